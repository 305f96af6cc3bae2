//! Who is next: flows of a pod run in turn with those of other pods, however many they are.
//!
//! The runtime runs its tasks one after the other, so a pod with a thousand busy flows has a thousand
//! places in its queue, and a neighbour with one waits for all of them. Here a pod has as many as fit
//! into `QUANTUM`: when its flows have used that much of a thread's time, further ones wait in the
//! pod's own line. One task, the pump, goes through the runtime's queue for them, and lets the next
//! few in each time it comes to the front. Nobody waits while there is nobody else: neither a flow that is
//! the only busy one of its pod, nor any while no other pod has done anything for some time.
//!
//! That is about the agent's own threads. Where the CPUs are short, a neighbour waits for the kernel instead,
//! behind everything that a flood keeps busy: the agent, and the applications on both sides of it. So as long
//! as threads wait for CPUs (`pressure`), and there are pods that use little, the pump comes back later: no
//! pod's flows may then use more of the CPUs than `CpuShare` says, whatever the flood.
//!
//! The pump also makes sure that sockets are looked at once per turn: the runtime does so by itself
//! only every so many tasks, and those of a bulk transfer are long.

mod pressure;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use self::pressure::PRESSURE;

/// The turns of one pod's flows.
#[derive(Debug)]
pub struct Turns {
    /// Time used since the pump came last.
    used_ns: AtomicU64,
    /// How long one flow takes, lately.
    usual_ns: AtomicU64,
    /// Whose tickets are below this may go on.
    released: AtomicU64,
    /// The flow that ran last, and how often another one had its turn since the pump came last.
    last_flow: AtomicU64,
    changes: AtomicU64,
    pod: u64,
    most: CpuShare,
    /// When the pump last came, in the stage's milliseconds.
    pumped_ms: AtomicU64,
    /// CPUs are short, and it is one of those that use much.
    is_held_back: AtomicBool,
    held_back_us: AtomicU64,
    line: Mutex<Line>,
}

/// How much of the CPUs the flows of one pod may use while they are short, in CPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CpuShare(pub f64);

/// Which pod ran last in this process, and when it last was another one. Pods that run alone leave
/// it alone, so that it costs no more than a look.
struct Stage {
    start: Instant,
    pod: AtomicU64,
    changed_ms: AtomicU64,
    /// When a pod ran that uses little.
    light_ms: AtomicU64,
}

static STAGE: LazyLock<Stage> = LazyLock::new(|| Stage {
    start: Instant::now(),
    pod: AtomicU64::new(0),
    changed_ms: AtomicU64::new(0),
    light_ms: AtomicU64::new(0),
});

impl Stage {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A flow of the pod ran; it uses much if its pump came after that time.
    fn enters(&self, pod: u64, pumped_ms: &AtomicU64) {
        if self.pod.load(Ordering::Relaxed) != pod {
            self.pod.store(pod, Ordering::Relaxed);
            let now = self.now_ms();
            self.changed_ms.store(now, Ordering::Relaxed);
            if pumped_ms.load(Ordering::Relaxed) + HEAVY_MS < now {
                self.light_ms.store(now, Ordering::Relaxed);
            }
        }
    }

    /// Whether a pod that uses little has run lately.
    fn has_light(&self) -> bool {
        let light = self.light_ms.load(Ordering::Relaxed);
        light > 0 && self.now_ms().saturating_sub(light) <= ALONE_MS
    }

    /// Whether one pod has had it for itself for a while.
    fn is_quiet(&self) -> bool {
        let changed = self.changed_ms.load(Ordering::Relaxed);
        self.now_ms().saturating_sub(changed) > ALONE_MS
    }
}

#[derive(Debug)]
struct Line {
    waiting: VecDeque<Waker>,
    next_ticket: u64,
    since: Instant,
    pumped: bool,
}

/// A flow that waits for its pod's turn whenever it has something to do.
pub struct InTurn<F> {
    flow: Pin<Box<F>>,
    turns: Arc<Turns>,
    ticket: Option<u64>,
    number: u64,
}

impl Turns {
    /// Of a pod that has not used any, and may use so much while CPUs are short.
    pub fn new(most: CpuShare) -> Arc<Self> {
        Arc::new(Self {
            used_ns: AtomicU64::new(0),
            usual_ns: AtomicU64::new(QUANTUM_NS),
            released: AtomicU64::new(0),
            last_flow: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            pod: NEXT.fetch_add(1, Ordering::Relaxed),
            most,
            pumped_ms: AtomicU64::new(0),
            is_held_back: AtomicBool::new(false),
            held_back_us: AtomicU64::new(0),
            line: Mutex::new(Line {
                waiting: VecDeque::new(),
                next_ticket: 0,
                since: Instant::now(),
                pumped: false,
            }),
        })
    }

    /// Makes a flow wait for its turns.
    pub fn pace<F: Future>(self: &Arc<Self>, flow: F) -> InTurn<F> {
        InTurn {
            flow: Box::pin(flow),
            turns: Arc::clone(self),
            ticket: None,
            number: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// For how long its flows have waited because CPUs were short, all in all.
    pub fn held_back(&self) -> Duration {
        Duration::from_micros(self.held_back_us.load(Ordering::Relaxed))
    }

    /// A ticket for whoever must wait.
    fn queue(self: &Arc<Self>, waker: &Waker) -> Option<u64> {
        let is_held_back = self.is_held_back.load(Ordering::Relaxed);
        if !is_held_back && self.used_ns.load(Ordering::Relaxed) < QUANTUM_NS {
            return None;
        }
        let mut line = self.line();
        // Who uses little has no need of a line, nor who is alone.
        let alone = self.changes.load(Ordering::Relaxed) <= 1 || STAGE.is_quiet();
        if !line.pumped && (alone || line.since.elapsed() >= LIGHT_USE) {
            self.begin(&mut line);
            return None;
        }
        let ticket = line.next_ticket;
        line.next_ticket += 1;
        line.waiting.push_back(waker.clone());
        if !std::mem::replace(&mut line.pumped, true) {
            tokio::spawn(pump(Arc::downgrade(self)));
        }
        Some(ticket)
    }

    /// Whether the ticket's turn has not come. It is then the latest waker that is woken for it.
    fn still_waits(&self, ticket: u64, waker: &Waker) -> bool {
        if ticket < self.released.load(Ordering::Acquire) {
            return false;
        }
        let mut line = self.line();
        // Changes under the lock only.
        let released = self.released.load(Ordering::Acquire);
        let Some(place) = ticket.checked_sub(released) else {
            return false;
        };
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        if let Some(waiting) = line.waiting.get_mut(place) {
            waiting.clone_from(waker);
        }
        true
    }

    fn charge(&self, flow: u64, used: Duration) {
        STAGE.enters(self.pod, &self.pumped_ms);
        if self.last_flow.load(Ordering::Relaxed) != flow {
            self.last_flow.store(flow, Ordering::Relaxed);
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
        let used = u64::try_from(used.as_nanos()).unwrap_or(u64::MAX);
        self.used_ns.fetch_add(used, Ordering::Relaxed);
        // Races lose a sample, no more.
        let usual = self.usual_ns.load(Ordering::Relaxed);
        let usual = usual - usual / 8 + used.min(QUANTUM_NS) / 8;
        self.usual_ns.store(usual, Ordering::Relaxed);
    }

    fn begin(&self, line: &mut Line) {
        line.since = Instant::now();
        self.used_ns.store(0, Ordering::Relaxed);
        self.changes.store(0, Ordering::Relaxed);
    }

    /// How long the next few have to wait because CPUs are short and others use little of them.
    fn pause(&self) -> Option<Duration> {
        self.pumped_ms.store(STAGE.now_ms(), Ordering::Relaxed);
        let times_share = if self.most.is_all() || !STAGE.has_light() {
            None
        } else {
            PRESSURE.times_share()
        };
        self.is_held_back
            .store(times_share.is_some(), Ordering::Relaxed);
        let most = self.most.times(times_share?);
        let used = Duration::from_nanos(self.used_ns.load(Ordering::Relaxed));
        let since = self.line().since;
        let pause = most.takes(used).checked_sub(since.elapsed())?;
        Some(pause.min(LONGEST_PAUSE)).filter(|it| *it >= SHORTEST_PAUSE)
    }

    /// Lets the next few in. Says whether the pump must come again.
    fn release(&self) -> bool {
        let mut next = Vec::new();
        {
            let mut line = self.line();
            if line.waiting.is_empty() {
                line.pumped = false;
                self.is_held_back.store(false, Ordering::Relaxed);
                return false;
            }
            self.begin(&mut line);
            let usual = self.usual_ns.load(Ordering::Relaxed).max(1);
            let quantum = if self.is_held_back.load(Ordering::Relaxed) {
                SHORT_QUANTUM_NS
            } else {
                QUANTUM_NS
            };
            let room = usize::try_from(quantum / usual).unwrap_or(MOST_AT_ONCE);
            let count = room.clamp(1, MOST_AT_ONCE).min(line.waiting.len());
            next.extend(line.waiting.drain(..count));
            self.released.fetch_add(count as u64, Ordering::Release);
        }
        for waker in next {
            waker.wake();
        }
        true
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        // Every change under the lock is complete in itself.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CpuShare {
    /// So many percent of all the CPUs that the process may use.
    pub fn percent_of(percent: u8, cpus: usize) -> Self {
        let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        if percent >= 100 {
            return Self(f64::INFINITY);
        }
        Self(f64::from(cpus) * f64::from(percent.max(1)) / 100.0)
    }

    fn times(self, times: f64) -> Self {
        Self(self.0 * times)
    }

    fn is_all(self) -> bool {
        self.0.is_infinite()
    }

    /// In what time it is right to have used so much.
    fn takes(self, used: Duration) -> Duration {
        used.div_f64(self.0.max(0.01))
    }
}

impl<F: Future> Future for InTurn<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        match this.ticket {
            // Woken for something else meanwhile.
            Some(ticket) if this.turns.still_waits(ticket, context.waker()) => {
                return Poll::Pending;
            }
            Some(_) => this.ticket = None,
            None => {
                this.ticket = this.turns.queue(context.waker());
                if this.ticket.is_some() {
                    return Poll::Pending;
                }
            }
        }
        let start = Instant::now();
        let result = this.flow.as_mut().poll(context);
        this.turns.charge(this.number, start.elapsed());
        result
    }
}

/// Goes through the runtime's queue for all that wait.
async fn pump(turns: Weak<Turns>) {
    loop {
        // After the others that are in the queue, and after a look at the sockets.
        tokio::task::yield_now().await;
        let Some(turns) = turns.upgrade() else { return };
        if let Some(pause) = turns.pause() {
            tokio::time::sleep(pause).await;
            let waited = u64::try_from(pause.as_micros()).unwrap_or(u64::MAX);
            turns.held_back_us.fetch_add(waited, Ordering::Relaxed);
        }
        if !turns.release() {
            return;
        }
    }
}

/// What a pod's flows may use of a thread's time before others have their turn.
const QUANTUM: Duration = Duration::from_micros(250);
const QUANTUM_NS: u64 = QUANTUM.as_nanos() as u64;
/// The same while CPUs are short: a neighbour may wait for all of it.
const SHORT_QUANTUM_NS: u64 = 100_000;
/// After this time without another pod a pod is alone.
const ALONE_MS: u64 = 2000;
/// Numbers of pods and flows.
static NEXT: AtomicU64 = AtomicU64::new(1);
/// Who needs longer than this for a quantum never waits.
const LIGHT_USE: Duration = Duration::from_millis(1);
const MOST_AT_ONCE: usize = 16;
/// A pod whose pump has come within this time uses much.
const HEAVY_MS: u64 = 100;
/// The runtime's timers are no finer.
const SHORTEST_PAUSE: Duration = Duration::from_micros(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// Keeps the thread busy, again and again.
    async fn busy(times: usize, done: Arc<AtomicUsize>) {
        for _ in 0..times {
            let start = Instant::now();
            while start.elapsed() < Duration::from_micros(50) {}
            done.fetch_add(1, Ordering::Relaxed);
            let mut yielded = false;
            std::future::poll_fn(|context| {
                if std::mem::replace(&mut yielded, true) {
                    return Poll::Ready(());
                }
                context.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
        }
    }

    /// One thread, a hundred busy flows of one pod, and one of another: it gets about every other
    /// quantum, not every hundredth place in the queue.
    #[tokio::test]
    async fn a_crowd_leaves_a_neighbour_its_turns() {
        let (crowd, single) = (
            Turns::new(CpuShare::percent_of(100, 1)),
            Turns::new(CpuShare::percent_of(100, 1)),
        );
        // There is somebody else.
        STAGE.enters(0, &AtomicU64::new(0));
        let (crowd_done, single_done) = (Arc::default(), Arc::default());
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..100 {
            tasks.spawn(crowd.pace(busy(1000, Arc::clone(&crowd_done))));
        }
        tokio::task::yield_now().await;
        let neighbour = single.pace(busy(100, Arc::clone(&single_done)));
        tokio::spawn(neighbour).await.expect("no panic");
        let crowd_done: usize = crowd_done.load(Ordering::Relaxed);
        assert_eq!(single_done.load(Ordering::Relaxed), 100);
        assert!(
            crowd_done < 2500,
            "the crowd ran {crowd_done} times meanwhile"
        );
        tasks.shutdown().await;
        // Those that left in the line keep nobody else from going on.
        let after = crowd.pace(busy(10, Arc::default()));
        let patience = Duration::from_secs(10);
        let after = tokio::time::timeout(patience, tokio::spawn(after)).await;
        after.expect("it has its turn").expect("no panic");
    }

    #[test]
    fn shares_are_of_all_cpus() {
        let used = Duration::from_millis(10);
        for (percent, cpus, takes_ms) in [(10, 2, 50), (10, 32, 3), (50, 4, 5), (0, 10, 100)] {
            let share = CpuShare::percent_of(percent, cpus);
            assert!(!share.is_all());
            assert_eq!(
                share.takes(used).as_millis(),
                takes_ms,
                "{percent} of {cpus}"
            );
        }
        assert!(CpuShare::percent_of(100, 2).is_all());
        assert_eq!(CpuShare::percent_of(100, 2).takes(used), Duration::ZERO);
    }

    #[tokio::test]
    async fn all_get_done() {
        let turns = Turns::new(CpuShare::percent_of(100, 1));
        let done: Arc<AtomicUsize> = Arc::default();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..50 {
            tasks.spawn(turns.pace(busy(20, Arc::clone(&done))));
        }
        while tasks.join_next().await.is_some() {}
        assert_eq!(done.load(Ordering::Relaxed), 1000);
        assert!(turns.line().waiting.is_empty());
    }
}
