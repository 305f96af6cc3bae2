//! The threads of a pod. All that the agent does for a pod's flows runs on them, and nothing else.
//!
//! So it is the kernel that shares the CPUs out between pods, as it does between their own processes: a pod with a
//! thousand busy flows waits for itself, and its neighbour's one flow has a thread that has used little and is
//! therefore run soon. What a pod costs its node is known, too: it is what its threads have used.
//!
//! *Soon* is not soon enough where CPUs are short: a thread that has just been sent something may wait for 3 ms for each
//! of the two agents, twice. A thread of a higher [`priority`](super::priority) does not wait (measured beside two busy threads for
//! each CPU: 0.1 ms instead of 3 ms in the 99th percentile). So, while CPUs are [short](super::shortage), the threads of pods that use
//! little have one, and those of pods that use much do not, or a flood would take the CPUs from all other processes. Who uses much is decided by [`Level`]; and if those
//! that use little use much together, none of them comes first either. Who decides this comes before all of them.
//!
//! Threads that have nothing to do sleep, and cost some memory. A thread's own use is asked of the kernel
//! (`CLOCK_THREAD_CPUTIME_ID` of another thread, clock_gettime(2)), and only of pods that have done something.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::thread::Thread;
use std::time::{Duration, Instant};

use nix::time::ClockId;
use nix::unistd::{Pid, gettid};
use tokio::runtime::{Builder, Handle, Runtime};

use super::priority::{Rank, Ranks};
use super::shortage::Shortage;

/// The threads of one pod. When this is dropped, what runs on them ends.
#[derive(Debug)]
pub struct PodThreads {
    runtime: Option<Runtime>,
    meter: Arc<Meter>,
}

/// What they use.
#[derive(Debug, Default)]
struct Meter {
    threads: Mutex<Threads>,
    /// One of them has woken since that was looked at last.
    has_woken: AtomicBool,
    used_ns: AtomicU64,
}

#[derive(Debug)]
struct Threads {
    ids: Vec<Pid>,
    rank: Rank,
}

/// Whether somebody uses much: a leaky bucket of CPU time. What is used flows in, what can be spared for it flows out. A burst
/// fits into it.
#[derive(Debug)]
struct Level {
    /// How many CPUs can be spared for however long.
    spared: f64,
    /// CPU time that fits into the bucket, and that is in it, in seconds.
    room: f64,
    filled: f64,
    uses_much: bool,
}

/// One pod, as it is watched.
struct Watched {
    meter: Weak<Meter>,
    level: Level,
    looked: Instant,
    is_asleep: bool,
}

/// All pods, as they are watched.
struct Pods {
    pods: Vec<Watched>,
    /// Of those that use little, together.
    level: Level,
    looked: Instant,
    /// Of pods that have left, which may have something to send yet, and since when.
    ending: Vec<(Instant, Runtime)>,
    /// None where threads that come first do not differ from the rest of the agent.
    shortage: Option<Shortage>,
}

/// What is new to who looks.
#[derive(Default)]
struct News {
    pods: Vec<Watched>,
    ending: Vec<(Instant, Runtime)>,
}

/// Looks after the priorities of all pods' threads. It waits for no lock: who has it may be waiting for a CPU, behind
/// threads whose priority is to be taken away.
struct Watch {
    news: Mutex<News>,
    is_parked: AtomicBool,
    thread: Mutex<Option<Thread>>,
    ranks: Ranks,
    cpus: usize,
}

static WATCH: LazyLock<Watch> = LazyLock::new(|| {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Watch {
        news: Mutex::default(),
        is_parked: AtomicBool::new(false),
        thread: Mutex::new(None),
        ranks: Ranks::find(),
        cpus,
    }
});

impl PodThreads {
    /// Starts them: as many as there are CPUs, four at most.
    ///
    /// # Errors
    /// A thread cannot be made.
    pub fn start() -> io::Result<Self> {
        WATCH.begin()?;
        let meter = Arc::<Meter>::default();
        let [on_start, on_stop, on_wake] = [(); 3].map(|()| Arc::clone(&meter));
        let mut builder = Builder::new_multi_thread();
        builder
            .worker_threads(threads_of(WATCH.cpus))
            .thread_name("weft-pod")
            .enable_all()
            .on_thread_start(move || on_start.enter())
            .on_thread_stop(move || on_stop.leave())
            .on_thread_unpark(move || on_wake.wakes());
        // It panics where the kernel makes no thread, and this pod must not end all others' agent.
        let built = catch_unwind(AssertUnwindSafe(|| builder.build()));
        let none = |_| io::Error::other("the kernel makes no thread; the log says why");
        let runtime = built.map_err(none)??;
        WATCH.add(&meter);
        Ok(Self {
            runtime: Some(runtime),
            meter,
        })
    }

    /// Where to run something.
    pub fn handle(&self) -> &Handle {
        match &self.runtime {
            Some(runtime) => runtime.handle(),
            None => unreachable!("taken when dropped only"),
        }
    }

    /// CPU time that they had used a moment ago.
    pub fn used(&self) -> Duration {
        Duration::from_nanos(self.meter.used_ns.load(Ordering::Relaxed))
    }
}

impl Drop for PodThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            WATCH.news().ending.push((Instant::now(), runtime));
            WATCH.wake();
        }
    }
}

impl Meter {
    fn enter(&self) {
        let thread = gettid();
        // Under the lock: or it may be given what has just been taken from all others, and keep it.
        let mut threads = self.threads();
        threads.ids.push(thread);
        WATCH.ranks.give(thread, threads.rank);
    }

    fn leave(&self) {
        let thread = gettid();
        self.threads().ids.retain(|it| *it != thread);
    }

    /// One of them has something to do.
    fn wakes(&self) {
        if !self.has_woken.load(Ordering::Relaxed) {
            self.has_woken.store(true, Ordering::SeqCst);
            WATCH.wake();
        }
    }

    /// What they have used since the last time, unless one of them begins or ends just now. They last as long as their
    /// runtime.
    fn measure(&self) -> Option<Duration> {
        let threads = tried(&self.threads)?;
        let used: Duration = threads.ids.iter().filter_map(|it| cpu_time(*it)).sum();
        let ns = u64::try_from(used.as_nanos()).unwrap_or(u64::MAX);
        let before = self.used_ns.fetch_max(ns, Ordering::Relaxed);
        Some(Duration::from_nanos(ns.saturating_sub(before)))
    }

    /// Changes the priority of all of them; or not yet, for the same reason.
    fn set_rank(&self, rank: Rank) {
        if let Some(mut threads) = tried(&self.threads)
            && threads.rank != rank
        {
            threads.rank = rank;
            for thread in &threads.ids {
                WATCH.ranks.give(*thread, rank);
            }
        }
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        // Every change under the lock is complete in itself.
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Threads {
    fn default() -> Self {
        Self {
            ids: Vec::new(),
            rank: Rank::Own,
        }
    }
}

impl Watch {
    /// Starts the thread that looks, once.
    fn begin(&'static self) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let shortage = match self.ranks.come_first() {
                true => Some(Shortage::watch(|| self.ranks.give(gettid(), Rank::Own))?),
                false => None,
            };
            let started = std::thread::Builder::new()
                .name("weft-priority".into())
                .stack_size(64 * 1024)
                .spawn(move || {
                    self.ranks.give(gettid(), Rank::Watch);
                    self.run(shortage);
                })?;
            *thread = Some(started.thread().clone());
        }
        Ok(())
    }

    fn add(&self, meter: &Arc<Meter>) {
        self.news().pods.push(Watched {
            meter: Arc::downgrade(meter),
            level: Level::of(threads_of(self.cpus), MUCH),
            looked: Instant::now(),
            is_asleep: false,
        });
        self.wake();
    }

    fn wake(&self) {
        if self.is_parked.load(Ordering::SeqCst) {
            let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(thread) = &*thread {
                thread.unpark();
            }
        }
    }

    fn run(&self, shortage: Option<Shortage>) {
        let mut pods = Pods {
            pods: Vec::new(),
            level: Level::of(self.cpus, MUCH_OF_ALL),
            looked: Instant::now(),
            ending: Vec::new(),
            shortage,
        };
        loop {
            if !self.look(&mut pods) {
                self.is_parked.store(true, Ordering::SeqCst);
                // Who woke before the line above has seen no parked thread: look again.
                if !self.look(&mut pods) {
                    std::thread::park();
                }
                self.is_parked.store(false, Ordering::SeqCst);
            }
            std::thread::sleep(LOOKS_EVERY);
        }
    }

    /// Looks at all pods. Whether it must be looked again, though none of them wakes.
    fn look(&self, pods: &mut Pods) -> bool {
        let now = Instant::now();
        let news = tried(&self.news);
        let is_behind = news.is_none();
        if let Some(mut news) = news {
            pods.pods.append(&mut news.pods);
            pods.ending.append(&mut news.ending);
        }
        let mut used_by_little = Duration::ZERO;
        pods.pods.retain_mut(|it| {
            let meter = it.meter.upgrade();
            if let Some(meter) = &meter {
                // Used as one that came first, also if it was too much.
                let came_first = !it.level.uses_much;
                let used = it.look(meter, now);
                if came_first {
                    used_by_little += used;
                }
            }
            meter.is_some()
        });
        let elapsed = now.saturating_duration_since(pods.looked);
        pods.looked = now;
        pods.level.look(used_by_little, elapsed);
        let all_plain = pods.level.uses_much;
        let is_short = pods.shortage.as_mut().is_some_and(Shortage::look);
        for pod in &pods.pods {
            if let Some(meter) = pod.meter.upgrade() {
                meter.set_rank(rank(all_plain || pod.level.uses_much, is_short));
            }
        }
        let over = |it: &mut (Instant, Runtime)| now.saturating_duration_since(it.0) >= ENDING;
        for (_, runtime) in pods.ending.extract_if(.., over) {
            runtime.shutdown_background();
        }
        let is_awake = pods.pods.iter().any(|it| !it.is_asleep);
        is_behind || all_plain || !pods.ending.is_empty() || is_awake
    }

    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    /// Looks at what its threads have used since the last time, and says it.
    fn look(&mut self, meter: &Meter, now: Instant) -> Duration {
        let has_woken = meter.has_woken.swap(false, Ordering::SeqCst);
        if self.is_asleep && !has_woken {
            return Duration::ZERO;
        }
        let Some(more) = meter.measure() else {
            self.is_asleep = false;
            return Duration::ZERO;
        };
        let elapsed = now.saturating_duration_since(self.looked);
        self.looked = now;
        self.level.look(more, elapsed);
        // One that is busy all the time does not wake.
        self.is_asleep = !has_woken && more.is_zero() && !self.level.uses_much;
        more
    }
}

impl Level {
    /// Of somebody who has used nothing yet, can use so many CPUs and may use a part of them for however long.
    fn of(cpus: usize, part: f64) -> Self {
        let cpus = f64::from(u32::try_from(cpus).unwrap_or(u32::MAX));
        Self {
            spared: cpus * part,
            room: cpus * BURST.as_secs_f64(),
            filled: 0.0,
            uses_much: false,
        }
    }

    /// Looks at what was used in a time.
    fn look(&mut self, used: Duration, elapsed: Duration) {
        let spared = self.spared * elapsed.as_secs_f64();
        self.filled = (self.filled + used.as_secs_f64() - spared).clamp(0.0, self.room);
        self.uses_much = if self.uses_much {
            self.filled > 0.0
        } else {
            self.filled >= self.room
        };
    }
}

/// What a thread of this process has used.
fn cpu_time(thread: Pid) -> Option<Duration> {
    // The kernel's name for the clock of another thread (MAKE_THREAD_CPUCLOCK with CPUCLOCK_SCHED).
    let clock = ClockId::from_raw((!thread.as_raw() << 3) | 0b110);
    clock.now().ok().map(Duration::from)
}

/// What nobody has locked at the moment.
fn tried<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// How many threads a pod has.
pub(crate) fn threads_of(cpus: usize) -> usize {
    cpus.min(MOST_THREADS)
}

/// Gives the thread that asks a priority, for what the agent does for itself.
pub(crate) fn come_first() {
    WATCH.ranks.give(gettid(), Rank::Own);
}

/// Takes from the thread that asks what it may have inherited: what it does can wait.
pub(super) fn come_as_any() {
    WATCH.ranks.give(gettid(), Rank::Plain);
}

/// Of threads of pods.
fn rank(uses_much: bool, is_short: bool) -> Rank {
    match (uses_much, is_short) {
        (true, _) => Rank::Plain,
        (false, true) => Rank::First,
        (false, false) => Rank::Own,
    }
}

/// More than these would be of little use to a single pod, and there is one set for each pod.
const MOST_THREADS: usize = 4;
const LOOKS_EVERY: Duration = Duration::from_millis(20);
/// For how long what a pod's tunnels have to send yet may be sent after it has left.
const ENDING: Duration = Duration::from_secs(5);
/// The part of the CPUs that it could use that a pod may use for however long and still use little.
const MUCH: f64 = 0.15;
/// The part of the node's CPUs that those who use little may use together and come first.
const MUCH_OF_ALL: f64 = 0.5;
/// How long a pod may use all the CPUs before it uses much; with 30 percent of them some six times as long. So long, and
/// until somebody looks, all others may have to wait for it.
const BURST: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::super::priority::Scheduling;
    use super::*;

    /// CPUs, percent of them → how long until it uses much, in looks; none: never
    #[test]
    fn who_uses_much_for_long_enough_uses_much() {
        for (percent, expected) in [
            (100, Some(2)),
            (50, Some(3)),
            (30, Some(7)),
            (15, None),
            (1, None),
        ] {
            for cpus in [1, 2, 4] {
                let mut level = Level::of(cpus, MUCH);
                let used = LOOKS_EVERY * u32::try_from(cpus).unwrap() * percent / 100;
                let looks = (1..1000).find(|_| {
                    level.look(used, LOOKS_EVERY);
                    level.uses_much
                });
                assert_eq!(looks, expected, "{percent} percent of {cpus}");
            }
        }
    }

    const PIECE: Duration = Duration::from_millis(4);
    /// Of tests that use CPUs: one at a time, or one would see what another does.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn who_stops_uses_little_again_but_not_at_once() {
        let mut level = Level::of(2, MUCH);
        level.look(Duration::from_secs(1), LOOKS_EVERY);
        assert!(level.uses_much);
        level.look(Duration::ZERO, LOOKS_EVERY);
        assert!(level.uses_much);
        level.look(Duration::ZERO, Duration::from_millis(300));
        assert!(!level.uses_much);
    }

    /// As the kernel says it: the policy, and the priority or nice value (proc_pid_stat(5)).
    fn ranks_of(threads: &PodThreads) -> Vec<Scheduling> {
        let pids = threads.meter.threads().ids.clone();
        let scheduling = |it: Pid| {
            let stat = std::fs::read_to_string(format!("/proc/self/task/{it}/stat"));
            let stat = stat.expect("it runs");
            let (_, fields) = stat.rsplit_once(") ").expect("a name");
            let field = |number: usize| -> i64 {
                let text = fields.split(' ').nth(number - 3);
                text.expect("a field").trim().parse().expect("a number")
            };
            match field(41) {
                0 => Scheduling::Shared(i32::try_from(field(19)).expect("small")),
                policy => {
                    assert_eq!(policy, i64::from(libc::SCHED_RR));
                    Scheduling::RealTime(u32::try_from(field(40)).expect("small"))
                }
            }
        };
        pids.into_iter().map(scheduling).collect()
    }

    /// Whether all its threads are there, and have this rank.
    fn all(threads: &PodThreads, rank: Rank) -> bool {
        let expected = WATCH.ranks.scheduling(rank);
        let ranks = ranks_of(threads);
        ranks.len() == threads_of(WATCH.cpus) && ranks.iter().all(|it| *it == expected)
    }

    fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// CPUs are short for a moment because threads that come before the probe take all of them. Where this process can have
    /// no such threads, those of pods have the same rank in any case.
    #[test]
    fn threads_that_use_little_come_first_while_cpus_are_short() {
        let _alone = ALONE.lock();
        let threads = PodThreads::start().expect("starts");
        threads.handle().spawn(async {
            loop {
                tokio::time::sleep(LOOKS_EVERY / 2).await;
            }
        });
        let is_seen = Arc::new(AtomicBool::new(false));
        let deadline = Instant::now() + Duration::from_secs(5);
        let takers: Vec<_> = (0..WATCH.cpus)
            .map(|_| {
                let is_seen = Arc::clone(&is_seen);
                std::thread::spawn(move || {
                    WATCH.ranks.give(gettid(), Rank::First);
                    while !is_seen.load(Ordering::Relaxed) && Instant::now() < deadline {}
                })
            })
            .collect();
        WATCH.ranks.give(gettid(), Rank::Watch);
        wait_for("they come first", || all(&threads, Rank::First));
        is_seen.store(true, Ordering::Relaxed);
        takers.into_iter().for_each(|it| it.join().expect("ends"));
    }

    /// Has a pod use so many CPUs at most, in pieces, until it is dropped.
    fn keep_using(threads: &PodThreads, cpus: f64) {
        threads.handle().spawn(async move {
            loop {
                let begun = Instant::now();
                let used = || cpu_time(gettid()).expect("it runs");
                let before = used();
                while used().saturating_sub(before) < PIECE {}
                let at_least = PIECE.div_f64(cpus);
                tokio::time::sleep_until((begun + at_least).into()).await;
            }
        });
    }

    #[test]
    fn nobody_comes_first_while_those_that_use_little_use_much_together() {
        let _alone = ALONE.lock();
        let cpus = WATCH.cpus as f64;
        let little = MUCH * 0.8 * threads_of(WATCH.cpus) as f64;
        let twice_as_many = (2.0 * MUCH_OF_ALL * cpus / little).ceil() as usize;
        let start = || PodThreads::start().expect("starts");
        let pods: Vec<_> = std::iter::repeat_with(start).take(twice_as_many).collect();
        pods.iter().for_each(|it| keep_using(it, little));
        wait_for("together they use much", || {
            pods.iter().all(|it| all(it, Rank::Plain))
        });
    }

    /// The kernel's own figures, of threads that compute and of others that do not.
    #[test]
    fn threads_of_a_busy_pod_do_not_come_first() {
        let _alone = ALONE.lock();
        let [busy, idle] = [(); 2].map(|()| PodThreads::start().expect("starts"));
        // Whether CPUs are short is not in the hands of a test.
        let is_light = |threads| all(threads, Rank::Own) || all(threads, Rank::First);
        wait_for("both begin light", || is_light(&busy) && is_light(&idle));
        let is_over = Arc::new(AtomicBool::new(false));
        for _ in 0..threads_of(WATCH.cpus) {
            let is_over = Arc::clone(&is_over);
            busy.handle().spawn(async move {
                while !is_over.load(Ordering::Relaxed) {
                    tokio::task::yield_now().await;
                }
            });
        }
        wait_for("it uses much", || all(&busy, Rank::Plain));
        // Before that, what it used may have been too much for all of them together.
        wait_for("the other is light", || is_light(&idle));
        wait_for("it has used more", || busy.used() > idle.used());
        is_over.store(true, Ordering::Relaxed);
        wait_for("it uses little again", || is_light(&busy));
        // From a thread of its own, as the last flow of a pod does.
        let (done, is_done) = std::sync::mpsc::channel();
        let handle = busy.handle().clone();
        handle.spawn(async move {
            drop(busy);
            let _ = done.send(());
        });
        is_done.recv().expect("no panic");
    }
}
