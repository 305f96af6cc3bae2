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
    /// The version that was last written by this one.
    wrote: Option<String>,
    until: Option<Instant>,
}

impl Election {
    /// Nothing was seen yet.
    pub(super) fn new(me: String) -> Self {
        Self {
            me,
            seen: None,
            wrote: None,
            until: None,
        }
    }

    /// What follows from what the Lease says at this moment; none: there is no Lease.
    pub(super) fn look(&mut self, said: Option<Said>, now: Instant) -> Move {
        let Some(said) = said else {
            if self.may_be_held(now) {
                self.wrote = None;
                return Move::Wait;
            }
            self.seen = None;
            return Move::Create;
        };
        let since = match &self.seen {
            Some((before, since)) if *before == said => *since,
            _ => now,
        };
        let next = if said.holder.is_empty() {
            Move::Take
        } else if self.is_own(&said, now) {
            Move::Renew
        } else {
            // Whatever was believed until now.
            (self.until, self.wrote) = (None, None);
            match now - since >= said.duration.min(LONGEST) {
                true => Move::Take,
                false => Move::Wait,
            }
        };
        self.seen = Some((said, since));
        next
    }

    /// Whether a Lease is the own one, and nobody else leads. One of a cluster that was restored from a backup may name
    /// who led then: whoever led since does not know yet.
    fn is_own(&self, said: &Said, now: Instant) -> bool {
        let leads = self.until.is_some_and(|it| now < it);
        said.holder == self.me && (leads || self.wrote.as_ref() == Some(&said.version))
    }

    /// Whether another one may lead still, by a Lease that is not there any more.
    fn may_be_held(&self, now: Instant) -> bool {
        let is_theirs = |it: &Said| !it.holder.is_empty() && it.holder != self.me;
        let seen = self.seen.as_ref().filter(|(it, _)| is_theirs(it));
        seen.is_some_and(|(it, since)| now - *since < it.duration.min(LONGEST))
    }

    /// It was written, by a request that began then, and is of this version now.
    pub(super) fn wrote(&mut self, began: Instant, version: String) {
        self.wrote = Some(version);
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
            if at == 35 {
                election.wrote(now, "4".to_owned());
            }
        }
    }

    /// What the Lease of a cluster says that was restored from a backup, to the one who led before, and to another.
    #[test]
    fn a_lease_that_was_restored_makes_nobody_lead_beside_another() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for (restored, of_leader, of_other) in [
            // As the leader wrote it, but earlier.
            (said("one", 3), Move::Renew, Move::Wait),
            // Of a time in which the other one led.
            (said("other", 3), Move::Wait, Move::Wait),
            (said("third", 3), Move::Wait, Move::Wait),
            (None, Move::Create, Move::Wait),
        ] {
            let (mut one, mut other) = (
                Election::new("one".to_owned()),
                Election::new("other".to_owned()),
            );
            other.wrote(start - Duration::from_secs(60), "3".to_owned());
            other.look(said("one", 8), at(0));
            one.wrote(at(0), "9".to_owned());
            assert_eq!(other.look(said("one", 9), at(0)), Move::Wait);
            let name = format!("{restored:?}");
            assert_eq!(other.look(restored.clone(), at(1)), of_other, "{name}");
            assert_eq!(other.until(), None, "{name}");
            assert_eq!(one.look(restored.clone(), at(2)), of_leader, "{name}");
            // Whoever is away for good does not keep it.
            assert_eq!(
                other.look(restored.clone(), at(15)),
                match restored {
                    None => Move::Create,
                    Some(_) => Move::Wait,
                }
            );
            assert_ne!(other.look(restored, at(16)), Move::Wait, "{name}");
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
        one.wrote(start, "1".to_owned());
        // The other one sees it as early as it can.
        other.look(said("one", 1), start);
        let taken = (0..60).find(|at| other.look(said("one", 1), after(*at)) == Move::Take);
        let taken = after(taken.expect("it is taken in the end"));
        assert!(one.until() <= Some(taken - Duration::from_secs(5)));
        other.wrote(taken, "2".to_owned());
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
