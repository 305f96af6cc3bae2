//! Asking the controller for addresses that should be known and are not.
//!
//! A connect to a pod newer than the store must wait for the pod's record, for a moment only, and
//! must never go out in the clear. Connects that wait for the same address share one question; a
//! "nobody has it" is remembered for a moment, so that a pod that scans a range does not make the
//! agent ask for every packet. Each pod has a share of the questions: one that scans makes its own
//! destinations unknown, not those of others.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};
use weft_core::{Counts, WorkloadId};

use super::state::StreamState;
use super::store::{Destination, Store, is_reachable};

/// The data path's handle of the control stream. Cheap to clone.
#[derive(Clone)]
pub struct Discovery {
    store: Arc<Store>,
    asks: Arc<Asks>,
    state: watch::Receiver<StreamState>,
}

/// What was asked and not forgotten yet.
pub(super) struct Asks {
    table: Mutex<Table>,
    wants: mpsc::Sender<IpAddr>,
}

#[derive(Default)]
struct Table {
    asks: HashMap<IpAddr, Ask>,
    /// How many of them each pod has.
    shares: Counts<WorkloadId>,
}

struct Ask {
    /// The pod that asked first.
    by: WorkloadId,
    state: AskState,
}

enum AskState {
    /// Waiting for the controller. Dropping the sender wakes those who wait.
    Outstanding(watch::Sender<()>),
    /// Nobody had the address, or nobody answered.
    Absent { until: Instant },
}

impl Discovery {
    pub(super) fn new(
        store: Arc<Store>,
        asks: Arc<Asks>,
        state: watch::Receiver<StreamState>,
    ) -> Self {
        Self { store, asks, state }
    }

    /// Asks for an address, for a pod, and waits, at most a second. Returns whether it can be
    /// classified now.
    pub async fn ask(&self, pod: &WorkloadId, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if !is_reachable(address) {
            return false;
        }
        if self.is_known(address) {
            return true;
        }
        let deadline = Instant::now() + WAIT;
        if !self.store.is_complete() {
            let mut state = self.state.clone();
            let complete = state.wait_for(|state| state.complete);
            let _ = timeout_at(deadline, complete).await;
            if self.is_known(address) {
                return true;
            }
        }
        let Some(mut answer) = self.asks.begin(pod, address) else {
            return false;
        };
        // The sender is dropped when the controller has looked.
        let answered = timeout_at(deadline, answer.changed()).await.is_ok();
        if !answered {
            self.asks.give_up(address);
        }
        self.is_known(address)
    }

    /// How the control stream is doing.
    pub fn state(&self) -> StreamState {
        self.state.borrow().clone()
    }

    /// Tells of changes of [`Discovery::state`].
    pub fn state_changes(&self) -> watch::Receiver<StreamState> {
        self.state.clone()
    }

    fn is_known(&self, address: IpAddr) -> bool {
        let destination = self.store.classify(SocketAddr::new(address, 0));
        !matches!(destination, Destination::Unknown)
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        let mut shown = formatter.debug_struct("Discovery");
        shown.field("state", &state).finish_non_exhaustive()
    }
}

impl Asks {
    /// The second value yields the addresses to ask the controller for.
    pub(super) fn new() -> (Arc<Self>, mpsc::Receiver<IpAddr>) {
        // While the controller is away nobody takes any out.
        let (wants, receiver) = mpsc::channel(MAX_ASKS);
        let table = Mutex::default();
        (Arc::new(Self { table, wants }), receiver)
    }

    /// Addresses that wait for an answer: asked for again on a new stream.
    pub(super) fn outstanding(&self) -> Vec<IpAddr> {
        let table = self.table();
        let outstanding = table.asks.iter().filter(|(_, ask)| ask.is_outstanding());
        outstanding.map(|(address, _)| *address).collect()
    }

    /// Whether somebody still waits for an answer.
    pub(super) fn is_outstanding(&self, address: IpAddr) -> bool {
        self.table()
            .asks
            .get(&address)
            .is_some_and(Ask::is_outstanding)
    }

    /// The controller has looked; what it found is in the store.
    pub(super) fn looked(&self, address: IpAddr, found: bool) {
        let mut table = self.table();
        if found {
            table.remove(address);
        } else if let Some(ask) = table.asks.get_mut(&address) {
            ask.state = AskState::absent();
        }
    }

    /// Joins a question or asks it. `None`: known to be absent, or too many questions are open.
    fn begin(&self, pod: &WorkloadId, address: IpAddr) -> Option<watch::Receiver<()>> {
        let now = Instant::now();
        let mut table = self.table();
        match table.asks.get(&address).map(|it| &it.state) {
            Some(AskState::Outstanding(done)) => return Some(done.subscribe()),
            Some(AskState::Absent { until }) if *until > now => return None,
            Some(_) => table.remove(address),
            None => {}
        }
        if table.is_full(pod) {
            table.tidy(now);
            if table.is_full(pod) {
                return None;
            }
        }
        // Fails when the controller is away for long, or the stream's task is gone: nobody answers.
        self.wants.try_send(address).ok()?;
        let (done, answer) = watch::channel(());
        let ask = Ask {
            by: pod.clone(),
            state: AskState::Outstanding(done),
        };
        table.asks.insert(address, ask);
        table.shares.add(pod.clone());
        Some(answer)
    }

    fn give_up(&self, address: IpAddr) {
        let mut table = self.table();
        if let Some(ask) = table.asks.get_mut(&address)
            && ask.is_outstanding()
        {
            ask.state = AskState::absent();
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn is_full(&self, pod: &WorkloadId) -> bool {
        self.shares.of(pod) >= MAX_ASKS_OF_A_POD || self.asks.len() >= MAX_ASKS
    }

    fn remove(&mut self, address: IpAddr) {
        if let Some(ask) = self.asks.remove(&address) {
            self.shares.remove(&ask.by);
        }
    }

    /// Forgets what is not remembered any more.
    fn tidy(&mut self, now: Instant) {
        let stale = self.asks.iter().filter(|(_, ask)| !ask.is_fresh(now));
        let stale: Vec<_> = stale.map(|(address, _)| *address).collect();
        for address in stale {
            self.remove(address);
        }
    }
}

impl AskState {
    fn absent() -> Self {
        Self::Absent {
            until: Instant::now() + REMEMBER_ABSENT,
        }
    }
}

impl Ask {
    fn is_outstanding(&self) -> bool {
        matches!(self.state, AskState::Outstanding(_))
    }

    fn is_fresh(&self, now: Instant) -> bool {
        match self.state {
            AskState::Outstanding(_) => true,
            AskState::Absent { until } => until > now,
        }
    }
}

/// How long a connect waits for the record of its destination.
const WAIT: Duration = Duration::from_secs(1);
/// How long "nobody has it" is believed. Short: the pod may be about to start.
const REMEMBER_ABSENT: Duration = Duration::from_secs(1);
/// Addresses that are asked for or remembered as absent at a time, as many as the controller keeps
/// of an agent,
const MAX_ASKS: usize = 4096;
/// and for one pod of them.
const MAX_ASKS_OF_A_POD: usize = 128;

#[cfg(test)]
mod tests {
    use super::super::testing::{cluster, workload};
    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 9));

    struct World {
        store: Arc<Store>,
        asks: Arc<Asks>,
        wants: mpsc::Receiver<IpAddr>,
        discovery: Discovery,
        state: watch::Sender<StreamState>,
    }

    fn pod(number: u32) -> WorkloadId {
        format!("shop/pod-{number}").parse().expect("valid")
    }

    /// Addresses of the pod range, other ones for each round.
    fn addresses(round: u32, count: usize) -> impl Iterator<Item = IpAddr> {
        let first = 0x0a01_0000 + (round + 1) * 4096;
        (first..)
            .take(count)
            .map(|it| IpAddr::from(it.to_be_bytes()))
    }

    fn world() -> World {
        let store = Store::new();
        store.apply(vec![cluster()], vec![]);
        store.set_complete();
        let (asks, wants) = Asks::new();
        let (state, receiver) = watch::channel(StreamState::default());
        let discovery = Discovery::new(Arc::clone(&store), Arc::clone(&asks), receiver);
        World {
            store,
            asks,
            wants,
            discovery,
            state,
        }
    }

    #[tokio::test]
    async fn connects_to_one_address_share_a_question() {
        let mut world = world();
        let asks: Vec<_> = (0..10)
            .map(|_| {
                let discovery = world.discovery.clone();
                tokio::spawn(async move { discovery.ask(&pod(0), ADDRESS).await })
            })
            .collect();
        assert_eq!(world.wants.recv().await, Some(ADDRESS));
        let found = workload("shop/new", &["10.1.0.9"]);
        world.store.apply(vec![found], vec![]);
        world.asks.looked(ADDRESS, true);
        for ask in asks {
            assert!(ask.await.expect("no panic"));
        }
        assert!(world.wants.try_recv().is_err());
        assert!(world.asks.outstanding().is_empty());
    }

    #[tokio::test]
    async fn absence_is_remembered_for_a_moment() {
        let mut world = world();
        let discovery = world.discovery.clone();
        let ask = tokio::spawn(async move { discovery.ask(&pod(0), ADDRESS).await });
        assert_eq!(world.wants.recv().await, Some(ADDRESS));
        world.asks.looked(ADDRESS, false);
        assert!(!ask.await.expect("no panic"));
        assert!(!world.discovery.ask(&pod(0), ADDRESS).await);
        assert!(world.wants.try_recv().is_err());
        tokio::time::sleep(REMEMBER_ABSENT).await;
        assert!(!world.discovery.ask(&pod(0), ADDRESS).await);
        assert_eq!(world.wants.try_recv(), Ok(ADDRESS));
    }

    #[tokio::test]
    async fn nobody_answers() {
        let world = world();
        let began = Instant::now();
        assert!(!world.discovery.ask(&pod(0), ADDRESS).await);
        assert!(began.elapsed() >= WAIT && began.elapsed() < 2 * WAIT);
        assert!(world.asks.outstanding().is_empty());
    }

    #[tokio::test]
    async fn a_pod_that_scans_harms_no_other() {
        let world = world();
        let asked: Vec<_> = addresses(0, MAX_ASKS_OF_A_POD).collect();
        let answers: Vec<_> = asked
            .iter()
            .map(|it| world.asks.begin(&pod(0), *it))
            .collect();
        assert!(answers.iter().all(Option::is_some));
        assert!(world.asks.begin(&pod(0), ADDRESS).is_none());
        assert!(world.asks.begin(&pod(1), ADDRESS).is_some());
        // Joining others costs nothing.
        assert!(world.asks.begin(&pod(0), ADDRESS).is_some());
        world.asks.looked(asked[0], false);
        let other = addresses(1, 1).next().expect("one");
        assert!(world.asks.begin(&pod(0), other).is_none());
        tokio::time::sleep(REMEMBER_ABSENT).await;
        assert!(world.asks.begin(&pod(0), other).is_some());
        for address in world.asks.outstanding() {
            world.asks.looked(address, true);
        }
        let table = world.asks.table();
        assert!(table.asks.is_empty() && table.shares.is_empty());
    }

    #[tokio::test]
    async fn questions_are_bounded_while_the_controller_is_away() {
        let mut world = world();
        for round in 0..3 {
            for (index, address) in addresses(round, 2 * MAX_ASKS).enumerate() {
                let asked = world.asks.begin(&pod(index as u32 % 64), address);
                drop(asked);
                world.asks.give_up(address);
            }
            tokio::time::sleep(REMEMBER_ABSENT).await;
        }
        let mut queued = 0;
        while let Ok(address) = world.wants.try_recv() {
            assert!(!world.asks.is_outstanding(address), "nobody waits any more");
            queued += 1;
        }
        assert_eq!(queued, MAX_ASKS);
        assert!(world.asks.begin(&pod(0), ADDRESS).is_some());
    }

    #[tokio::test]
    async fn a_fresh_agent_waits_for_everything_first() {
        let store = Store::new();
        let (asks, _wants) = Asks::new();
        let mut world = world();
        let receiver = world.state.subscribe();
        world.discovery = Discovery::new(Arc::clone(&store), asks, receiver);
        let discovery = world.discovery.clone();
        let outside: IpAddr = "192.0.2.1".parse().expect("valid");
        let ask = tokio::spawn(async move { discovery.ask(&pod(0), outside).await });
        tokio::task::yield_now().await;
        store.apply(vec![cluster()], vec![]);
        store.set_complete();
        world.state.send_modify(|state| state.complete = true);
        assert!(ask.await.expect("no panic"));
    }

    #[tokio::test]
    async fn what_is_nobodys_is_not_asked_for() {
        let mut world = world();
        for address in [
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "::1",
            "::ffff:127.0.0.1",
        ] {
            assert!(
                !world
                    .discovery
                    .ask(&pod(0), address.parse().expect("valid"))
                    .await
            );
        }
        assert!(world.wants.try_recv().is_err());
    }
}
