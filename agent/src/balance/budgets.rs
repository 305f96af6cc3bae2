//! Where budgets of retries are found: by whose they are, and for as long as somebody has use for them.
//!
//! How many there may be is bounded where they are used. Those of a Service's port are kept with the port. Those
//! of routes by which requests leave the cluster are as many as their writers like, and are shared by all pods of the
//! node all the same: each pod holds on to a few, and a budget is there as long as a pod holds it. So a
//! pod that goes by very many rules forgets its own, and nobody else's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use weft_core::route::{BudgetSettings, RouteName};
use weft_core::{EgressName, Name};

use super::budget::RetryBudget;

/// A budget that several requests take from at once.
pub type SharedBudget = Arc<Mutex<RetryBudget>>;

/// Whose a budget is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BudgetOwner {
    /// A rule's: its route, and which one of it.
    Rule(RouteName, usize),
    /// The same of a route by which requests leave the cluster.
    Egress(EgressName, RouteName, usize),
    /// The port's, for requests that no rule is for.
    Port,
    /// The same of clients in a namespace, which has terms of its own.
    ClientsIn(Name),
}

/// The budgets of a service's port: of each rule of its routes, and of requests that none is for. All pods of
/// the node share them.
#[derive(Debug, Default)]
pub struct PortBudgets(Mutex<Lately>);

/// The budgets of all that leaves the cluster: of each rule of each network, for as long as a pod of the node
/// holds on to it.
#[derive(Debug, Default)]
pub struct EgressBudgets(Mutex<Held>);

/// What a pod holds of them, and how often it had to forget one.
#[derive(Debug, Default)]
pub struct PodBudgets {
    lately: Mutex<Lately>,
    forgotten: AtomicU64,
}

/// A few budgets, and when each was last asked for.
#[derive(Debug, Default)]
struct Lately(Vec<Used>);

#[derive(Debug)]
struct Used {
    key: Key,
    budget: SharedBudget,
    last: Instant,
}

/// One for other settings is another one: what is asked for under both in turn must not begin anew each time.
type Key = (BudgetOwner, BudgetSettings);

#[derive(Debug, Default)]
struct Held {
    budgets: HashMap<Key, Weak<Mutex<RetryBudget>>>,
    /// How many there are when those that nobody holds any more are looked for.
    look_at: usize,
}

impl PortBudgets {
    /// Somebody's, for a request of a pod.
    pub fn of(
        &self,
        pod: &PodBudgets,
        owner: BudgetOwner,
        settings: BudgetSettings,
        now: Instant,
    ) -> SharedBudget {
        let make = |_: &Key, is_in_place| made(settings, is_in_place, now);
        locked(&self.0).get((owner, settings), now, MOST_OF_PORT, pod, make)
    }
}

impl PodBudgets {
    /// That of a rule by which a request of the pod leaves the cluster.
    pub fn of_egress(
        &self,
        all: &EgressBudgets,
        owner: BudgetOwner,
        settings: BudgetSettings,
        now: Instant,
    ) -> SharedBudget {
        let make = |key: &Key, is_in_place| all.held(key, || made(settings, is_in_place, now));
        locked(&self.lately).get((owner, settings), now, MOST_OF_POD, self, make)
    }

    /// How often requests of the pod had a budget forgotten that was in use not long ago, for want of room.
    pub fn forgotten(&self) -> u64 {
        self.forgotten.load(Ordering::Relaxed)
    }

    fn forgot(&self, is_one: bool) {
        self.forgotten
            .fetch_add(u64::from(is_one), Ordering::Relaxed);
    }
}

impl EgressBudgets {
    /// The one that other pods hold, or else a new one.
    fn held(&self, key: &Key, make: impl FnOnce() -> SharedBudget) -> SharedBudget {
        let mut held = locked(&self.0);
        if let Some(found) = held.budgets.get(key).and_then(Weak::upgrade) {
            return found;
        }
        if held.budgets.len() >= held.look_at {
            held.budgets.retain(|_, it| it.strong_count() > 0);
            held.look_at = MOST_OF_POD.max(2 * held.budgets.len());
        }
        let budget = make();
        held.budgets.insert(key.clone(), Arc::downgrade(&budget));
        budget
    }
}

impl Lately {
    /// That of a key, or else one that is made, for a request of a pod; its maker hears whether it takes another's place.
    fn get(
        &mut self,
        key: Key,
        now: Instant,
        most: usize,
        pod: &PodBudgets,
        make: impl FnOnce(&Key, bool) -> SharedBudget,
    ) -> SharedBudget {
        if let Some(found) = self.find(&key, now) {
            return found;
        }
        let is_in_place = self.make_room(most);
        pod.forgot(is_in_place);
        let budget = make(&key, is_in_place);
        self.add(key, budget, now)
    }

    fn find(&mut self, key: &Key, now: Instant) -> Option<SharedBudget> {
        let found = self.0.iter_mut().find(|it| it.key == *key)?;
        found.last = found.last.max(now);
        Some(Arc::clone(&found.budget))
    }

    /// Forgets the one that was not asked for the longest, if there are as many as there may be. Says whether it did.
    fn make_room(&mut self, most: usize) -> bool {
        if self.0.len() < most {
            return false;
        }
        let by_age = self.0.iter().enumerate().min_by_key(|(_, it)| it.last);
        let Some(oldest) = by_age.map(|(at, _)| at) else {
            return false;
        };
        self.0.swap_remove(oldest);
        true
    }

    fn add(&mut self, key: Key, budget: SharedBudget, now: Instant) -> SharedBudget {
        let last = now;
        self.0.push(Used {
            key,
            budget: Arc::clone(&budget),
            last,
        });
        budget
    }
}

/// One that takes another's place has no second's worth yet: whoever makes budgets be forgotten gets no retries
/// by it.
fn made(settings: BudgetSettings, is_in_place: bool, now: Instant) -> SharedBudget {
    let budget = match is_in_place {
        true => RetryBudget::empty(settings, now),
        false => RetryBudget::new(settings, now),
    };
    Arc::new(Mutex::new(budget))
}

fn locked<T>(all: &Mutex<T>) -> MutexGuard<'_, T> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

/// More rules of one port than that are rare, and the budgets of some begin anew more often.
const MOST_OF_PORT: usize = 256;
/// Rules by which one pod leaves the cluster: it goes to few hosts, mostly.
const MOST_OF_POD: usize = 64;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use weft_core::route::RouteKind;

    use super::*;

    const TEN_A_SECOND: BudgetSettings = BudgetSettings {
        ratio_thousandths: 0,
        per_second: 10,
        ttl: Duration::from_secs(10),
    };

    fn route() -> RouteName {
        RouteName {
            name: "shop/r".parse().expect("valid"),
            kind: RouteKind::Http,
        }
    }

    /// A rule of the network of a namespace.
    fn out(namespace: &str, rule: usize) -> BudgetOwner {
        let network = format!("policy.weft.dev/{namespace}/out");
        BudgetOwner::Egress(network.parse().expect("valid"), route(), rule)
    }

    fn left(budget: &SharedBudget, now: Instant) -> usize {
        let mut budget = locked(budget);
        std::iter::from_fn(|| budget.withdraw(now).then_some(())).count()
    }

    #[test]
    fn each_owner_has_its_own_budget() {
        let now = Instant::now();
        let (budgets, pod) = (PortBudgets::default(), PodBudgets::default());
        let of = |owner, settings| budgets.of(&pod, owner, settings, now);
        let rule = |at| BudgetOwner::Rule(route(), at);
        let first = of(rule(0), BudgetSettings::DEFAULT);
        assert!(Arc::ptr_eq(&first, &of(rule(0), BudgetSettings::DEFAULT)));
        for owner in [
            rule(1),
            BudgetOwner::Port,
            BudgetOwner::ClientsIn("shop".parse().expect("valid")),
        ] {
            assert!(!Arc::ptr_eq(&first, &of(owner, BudgetSettings::DEFAULT)));
        }
    }

    /// Clients whose requests say themselves how often they are sent again, beside others.
    #[test]
    fn two_settings_in_turn_are_no_way_to_more() {
        let now = Instant::now();
        let (budgets, pod) = (PortBudgets::default(), PodBudgets::default());
        let retries: usize = (0..20)
            .map(|it| {
                let settings = match it % 2 {
                    0 => TEN_A_SECOND,
                    _ => BudgetSettings::DEFAULT,
                };
                left(&budgets.of(&pod, BudgetOwner::Port, settings, now), now)
            })
            .sum();
        assert_eq!(retries, 20);
    }

    #[test]
    fn pods_share_the_budget_of_a_network() {
        let now = Instant::now();
        let all = EgressBudgets::default();
        let [one, other] = [(); 2].map(|()| PodBudgets::default());
        let of = |pod: &PodBudgets, rule| pod.of_egress(&all, out("shop", rule), TEN_A_SECOND, now);
        assert_eq!(left(&of(&one, 0), now), 10);
        assert_eq!(left(&of(&other, 0), now), 0);
        assert_eq!(left(&of(&other, 1), now), 10);
        // It is there as long as any of them is.
        drop(one);
        assert_eq!(left(&of(&other, 0), now), 0);
        drop(other);
        let next = PodBudgets::default();
        assert_eq!(left(&of(&next, 0), now), 10);
    }

    #[test]
    fn no_pod_has_anothers_budgets_forgotten() {
        let mut now = Instant::now();
        let all = EgressBudgets::default();
        let [quiet, greedy] = [(); 2].map(|()| PodBudgets::default());
        let kept = quiet.of_egress(&all, out("shop", 0), TEN_A_SECOND, now);
        assert_eq!(left(&kept, now), 10);
        drop(kept);
        for rule in 0..10 * MOST_OF_POD {
            now += Duration::from_micros(1);
            greedy.of_egress(&all, out("greedy", rule), TEN_A_SECOND, now);
        }
        let again = quiet.of_egress(&all, out("shop", 0), TEN_A_SECOND, now);
        assert_eq!(left(&again, now), 0, "it has begun anew");
        assert_eq!(quiet.forgotten(), 0);
        assert_eq!(greedy.forgotten(), 9 * MOST_OF_POD as u64);
        let held = locked(&all.0).budgets.len();
        assert!(held <= 4 * MOST_OF_POD, "{held} are remembered");
    }

    #[test]
    fn the_one_that_is_idle_for_the_longest_is_forgotten() {
        let start = Instant::now();
        let at = |micros: usize| start + Duration::from_micros(micros as u64);
        let (all, pod) = (EgressBudgets::default(), PodBudgets::default());
        let of = |rule, now| pod.of_egress(&all, out("shop", rule), TEN_A_SECOND, now);
        let first: Vec<_> = (0..MOST_OF_POD).map(|rule| of(rule, at(rule))).collect();
        let is_kept = |rule: usize| Arc::strong_count(&first[rule]) > 1;
        // The first one is needed again, so the second one is idle for the longest.
        of(0, at(1000));
        assert_eq!(pod.forgotten(), 0);
        of(MOST_OF_POD, at(1001));
        assert_eq!(pod.forgotten(), 1);
        assert!(is_kept(0) && !is_kept(1) && is_kept(2));
    }

    /// Whoever goes by more rules than are kept has what its requests give, and no second's worth for each.
    #[test]
    fn what_takes_anothers_place_begins_with_nothing() {
        let mut now = Instant::now();
        let all = EgressBudgets::default();
        let (ports, pod) = (PortBudgets::default(), PodBudgets::default());
        for _ in 0..3 {
            for rule in 0..2 * MOST_OF_PORT {
                now += Duration::from_micros(1);
                let leaves = pod.of_egress(&all, out("shop", rule), TEN_A_SECOND, now);
                assert!(rule < MOST_OF_POD || left(&leaves, now) == 0, "{rule}");
                let owner = BudgetOwner::Rule(route(), rule);
                let stays = ports.of(&pod, owner, TEN_A_SECOND, now);
                assert!(rule < MOST_OF_PORT || left(&stays, now) == 0, "{rule}");
            }
        }
    }
}
