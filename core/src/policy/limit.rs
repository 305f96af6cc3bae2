//! Limits of requests per second, and the decision over them. Pure: whoever asks says what time it is.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::time::Duration;

use serde::Serialize;

use super::AuthorizationName;
use crate::identity::Identity;

/// How many requests a Server takes (HTTPLocalRateLimitPolicy), at each of its pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RateLimit {
    /// The policy's name, for metrics.
    pub name: AuthorizationName,
    /// Per second, of all clients together.
    pub total: Option<NonZeroU32>,
    /// Per second, of each identity; clients without one share one.
    pub identity: Option<NonZeroU32>,
    /// In place of the latter, for some identities.
    pub overrides: Vec<RateOverride>,
}

/// A limit for some identities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RateOverride {
    /// Per second, of these together.
    pub requests_per_second: NonZeroU32,
    /// Whose.
    pub clients: Vec<Identity>,
}

/// Which limit a request is above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LimitScope {
    /// That of all clients.
    Total,
    /// That of each identity.
    Identity,
    /// One for some identities.
    Override,
}

/// A request above a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limited {
    /// Which.
    pub scope: LimitScope,
    /// When there will be room for one more.
    pub retry_after: Duration,
}

/// Applies a [`RateLimit`] at one pod.
///
/// Each rate is kept by the generic cell rate algorithm: a second's worth of requests may come at once, and
/// from then on one each time that the rate has room for one. That takes one number for each rate.
#[derive(Clone, Debug)]
pub struct Limiter {
    limit: RateLimit,
    total: Cell,
    overrides: Vec<Cell>,
    identities: HashMap<Identity, Cell>,
    /// Of who has no identity.
    strangers: Cell,
    /// Of identities for which there is no room.
    others: Cell,
    /// When those that were quiet were looked for last.
    swept: u64,
}

/// When the next request would come if all came evenly: in nanoseconds since the limiter's beginning.
#[derive(Clone, Copy, Debug, Default)]
struct Cell(u64);

impl Limiter {
    /// A limiter that has seen no request.
    pub fn new(limit: RateLimit) -> Self {
        Self {
            total: Cell::default(),
            overrides: vec![Cell::default(); limit.overrides.len()],
            identities: HashMap::new(),
            strangers: Cell::default(),
            others: Cell::default(),
            swept: 0,
            limit,
        }
    }

    /// What it applies.
    pub fn limit(&self) -> &RateLimit {
        &self.limit
    }

    /// Takes a request, at a time since some beginning that stays the same. A request that is refused
    /// counts for nobody.
    ///
    /// # Errors
    /// It is above a limit.
    pub fn take(&mut self, client: Option<&Identity>, now: Duration) -> Result<(), Limited> {
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let own = match self.place(client, now) {
            None => None,
            Some((place, rate, scope)) => {
                let after = self.cell(place).after(rate, now);
                let after = after.map_err(|retry_after| Limited { scope, retry_after })?;
                Some((place, after))
            }
        };
        if let Some(rate) = self.limit.total {
            self.total = self.total.after(rate, now).map_err(|retry_after| Limited {
                scope: LimitScope::Total,
                retry_after,
            })?;
        }
        // Only now that both have room.
        if let Some((place, after)) = own {
            *self.cell(place) = after;
        }
        Ok(())
    }

    /// Whether a request would be taken now: nothing is counted.
    ///
    /// # Errors
    /// It would be above a limit.
    pub fn look(&self, client: Option<&Identity>, now: Duration) -> Result<(), Limited> {
        let own = client.and_then(|it| Some((it.clone(), *self.identities.get(it)?)));
        let mut like = Self {
            limit: self.limit.clone(),
            overrides: self.overrides.clone(),
            identities: own.into_iter().collect(),
            ..*self
        };
        like.take(client, now)
    }

    /// Which cell a client's requests are kept in, besides that of all; none: it has no limit of its own.
    fn place<'a>(
        &mut self,
        client: Option<&'a Identity>,
        now: u64,
    ) -> Option<(Place<'a>, NonZeroU32, LimitScope)> {
        if let Some(client) = client {
            let mut overrides = self.limit.overrides.iter().enumerate();
            if let Some((index, it)) = overrides.find(|(_, it)| it.clients.contains(client)) {
                let rate = it.requests_per_second;
                return Some((Place::Override(index), rate, LimitScope::Override));
            }
        }
        let rate = self.limit.identity?;
        let place = match client {
            None => Place::Strangers,
            Some(client) if self.identities.contains_key(client) => Place::Identity(client),
            Some(client) if self.has_room(now) => {
                self.identities.insert(client.clone(), Cell::default());
                Place::Identity(client)
            }
            Some(_) => Place::Others,
        };
        Some((place, rate, LimitScope::Identity))
    }

    fn cell(&mut self, place: Place<'_>) -> &mut Cell {
        match place {
            Place::Override(index) => &mut self.overrides[index],
            // It was just found there, or put there.
            Place::Identity(client) => self.identities.get_mut(client).unwrap_or(&mut self.others),
            Place::Strangers => &mut self.strangers,
            Place::Others => &mut self.others,
        }
    }

    /// Whether one more identity can be remembered: those that have been quiet long enough are as if they
    /// had never been there.
    fn has_room(&mut self, now: u64) -> bool {
        let is_due = self.swept == 0 || now.saturating_sub(self.swept) >= SECOND / 10;
        if self.identities.len() >= MOST_IDENTITIES && is_due {
            self.swept = now.max(1);
            self.identities.retain(|_, cell| cell.0 > now);
        }
        self.identities.len() < MOST_IDENTITIES
    }
}

#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    Override(usize),
    Identity(&'a Identity),
    Strangers,
    Others,
}

impl Cell {
    /// What it is after one more request; or how long that would have to wait.
    fn after(self, rate: NonZeroU32, now: u64) -> Result<Self, Duration> {
        let interval = SECOND / u64::from(rate.get());
        let next = self.0.max(now).saturating_add(interval);
        let ahead = next - now;
        match ahead.checked_sub(SECOND) {
            None | Some(0) => Ok(Self(next)),
            Some(wait) => Err(Duration::from_nanos(wait)),
        }
    }
}

impl LimitScope {
    /// As in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Identity => "identity",
            Self::Override => "override",
        }
    }
}

const SECOND: u64 = 1_000_000_000;
/// Identities that one limiter remembers at once; further ones share a rate. A namespace seldom has as many
/// callers in one second.
const MOST_IDENTITIES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyGroup;

    fn identity(account: &str) -> Identity {
        let text = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        text.parse().expect("valid")
    }

    fn limiter(total: u32, each: u32, overrides: &[(u32, &[&str])]) -> Limiter {
        let overrides = overrides.iter().map(|(rate, accounts)| RateOverride {
            requests_per_second: NonZeroU32::new(*rate).expect("a rate"),
            clients: accounts.iter().map(|it| identity(it)).collect(),
        });
        Limiter::new(RateLimit {
            name: AuthorizationName {
                group: PolicyGroup::Weft,
                name: "shop/limit".parse().expect("valid"),
            },
            total: NonZeroU32::new(total),
            identity: NonZeroU32::new(each),
            overrides: overrides.collect(),
        })
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// How many of a burst of requests pass.
    fn burst(limiter: &mut Limiter, account: Option<&str>, ms: u64) -> usize {
        let client = account.map(identity);
        let taken = (0..100).filter(|_| limiter.take(client.as_ref(), at(ms)).is_ok());
        taken.count()
    }

    #[test]
    fn who_only_looks_takes_nothing() {
        let mut limiter = limiter(0, 2, &[(1, &["few"])]);
        let (order, few) = (identity("order"), identity("few"));
        for taken in 0..3 {
            for _ in 0..5 {
                let looked = limiter.look(Some(&order), at(0));
                assert_eq!(looked.is_ok(), taken < 2, "{taken}");
            }
            assert_eq!(limiter.take(Some(&order), at(0)).is_ok(), taken < 2);
        }
        assert_eq!(limiter.look(Some(&few), at(0)), Ok(()));
        assert_eq!(limiter.take(Some(&few), at(0)), Ok(()));
        let limited = limiter.look(Some(&few), at(0)).expect_err("above");
        assert_eq!(limited.scope, LimitScope::Override);
    }

    #[test]
    fn a_second_s_worth_comes_at_once_and_then_evenly() {
        let mut limiter = limiter(10, 0, &[]);
        assert_eq!(burst(&mut limiter, None, 5_000), 10);
        let limited = limiter.take(None, at(5_000)).expect_err("above");
        assert_eq!(limited.scope, LimitScope::Total);
        assert_eq!(limited.retry_after, at(100));
        assert_eq!(burst(&mut limiter, None, 5_099), 0);
        assert_eq!(burst(&mut limiter, None, 5_100), 1);
        assert_eq!(burst(&mut limiter, None, 5_350), 2);
        assert_eq!(burst(&mut limiter, None, 60_000), 10);
    }

    #[test]
    fn identities_have_rates_of_their_own() {
        let mut limiter = limiter(0, 3, &[(5, &["vip", "other-vip"])]);
        assert_eq!(burst(&mut limiter, Some("a"), 0), 3);
        assert_eq!(burst(&mut limiter, Some("b"), 0), 3);
        assert_eq!(burst(&mut limiter, None, 0), 3);
        assert_eq!(burst(&mut limiter, Some("vip"), 0), 5);
        assert_eq!(burst(&mut limiter, Some("other-vip"), 0), 0, "shared");
        let scope = |limiter: &mut Limiter, account| {
            let limited = limiter.take(Some(&identity(account)), at(0));
            limited.expect_err("above").scope
        };
        assert_eq!(scope(&mut limiter, "a"), LimitScope::Identity);
        assert_eq!(scope(&mut limiter, "vip"), LimitScope::Override);
    }

    #[test]
    fn what_is_refused_counts_for_nobody() {
        let mut limiter = limiter(4, 3, &[]);
        assert_eq!(burst(&mut limiter, Some("a"), 0), 3);
        assert_eq!(burst(&mut limiter, Some("b"), 0), 1, "all that is left");
        // Of its own three, b has two left.
        assert_eq!(burst(&mut limiter, Some("b"), 500), 2);
    }

    #[test]
    fn no_limit_is_none() {
        let mut limiter = limiter(0, 0, &[]);
        assert_eq!(burst(&mut limiter, None, 0), 100);
        assert_eq!(burst(&mut limiter, Some("a"), 0), 100);
        assert!(limiter.identities.is_empty());
    }

    #[test]
    fn the_state_of_identities_is_bounded() {
        let mut limiter = limiter(0, 1, &[]);
        for number in 0..MOST_IDENTITIES + 10 {
            let _ = limiter.take(Some(&identity(&format!("a{number}"))), at(0));
        }
        assert_eq!(limiter.identities.len(), MOST_IDENTITIES);
        assert_eq!(burst(&mut limiter, Some("late"), 0), 0, "they share one");
        assert_eq!(burst(&mut limiter, Some("late"), 1_000), 1);
        assert_eq!(limiter.identities.len(), 1, "the others are forgotten");
    }
}
