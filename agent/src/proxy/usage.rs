//! What pods and peers use of their limits now.
//!
//! Counting is a few atomics: nothing here is locked while bytes move.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::ready;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio_util::sync::PollSemaphore;

use super::limits::Limits;

/// What one pod uses.
#[derive(Debug)]
pub struct Usage {
    kept: Arc<KeptBytes>,
    of_node: Arc<KeptBytes>,
    dials: Semaphore,
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
    turns: Arc<Semaphore>,
    peers: Arc<Shares>,
    most_per_peer: usize,
}

/// A place for an unfinished handshake with somebody.
#[derive(Debug)]
pub(super) struct PeerPlace {
    _share: Share,
    _all: OwnedSemaphorePermit,
}

/// What each peer has of something that all share.
#[derive(Debug, Default)]
pub(super) struct Shares(Mutex<HashMap<IpAddr, usize>>);

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
            dials: Semaphore::new(limits.dials_per_pod),
        })
    }

    /// Of a pod that must keep little.
    #[cfg(test)]
    pub(super) fn tight() -> Arc<Self> {
        let usage = Self::new(&Limits::default(), &KeptBytes::new(0));
        usage.of_node.change(0, 1);
        usage
    }

    /// Bytes that are kept now.
    pub fn kept_bytes(&self) -> usize {
        self.kept.now()
    }

    /// Whether flows should read in small steps: a flow is never ended for what it keeps, so from
    /// here on each may add only the least it can.
    pub(super) fn is_tight(&self) -> bool {
        self.kept.is_tight() || self.of_node.is_tight()
    }

    /// Waits for the pod's turn to make a tunnel; none if that takes too long.
    pub(super) async fn dial(&self) -> Option<SemaphorePermit<'_>> {
        let turn = tokio::time::timeout(DIAL_PATIENCE, self.dials.acquire());
        // It is never closed.
        turn.await.ok()?.ok()
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
        if after < before {
            self.now.fetch_sub(before - after, Ordering::Relaxed);
        } else {
            self.now.fetch_add(after - before, Ordering::Relaxed);
        }
    }
}

impl Kept {
    pub(super) fn new(usage: Option<&Arc<Usage>>) -> Self {
        Self {
            usage: usage.cloned(),
            bytes: 0,
        }
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
            turns: Arc::new(Semaphore::new(limits.handshake_turns)),
            peers: Arc::default(),
            most_per_peer: limits.handshakes_per_peer,
        })
    }

    /// A place for a handshake with a peer; none if it or the node has too many.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr, is_workload: bool) -> Option<PeerPlace> {
        let all = Arc::clone(&self.all).try_acquire_owned().ok()?;
        let most = if is_workload {
            self.most_per_peer
        } else {
            self.most_per_peer.div_ceil(10)
        };
        Some(PeerPlace {
            _share: self.peers.enter(peer, most)?,
            _all: all,
        })
    }

    /// Runs a handshake so that it computes only when it is its turn. Certificates and keys take
    /// about a millisecond of a thread's time; many of them at once would hold up every flow.
    pub(super) async fn in_turn<F: Future>(&self, handshake: F) -> F::Output {
        let mut handshake = pin!(handshake);
        let mut turns = PollSemaphore::new(Arc::clone(&self.turns));
        std::future::poll_fn(|context| {
            // It is never closed. Waiting for the peer takes no turn.
            let _turn = ready!(turns.poll_acquire(context));
            handshake.as_mut().poll(context)
        })
        .await
    }
}

impl Shares {
    /// One more for a peer; none if it has as many as it may.
    pub(super) fn enter(self: &Arc<Self>, peer: IpAddr, most: usize) -> Option<Share> {
        let mut counts = self.counts();
        if counts.get(&peer).is_some_and(|count| *count >= most) {
            return None;
        }
        *counts.entry(peer).or_default() += 1;
        drop(counts);
        Some(Share {
            shares: Arc::clone(self),
            peer,
        })
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counts = self.shares.counts();
        if let Some(count) = counts.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.peer);
            }
        }
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
        let handshakes = Handshakes::new(&limits());
        // Never ends, and must not keep the other from its turn.
        let silent = handshakes.in_turn(std::future::pending::<()>());
        let quick = handshakes.in_turn(async {
            tokio::task::yield_now().await;
            7
        });
        tokio::select! {
            biased;
            () = silent => unreachable!(),
            seven = quick => assert_eq!(seven, 7),
        }
    }

    #[tokio::test]
    async fn tunnels_are_made_one_after_the_other() {
        let usage = Usage::new(&limits(), &KeptBytes::new(100));
        let first = usage.dial().await;
        assert!(first.is_some());
        let mut second = pin!(usage.dial());
        assert!(futures::poll!(second.as_mut()).is_pending());
        drop(first);
        assert!(second.await.is_some());
    }
}
