//! The connections that flows leave by, kept per pair of workloads: a flow takes one for itself, and
//! puts it back if it ends well.
//!
//! Nothing is locked while a connection is being made or while bytes move. Whoever finds none that is
//! free waits for one: for the next that is put back, or for one that a task of its own makes. A pair
//! has a bounded number of connections; beyond it, flows go by HTTP/2.

mod ask;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use weft_core::WorkloadId;

use super::channel::Channel;
use crate::proxy::descriptors;
use crate::proxy::error::TunnelError;
use crate::proxy::tunnel::Watch;
use crate::proxy::tunnel::client::Key;

pub use ask::{Answer, MOST_EARLY_BYTES};

/// All connections of the node that lead elsewhere.
#[derive(Debug)]
pub struct Pool {
    pairs: Mutex<HashMap<Key, Pair>>,
    limits: Limits,
    idle_came: Arc<Notify>,
}

/// Limits of what is kept.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections of a pair, in use or not.
    pub connections: usize,
    /// Connections of a pair that are being made at a time.
    pub making: usize,
    /// Closed when unused for so long.
    pub idle: Duration,
    /// Connections that one source may leave unused; the longest unused are closed.
    pub idle_of_source: usize,
    /// The same of all sources.
    pub idle_of_all: usize,
    /// Takes no new flows when so old.
    pub age: Duration,
}

/// What came of connecting to a peer whose identity has been checked.
pub enum Dialed {
    /// It speaks `weft/1`.
    Channel {
        /// The connection.
        channel: Box<Channel>,
        /// What ends it from outside.
        watch: Watch,
        /// [`Watch::generation`] before the handshake.
        generation: u64,
    },
    /// It does not.
    Otherwise,
}

/// How a flow may go.
#[derive(Debug)]
pub enum Taken {
    /// On this connection, alone.
    Lent(Box<Lent>),
    /// By HTTP/2: the pair has enough connections, or the peer speaks nothing else.
    Http,
}

/// A connection, in use by one flow. It is closed when dropped, unless it is given back.
pub struct Lent {
    kept: Kept,
    pool: Arc<Pool>,
    reused: bool,
    leaving: bool,
}

#[derive(Debug, Default)]
struct Pair {
    idle: Vec<Kept>,
    /// Connections that are there, in use or not.
    open: Arc<AtomicUsize>,
    making: usize,
    waiting: VecDeque<oneshot::Sender<Given>>,
    /// The peer has spoken something else; not asked again before this.
    otherwise_until: Option<Instant>,
}

struct Kept {
    channel: Box<Channel>,
    watch: Watch,
    key: Arc<Key>,
    /// Of the trust roots and certificates that it was made with.
    generation: u64,
    born: Instant,
    idle_since: Instant,
    place: Place,
    lane: Option<usize>,
}

/// One of a pair's connections.
struct Place(Arc<AtomicUsize>);

#[derive(Debug)]
enum Given {
    Kept(Box<Kept>),
    Http,
    Failed(Arc<TunnelError>),
}

impl Pool {
    /// An empty pool. Needs a runtime.
    pub fn new(limits: Limits) -> Arc<Self> {
        let pool = Arc::new(Self {
            pairs: Mutex::default(),
            limits,
            idle_came: Arc::default(),
        });
        tokio::spawn(sweep(Arc::downgrade(&pool), Arc::clone(&pool.idle_came)));
        pool
    }

    /// A connection of the pair, which `dial` makes if none is free. The caller bounds the time.
    ///
    /// # Errors
    /// None could be made.
    pub async fn take<D, F>(self: &Arc<Self>, key: &Key, dial: D) -> Result<Taken, Arc<TunnelError>>
    where
        D: Fn() -> F + Send + 'static,
        F: Future<Output = Result<Dialed, TunnelError>> + Send + 'static,
    {
        let mut unusable = Vec::new();
        let given = {
            let mut pairs = self.pairs();
            let pair = match pairs.get_mut(key) {
                Some(pair) => pair,
                None => pairs.entry(key.clone()).or_default(),
            };
            loop {
                let here = crate::lanes::here();
                let near = pair.idle.iter().rposition(|it| it.lane == here);
                let at = near.or(pair.idle.len().checked_sub(1));
                match at.map(|at| pair.idle.remove(at)) {
                    Some(kept) if kept.is_usable(&self.limits) => break Ok(kept),
                    Some(kept) => unusable.push(kept),
                    None => break self.wait_in_line(key, pair, dial),
                }
            }
        };
        // Not while the pool is locked: closing is a system call.
        drop(unusable);
        let waiting = match given {
            Ok(kept) => return Ok(self.lend(kept.moved_here(), true)),
            Err(None) => return Ok(Taken::Http),
            Err(Some(waiting)) => waiting,
        };
        match waiting.await {
            Ok(Given::Kept(kept)) => {
                let reused = kept.idle_since != kept.born;
                Ok(self.lend(kept.moved_here(), reused))
            }
            Ok(Given::Http) => Ok(Taken::Http),
            Ok(Given::Failed(error)) => Err(error),
            // The task that made one has panicked.
            Err(_) => Err(Arc::new(TunnelError::Closed)),
        }
    }

    /// How many connections are there.
    pub fn connections(&self) -> usize {
        let pairs = self.pairs();
        let open = pairs.values().map(|it| it.open.load(Ordering::Relaxed));
        open.sum()
    }

    fn lend(self: &Arc<Self>, kept: Kept, reused: bool) -> Taken {
        Taken::Lent(Box::new(Lent {
            kept,
            pool: Arc::clone(self),
            reused,
            leaving: false,
        }))
    }

    /// None: the flow must go another way.
    fn wait_in_line<D, F>(
        self: &Arc<Self>,
        key: &Key,
        pair: &mut Pair,
        dial: D,
    ) -> Result<Kept, Option<oneshot::Receiver<Given>>>
    where
        D: Fn() -> F + Send + 'static,
        F: Future<Output = Result<Dialed, TunnelError>> + Send + 'static,
    {
        if pair.otherwise_until.is_some_and(|it| it > Instant::now()) {
            return Err(None);
        }
        pair.waiting.retain(|it| !it.is_closed());
        let open = pair.open.load(Ordering::Relaxed);
        if open + pair.waiting.len() >= self.limits.connections {
            return Err(None);
        }
        let (sender, receiver) = oneshot::channel();
        pair.waiting.push_back(sender);
        if pair.making < self.limits.making && pair.making < pair.waiting.len() {
            pair.making += 1;
            // A task of its own: it goes on if the flow that started it gives up.
            tokio::spawn(make(Arc::downgrade(self), Arc::new(key.clone()), dial));
        }
        Err(Some(receiver))
    }

    /// Passes a connection to whoever waits longest, or keeps it.
    fn put(&self, kept: Kept) {
        let mut pairs = self.pairs();
        let Some(pair) = pairs.get_mut(&*kept.key) else {
            return;
        };
        let mut kept = Box::new(kept);
        while let Some(waiting) = pair.waiting.pop_front() {
            match waiting.send(Given::Kept(kept)) {
                Ok(()) => return,
                Err(Given::Kept(back)) => kept = back,
                Err(_) => return,
            }
        }
        let first = pair.idle.is_empty();
        pair.idle.push(*kept);
        if first {
            self.idle_came.notify_one();
        }
    }

    /// Settles an attempt. Says whether another must be made, for those who still wait.
    fn made(&self, key: &Arc<Key>, result: Result<Dialed, TunnelError>) -> bool {
        let mut pairs = self.pairs();
        let pair = pairs.entry((**key).clone()).or_default();
        let give_all = |pair: &mut Pair, given: &dyn Fn() -> Given| {
            for waiting in pair.waiting.drain(..) {
                let _ = waiting.send(given());
            }
        };
        match result {
            Ok(Dialed::Channel {
                channel,
                watch,
                generation,
            }) => {
                let now = Instant::now();
                let kept = Kept {
                    channel,
                    watch,
                    generation,
                    key: Arc::clone(key),
                    born: now,
                    idle_since: now,
                    lane: crate::lanes::here(),
                    place: Place::new(&pair.open),
                };
                drop(pairs);
                self.put(kept);
                pairs = self.pairs();
            }
            Ok(Dialed::Otherwise) => {
                pair.otherwise_until = Some(Instant::now() + ASK_AGAIN);
                give_all(pair, &|| Given::Http);
            }
            Err(error) => {
                // So many of those who wait as this attempt was for: one that fails says little
                // of the others that are being made.
                let error = Arc::new(error);
                pair.waiting.retain(|it| !it.is_closed());
                let its_own = pair.waiting.len().div_ceil(pair.making.max(1));
                for waiting in pair.waiting.drain(..its_own) {
                    let _ = waiting.send(Given::Failed(Arc::clone(&error)));
                }
            }
        }
        let Some(pair) = pairs.get_mut(&**key) else {
            return false;
        };
        pair.waiting.retain(|it| !it.is_closed());
        let again = pair.waiting.len() >= pair.making && !pair.waiting.is_empty();
        if !again {
            pair.making = pair.making.saturating_sub(1);
        }
        again
    }

    /// Takes out what must not be kept, and pairs that are forgotten. Says whether anything is left to
    /// look after.
    fn sweep(&self) -> bool {
        let mut unusable = Vec::new();
        let mut idle = false;
        let mut pairs = self.pairs();
        pairs.retain(|_, pair| {
            let is_good = |kept: &mut Kept| {
                kept.is_usable(&self.limits) && kept.idle_since.elapsed() < self.limits.idle
            };
            unusable.extend(pair.idle.extract_if(.., |kept| !is_good(kept)));
            idle |= !pair.idle.is_empty();
            let remembered = pair.otherwise_until.is_some_and(|it| it > Instant::now());
            let used = pair.making > 0 || pair.open.load(Ordering::Relaxed) > 0;
            used || remembered || !pair.waiting.is_empty()
        });
        self.thin_out(&mut pairs, descriptors::were_few_left(), &mut unusable);
        drop(pairs);
        for kept in unusable {
            kept.channel.close();
        }
        idle
    }

    /// Takes out the longest unused of a source that has too many of them, and of all if those are too
    /// many; half of all where descriptors are needed for something else.
    fn thin_out(&self, pairs: &mut HashMap<Key, Pair>, few_left: bool, out: &mut Vec<Kept>) {
        let mut of_all = Vec::new();
        let mut of_sources: HashMap<&WorkloadId, Vec<Instant>> = HashMap::new();
        for (key, pair) in pairs.iter() {
            let times = pair.idle.iter().map(|it| it.idle_since);
            of_all.extend(times.clone());
            of_sources.entry(&key.source).or_default().extend(times);
        }
        let most = match few_left {
            true => self.limits.idle_of_all.min(of_all.len() / 2),
            false => self.limits.idle_of_all,
        };
        let earliest = nth_latest(&mut of_all, most);
        let limits = of_sources.into_iter().filter_map(|(source, mut times)| {
            let time = nth_latest(&mut times, self.limits.idle_of_source)?;
            Some((source.clone(), time))
        });
        let limits: HashMap<WorkloadId, Instant> = limits.collect();
        if earliest.is_none() && limits.is_empty() {
            return;
        }
        for (key, pair) in pairs.iter_mut() {
            let of_source = limits.get(&key.source).copied();
            let Some(until) = earliest.max(of_source) else {
                continue;
            };
            out.extend(pair.idle.extract_if(.., |it| it.idle_since <= until));
        }
    }

    fn pairs(&self) -> MutexGuard<'_, HashMap<Key, Pair>> {
        // Every change under the lock is complete in itself.
        self.pairs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// If there are more than `most`, the latest of those that are too many.
fn nth_latest(times: &mut [Instant], most: usize) -> Option<Instant> {
    let surplus = times.len().checked_sub(most)?.checked_sub(1)?;
    let (_, last, _) = times.select_nth_unstable(surplus);
    Some(*last)
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.idle_came.notify_one();
    }
}

/// Makes connections until nobody waits for one that is not being made by somebody else.
async fn make<D, F>(pool: Weak<Pool>, key: Arc<Key>, dial: D)
where
    D: Fn() -> F + Send + 'static,
    F: Future<Output = Result<Dialed, TunnelError>> + Send + 'static,
{
    loop {
        let mut note = Note {
            pool: &pool,
            key: &key,
            result: None,
        };
        let again = {
            note.result = Some(dial().await);
            note.settle()
        };
        if !again {
            return;
        }
    }
}

/// Settles an attempt however it ends, a panic included.
struct Note<'a> {
    pool: &'a Weak<Pool>,
    key: &'a Arc<Key>,
    result: Option<Result<Dialed, TunnelError>>,
}

impl Note<'_> {
    fn settle(mut self) -> bool {
        match (self.pool.upgrade(), self.result.take()) {
            (Some(pool), Some(result)) => {
                let again = pool.made(self.key, result);
                std::mem::forget(self);
                again
            }
            _ => false,
        }
    }
}

impl Drop for Note<'_> {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            let result = self.result.take().unwrap_or(Err(TunnelError::Closed));
            pool.made(self.key, result);
        }
    }
}

/// Looks after the connections that wait: closes what is old, unused, no longer trusted, or was closed
/// at the other end.
async fn sweep(pool: Weak<Pool>, idle_came: Arc<Notify>) {
    loop {
        let idle = match pool.upgrade() {
            Some(pool) => pool.sweep(),
            None => return,
        };
        if !idle {
            idle_came.notified().await;
        }
        tokio::time::sleep(SWEEP_INTERVAL).await;
    }
}

impl Lent {
    /// Whether the connection had been used before: the peer may have gone away meanwhile.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// Parts the connection from what is needed to give it back.
    pub fn part(self) -> (Box<Channel>, Watch, GiveBack) {
        let Self {
            kept,
            pool,
            leaving,
            ..
        } = self;
        let Kept {
            channel,
            watch,
            key,
            generation,
            born,
            place,
            ..
        } = kept;
        let give_back = GiveBack {
            pool,
            key,
            generation,
            born,
            leaving,
            place,
        };
        (channel, watch, give_back)
    }
}

/// Takes a connection back when its flow has ended well.
pub struct GiveBack {
    pool: Arc<Pool>,
    key: Arc<Key>,
    generation: u64,
    born: Instant,
    leaving: bool,
    place: Place,
}

impl GiveBack {
    /// For the next flow, if it may have one.
    pub fn give(self, channel: Box<Channel>, watch: Watch) {
        let kept = Kept {
            channel,
            watch,
            key: self.key,
            generation: self.generation,
            born: self.born,
            idle_since: Instant::now(),
            lane: crate::lanes::here(),
            place: self.place,
        };
        if !self.leaving && kept.channel.is_clean() && kept.is_usable(&self.pool.limits) {
            self.pool.put(kept);
        } else {
            kept.channel.close();
        }
    }
}

impl Kept {
    fn moved_here(mut self) -> Self {
        if self.lane != crate::lanes::here() {
            self.channel = self.channel.moved_here();
        }
        self
    }

    fn is_usable(&self, limits: &Limits) -> bool {
        // Whatever the peer says to a connection that waits, it means that it is over.
        self.born.elapsed() < limits.age
            && self.watch.generation() == self.generation
            && !self.watch.is_expired()
            && !self.watch.pod_gone.is_cancelled()
            && !self.channel.stirs()
    }
}

impl Place {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Lent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kept.fmt(formatter)
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Kept")
            .field("channel", &self.channel)
            .field("born", &self.born)
            .finish_non_exhaustive()
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            making: 16,
            idle: Duration::from_secs(90),
            idle_of_source: (descriptors::limit() / 20).max(64),
            idle_of_all: (descriptors::limit() / 8).max(64),
            age: Duration::from_secs(3600),
        }
    }
}

/// A connection that was closed at the other end is never used; this is how long it may still be held.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);
/// When a peer that did not speak `weft/1` is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(300);
