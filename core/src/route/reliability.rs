//! How long requests may take, and when they are sent again: as domain types, and how their parts are written.
//!
//! What is done by them is the agent's; here is what can be decided without a clock.

use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// What holds for the requests of a rule, or of a Service, beside where they go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reliability {
    /// How long they may take.
    pub timeouts: Timeouts,
    /// When they are sent again; none: never.
    pub retry: Option<Retry>,
    /// Clients may say in headers how long a request may take.
    pub heeds_headers: bool,
}

/// How long requests may take; none: as long as they do. Never zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Timeouts {
    /// From a request's head to the end of its response, with all tries (`HTTPRouteTimeouts.request`).
    #[serde(serialize_with = "seconds")]
    pub request: Option<Duration>,
    /// From the end of a request to the end of its response, for each try.
    #[serde(serialize_with = "seconds")]
    pub response: Option<Duration>,
    /// From the beginning of a try to the end of its response (`HTTPRouteTimeouts.backendRequest`).
    #[serde(serialize_with = "seconds")]
    pub backend_request: Option<Duration>,
    /// While nothing of a body moves, or a response is waited for.
    #[serde(serialize_with = "seconds")]
    pub idle: Option<Duration>,
}

/// When requests are sent again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Retry {
    /// Statuses of HTTP that are no answer yet. What the mesh answers in a server's place counts too.
    pub http: Vec<StatusRange>,
    /// Statuses of gRPC that are none.
    pub grpc: GrpcCodes,
    /// Whether all failures of connections are to be tried again, whatever they are answered with.
    pub on_failure: bool,
    /// How often a request may be sent again.
    pub limit: u16,
    /// How long to wait for a response's head before the request is sent again.
    #[serde(serialize_with = "seconds")]
    pub try_timeout: Option<Duration>,
    /// How long to wait between tries.
    pub backoff: Backoff,
    /// How many retries there may be, of all requests.
    pub budget: BudgetSettings,
}

/// A range of statuses of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StatusRange {
    /// The first one.
    pub first: u16,
    /// The last one.
    pub last: u16,
}

/// Statuses of gRPC, each a bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrpcCodes(u32);

/// How long to wait between tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Backoff {
    /// Never shorter.
    #[serde(serialize_with = "plain_seconds")]
    pub least: Duration,
    /// Never longer.
    #[serde(serialize_with = "plain_seconds")]
    pub most: Duration,
}

/// What bounds retries, so that a server that fails gets no multiple of its requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct BudgetSettings {
    /// Retries per thousand requests.
    pub ratio_thousandths: u32,
    /// Retries per second beside them, so that few requests may be retried too.
    pub per_second: u32,
    /// For how long a request lets others be retried.
    #[serde(serialize_with = "plain_seconds")]
    pub ttl: Duration,
}

/// Why a text is no duration, no status, or none of their lists.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReliabilityError {
    /// GEP-2257.
    #[error(
        "{0:?} is no duration: up to four numbers of up to five digits, each with h, m, s or ms"
    )]
    Duration(String),
    /// Of an annotation.
    #[error(
        "{0:?} is no status of HTTP: 5xx, gateway-error, a number from 100 to 599, or a range of them"
    )]
    Status(String),
    /// Of an annotation.
    #[error(
        "{0:?} is no status of gRPC to retry: cancelled, deadline-exceeded, resource-exhausted, internal, \
         unavailable"
    )]
    Code(String),
}

impl Reliability {
    /// Whether anything is to be done.
    pub fn is_any(&self) -> bool {
        *self != Self::default()
    }
}

impl Retry {
    /// One retry, of nothing: what is not said otherwise.
    pub fn new() -> Self {
        Self {
            http: vec![],
            grpc: GrpcCodes::default(),
            on_failure: false,
            limit: 1,
            try_timeout: None,
            backoff: Backoff::DEFAULT,
            budget: BudgetSettings::DEFAULT,
        }
    }

    /// Whether a response with this status is none yet.
    pub fn is_for_status(&self, status: u16) -> bool {
        self.http.iter().any(|it| it.contains(status))
    }

    /// Whether a response with this status of gRPC is none yet.
    pub fn is_for_code(&self, code: u32) -> bool {
        self.grpc.contains(code)
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self::new()
    }
}

impl StatusRange {
    /// A range that is one.
    ///
    /// # Errors
    /// It is not within 100 to 599, or ends before it begins.
    pub fn new(first: u16, last: u16) -> Result<Self, ReliabilityError> {
        let good = (100..600).contains(&first) && (first..600).contains(&last);
        let error = || ReliabilityError::Status(format!("{first}-{last}"));
        good.then_some(Self { first, last }).ok_or_else(error)
    }

    /// Whether a status is of it.
    pub fn contains(self, status: u16) -> bool {
        (self.first..=self.last).contains(&status)
    }

    /// Reads a list as annotations have it: `5xx`, `gateway-error`, `500-504,429`.
    ///
    /// # Errors
    /// What is none of these.
    pub fn list(text: &str) -> Result<Vec<Self>, ReliabilityError> {
        let one = |part: &str| {
            let part = part.trim();
            let error = || ReliabilityError::Status(shown(part));
            if part.eq_ignore_ascii_case("5xx") {
                return Self::new(500, 599);
            }
            if part.eq_ignore_ascii_case("gateway-error") {
                return Self::new(502, 504);
            }
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |it: &str| it.trim().parse::<u16>().map_err(|_| error());
            Self::new(number(first)?, number(last)?).map_err(|_| error())
        };
        text.split(',').map(one).collect()
    }
}

impl GrpcCodes {
    /// What annotations may name.
    const NAMED: [(&'static str, u32); 5] = [
        ("cancelled", 1),
        ("deadline-exceeded", 4),
        ("resource-exhausted", 8),
        ("internal", 13),
        ("unavailable", 14),
    ];

    /// These; numbers that are no status are left out.
    pub fn new(codes: impl IntoIterator<Item = u32>) -> Self {
        let bits = codes.into_iter().filter(|it| *it < 32);
        Self(bits.fold(0, |all, it| all | 1 << it))
    }

    /// Whether this is one of them.
    pub fn contains(self, code: u32) -> bool {
        code < 32 && self.0 & (1 << code) != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// All of them, ascending.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..32).filter(move |it| self.contains(*it))
    }

    /// Reads a list as annotations have it: `cancelled,deadline-exceeded,unavailable`.
    ///
    /// # Errors
    /// What names none that can be tried again.
    pub fn list(text: &str) -> Result<Self, ReliabilityError> {
        let code = |part: &str| {
            let part = part.trim();
            let named = Self::NAMED.iter();
            let mut named = named.filter(|(name, _)| name.eq_ignore_ascii_case(part));
            let found = named.next().map(|(_, code)| *code);
            found.ok_or_else(|| ReliabilityError::Code(shown(part)))
        };
        let codes: Result<Vec<u32>, _> = text.split(',').map(code).collect();
        Ok(Self::new(codes?))
    }
}

impl Backoff {
    /// Where nobody says otherwise.
    pub const DEFAULT: Self = Self {
        least: Duration::from_millis(25),
        most: Duration::from_millis(250),
    };

    /// With this in place of the least.
    pub fn from_least(least: Duration) -> Self {
        let most = least.saturating_mul(10).max(Self::DEFAULT.most);
        Self { least, most }
    }

    /// How long to wait before a retry, the first of which is 0: anything from the least to a bound that doubles
    /// with each, so that clients which failed at the same moment do not come back at the same moment.
    ///
    /// `random` is a number out of all of its type.
    pub fn wait(&self, retry: u32, random: u64) -> Duration {
        let doubled = 1_u32
            .checked_shl(retry.saturating_add(1))
            .unwrap_or(u32::MAX);
        let bound = self.least.saturating_mul(doubled).min(self.most);
        let span = bound.saturating_sub(self.least);
        let nanos = (u128::from(random) * span.as_nanos()) >> 64;
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        self.least + Duration::from_nanos(nanos)
    }
}

impl BudgetSettings {
    /// Where nobody says otherwise: a retry for five requests, and ten in each second.
    pub const DEFAULT: Self = Self {
        ratio_thousandths: 200,
        per_second: 10,
        ttl: Duration::from_secs(10),
    };
}

/// Reads a duration of the Gateway API (GEP-2257): `1h`, `1m30s`, `500ms`. Zero is none.
///
/// # Errors
/// It is none of these.
pub fn duration(text: &str) -> Result<Option<Duration>, ReliabilityError> {
    let error = || ReliabilityError::Duration(shown(text));
    let mut rest = text;
    let mut total = Duration::ZERO;
    for _ in 0..4 {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        if digits > 5 {
            return Err(error());
        }
        let number: u64 = number.parse().map_err(|_| error())?;
        // The longer unit first: "m" begins "ms".
        let units = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1000)];
        let unit = units
            .iter()
            .find_map(|(unit, ms)| Some((after.strip_prefix(unit)?, ms)));
        let (after, ms) = unit.ok_or_else(error)?;
        total += Duration::from_millis(number * ms);
        rest = after;
        if rest.is_empty() {
            return Ok(Some(total).filter(|it| !it.is_zero()));
        }
    }
    Err(error())
}

/// Reads a duration as annotations have it: as the Gateway API does, a number of days (`2d`), or `0`.
///
/// # Errors
/// It is none of these.
pub fn annotated_duration(text: &str) -> Result<Option<Duration>, ReliabilityError> {
    let text = text.trim();
    let days = text.strip_suffix('d').and_then(|it| it.parse::<u16>().ok());
    match (text, days) {
        ("0", _) => Ok(None),
        (_, Some(days)) => {
            let days = Duration::from_secs(u64::from(days) * 24 * 3600);
            Ok(Some(days).filter(|it| !it.is_zero()))
        }
        (text, None) => duration(text),
    }
}

/// Reads what a client of gRPC says about how long it waits (`grpc-timeout`: "Requests" of its HTTP/2
/// mapping). None: it is not one.
pub fn grpc_timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let digits = number.bytes().all(|it| it.is_ascii_digit());
    if !digits || !(1..=8).contains(&number.len()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// Writes it: rounded down to what eight digits can say, never more than it was.
pub fn write_grpc_timeout(time: Duration) -> String {
    const MOST: u128 = 99_999_999;
    let units = [
        (time.as_nanos(), 'n'),
        (time.as_micros(), 'u'),
        (time.as_millis(), 'm'),
        (u128::from(time.as_secs()), 'S'),
        (u128::from(time.as_secs() / 60), 'M'),
    ];
    let fits = units.iter().find(|(number, _)| *number <= MOST);
    match fits {
        Some((number, unit)) => format!("{number}{unit}"),
        None => format!("{}H", (u128::from(time.as_secs() / 3600)).min(MOST)),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

fn seconds<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|it| it.as_secs_f64()).serialize(serializer)
}

fn plain_seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    time.as_secs_f64().serialize(serializer)
}

/// As numbers.
impl Serialize for GrpcCodes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

/// `503`, `500-599`.
impl fmt::Display for StatusRange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last } = self;
        match first == last {
            true => write!(formatter, "{first}"),
            false => write!(formatter, "{first}-{last}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(number: u64) -> Option<Duration> {
        Some(Duration::from_millis(number))
    }

    #[test]
    fn durations_of_the_gateway_api() {
        for (text, is) in [
            ("0s", Ok(None)),
            ("0h0m0s0ms", Ok(None)),
            ("10ms", Ok(ms(10))),
            ("1m", Ok(ms(60_000))),
            ("1h1m1s1ms", Ok(ms(3_661_001))),
            ("1ms1h", Ok(ms(3_600_001))),
            ("99999h", Ok(ms(99_999 * 3_600_000))),
            ("", Err(())),
            ("0", Err(())),
            ("1", Err(())),
            ("1d", Err(())),
            ("1.5s", Err(())),
            ("-1s", Err(())),
            ("100000s", Err(())),
            ("1s ", Err(())),
            ("1s1s1s1s1s", Err(())),
            ("ms", Err(())),
            ("1µs", Err(())),
        ] {
            assert_eq!(duration(text).map_err(|_| ()), is, "{text:?}");
        }
    }

    #[test]
    fn durations_of_annotations() {
        for (text, is) in [
            ("0", Ok(None)),
            ("0d", Ok(None)),
            (" 2s ", Ok(ms(2000))),
            ("1d", Ok(ms(86_400_000))),
            ("1d1s", Err(())),
            ("soon", Err(())),
        ] {
            assert_eq!(annotated_duration(text).map_err(|_| ()), is, "{text:?}");
        }
    }

    #[test]
    fn lists_of_statuses() {
        let range = |first, last| StatusRange { first, last };
        for (text, is) in [
            ("5xx", Some(vec![range(500, 599)])),
            ("Gateway-Error", Some(vec![range(502, 504)])),
            ("500-504, 429", Some(vec![range(500, 504), range(429, 429)])),
            ("", None),
            ("4xx", None),
            ("504-500", None),
            ("99", None),
            ("600", None),
            ("500,", None),
            ("3", None),
        ] {
            assert_eq!(StatusRange::list(text).ok(), is, "{text:?}");
        }
        let codes = |text| GrpcCodes::list(text).map(|it| it.iter().collect::<Vec<_>>());
        assert_eq!(codes("unavailable, Cancelled"), Ok(vec![1, 14]));
        assert!(codes("ok").is_err() && codes("").is_err() && codes("14").is_err());
    }

    #[test]
    fn times_of_grpc() {
        for (text, is) in [
            ("1S", ms(1000)),
            ("250m", ms(250)),
            ("99999999H", ms(99_999_999 * 3_600_000)),
            ("5u", Some(Duration::from_micros(5))),
            ("0n", Some(Duration::ZERO)),
            ("100000000n", None),
            ("S", None),
            ("1", None),
            ("1s", None),
            ("+1S", None),
            ("", None),
            ("1é", None),
        ] {
            assert_eq!(grpc_timeout(text), is, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(nanos in 0..u64::MAX) {
            let time = Duration::from_nanos(nanos);
            let read = grpc_timeout(&write_grpc_timeout(time)).expect("one");
            prop_assert!(read <= time);
            // Eight digits.
            prop_assert!(time - read <= time / 100_000 + Duration::from_nanos(1));
        }

        #[test]
        fn waits_are_bounded(retry in 0_u32..80, random: u64) {
            let backoff = Backoff::DEFAULT;
            let wait = backoff.wait(retry, random);
            prop_assert!(wait >= backoff.least && wait <= backoff.most);
            prop_assert!(retry > 0 || wait <= 2 * backoff.least);
        }

        #[test]
        fn no_text_is_too_much(text: String) {
            let _ = (duration(&text), annotated_duration(&text), grpc_timeout(&text));
            let _ = (StatusRange::list(&text), GrpcCodes::list(&text));
        }
    }
}
