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
//! as threads wait for CPUs (`pressure`), and there are pods that use little, the pump of a pod that has used very
//! much for some time (`flood`) comes back later: its flows then have a share of the CPUs that leaves some to others.
//!
//! The pump also makes sure that sockets are looked at once per turn: the runtime does so by itself
//! only every so many tasks, and those of a bulk transfer are long.

mod flood;
mod pressure;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use weft_core::WorkloadId;

pub use self::flood::FloodLimits;
use self::flood::{Flood, Verdict, View};
use self::pressure::{PRESSURE, Pressed};
use super::seldom::Seldom;

/// The turns of one pod's flows.
#[derive(Debug)]
pub struct Turns {
    /// Time used in all, and up to when the pump came last.
    used_ns: AtomicU64,
    used_before_ns: AtomicU64,
    /// How long one flow takes, lately.
    usual_ns: AtomicU64,
    /// Whose tickets are below this may go on.
    released: AtomicU64,
    /// The flow that ran last, and how often another one had its turn since the pump came last.
    last_flow: AtomicU64,
    changes: AtomicU64,
    pod: u64,
    name: WorkloadId,
    flood: Mutex<Looks>,
    /// When the pump last came, in the stage's milliseconds.
    pumped_ms: AtomicU64,
    /// CPUs are short, and it is one of those that use much.
    is_held_back: AtomicBool,
    held_back_us: AtomicU64,
    floods: AtomicU64,
    told: Seldom,
    line: Mutex<Line>,
}

/// Whether the pod is a flood, and what it had used when that was looked at last.
#[derive(Debug)]
struct Looks {
    flood: Flood,
    used_ns: u64,
    /// Since the stage began: by then the pod may have used what it has, with its share.
    due: Duration,
}

/// Which pod ran last in this process, and when it last was another one. Pods that run alone leave
/// it alone, so that it costs no more than a look.
struct Stage {
    start: Instant,
    pod: AtomicU64,
    changed_ms: AtomicU64,
    /// When a pod ran that uses little, and which.
    light_ms: AtomicU64,
    light_pod: AtomicU64,
}

static STAGE: LazyLock<Stage> = LazyLock::new(|| Stage {
    start: Instant::now(),
    pod: AtomicU64::new(0),
    changed_ms: AtomicU64::new(0),
    light_ms: AtomicU64::new(0),
    light_pod: AtomicU64::new(0),
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
                // Races lose a sample, no more.
                self.light_ms.store(now, Ordering::Relaxed);
                self.light_pod.store(pod, Ordering::Relaxed);
            }
        }
    }

    /// Whether another pod than this has run lately that uses little. A pod that begins has used little itself.
    fn has_light_beside(&self, pod: u64) -> bool {
        let light = self.light_ms.load(Ordering::Relaxed);
        light > 0
            && self.light_pod.load(Ordering::Relaxed) != pod
            && self.now_ms().saturating_sub(light) <= ALONE_MS
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
    /// Of a pod that has not used any, and is held back when it uses more than it may.
    pub fn new(name: WorkloadId, limits: FloodLimits) -> Arc<Self> {
        Arc::new(Self {
            used_ns: AtomicU64::new(0),
            used_before_ns: AtomicU64::new(0),
            usual_ns: AtomicU64::new(QUANTUM_NS),
            released: AtomicU64::new(0),
            last_flow: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            pod: NEXT.fetch_add(1, Ordering::Relaxed),
            name,
            flood: Mutex::new(Looks {
                flood: Flood::new(limits),
                used_ns: 0,
                due: Duration::ZERO,
            }),
            pumped_ms: AtomicU64::new(0),
            is_held_back: AtomicBool::new(false),
            held_back_us: AtomicU64::new(0),
            floods: AtomicU64::new(0),
            told: Seldom::new(),
            line: Mutex::new(Line {
                waiting: VecDeque::new(),
                next_ticket: 0,
                since: Instant::now(),
                pumped: false,
            }),
        })
    }

    /// Of a pod that is never held back.
    #[cfg(test)]
    pub(crate) fn unlimited() -> Arc<Self> {
        let name = "default/pod".parse().expect("valid");
        Self::new(name, FloodLimits::percent_of(100, 1))
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

    /// How often it was found to be a flood.
    pub fn floods(&self) -> u64 {
        self.floods.load(Ordering::Relaxed)
    }

    /// A ticket for whoever must wait.
    fn queue(self: &Arc<Self>, waker: &Waker) -> Option<u64> {
        let is_held_back = self.is_held_back.load(Ordering::Relaxed);
        if !is_held_back && self.used() < QUANTUM {
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
        let used = self.used_ns.load(Ordering::Relaxed);
        self.used_before_ns.store(used, Ordering::Relaxed);
        self.changes.store(0, Ordering::Relaxed);
    }

    /// Time used since the pump came last.
    fn used(&self) -> Duration {
        let before = self.used_before_ns.load(Ordering::Relaxed);
        let used = self.used_ns.load(Ordering::Relaxed);
        Duration::from_nanos(used.saturating_sub(before))
    }

    /// How long the next few have to wait because CPUs are short and others use little of them.
    fn pause(&self) -> Option<Duration> {
        self.pumped_ms.store(STAGE.now_ms(), Ordering::Relaxed);
        let is_beside_light = STAGE.has_light_beside(self.pod);
        let pause = self.judge(is_beside_light);
        self.is_held_back.store(pause.is_some(), Ordering::Relaxed);
        pause.filter(|it| *it >= SHORTEST_PAUSE)
    }

    /// Looks whether the pod is a flood; if so, how long it takes until it may go on.
    fn judge(&self, is_beside_light: bool) -> Option<Duration> {
        let mut looks = self.flood.lock().unwrap_or_else(PoisonError::into_inner);
        let used_ns = self.used_ns.load(Ordering::Relaxed);
        let used = Duration::from_nanos(used_ns.saturating_sub(looks.used_ns));
        looks.used_ns = used_ns;
        // Nobody looks for pressure where it makes no difference.
        let pressed = if is_beside_light && looks.flood.is_suspected() {
            PRESSURE.look()
        } else {
            Pressed::default()
        };
        let now = STAGE.start.elapsed();
        let verdict = looks.flood.look(View {
            now,
            used,
            is_short: pressed.is_high,
            late: pressed.late,
        });
        let share = match verdict {
            Verdict::Held { share, anew } => {
                if anew {
                    self.floods.fetch_add(1, Ordering::Relaxed);
                    self.tell(share);
                }
                Some(share).filter(|_| is_beside_light)
            }
            Verdict::Free => None,
        };
        let Some(share) = share else {
            looks.due = now;
            return None;
        };
        // Timers end late, so what is due is remembered; not for long, or it would be a burst.
        let due = looks.due.max(now.saturating_sub(MOST_CREDIT)) + used.div_f64(share);
        looks.due = due.min(now + LONGEST_PAUSE);
        Some(looks.due.saturating_sub(now))
    }

    fn tell(&self, share: f64) {
        let (pod, times) = (&self.name, self.told.now());
        let what =
            "held back: CPUs are short, and its flows have used very much of them for some time";
        match times {
            Some(times) => tracing::warn!(%pod, cpus = share, times, what),
            None => tracing::debug!(%pod, cpus = share, what),
        }
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
/// For how long what was not used may be used later.
const MOST_CREDIT: Duration = Duration::from_millis(5);

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
        let (crowd, single) = (Turns::unlimited(), Turns::unlimited());
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

    #[tokio::test]
    async fn all_get_done() {
        let turns = Turns::unlimited();
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
