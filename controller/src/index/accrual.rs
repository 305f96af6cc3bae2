//! What a Service's annotations say about endpoints that fail: Linkerd's names, and the same as Weft's.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use weft_core::{FailureAccrual, SuccessRate};

use crate::objects::Fault;

/// What a Service says about endpoints that fail.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct AccrualChoice {
    /// When one is left out; none: never.
    pub(super) settings: Option<FailureAccrual>,
    /// Something could not be read: what was said before holds.
    unreadable: bool,
}

/// A setting's annotations; of each the first one present counts.
type Names = [&'static str; 2];

const MODE: Names = [
    "weft.dev/failure-accrual",
    "balancer.linkerd.io/failure-accrual",
];
const MAX_FAILURES: Names = [
    "weft.dev/failure-accrual-consecutive-max-failures",
    "balancer.linkerd.io/failure-accrual-consecutive-max-failures",
];
const MIN_PENALTY: Names = [
    "weft.dev/failure-accrual-consecutive-min-penalty",
    "balancer.linkerd.io/failure-accrual-consecutive-min-penalty",
];
const MAX_PENALTY: Names = [
    "weft.dev/failure-accrual-consecutive-max-penalty",
    "balancer.linkerd.io/failure-accrual-consecutive-max-penalty",
];
const JITTER: Names = [
    "weft.dev/failure-accrual-consecutive-jitter-ratio",
    "balancer.linkerd.io/failure-accrual-consecutive-jitter-ratio",
];
const THRESHOLD: Names = [
    "weft.dev/failure-accrual-success-rate-threshold",
    "balancer.alpha.linkerd.io/failure-accrual-success-rate-threshold",
];
const WINDOW: Names = [
    "weft.dev/failure-accrual-success-rate-window",
    "balancer.alpha.linkerd.io/failure-accrual-success-rate-window",
];
const MIN_REQUESTS: Names = [
    "weft.dev/failure-accrual-success-rate-min-requests",
    "balancer.alpha.linkerd.io/failure-accrual-success-rate-min-requests",
];

/// All of them.
pub(super) const ANNOTATIONS: [Names; 8] = [
    MODE,
    MAX_FAILURES,
    MIN_PENALTY,
    MAX_PENALTY,
    JITTER,
    THRESHOLD,
    WINDOW,
    MIN_REQUESTS,
];

impl AccrualChoice {
    /// Reads annotations. Also returned: faults of those that cannot be read.
    pub(super) fn check(metadata: &ObjectMeta) -> (Self, Vec<Fault>) {
        let mut said = Said {
            metadata,
            faults: vec![],
        };
        let settings = said.settings();
        let choice = Self {
            settings,
            unreadable: !said.faults.is_empty(),
        };
        (choice, said.faults)
    }

    /// Takes what cannot be read now from what was known of the same Service before.
    pub(super) fn complete_by(&mut self, before: &Self) {
        if self.unreadable {
            self.settings = before.settings;
        }
    }
}

struct Said<'a> {
    metadata: &'a ObjectMeta,
    faults: Vec<Fault>,
}

impl Said<'_> {
    fn settings(&mut self) -> Option<FailureAccrual> {
        let (name, mode) = self.find(MODE)?;
        let defaults = FailureAccrual::default();
        let (max_failures, has_rate) = match mode.as_str() {
            "consecutive" => (defaults.max_failures, false),
            "unified" => (defaults.max_failures, true),
            "success-rate" => (0, true),
            _ => {
                let reason = "is none of consecutive, unified and success-rate";
                self.fault(name, &mode, reason);
                return None;
            }
        };
        let rate = SuccessRate::default();
        let settings = FailureAccrual {
            max_failures: match max_failures {
                0 => 0,
                default => self.read(MAX_FAILURES, default, "is no number", |it| it.parse().ok()),
            },
            min_penalty: self.duration(MIN_PENALTY, defaults.min_penalty),
            max_penalty: self.duration(MAX_PENALTY, defaults.max_penalty),
            jitter_permille: self.read(
                JITTER,
                defaults.jitter_permille,
                "is no number from 0 to 100",
                |it| permille(it, FailureAccrual::MAX_JITTER_PERMILLE),
            ),
            success_rate: has_rate.then(|| SuccessRate {
                threshold_permille: self.read(
                    THRESHOLD,
                    rate.threshold_permille,
                    "is no number from 0 to 1",
                    |it| permille(it, 1000),
                ),
                window: self.duration(WINDOW, rate.window),
                min_requests: self.read(MIN_REQUESTS, rate.min_requests, "is no number", |it| {
                    it.parse().ok()
                }),
            }),
        };
        if let Some(fault) = settings.fault() {
            self.faults.push(Fault::new(field(name), fault));
            return None;
        }
        Some(settings)
    }

    fn duration(&mut self, names: Names, default: Duration) -> Duration {
        self.read(
            names,
            default,
            "is no duration such as 10s or 1m30s",
            duration,
        )
    }

    fn read<T>(
        &mut self,
        names: Names,
        default: T,
        reason: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        let Some((name, text)) = self.find(names) else {
            return default;
        };
        parse(text.trim()).unwrap_or_else(|| {
            self.fault(name, &text, reason);
            default
        })
    }

    fn find(&self, names: Names) -> Option<(&'static str, String)> {
        let annotations = self.metadata.annotations.as_ref()?;
        let mut names = names.into_iter();
        names.find_map(|name| Some((name, annotations.get(name)?.clone())))
    }

    fn fault(&mut self, name: &str, text: &str, reason: &str) {
        let shown: String = text.chars().take(64).collect();
        let reason = format!("{shown:?} {reason}");
        self.faults.push(Fault::new(field(name), reason));
    }
}

fn field(name: &str) -> String {
    format!("metadata.annotations[{name:?}]")
}

/// Reads a ratio, in thousandths.
fn permille(text: &str, most: u32) -> Option<u32> {
    let ratio: f64 = text.parse().ok()?;
    let permille = (ratio * 1000.0).round();
    // Not a number is not in it either.
    (0.0..=f64::from(most))
        .contains(&permille)
        .then_some(permille as u32)
}

/// Reads a duration as the Gateway API writes it (GEP-2257): up to four numbers of up to five digits,
/// each with `h`, `m`, `s` or `ms`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    for _ in 0..4 {
        let digits = rest.find(|it: char| !it.is_ascii_digit())?;
        let (number, unit) = rest.split_at(digits);
        if number.len() > 5 {
            return None;
        }
        let number: u64 = number.parse().ok()?;
        let end = unit
            .find(|it: char| it.is_ascii_digit())
            .unwrap_or(unit.len());
        let (unit, next) = unit.split_at(end);
        total += match unit {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number * 60),
            "h" => Duration::from_secs(number * 3600),
            _ => return None,
        };
        if next.is_empty() {
            return Some(total);
        }
        rest = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(annotations: &[(&str, &str)]) -> (AccrualChoice, Vec<Fault>) {
        let annotations = annotations.iter();
        let annotations =
            annotations.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        AccrualChoice::check(&ObjectMeta {
            annotations: Some(annotations.collect()),
            ..ObjectMeta::default()
        })
    }

    fn settings(annotations: &[(&str, &str)]) -> Option<FailureAccrual> {
        let (choice, faults) = check(annotations);
        assert_eq!(faults, []);
        choice.settings
    }

    #[test]
    fn annotations_are_read_as_linkerd_reads_them() {
        assert_eq!(settings(&[]), None);
        // Numbers alone switch nothing on.
        assert_eq!(settings(&[(MAX_FAILURES[1], "3")]), None);
        let default = Some(FailureAccrual::default());
        assert_eq!(settings(&[(MODE[1], "consecutive")]), default);
        assert_eq!(settings(&[(MODE[0], "consecutive")]), default);
        let all = |name: usize| {
            [
                (MODE[name], "unified"),
                (MAX_FAILURES[name], "3"),
                (MIN_PENALTY[name], "500ms"),
                (MAX_PENALTY[name], "1m30s"),
                (JITTER[name], "0.25"),
                (THRESHOLD[name], "0.95"),
                (WINDOW[name], "30s"),
                (MIN_REQUESTS[name], "100"),
            ]
        };
        let expected = FailureAccrual {
            max_failures: 3,
            min_penalty: Duration::from_millis(500),
            max_penalty: Duration::from_secs(90),
            jitter_permille: 250,
            success_rate: Some(SuccessRate {
                threshold_permille: 950,
                window: Duration::from_secs(30),
                min_requests: 100,
            }),
        };
        assert_eq!(settings(&all(0)), Some(expected));
        assert_eq!(settings(&all(1)), Some(expected));
        let rate = settings(&[(MODE[0], "success-rate")]).expect("on");
        assert_eq!(
            (rate.max_failures, rate.success_rate),
            (0, Some(SuccessRate::default()))
        );
        // Weft's name comes first.
        let others = [
            (MODE[1], "consecutive"),
            (MAX_FAILURES[1], "9"),
            (MIN_PENALTY[1], "1s"),
            (MAX_PENALTY[1], "2s"),
            (JITTER[1], "0.5"),
            (THRESHOLD[1], "0.5"),
            (WINDOW[1], "20s"),
            (MIN_REQUESTS[1], "7"),
        ];
        let both = [all(0), others].concat();
        assert_eq!(settings(&both), Some(expected));
    }

    #[test]
    fn what_cannot_be_read_is_reported_and_leaves_what_was() {
        let on = (MODE[1], "consecutive");
        for bad in [
            [(MODE[1], "sometimes"), ("x", "y")],
            [on, (MAX_FAILURES[1], "-1")],
            [on, (MIN_PENALTY[1], "0s")],
            [on, (MIN_PENALTY[1], "2m")],
            [on, (MAX_PENALTY[1], "1.5s")],
            [on, (MAX_PENALTY[1], "99999h")],
            [on, (JITTER[1], "101")],
            [on, (JITTER[1], "NaN")],
            [(MODE[1], "unified"), (THRESHOLD[1], "1.01")],
            [(MODE[1], "unified"), (WINDOW[1], "10ms")],
        ] {
            let (mut choice, faults) = check(&bad);
            assert_eq!(faults.len(), 1, "{bad:?}: {faults:?}");
            let (before, _) = check(&[on, (MAX_FAILURES[1], "4")]);
            choice.complete_by(&before);
            assert_eq!(choice.settings, before.settings, "{bad:?}");
        }
    }

    #[test]
    fn durations() {
        for (text, milliseconds) in [
            ("0s", 0),
            ("500ms", 500),
            ("10s", 10_000),
            ("1h2m3s4ms", 3_723_004),
        ] {
            assert_eq!(duration(text), Some(Duration::from_millis(milliseconds)));
        }
        for bad in ["", "1", "s", "-1s", "1d", "1.5s", "100000s", "1s2s3s4s5s"] {
            assert_eq!(duration(bad), None, "{bad:?}");
        }
    }
}
