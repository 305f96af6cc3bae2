//! The endpoints that a request was sent to, where it may be sent more than once, and who comes next.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::balance::Tries;

/// The endpoints that a request was sent to, the last one last.
#[derive(Debug)]
pub(super) struct Tried(Option<Mutex<Vec<One>>>);

/// The same as they were at some time.
#[derive(Debug)]
pub(super) struct SoFar(Vec<One>);

/// An endpoint that a request was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct One {
    to: SocketAddr,
    /// It asked to be left alone until then.
    rests_until: Option<Instant>,
}

/// Whom a request that is sent again may go to, but for those who asked for a pause; each is tried if nobody of the
/// one before takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Among {
    /// Who was not tried.
    Untried,
    /// Who was not tried last.
    NotLast,
    /// Everybody.
    All,
}

impl Tried {
    /// Of a request that is sent once.
    pub(super) const ONCE: Self = Self(None);

    /// None yet.
    pub(super) fn none() -> Self {
        Self(Some(Mutex::default()))
    }

    /// The endpoints so far.
    pub(super) fn so_far(&self) -> SoFar {
        SoFar(self.all().map_or_else(Vec::new, |it| it.clone()))
    }

    /// It is sent there.
    pub(super) fn push(&self, to: SocketAddr) {
        let Some(mut all) = self.all() else { return };
        all.retain(|it| it.to != to);
        if all.len() >= MOST_REMEMBERED {
            all.remove(0);
        }
        all.push(One {
            to,
            rests_until: None,
        });
    }

    /// An endpoint that it was sent to asks to be left alone until then.
    pub(super) fn rests(&self, to: SocketAddr, until: Instant) {
        let Some(mut all) = self.all() else { return };
        if let Some(one) = all.iter_mut().find(|it| it.to == to) {
            one.rests_until = Some(until);
        }
    }

    /// When it may be sent to one of these, where all of them have asked for a pause; none: now.
    pub(super) fn pause(
        &self,
        among: impl Iterator<Item = SocketAddr>,
        now: Instant,
    ) -> Option<Instant> {
        let all = self.all()?;
        if !all.iter().any(|it| it.is_resting(now)) {
            return None;
        }
        let mut earliest = None::<Instant>;
        for to in among {
            let resting = all.iter().find(|it| it.to == to && it.is_resting(now))?;
            let until = resting.rests_until?;
            earliest = Some(earliest.map_or(until, |it| it.min(until)));
        }
        earliest
    }

    fn all(&self) -> Option<MutexGuard<'_, Vec<One>>> {
        let all = self.0.as_ref()?;
        Some(all.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl SoFar {
    /// With whom to begin now.
    pub(super) fn first(&self) -> Among {
        match self.0.as_slice() {
            [] => Among::All,
            [..] => Among::Untried,
        }
    }

    /// Of all tries those at these.
    pub(super) fn among(&self, tries: Tries, among: Among, now: Instant) -> Tries {
        if self.0.is_empty() {
            return tries;
        }
        tries.leaving_out(|to| {
            let found = self.0.iter().position(|it| it.to == to);
            found.is_some_and(|place| {
                let is_last = place + 1 == self.0.len();
                let is_out = match among {
                    Among::Untried => true,
                    Among::NotLast => is_last,
                    Among::All => false,
                };
                is_out || self.0[place].is_resting(now)
            })
        })
    }
}

impl One {
    fn is_resting(&self, now: Instant) -> bool {
        self.rests_until.is_some_and(|until| now < until)
    }
}

impl Among {
    /// With whom to go on; none: there is nobody else.
    pub(super) fn wider(self) -> Option<Self> {
        match self {
            Self::Untried => Some(Self::NotLast),
            Self::NotLast => Some(Self::All),
            Self::All => None,
        }
    }
}

/// For how long a request waits for an endpoint that asked for a pause, where there is no other.
pub(super) const MOST_PAUSE: Duration = Duration::from_secs(10);
/// More endpoints than anybody has a request sent to; of more the last ones are remembered.
const MOST_REMEMBERED: usize = 128;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::balance::EndpointEntry;

    fn endpoint(number: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], number))
    }

    #[test]
    fn all_that_were_tried_are_remembered_once_and_the_last_is_last() {
        let tried = Tried::none();
        let numbers = || -> Vec<u16> {
            let all = tried.so_far().0;
            all.iter().map(|it| it.to.port()).collect()
        };
        for number in [1, 2, 3, 4, 5, 2] {
            tried.push(endpoint(number));
        }
        assert_eq!(numbers(), [1, 3, 4, 5, 2]);
        for number in 0..10_000 {
            tried.push(endpoint(number));
        }
        assert_eq!(numbers().len(), MOST_REMEMBERED);
        assert_eq!(numbers().last(), Some(&9999));
        Tried::ONCE.push(endpoint(1));
        assert!(Tried::ONCE.so_far().0.is_empty());
    }

    /// The numbers of those that are tried.
    fn asked(tried: &Tried, count: u16, among: Among, now: Instant) -> Vec<u16> {
        let all = (0..count).map(|it| EndpointEntry::new(endpoint(it).ip(), it));
        let all: Vec<_> = all.collect();
        let tries = Tries::new(Arc::new(all), 0..count.into());
        let mut tries = tried.so_far().among(tries, among, now);
        let mut asked = Vec::new();
        while let Some(next) = tries.next(now.into(), |_| 0) {
            asked.push(next.port);
        }
        asked.sort_unstable();
        asked
    }

    #[test]
    fn it_is_widened_until_everybody_may_be_tried() {
        let (tried, now) = (Tried::none(), Instant::now());
        assert_eq!(tried.so_far().first(), Among::All);
        tried.push(endpoint(0));
        tried.push(endpoint(1));
        let steps = std::iter::successors(Some(tried.so_far().first()), |it| it.wider());
        let steps: Vec<_> = steps.map(|it| asked(&tried, 3, it, now)).collect();
        assert_eq!(steps, [vec![2], vec![0, 2], vec![0, 1, 2]]);
    }

    #[test]
    fn who_asked_for_a_pause_is_not_tried_before_its_end() {
        let (tried, start) = (Tried::none(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let pause = |numbers: &[u16], now| {
            let until = tried.pause(numbers.iter().copied().map(endpoint), now);
            until.map(|it| it.duration_since(start).as_secs())
        };
        for (number, until) in [(0, Some(5)), (1, None), (2, Some(3))] {
            tried.push(endpoint(number));
            if let Some(until) = until {
                tried.rests(endpoint(number), after(until));
            }
        }
        assert_eq!(asked(&tried, 3, Among::NotLast, start), [1]);
        assert_eq!(asked(&tried, 3, Among::All, start), [1]);
        // Whether one may be asked now, and when else.
        assert_eq!(pause(&[0, 1, 2], start), None);
        assert_eq!(pause(&[0, 2, 7], start), None);
        assert_eq!(pause(&[0, 2], start), Some(3));
        assert_eq!(pause(&[0], start), Some(5));
        assert_eq!(pause(&[], start), None);
        assert_eq!(asked(&tried, 3, Among::All, after(3)), [1, 2]);
        assert_eq!(pause(&[0, 2], after(3)), None);
        // Asked again it has said nothing yet.
        tried.push(endpoint(0));
        assert_eq!(pause(&[0], start), None);
        assert_eq!(Tried::ONCE.pause([endpoint(0)].into_iter(), start), None);
    }
}
