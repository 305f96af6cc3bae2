//! Who leads, from what the Lease says and when that was seen: pure.
//!
//! As client-go does it, the times in the Lease are for people. Whether its holder is still there is judged by how long
//! ago the Lease was *seen* to change, by the own clock that only goes forward: no two clocks need to agree.
//!
//! A leader leads until [`RENEW_DEADLINE`] after it last *began* a write that succeeded. Whoever else wants to lead saw
//! that write after it began, and waits for [`DURATION`] from then: it is the later of the two, by what a write that is
//! under way then may take.

use std::time::Duration;

use tokio::time::Instant;

/// For how long nobody else leads after the last change.
pub(super) const DURATION: Duration = Duration::from_secs(15);
/// How long a leader leads that cannot renew.
pub(super) const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// How often it is looked, and renewed.
pub(super) const RETRY: Duration = Duration::from_secs(2);
/// A Lease that says more is none of ours.
const LONGEST: Duration = Duration::from_secs(60);

/// What a Lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said {
    /// Who holds it; empty: nobody.
    pub(super) holder: String,
    /// For how long.
    pub(super) duration: Duration,
    /// The version of the object: another one after each write.
    pub(super) version: String,
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// There is none: make it.
    Create,
    /// It is nobody's, or of one who is gone: take it.
    Take,
    /// It is the own one: say so again.
    Renew,
    /// It is another's.
    Wait,
}

/// What one of those who want to lead knows.
#[derive(Debug)]
pub(super) struct Election {
    me: String,
    seen: Option<(Said, Instant)>,
    until: Option<Instant>,
}

impl Election {
    /// Nothing was seen yet.
    pub(super) fn new(me: String) -> Self {
        Self {
            me,
            seen: None,
            until: None,
        }
    }

    /// What follows from what the Lease says at this moment; none: there is no Lease.
    pub(super) fn look(&mut self, said: Option<Said>, now: Instant) -> Move {
        let Some(said) = said else {
            self.seen = None;
            return Move::Create;
        };
        let since = match &self.seen {
            Some((before, since)) if *before == said => *since,
            _ => now,
        };
        let next = if said.holder.is_empty() {
            Move::Take
        } else if said.holder == self.me {
            Move::Renew
        } else {
            // Whatever was believed until now.
            self.until = None;
            match now - since >= said.duration.min(LONGEST) {
                true => Move::Take,
                false => Move::Wait,
            }
        };
        self.seen = Some((said, since));
        next
    }

    /// It was written, by a request that began then.
    pub(super) fn wrote(&mut self, began: Instant) {
        self.until = Some(began + RENEW_DEADLINE);
    }

    /// Until when this one leads, if it does.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(holder: &str, version: u32) -> Option<Said> {
        Some(Said {
            holder: holder.to_owned(),
            duration: DURATION,
            version: version.to_string(),
        })
    }

    #[test]
    fn a_lease_is_taken_when_it_was_seen_unchanged_for_its_time() {
        let start = Instant::now();
        let mut election = Election::new("me".to_owned());
        for (at, lease, expected) in [
            (0, None, Move::Create),
            (2, said("", 1), Move::Take),
            (4, said("other", 2), Move::Wait),
            (18, said("other", 2), Move::Wait),
            // It was renewed: from now on.
            (20, said("other", 3), Move::Wait),
            (34, said("other", 3), Move::Wait),
            (35, said("other", 3), Move::Take),
            (36, said("me", 4), Move::Renew),
            (90, said("me", 4), Move::Renew),
            // However old it was before.
            (91, said("third", 5), Move::Wait),
        ] {
            let now = start + Duration::from_secs(at);
            assert_eq!(election.look(lease, now), expected, "{at}");
        }
    }

    #[test]
    fn nobody_else_leads_as_long_as_one_does() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let (mut one, mut other) = (
            Election::new("one".to_owned()),
            Election::new("other".to_owned()),
        );
        assert_eq!(one.look(None, start), Move::Create);
        one.wrote(start);
        // The other one sees it as early as it can.
        other.look(said("one", 1), start);
        let taken = (0..60).find(|at| other.look(said("one", 1), after(*at)) == Move::Take);
        let taken = after(taken.expect("it is taken in the end"));
        assert!(one.until() <= Some(taken - Duration::from_secs(5)));
        other.wrote(taken);
        assert_eq!(one.look(said("other", 2), taken), Move::Wait);
        assert_eq!(one.until(), None);
    }

    #[test]
    fn a_lease_that_says_it_is_for_ever_is_not() {
        let start = Instant::now();
        let mut election = Election::new("me".to_owned());
        let lease = Some(Said {
            duration: Duration::MAX,
            ..said("other", 1).expect("one")
        });
        assert_eq!(election.look(lease.clone(), start), Move::Wait);
        assert_eq!(election.look(lease, start + LONGEST), Move::Take);
    }
}
