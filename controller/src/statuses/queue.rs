//! Which object is next to be said something on: pure.
//!
//! First come, first served, so that one that keeps failing is not tried while others wait: it comes back at its own time,
//! later after each failure. To look through all is one of the things that wait, behind those that were there before it;
//! when too many wait it is done in their place, though not all the time.

use std::collections::BTreeMap;

use tokio::time::{Duration, Instant};

use super::Next;
use crate::objects::ObjectKey;
use crate::pause::Pause;

/// What waits.
#[derive(Debug)]
pub(super) struct Queue {
    /// By the moment from which it may be done, and then in the order in which it came.
    order: BTreeMap<Place, Next>,
    places: BTreeMap<ObjectKey, Place>,
    /// Where in the order it is to be looked through all.
    all: Option<Place>,
    /// Not before this moment.
    all_from: Instant,
    /// More wanted to wait than there was room for, since it was last begun to look through all.
    overflown: bool,
    /// Those that failed, until they succeed.
    pauses: BTreeMap<ObjectKey, Pause>,
    came: u64,
}

type Place = (Instant, u64);

/// So many objects may wait.
pub(super) const MOST_WAITING: usize = 4096;
/// How long to wait after a failure; longer after each, up to
const SHORTEST_PAUSE: Duration = Duration::from_millis(500);
/// this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Between two times that all are looked through, however many do not fit.
const BETWEEN: Duration = Duration::from_secs(20);

impl Default for Queue {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Queue {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            order: BTreeMap::new(),
            places: BTreeMap::new(),
            all: None,
            all_from: now,
            overflown: false,
            pauses: BTreeMap::new(),
            came: 0,
        }
    }

    /// A pause as long as those of objects, for what else may fail.
    pub(super) fn pause() -> Pause {
        Pause::new(SHORTEST_PAUSE, LONGEST_PAUSE)
    }

    /// Begins anew: these wait, as far as there is room, and then all are to be looked through. Those without room.
    pub(super) fn begin<'a>(
        &mut self,
        objects: impl IntoIterator<Item = &'a ObjectKey>,
        now: Instant,
    ) -> Vec<&'a ObjectKey> {
        *self = Self::new(now);
        let objects = objects.into_iter();
        let without = objects.filter(|it| !self.push(it, now)).collect();
        self.look_at(now);
        without
    }

    /// This one waits from now on, if it does not already. Whether there is room for it.
    pub(super) fn push(&mut self, object: &ObjectKey, now: Instant) -> bool {
        self.put(object, now, now)
    }

    /// This one failed in a way that may pass: it is tried again, when others had their turn, and not before the pause
    /// that was asked for. Whether there is room for it.
    pub(super) fn failed(
        &mut self,
        object: &ObjectKey,
        asked: Option<Duration>,
        now: Instant,
    ) -> bool {
        let pause = self.pauses.entry(object.clone());
        let pause = pause.or_insert_with(Self::pause).after_asked(now, asked);
        self.leave(object);
        self.put(object, now + pause, now)
    }

    /// This one did not fail, or in a way that does not pass.
    pub(super) fn done(&mut self, object: &ObjectKey) {
        self.pauses.remove(object);
    }

    /// This one is gone.
    pub(super) fn gone(&mut self, object: &ObjectKey) {
        self.pauses.remove(object);
        self.leave(object);
    }

    /// All were looked through, or as far as that was possible: the next time is at this moment, or sooner if some had
    /// no room to wait meanwhile.
    pub(super) fn looked(&mut self, next: Instant, now: Instant) {
        self.all_from = now + BETWEEN;
        let next = match self.overflown {
            true => next.min(self.all_from),
            false => next,
        };
        self.forget_all();
        self.look_at(next);
    }

    /// Takes what is to be done now.
    pub(super) fn next(&mut self, now: Instant) -> Option<Next> {
        let first = self.order.first_entry()?;
        if first.key().0 > now {
            return None;
        }
        let next = first.remove();
        match &next {
            Next::One(object) => {
                self.places.remove(object);
            }
            Next::All => (self.all, self.overflown) = (None, false),
        }
        Some(next)
    }

    /// When there is something to do, if nothing comes.
    pub(super) fn wakes(&self) -> Option<Instant> {
        let (first, _) = self.order.first_key_value()?;
        Some(first.0)
    }

    /// How many objects wait.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    fn put(&mut self, object: &ObjectKey, at: Instant, now: Instant) -> bool {
        if self.places.contains_key(object) {
            return true;
        }
        if self.places.len() < MOST_WAITING {
            let place = self.place(at);
            self.places.insert(object.clone(), place);
            self.order.insert(place, Next::One(object.clone()));
            return true;
        }
        // It is found again, if it is still not as it should be.
        self.pauses.remove(object);
        self.overflown = true;
        self.look_at(now.max(self.all_from));
        false
    }

    fn leave(&mut self, object: &ObjectKey) {
        if let Some(place) = self.places.remove(object) {
            self.order.remove(&place);
        }
    }

    /// All are to be looked through at this moment, if not before.
    fn look_at(&mut self, at: Instant) {
        if self.all.is_some_and(|it| it.0 <= at) {
            return;
        }
        self.forget_all();
        let place = self.place(at);
        self.order.insert(place, Next::All);
        self.all = Some(place);
    }

    fn forget_all(&mut self) {
        if let Some(place) = self.all.take() {
            self.order.remove(&place);
        }
    }

    fn place(&mut self, at: Instant) -> Place {
        self.came += 1;
        (at, self.came)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use weft_core::PolicyGroup;

    use super::*;
    use crate::objects::ObjectKind;

    fn object(number: usize) -> ObjectKey {
        ObjectKey {
            kind: ObjectKind::Server(PolicyGroup::Weft),
            namespace: Some("shop".parse().expect("valid")),
            name: format!("p{number:05}").parse().expect("valid"),
        }
    }

    fn one(number: usize) -> Option<Next> {
        Some(Next::One(object(number)))
    }

    /// However many do not fit, each gets its turn: as the writer does it, with what it finds when it looks through all.
    #[test]
    fn more_than_may_wait_all_get_their_turn() {
        let mut now = Instant::now();
        let mut queue = Queue::new(now);
        let mut unwritten: BTreeSet<ObjectKey> = (0..3 * MOST_WAITING).map(object).collect();
        queue.begin(&unwritten, now);
        let (mut looks, mut done) = (0, 0);
        while !unwritten.is_empty() {
            match queue.next(now) {
                Some(Next::One(key)) => {
                    assert!(unwritten.remove(&key), "{key} twice");
                    queue.done(&key);
                    done += 1;
                }
                Some(Next::All) => {
                    looks += 1;
                    for key in &unwritten {
                        queue.push(key, now);
                    }
                    queue.looked(now + BETWEEN * 10, now);
                }
                None => now = queue.wakes().expect("something waits"),
            }
            assert!(looks <= 4, "{done} done, {looks} times looked through");
        }
        assert_eq!(done, 3 * MOST_WAITING);
    }

    #[test]
    fn what_waits_already_is_none_too_many() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        (0..MOST_WAITING).for_each(|it| {
            queue.push(&object(it), now);
        });
        (0..MOST_WAITING).for_each(|it| {
            queue.push(&object(it), now);
        });
        assert_eq!((queue.len(), queue.overflown), (MOST_WAITING, false));
        queue.push(&object(MOST_WAITING), now);
        assert_eq!((queue.len(), queue.overflown), (MOST_WAITING, true));
    }

    #[test]
    fn one_that_fails_lets_others_pass_and_waits_longer_each_time() {
        let mut now = Instant::now();
        let mut queue = Queue::new(now);
        (1..4).for_each(|it| {
            queue.push(&object(it), now);
        });
        assert_eq!(queue.next(now), one(1));
        queue.failed(&object(1), None, now);
        assert_eq!(queue.next(now), one(2));
        // A change of it does not let it be tried sooner.
        queue.push(&object(1), now);
        assert_eq!(queue.next(now), one(3));
        assert_eq!(queue.next(now), None);
        let mut pauses = vec![];
        for _ in 0..10 {
            let wakes = queue.wakes().expect("it waits");
            pauses.push(wakes - now);
            now = wakes;
            assert_eq!(queue.next(now), one(1));
            queue.failed(&object(1), None, now);
        }
        assert!(pauses[0] <= SHORTEST_PAUSE, "{pauses:?}");
        let last = pauses[9];
        assert!(
            last >= LONGEST_PAUSE / 2 && last <= LONGEST_PAUSE,
            "{pauses:?}"
        );
        // After a success, the next failure is the first.
        now = queue.wakes().expect("it waits");
        assert_eq!(queue.next(now), one(1));
        queue.done(&object(1));
        queue.failed(&object(1), None, now);
        assert!(queue.wakes().expect("it waits") - now <= SHORTEST_PAUSE);
        queue.gone(&object(1));
        assert_eq!((queue.wakes(), queue.len()), (None, 0));
        assert!(queue.pauses.is_empty());
    }

    #[test]
    fn all_are_looked_through_in_turn_and_not_all_the_time() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        queue.begin([&object(1)], now);
        queue.push(&object(2), now);
        assert_eq!(queue.next(now), one(1));
        assert_eq!(queue.next(now), Some(Next::All));
        let later = now + BETWEEN * 10;
        queue.looked(later, now);
        assert_eq!(queue.next(now), one(2));
        assert_eq!((queue.next(now), queue.wakes()), (None, Some(later)));
        // Those that fail fill it, and there is no room for more.
        for number in 0..=MOST_WAITING {
            queue.failed(&object(number), None, now);
        }
        while let Some(next) = queue.next(now + BETWEEN / 2) {
            assert_ne!(next, Next::All);
        }
        assert_eq!(queue.next(now + BETWEEN), Some(Next::All));
        // Each time that comes to nothing has an end, too.
        queue.looked(later, now + BETWEEN);
        assert_eq!(queue.next(now + BETWEEN), None);
        assert_eq!(queue.next(later), Some(Next::All));
    }

    #[test]
    fn who_asks_for_a_longer_pause_is_heeded() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let asked = Duration::from_secs(45);
        queue.failed(&object(1), Some(asked), now);
        assert!(queue.wakes().is_some_and(|it| it >= now + asked));
    }
}
