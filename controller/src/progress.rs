//! How far the source has come, in versions that can be compared between controllers.
//!
//! Of two controllers one may be behind: what it tells an agent that comes from the other would be old, and taken for
//! new. So an agent is told with its state up to where its controller had heard, kind by kind, and shows that to the
//! next one, which tells nothing before it has come as far itself.
//!
//! A cluster's API server counts the changes of each kind (`resourceVersion`); a directory counts nothing, and then
//! nothing is waited for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// Up to which version of each kind something was heard.
pub type Position = BTreeMap<String, u64>;

/// How far a source has come; shared by who reads, who translates and who tells.
#[derive(Clone, Debug)]
pub struct Progress(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// What agents are told can be as old as this, and not older.
    done: watch::Sender<Position>,
}

#[derive(Debug, Default)]
struct State {
    /// Of batches that are under way.
    sent: VecDeque<Position>,
    /// Of the batch that is taken in now, or was last.
    begun: Position,
    /// Whether the source cannot hear now.
    is_deaf: bool,
}

/// How long it is waited for a controller that hears, and has not come as far: longer than any cache is behind. After
/// that, the cluster has gone back, as by a backup.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether it hears.
const LOOK: Duration = Duration::from_millis(500);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            done: watch::Sender::new(Position::new()),
        }))
    }
}

impl Progress {
    /// The source sends a batch, with which it has come this far.
    pub fn sends(&self, position: Position) {
        self.locked().sent.push_back(position);
    }

    /// Whether there are kinds that the source cannot hear of now.
    pub fn deaf(&self, is_deaf: bool) {
        self.locked().is_deaf = is_deaf;
    }

    /// The next batch is taken in.
    pub fn begins(&self) {
        let mut state = self.locked();
        if let Some(position) = state.sent.pop_front() {
            state.begun = position;
        }
    }

    /// It was taken in.
    pub fn ends(&self) {
        let position = self.begun();
        self.0.done.send_replace(position);
    }

    /// Nothing that agents are told is later than this.
    pub fn begun(&self) -> Position {
        self.locked().begun.clone()
    }

    /// Waits until everything up to this position was taken in; not for ever where the source hears.
    pub async fn reaches(&self, position: &Position) {
        self.reaches_within(position, PATIENCE).await;
    }

    async fn reaches_within(&self, position: &Position, patience: Duration) {
        let mut done = self.0.done.subscribe();
        let mut heard = Instant::now();
        while is_behind(&done.borrow_and_update(), position) {
            if self.locked().is_deaf {
                heard = Instant::now();
            }
            if heard.elapsed() >= patience {
                tracing::warn!(
                    "an agent knows of later versions than the cluster has: has it gone back?"
                );
                return;
            }
            // The sender lives as long as this.
            let _ = tokio::time::timeout(LOOK.min(patience), done.changed()).await;
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // Every change leaves it whole.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether one has not come as far as the other, in any kind.
fn is_behind(one: &Position, other: &Position) -> bool {
    let reached = |kind| one.get(kind).copied().unwrap_or(0);
    other.iter().any(|(kind, version)| reached(kind) < *version)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn position(versions: &[(&str, u64)]) -> Position {
        let versions = versions.iter();
        versions
            .map(|(kind, it)| ((*kind).to_owned(), *it))
            .collect()
    }

    #[test]
    fn one_is_behind_if_it_is_in_any_kind() {
        for (one, other, expected) in [
            (&[][..], &[][..], false),
            (&[("Pod", 7)], &[], false),
            (&[("Pod", 7)], &[("Pod", 7)], false),
            (&[("Pod", 7)], &[("Pod", 8)], true),
            (
                &[("Pod", 9), ("Server", 3)],
                &[("Pod", 8), ("Server", 4)],
                true,
            ),
            (&[("Pod", 9)], &[("Server", 1)], true),
        ] {
            let behind = is_behind(&position(one), &position(other));
            assert_eq!(behind, expected, "{one:?} {other:?}");
        }
    }

    #[tokio::test]
    async fn what_was_taken_in_is_what_was_reached() {
        let progress = Progress::default();
        let wanted = position(&[("Pod", 8)]);
        assert!(progress.reaches(&Position::new()).now_or_never().is_some());
        progress.sends(position(&[("Pod", 7)]));
        progress.sends(position(&[("Pod", 8)]));
        progress.begins();
        progress.ends();
        assert!(progress.reaches(&wanted).now_or_never().is_none());
        progress.begins();
        // Agents may be told of it already, and it is not there as a whole.
        assert_eq!(progress.begun(), wanted);
        assert!(progress.reaches(&wanted).now_or_never().is_none());
        progress.ends();
        assert!(progress.reaches(&wanted).now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_cluster_that_has_gone_back_is_not_waited_for_but_a_deaf_source_is() {
        let progress = Progress::default();
        let wanted = position(&[("Pod", 8)]);
        let patience = Duration::from_millis(10);
        progress.reaches_within(&wanted, patience).await;
        progress.deaf(true);
        let waiting = progress.reaches_within(&wanted, patience);
        let waited = tokio::time::timeout(patience * 30, waiting).await;
        assert!(waited.is_err());
    }
}
