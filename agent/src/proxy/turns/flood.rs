//! Tells a flood from a pod that is merely busy, and finds how much of the CPUs to leave it. Pure: time and
//! what was used are handed in.
//!
//! No single moment tells them apart: a flood and a busy gateway both take what they get. What can be told is
//! for how long a pod has used more than a node can spare for one (`much`, 15 percent of its CPUs in the agent),
//! and whether it helps the others if it gets less. So there are two parts.
//!
//! **A leaky bucket** of CPU time: what a pod uses flows in, `much` flows out. A burst fits into it, and so does
//! anything that a node has CPUs for, since a full bucket alone changes nothing. Only if it is full *and*
//! threads wait for CPUs *and* pods that use little are served is the pod held back.
//!
//! **A share that is found, not set.** A pod that is held back has `much` at first, which costs a busy pod the
//! least. As long as threads go on waiting for CPUs, its share is halved, down to `least`; once they don't, it
//! grows again: soon to near where they waited, from there on slowly, until it is all or they wait anew. That is how
//! TCP finds the rate of a path (RFC 9438): a pod gets about what there is without its neighbours' waiting for it,
//! whether that is little or much.
//!
//! **What does not help is not done**: if threads wait as they did although the pod has `least`, then it is not
//! this pod that they wait for (a batch job beside it uses the CPUs, say). It then has `much` for a while, not all:
//! else a flood would be let go if only it kept CPUs busy in its own pod too.

use std::time::Duration;

/// How much of the CPUs the flows of one pod may use through the agent, in CPUs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FloodLimits {
    /// All that there are.
    all: f64,
    /// A pod that uses more for long is held to this when they get short,
    much: f64,
    /// and in the end to this.
    least: f64,
}

/// What is known of one pod.
#[derive(Debug)]
pub(super) struct Flood {
    limits: FloodLimits,
    /// CPU seconds in the bucket.
    level: f64,
    looked: Duration,
    held: Option<Held>,
}

/// The share of a pod that is held back.
#[derive(Debug)]
struct Held {
    /// In CPUs.
    share: f64,
    /// What it was when threads waited last.
    too_much: f64,
    /// When they did, and how often by then, as far as was seen.
    waited: Duration,
    late: u64,
    /// When it was looked at last whether they wait so often that the share is cut, and how often by then.
    weighed: Duration,
    late_at_weighing: u64,
    /// When the share was cut last, and how often threads had waited by then.
    cut: Duration,
    late_at_cut: u64,
    /// The share is not cut below `much` before that.
    spared_until: Duration,
}

/// What there is to see.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    /// Since some beginning.
    pub(super) now: Duration,
    /// What the pod used since the last look.
    pub(super) used: Duration,
    /// Threads wait for CPUs, or did a moment ago; and pods that use little are served.
    pub(super) is_short: bool,
    /// How often threads were found to wait, all in all; 0 if no such pods are served.
    pub(super) late: u64,
}

/// What a pod may have now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Verdict {
    /// As much as it likes.
    Free,
    /// So many CPUs. `anew`: until now it had as much as it liked.
    Held { share: f64, anew: bool },
}

impl FloodLimits {
    /// A flood is held to so many percent of the CPUs in the end; with 100 nobody is held back.
    pub fn percent_of(percent: u8, cpus: usize) -> Self {
        let all = f64::from(u32::try_from(cpus).unwrap_or(u32::MAX));
        let least = all * f64::from(percent.clamp(1, 100)) / 100.0;
        Self {
            all,
            much: least.max(all * MUCH),
            least,
        }
    }

    /// Whether nobody is held back.
    pub(super) fn is_off(self) -> bool {
        self.least >= self.all
    }
}

impl Flood {
    pub(super) fn new(limits: FloodLimits) -> Self {
        Self {
            limits,
            level: 0.0,
            looked: Duration::ZERO,
            held: None,
        }
    }

    /// Whether it would make a difference if CPUs were short.
    pub(super) fn is_suspected(&self) -> bool {
        self.held.is_some() || self.level >= self.capacity()
    }

    /// Looks at what the pod used since the last time.
    pub(super) fn look(&mut self, view: View) -> Verdict {
        let elapsed = view.now.saturating_sub(self.looked);
        self.looked = view.now.max(self.looked);
        let gained = view.used.as_secs_f64() - self.limits.much * elapsed.as_secs_f64();
        self.level = (self.level + gained).clamp(0.0, self.capacity());
        let limits = self.limits;
        let Some(held) = &mut self.held else {
            if limits.is_off() || !view.is_short || self.level < self.capacity() {
                return Verdict::Free;
            }
            let share = limits.much;
            self.held = Some(Held {
                share,
                too_much: limits.all,
                waited: view.now,
                late: view.late,
                weighed: view.now,
                late_at_weighing: view.late,
                cut: view.now,
                late_at_cut: view.late,
                spared_until: Duration::ZERO,
            });
            return Verdict::Held { share, anew: true };
        };
        held.late = held.late.max(view.late);
        if view.now.saturating_sub(held.weighed) >= CUT_EVERY {
            let late = held.late - held.late_at_weighing;
            held.weighed = view.now;
            held.late_at_weighing = held.late;
            if late >= TOO_OFTEN {
                held.waited = view.now;
                held.strain(view.now, limits);
            }
        }
        if view.now.saturating_sub(held.waited) >= CALM {
            held.grow(elapsed);
        }
        let share = held.share;
        if share >= limits.all {
            self.held = None;
            return Verdict::Free;
        }
        Verdict::Held { share, anew: false }
    }

    fn capacity(&self) -> f64 {
        self.limits.all * BURST.as_secs_f64()
    }
}

impl Held {
    /// Threads wait for CPUs.
    fn strain(&mut self, now: Duration, limits: FloodLimits) {
        let is_spared = now < self.spared_until;
        let least = if is_spared { limits.much } else { limits.least };
        let since = now.saturating_sub(self.cut);
        if self.share > least {
            self.too_much = self.share;
            self.share = (self.share / 2.0).max(least);
        } else {
            if since < PATIENCE {
                return;
            }
            let late = self.late.saturating_sub(self.late_at_cut);
            if !is_spared && late as f64 / since.as_secs_f64() > OFTEN {
                self.share = limits.much;
                self.spared_until = now + SPARED;
            }
        }
        self.cut = now;
        self.late_at_cut = self.late;
    }

    /// They don't, and didn't in that time.
    fn grow(&mut self, elapsed: Duration) {
        let near = self.too_much * NEAR;
        if self.share < near {
            let grown = self.share * GROWTH.powf(elapsed.div_duration_f64(GROWS_EVERY));
            self.share = grown.min(near);
        } else {
            self.share *= GROWTH.powf(elapsed.div_duration_f64(GROWS_SLOWLY_EVERY));
        }
    }
}

/// The part of the node's CPUs that a pod may use for however long.
const MUCH: f64 = 0.15;
/// How long a pod may use all the CPUs before it can be a flood; with 30 percent of them some six times as long.
const BURST: Duration = Duration::from_millis(40);
/// What a cut did is to be seen before the next one,
const CUT_EVERY: Duration = Duration::from_millis(30);
/// and threads that were found to wait less often in that time did so by chance: where CPUs are short it is five times
/// and more.
const TOO_OFTEN: u64 = 2;
/// For so long nobody has waited before it grows, so much each time,
const CALM: Duration = Duration::from_millis(200);
const GROWTH: f64 = 1.25;
/// in that time while it is less than so much of what was too much, and then in that time.
const GROWS_EVERY: Duration = Duration::from_millis(100);
const NEAR: f64 = 0.75;
const GROWS_SLOWLY_EVERY: Duration = Duration::from_secs(3);
/// For how long a pod has the least before it is asked whether that helps.
const PATIENCE: Duration = Duration::from_secs(2);
/// Threads that were found to wait so often a second do so all the time.
const OFTEN: f64 = 40.0;
/// For how long a pod has more after it did not help.
const SPARED: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A pod on a node of two CPUs, looked at every two milliseconds, which uses all that it may of what it wants.
    struct Pod {
        flood: Flood,
        now: Duration,
        late: u64,
        verdict: Verdict,
        /// Milliseconds that it was held back for.
        held_ms: u64,
    }

    impl Pod {
        fn new() -> Self {
            Self {
                flood: Flood::new(FloodLimits::percent_of(5, 2)),
                now: Duration::ZERO,
                late: 0,
                verdict: Verdict::Free,
                held_ms: 0,
            }
        }

        fn share(&self) -> f64 {
            match self.verdict {
                Verdict::Free => f64::INFINITY,
                Verdict::Held { share, .. } => share,
            }
        }

        /// For so long it wants so many CPUs; threads wait if `waits` of what it uses.
        fn wants(&mut self, cpus: f64, ms: u64, waits: impl Fn(f64) -> bool) -> f64 {
            let mut all_used = Duration::ZERO;
            let mut short_until = Duration::ZERO;
            for _ in 0..ms / 2 {
                self.now += STEP;
                let uses = cpus.min(self.share());
                if waits(uses) {
                    self.late += 1;
                    short_until = self.now + Duration::from_secs(1);
                }
                let used = STEP.mul_f64(uses);
                all_used += used;
                self.verdict = self.flood.look(View {
                    now: self.now,
                    used,
                    is_short: self.now < short_until,
                    late: self.late,
                });
                if self.verdict != Verdict::Free {
                    self.held_ms += 2;
                }
            }
            all_used.as_secs_f64() / (ms as f64 / 1000.0)
        }
    }

    const STEP: Duration = Duration::from_millis(2);
    const MINUTE: u64 = 60_000;

    #[test]
    fn who_is_held_back() {
        // CPUs that it wants, for how long, and whether threads wait → whether it ever is
        for (cpus, ms, waits, held) in [
            // All there is, while nobody waits.
            (2.0, MINUTE, false, false),
            // What a node can spare for one.
            (0.29, MINUTE, true, false),
            // Bursts, of all and of somewhat more than there is to spare.
            (2.0, 40, true, false),
            (0.6, 240, true, false),
            // And for too long.
            (2.0, 60, true, true),
            (0.6, 300, true, true),
            (0.4, 1000, true, true),
        ] {
            let mut pod = Pod::new();
            pod.wants(cpus, ms, |_| waits);
            let told = format!("{cpus} CPUs for {ms} ms, others wait: {waits}");
            assert_eq!(pod.held_ms > 0, held, "{told}");
        }
    }

    #[test]
    fn bursts_may_come_back_when_the_bucket_is_empty_again() {
        let mut pod = Pod::new();
        for _ in 0..20 {
            pod.wants(1.5, 50, |_| true);
            pod.wants(0.0, 250, |_| true);
        }
        assert_eq!(pod.held_ms, 0);
        for _ in 0..20 {
            pod.wants(1.5, 50, |_| true);
            pod.wants(0.0, 100, |_| true);
        }
        assert!(pod.held_ms > 0, "more than a node can spare for long");
    }

    #[test]
    fn a_flood_is_held_back_to_the_least_soon_and_no_further() {
        let mut pod = Pod::new();
        pod.wants(0.8, 250, |uses| uses > 0.11);
        assert!((pod.share() - 0.1).abs() < 0.001, "{:?}", pod.verdict);
        let used = pod.wants(0.8, MINUTE, |uses| uses > 0.11);
        assert!((0.09..0.12).contains(&used), "{used}");
    }

    #[test]
    fn a_busy_pod_gets_what_there_is_to_have() {
        // Wants 0.8 of two CPUs, and others wait if it has more than so much.
        for spare in [0.2, 0.3, 0.45, 0.7] {
            let mut pod = Pod::new();
            let used = pod.wants(0.8, MINUTE, |uses| uses > spare);
            assert!(
                used > spare * 0.7 && used < spare * 1.05,
                "{used} of {spare}"
            );
        }
    }

    #[test]
    fn it_is_let_go_step_by_step() {
        let mut pod = Pod::new();
        pod.wants(0.8, 500, |_| true);
        let mut before = pod.share();
        let mut seconds = 0;
        while pod.verdict != Verdict::Free {
            for _ in 0..10 {
                pod.wants(0.8, 100, |_| false);
                let now = pod.share();
                assert!(now >= before && (now <= before * 1.3 || pod.verdict == Verdict::Free));
                before = now;
            }
            seconds += 1;
            assert!(seconds < 60, "it never is");
        }
        assert!(seconds > 5, "it was at once");
    }

    #[test]
    fn what_does_not_help_is_not_done() {
        let mut pod = Pod::new();
        pod.wants(0.8, 1500, |_| true);
        assert!(pod.share() < 0.11);
        // They wait whatever it uses.
        let used = pod.wants(0.8, MINUTE, |_| true);
        assert!((0.25..=0.31).contains(&used), "{used}");
    }

    #[test]
    fn with_100_percent_it_is_off() {
        let mut pod = Pod::new();
        pod.flood = Flood::new(FloodLimits::percent_of(100, 2));
        assert!(pod.flood.limits.is_off());
        pod.wants(2.0, MINUTE, |_| true);
        assert_eq!(pod.held_ms, 0);
    }

    #[test]
    fn shares_are_of_all_cpus() {
        for (percent, cpus, much, least) in [
            (5, 2, 0.3, 0.1),
            (5, 32, 4.8, 1.6),
            (20, 4, 0.8, 0.8),
            (0, 10, 1.5, 0.1),
            (255, 2, 2.0, 2.0),
        ] {
            let limits = FloodLimits::percent_of(percent, cpus);
            let near = |one: f64, other: f64| (one - other).abs() < 1e-9;
            assert!(
                near(limits.much, much) && near(limits.least, least),
                "{limits:?}"
            );
        }
    }

    proptest! {
        /// Whatever happens, shares stay between the least and all, nobody is held back before the bucket was full
        /// while CPUs were short, and whoever is left in peace is free in the end.
        #[test]
        fn shares_stay_within_bounds(
            views in proptest::collection::vec((0..200_u64, 0.0..2.5_f64, any::<bool>(), 0..50_u64), 1..300),
        ) {
            let limits = FloodLimits::percent_of(5, 2);
            let mut flood = Flood::new(limits);
            let (mut now, mut late, mut was_held) = (Duration::ZERO, 0, false);
            for (ms, cpus, is_short, more_late) in views {
                let elapsed = Duration::from_millis(ms);
                now += elapsed;
                late += more_late;
                let view = View { now, used: elapsed.mul_f64(cpus), is_short, late };
                match flood.look(view) {
                    Verdict::Free => was_held = false,
                    Verdict::Held { share, anew } => {
                        prop_assert!(share >= limits.least && share < limits.all, "{share}");
                        prop_assert_eq!(anew, !was_held);
                        prop_assert!(!anew || is_short && share == limits.much);
                        was_held = true;
                    }
                }
            }
            for _ in 0..3 {
                now += Duration::from_secs(60);
                flood.look(View { now, used: Duration::ZERO, is_short: false, late });
            }
            prop_assert!(flood.held.is_none());
        }

        /// A pod that uses no more than a node can spare for one is never held back.
        #[test]
        fn the_modest_are_never_held_back(
            views in proptest::collection::vec((1..200_u64, 0.0..0.3_f64), 1..300),
        ) {
            let mut flood = Flood::new(FloodLimits::percent_of(5, 2));
            let mut now = Duration::ZERO;
            for (late, (ms, cpus)) in (1..).zip(views) {
                let elapsed = Duration::from_millis(ms);
                now += elapsed;
                let view = View { now, used: elapsed.mul_f64(cpus), is_short: true, late };
                prop_assert_eq!(flood.look(view), Verdict::Free);
            }
        }
    }
}
