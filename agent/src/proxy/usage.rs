//! What pods and peers use of their limits now.
//!
//! Counting is a few atomics: nothing here is locked while bytes move.

#[cfg(test)]
mod panic_tests;
mod party;

use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::ready;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;
use weft_core::Counts;

use super::excess::{self, Places};
use super::http::refusal::MOST_TOLD_PER_POD;
use super::limits::Limits;
pub(super) use party::{Charger, From, Hold, Party, Piece, Place, Window};

/// What one pod uses.
#[derive(Debug)]
pub struct Usage {
    kept: Arc<KeptBytes>,
    of_node: Arc<KeptBytes>,
    handshake_turns: Arc<Semaphore>,
    dials: Arc<Semaphore>,
    /// Of these to each address, so that one that does not answer holds up no others.
    dials_to: Mutex<HashMap<IpAddr, Weak<Semaphore>>>,
    most_dials_to_one: usize,
    /// Exchanges and flows that wait for an endpoint.
    pub(super) waiting: Arc<AtomicUsize>,
    /// Exchanges of HTTP that others have with the pod, and those that it began.
    inbound_exchanges: AtomicUsize,
    outbound_exchanges: AtomicUsize,
    /// Of each.
    most_exchanges: usize,
    /// What its connections of HTTP/2 may receive before somebody takes it.
    windows: AtomicUsize,
    /// Who was refused by the pod and is being told why.
    pub(super) told: Semaphore,
    /// Whose connections were too many for the pod, and are being told so.
    pub(super) excess: Places,
    /// Who has exchanges with the pod.
    sources: Mutex<HashMap<From, Weak<party::Source>>>,
}

/// A tunnel that may be made now.
#[derive(Debug)]
pub(super) struct Dial {
    _to_one: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

/// Bytes that are kept, and how many there should be.
#[derive(Debug)]
pub struct KeptBytes {
    now: AtomicUsize,
    budget: usize,
}

/// Bytes that a flow keeps because a receiver has no room; given back when dropped.
#[derive(Debug, Default)]
pub(super) struct Kept {
    usage: Option<Arc<Usage>>,
    bytes: usize,
}

/// Handshakes of the node.
#[derive(Debug)]
pub(super) struct Handshakes {
    all: Arc<Semaphore>,
    /// Those of them that are with addresses of no meshed workload.
    strangers: Arc<Semaphore>,
    peers: Arc<Shares>,
    most_per_peer: usize,
}

/// A place for an unfinished handshake with somebody.
#[derive(Debug)]
pub(super) struct PeerPlace {
    _share: Share,
    _strangers: Option<OwnedSemaphorePermit>,
    _all: OwnedSemaphorePermit,
}

/// What each peer has of something that all share.
#[derive(Debug, Default)]
pub(super) struct Shares(Mutex<Counts<IpAddr>>);

/// One of those that a peer has; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    shares: Arc<Shares>,
    peer: IpAddr,
}

impl Usage {
    /// Nothing, of a pod with these limits.
    pub fn new(limits: &Limits, of_node: &Arc<KeptBytes>) -> Arc<Self> {
        Arc::new(Self {
            kept: KeptBytes::new(limits.buffered_bytes_per_pod),
            of_node: Arc::clone(of_node),
            handshake_turns: Arc::new(Semaphore::new(limits.handshake_turns)),
            dials: Arc::new(Semaphore::new(limits.dials_per_pod)),
            dials_to: Mutex::default(),
            most_dials_to_one: limits.dials_per_pod.div_ceil(16),
            waiting: Arc::default(),
            told: Semaphore::new(MOST_TOLD_PER_POD),
            excess: Places::new(excess::MOST_TOLD_PER_POD),
            inbound_exchanges: AtomicUsize::new(0),
            outbound_exchanges: AtomicUsize::new(0),
            most_exchanges: limits.exchanges_per_pod,
            windows: AtomicUsize::new(0),
            sources: Mutex::default(),
        })
    }

    /// Runs a handshake so that it computes only when it is its turn. Certificates and keys take
    /// about a millisecond of a thread's time; many of them at once would hold up every flow of the pod.
    pub(super) async fn handshake_in_turn<F: Future>(&self, handshake: F) -> F::Output {
        let mut handshake = pin!(handshake);
        let mut turns = PollSemaphore::new(Arc::clone(&self.handshake_turns));
        std::future::poll_fn(|context| {
            // It is never closed. Waiting for the peer takes no turn.
            let _turn = ready!(turns.poll_acquire(context));
            handshake.as_mut().poll(context)
        })
        .await
    }

    /// Of a pod that must keep little: from the beginning, or once it keeps anything.
    #[cfg(test)]
    pub(super) fn tight(from_the_beginning: bool) -> Arc<Self> {
        let usage = Self::new(&Limits::default(), &KeptBytes::new(0));
        usage.of_node.change(0, from_the_beginning.into());
        usage
    }

    /// As it is after somebody panicked while holding a lock.
    #[cfg(test)]
    fn poison(self: &Arc<Self>) {
        let usage = Arc::clone(self);
        let panicked = std::thread::spawn(move || {
            let _locks = (usage.sources.lock(), usage.dials_to.lock());
            panic!("on purpose");
        });
        assert!(panicked.join().is_err() && self.sources.is_poisoned());
    }

    /// Bytes that are kept now.
    pub fn kept_bytes(&self) -> usize {
        self.kept.now()
    }

    /// Exchanges of HTTP that are open: those that others have with the pod, and those that it began.
    pub fn exchanges(&self) -> (usize, usize) {
        (
            self.inbound_exchanges.load(Ordering::Relaxed),
            self.outbound_exchanges.load(Ordering::Relaxed),
        )
    }

    /// Whether flows should read in small steps: a flow is never ended for what it keeps, so from
    /// here on each may add only the least it can.
    pub(super) fn is_tight(&self) -> bool {
        self.kept.is_tight() || self.of_node.is_tight()
    }

    /// Waits for the pod's turn to make a tunnel to an address; none if that takes too long.
    pub(super) async fn dial(&self, to: IpAddr) -> Option<Dial> {
        let to_one = self.dials_to(to);
        let turn = async {
            // First those to the same address among themselves. None of them is ever closed.
            Some(Dial {
                _to_one: to_one.acquire_owned().await.ok()?,
                _of_all: Arc::clone(&self.dials).acquire_owned().await.ok()?,
            })
        };
        tokio::time::timeout(DIAL_PATIENCE, turn).await.ok()?
    }

    fn dials_to(&self, to: IpAddr) -> Arc<Semaphore> {
        let mut all = self.dials_to.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = all.get(&to).and_then(Weak::upgrade) {
            return there;
        }
        // Whoever uses one holds it.
        all.retain(|_, it| it.strong_count() > 0);
        let new = Arc::new(Semaphore::new(self.most_dials_to_one));
        all.insert(to, Arc::downgrade(&new));
        new
    }
}

impl KeptBytes {
    /// None yet, of at most so many.
    pub fn new(budget: usize) -> Arc<Self> {
        Arc::new(Self {
            now: AtomicUsize::new(0),
            budget,
        })
    }

    fn now(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    fn is_tight(&self) -> bool {
        self.now() > self.budget / 2
    }

    fn change(&self, before: usize, after: usize) {
        change(&self.now, before, after);
    }
}

impl Kept {
    pub(super) fn new(usage: Option<&Arc<Usage>>) -> Self {
        Self {
            usage: usage.cloned(),
            bytes: 0,
        }
    }

    /// Whether so many are within the pod's and the node's budget, or are counted already.
    pub(super) fn may_be(&self, bytes: usize) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let fits = |it: &KeptBytes| it.now() + more <= it.budget;
        let Some(usage) = &self.usage else {
            return true;
        };
        more == 0 || (fits(&usage.kept) && fits(&usage.of_node))
    }

    /// Says how many bytes it is by now.
    pub(super) fn set(&mut self, bytes: usize) {
        let Some(usage) = &self.usage else { return };
        let before = std::mem::replace(&mut self.bytes, bytes);
        if bytes != before {
            usage.kept.change(before, bytes);
            usage.of_node.change(before, bytes);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.set(0);
    }
}

impl Handshakes {
    pub(super) fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            all: Arc::new(Semaphore::new(limits.handshakes)),
            strangers: Arc::new(Semaphore::new(limits.handshakes.div_ceil(4))),
            peers: Arc::default(),
            most_per_peer: limits.handshakes_per_peer,
        })
    }

    /// A place for a handshake with a peer; none if it or the node has too many.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr, is_workload: bool) -> Option<PeerPlace> {
        let all = Arc::clone(&self.all).try_acquire_owned().ok()?;
        let (share, strangers) = if is_workload {
            (self.peers.enter(peer, self.most_per_peer)?, None)
        } else {
            let place = Arc::clone(&self.strangers).try_acquire_owned().ok()?;
            let most = self.most_per_peer.div_ceil(10);
            (self.peers.enter(subnet(peer), most)?, Some(place))
        };
        Some(PeerPlace {
            _share: share,
            _strangers: strangers,
            _all: all,
        })
    }
}

impl Shares {
    /// One more for a peer; none if it has as many as it may.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr, most: usize) -> Option<Share> {
        let mut counts = self.counts();
        if counts.of(&peer) >= most {
            return None;
        }
        counts.add(peer);
        drop(counts);
        Some(Share {
            shares: Arc::clone(self),
            peer,
        })
    }

    fn counts(&self) -> MutexGuard<'_, Counts<IpAddr>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shares.counts().remove(&self.peer);
    }
}

/// What was so many is now as many.
fn change(counter: &AtomicUsize, before: usize, after: usize) {
    if after < before {
        counter.fetch_sub(before - after, Ordering::Relaxed);
    } else {
        counter.fetch_add(after - before, Ordering::Relaxed);
    }
}

/// What a stranger is counted by: anybody has as many IPv6 addresses of a subnet as there are.
fn subnet(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// How long a tunnel may wait for its pod's turn.
const DIAL_PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            buffered_bytes_per_pod: 100,
            handshakes_per_peer: 2,
            handshakes: 3,
            dials_per_pod: 1,
            handshake_turns: 1,
            ..Limits::default()
        }
    }

    #[test]
    fn a_pod_or_the_node_that_keeps_much_is_tight() {
        let node = KeptBytes::new(300);
        let [pod, neighbour] = [(), ()].map(|()| Usage::new(&limits(), &node));
        let mut one = Kept::new(Some(&pod));
        let mut other = Kept::new(Some(&pod));
        one.set(50);
        assert!(!pod.is_tight());
        other.set(51);
        assert!(pod.is_tight() && !neighbour.is_tight());
        other.set(101);
        assert_eq!(pod.kept_bytes(), 151, "nothing is refused");
        assert!(
            neighbour.is_tight(),
            "the node has more than half of its own"
        );
        drop(other);
        assert_eq!((pod.kept_bytes(), node.now()), (50, 50));
        assert!(!pod.is_tight() && !neighbour.is_tight());
        drop(one);
        assert_eq!((pod.kept_bytes(), node.now()), (0, 0));
        Kept::new(None).set(1000);
    }

    #[test]
    fn peers_and_the_node_have_so_many_handshakes() {
        let handshakes = Handshakes::new(&limits());
        let [one, other]: [IpAddr; 2] =
            ["10.0.0.1", "10.0.0.2"].map(|it| it.parse().expect("valid"));
        let places = [handshakes.enter(one, true), handshakes.enter(one, true)];
        assert!(places.iter().all(Option::is_some));
        assert!(handshakes.enter(one, true).is_none(), "one peer has two");
        let last = handshakes.enter(other, true);
        assert!(last.is_some());
        assert!(
            handshakes.enter(other, true).is_none(),
            "the node has three"
        );
        drop(places);
        let stranger = handshakes.enter(one, false);
        assert!(stranger.is_some() && handshakes.enter(one, false).is_none());
        drop(stranger);
        assert!(handshakes.enter(other, true).is_some());
        drop(last);
        assert!(handshakes.peers.counts().is_empty(), "nothing is left");
    }

    #[tokio::test]
    async fn a_turn_is_held_while_computing_only() {
        let usage = Usage::new(&limits(), &KeptBytes::new(0));
        // Never ends, and must not keep the other from its turn.
        let silent = usage.handshake_in_turn(std::future::pending::<()>());
        let quick = usage.handshake_in_turn(async {
            tokio::task::yield_now().await;
            7
        });
        tokio::select! {
            biased;
            () = silent => unreachable!(),
            seven = quick => assert_eq!(seven, 7),
        }
    }

    #[test]
    fn strangers_leave_handshakes_to_workloads() {
        let handshakes = Handshakes::new(&Limits {
            handshakes: 8,
            handshakes_per_peer: 10,
            ..limits()
        });
        let addresses = ["10.0.0.1", "2001:db8::1", "2001:db8::2", "10.0.0.2"];
        let addresses = addresses.map(|it| it.parse().expect("valid"));
        let one = handshakes.enter(addresses[1], false);
        assert!(one.is_some());
        let same = handshakes.enter(addresses[2], false);
        assert!(same.is_none(), "of the same subnet");
        let other = handshakes.enter(addresses[0], false);
        assert!(other.is_some());
        let third = handshakes.enter(addresses[3], false);
        assert!(third.is_none(), "a quarter of all is two");
        let workloads = addresses.map(|it| handshakes.enter(it, true));
        assert!(workloads.iter().all(Option::is_some));
    }

    #[tokio::test]
    async fn tunnels_are_made_one_after_the_other() {
        let limits = Limits {
            dials_per_pod: 32,
            ..limits()
        };
        let usage = Usage::new(&limits, &KeptBytes::new(100));
        let addresses: Vec<IpAddr> = (1..=17).map(|it| [10, 0, 0, it].into()).collect();
        let mut to_one = Vec::new();
        for _ in 0..2 {
            to_one.push(usage.dial(addresses[0]).await.expect("its turn"));
        }
        {
            let mut third = pin!(usage.dial(addresses[0]));
            let third = futures::poll!(third.as_mut());
            assert!(third.is_pending(), "one address has a sixteenth");
        }
        let mut others = Vec::new();
        for address in &addresses[1..16] {
            for _ in 0..2 {
                others.push(usage.dial(*address).await.expect("its turn"));
            }
        }
        let mut waits = pin!(usage.dial(addresses[16]));
        assert!(futures::poll!(waits.as_mut()).is_pending(), "all are used");
        drop(to_one);
        assert!(waits.await.is_some());
        drop(others);
        usage.dials_to(addresses[0]);
        assert_eq!(usage.dials_to.lock().expect("no panic").len(), 1);
    }
}
