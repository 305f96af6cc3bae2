//! How far the source has come, in versions that can be compared between controllers.
//!
//! Of two controllers one may be behind: what it tells an agent that comes from the other would be old, and taken for
//! new. So an agent is told with its state how far its controller had heard of each kind, and shows that to the next
//! one, which tells nothing before it has come as far itself.
//!
//! A cluster that was restored from a backup counts from an earlier version on, and nobody ever comes as far as agents
//! were. What tells that from being behind is not time but a list that was begun after the agent came: the API server
//! answers lists with what is so now (Kubernetes, "Resource versions": a list without one is the most recent). So a
//! controller that cannot reach the API server never tells an agent anything older than it knows.
//!
//! A directory counts nothing, and nothing is waited for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::objects::ObjectKind;

/// Up to which `resourceVersion` of each kind something was told.
pub type Position = BTreeMap<ObjectKind, u64>;

/// How far a source has come with a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reached {
    /// The kinds that are read.
    pub kinds: BTreeMap<ObjectKind, OfKind>,
    /// When it was begun to find out which kinds are served, the last time that succeeded.
    pub looked: Option<Instant>,
    /// Whether it counts at all; all else is empty if not.
    pub counts: bool,
}

/// How far it has come with a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OfKind {
    /// Nothing that was told of the kind is later,
    pub told: Option<u64>,
    /// and nothing up to this one is missing.
    pub heard: Option<u64>,
    /// When the last list that is complete was begun.
    pub listed: Option<Instant>,
}

/// How far a source has come; shared by who reads, who translates and who tells.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// When the API server was last heard of objects; none: never, or there is none.
    heard: Mutex<Option<Instant>>,
    /// Of the batch that is taken in now, or was last.
    begun: Mutex<Reached>,
    /// Of the batch that was last taken in.
    done: watch::Sender<Reached>,
    /// Kinds that are to be listed, and since when.
    wanted: watch::Sender<BTreeMap<ObjectKind, Instant>>,
    /// Agents that know of more.
    waiting: watch::Sender<usize>,
}

/// How long a change may take to get to one controller when another has told it already.
const USUAL: Duration = Duration::from_secs(1);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Shared {
            heard: Mutex::default(),
            begun: Mutex::default(),
            done: watch::Sender::default(),
            wanted: watch::Sender::default(),
            waiting: watch::Sender::default(),
        }))
    }
}

impl Progress {
    /// The API server has said something of objects.
    pub fn hears(&self) {
        *locked(&self.0.heard) = Some(Instant::now());
    }

    /// How long ago something was heard; none: never, or there is nothing to hear.
    pub fn silent_for(&self) -> Option<Duration> {
        locked(&self.0.heard).map(|it| it.elapsed())
    }

    /// A batch is taken in, with which the source has come so far.
    pub fn begins(&self, reached: Reached) {
        *locked(&self.0.begun) = reached;
    }

    /// It was taken in.
    pub fn ends(&self) {
        let reached = locked(&self.0.begun).clone();
        self.0.done.send_if_modified(|done| {
            let differs = *done != reached;
            *done = reached;
            differs
        });
    }

    /// Nothing that agents are told is later than this.
    pub fn told(&self) -> Position {
        let begun = locked(&self.0.begun);
        let told = begun.kinds.iter();
        told.filter_map(|(kind, it)| Some((*kind, it.told?)))
            .collect()
    }

    /// Kinds that are to be listed, each by a list that begins after this.
    pub(crate) fn wanted(&self) -> watch::Receiver<BTreeMap<ObjectKind, Instant>> {
        self.0.wanted.subscribe()
    }

    /// Agents that wait, as they know of more than was heard here.
    pub fn waiting(&self) -> usize {
        *self.0.waiting.borrow()
    }

    /// Whether everything up to a position, that an agent shows at this moment, is taken in soon: what is left of it, as
    /// of [`Progress::reaches`]. If not, the kinds of which it is not.
    ///
    /// # Errors
    /// The agent knows of more.
    pub async fn soon(
        &self,
        position: &Position,
        shown: Instant,
    ) -> Result<Position, Vec<ObjectKind>> {
        let reached = self.taken_in(position, shown);
        let reached = tokio::time::timeout(USUAL, reached).await;
        reached.map_err(|_| self.0.done.borrow().lacks(position, shown))
    }

    /// Waits until everything up to a position was taken in that an agent shows at this moment, or turns out not to be any
    /// more. What is left of the position then: of kinds that have come as far.
    pub async fn reaches(&self, position: &Position, shown: Instant) -> Position {
        let _waiting = Waiting::new(&self.0.waiting);
        let lacks = self.0.done.borrow().lacks(position, shown);
        self.0.wanted.send_modify(|wanted| {
            for kind in lacks {
                let since = wanted.entry(kind).or_insert(shown);
                *since = shown.max(*since);
            }
        });
        self.taken_in(position, shown).await
    }

    async fn taken_in(&self, position: &Position, shown: Instant) -> Position {
        let mut done = self.0.done.subscribe();
        let reached = done.wait_for(|it| it.lacks(position, shown).is_empty());
        // The sender lives as long as this.
        reached
            .await
            .map_or(Position::new(), |it| it.kept(position))
    }
}

impl Reached {
    /// The kinds of which not everything was heard up to a position, and no list begun since says that it is not so any more.
    fn lacks(&self, position: &Position, shown: Instant) -> Vec<ObjectKind> {
        let later = |it: Option<Instant>| it.is_some_and(|it| it > shown);
        let lacks = |kind: &ObjectKind, version: u64| match self.kinds.get(kind) {
            Some(it) => it.heard < Some(version) && !later(it.listed),
            // Perhaps it was not found yet.
            None => !later(self.looked),
        };
        let lacking = position.iter().filter(|_| self.counts);
        let lacking = lacking.filter(|(kind, version)| lacks(kind, **version));
        lacking.map(|(kind, _)| *kind).collect()
    }

    /// What of a position was heard here.
    fn kept(&self, position: &Position) -> Position {
        let heard = |kind: &ObjectKind| self.kinds.get(kind).and_then(|it| it.heard);
        let kept = position.iter();
        let kept = kept.filter(|(kind, version)| heard(kind) >= Some(**version));
        kept.map(|(kind, version)| (*kind, *version)).collect()
    }
}

/// Counts somebody who waits.
struct Waiting<'a>(&'a watch::Sender<usize>);

impl<'a> Waiting<'a> {
    fn new(all: &'a watch::Sender<usize>) -> Self {
        all.send_modify(|it| *it += 1);
        Self(all)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|it| *it -= 1);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: ObjectKind = ObjectKind::Pod;
    const NODE: ObjectKind = ObjectKind::Node;

    fn at(heard: u64) -> OfKind {
        OfKind {
            told: Some(heard),
            heard: Some(heard),
            listed: None,
        }
    }

    fn of(kinds: &[(ObjectKind, OfKind)]) -> Reached {
        Reached {
            kinds: kinds.iter().copied().collect(),
            looked: None,
            counts: true,
        }
    }

    async fn asks(progress: &Progress, position: &Position) -> Option<Position> {
        let shown = Instant::now();
        let reached = async {
            match progress.soon(position, shown).await {
                Ok(kept) => kept,
                Err(_) => progress.reaches(position, shown).await,
            }
        };
        let patience = USUAL * 3;
        tokio::time::timeout(patience, reached).await.ok()
    }

    #[tokio::test]
    async fn an_agent_is_told_when_all_was_taken_in_that_it_knows() {
        let progress = Progress::default();
        let pod_8 = Position::from([(POD, 8)]);
        // A directory, or nothing known of.
        assert_eq!(asks(&progress, &pod_8).await, Some(Position::new()));
        for (reached, told) in [
            (of(&[(POD, at(7))]), false),
            (of(&[(POD, at(8))]), true),
            (of(&[(NODE, at(9))]), false),
            (of(&[(POD, OfKind::default())]), false),
        ] {
            progress.begins(reached.clone());
            progress.ends();
            let is_told = asks(&progress, &pod_8).await;
            assert_eq!(is_told, told.then_some(pod_8.clone()), "{reached:?}");
            assert_eq!(
                asks(&progress, &Position::new()).await,
                Some(Position::new())
            );
        }
        // It may be told already of what is not there as a whole.
        progress.begins(of(&[(POD, at(8))]));
        assert_eq!(progress.told(), pod_8);
        assert_eq!(asks(&progress, &pod_8).await, None);
        progress.ends();
        assert_eq!(asks(&progress, &pod_8).await, Some(pod_8));
    }

    #[tokio::test]
    async fn a_list_since_says_that_the_cluster_has_gone_back() {
        let progress = Progress::default();
        let mut reached = of(&[(POD, at(7)), (NODE, at(7))]);
        let pod_8 = Position::from([(POD, 8), (NODE, 7)]);
        let mut wanted = progress.wanted();
        let listed = |heard| OfKind {
            listed: Some(Instant::now()),
            ..at(heard)
        };
        // One that was begun before says nothing.
        reached.kinds.insert(POD, listed(7));
        progress.begins(reached.clone());
        progress.ends();
        let listing = async {
            let changed = wanted.wait_for(|it| !it.is_empty()).await;
            let kinds: Vec<_> = changed.expect("open").keys().copied().collect();
            assert_eq!((kinds, progress.waiting()), (vec![POD], 1));
            tokio::time::sleep(USUAL / 4).await;
            assert_eq!(progress.waiting(), 1);
            reached.kinds.insert(POD, listed(3));
            progress.begins(reached.clone());
            progress.ends();
        };
        let (told, ()) = tokio::join!(asks(&progress, &pod_8), listing);
        assert_eq!(told, Some(Position::from([(NODE, 7)])));
        assert_eq!(progress.waiting(), 0);
    }

    #[tokio::test]
    async fn a_kind_that_is_not_served_is_not_waited_for() {
        let progress = Progress::default();
        progress.begins(of(&[(NODE, at(7))]));
        progress.ends();
        let pod_8 = Position::from([(POD, 8)]);
        let looking = async {
            tokio::time::sleep(USUAL * 5 / 4).await;
            assert_eq!(progress.waiting(), 1);
            progress.begins(Reached {
                looked: Some(Instant::now()),
                ..of(&[(NODE, at(7))])
            });
            progress.ends();
        };
        let (told, ()) = tokio::join!(asks(&progress, &pod_8), looking);
        assert_eq!(told, Some(Position::new()));
    }
}
