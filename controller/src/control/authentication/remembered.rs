//! What the API server answered about tokens, for a while: agents call more often than it should be asked. Tokens
//! themselves are not kept.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

use super::Refusal;
use super::proof::Proof;

/// A token, as it is remembered: its SHA-256.
pub(crate) type Fingerprint = [u8; 32];

/// The fingerprint of a token.
pub(crate) fn fingerprint(token: &[u8]) -> Fingerprint {
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(digest::digest(&digest::SHA256, token).as_ref());
    fingerprint
}

/// Answers.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    good: HashMap<Fingerprint, Good>,
    /// Apart, so that whoever brings bad tokens does not drive out good ones.
    bad: HashMap<Fingerprint, (Instant, Refusal)>,
}

#[derive(Debug)]
struct Good {
    proof: Proof,
    asked: Instant,
    /// When the token ends, if it says so.
    expires: Option<Instant>,
}

/// How long a good answer is of use while nobody can be asked.
pub(super) const DURING_AN_OUTAGE: Duration = Duration::from_secs(300);
/// How long a bad one is not asked for again.
const REFUSED: Duration = Duration::from_secs(3);
/// Tokens of agents: one for each node, and the one before it.
const MAX_GOOD: usize = 16_384;
const MAX_BAD: usize = 1024;

impl Remembered {
    /// What was answered about a token, a good answer no longer ago than this.
    pub(super) fn answer(
        &self,
        token: &Fingerprint,
        age: Duration,
        now: Instant,
    ) -> Option<Result<Proof, Refusal>> {
        let good = self.good.get(token).filter(|it| it.holds(age, now));
        if let Some(good) = good {
            return Some(Ok(good.proof.clone()));
        }
        let (at, refusal) = self.bad.get(token)?;
        (now.duration_since(*at) < REFUSED).then(|| Err(refusal.clone()))
    }

    /// Remembers an answer.
    pub(super) fn put(
        &mut self,
        token: Fingerprint,
        raw: &[u8],
        answer: &Result<Proof, Refusal>,
        now: Instant,
    ) {
        match answer {
            Ok(proof) => {
                self.bad.remove(&token);
                make_room(&mut self.good, MAX_GOOD, |it| {
                    it.holds(DURING_AN_OUTAGE, now)
                });
                let good = Good {
                    proof: proof.clone(),
                    asked: now,
                    expires: life(raw).map(|it| now + it),
                };
                self.good.insert(token, good);
            }
            // Nothing was answered.
            Err(refusal) if refusal.is_unclear() => {}
            Err(refusal) => {
                self.good.remove(&token);
                make_room(&mut self.bad, MAX_BAD, |it| {
                    now.duration_since(it.0) < REFUSED
                });
                self.bad.insert(token, (now, refusal.clone()));
            }
        }
    }
}

impl Good {
    fn holds(&self, age: Duration, now: Instant) -> bool {
        now.duration_since(self.asked) < age && self.expires.is_none_or(|it| now < it)
    }
}

/// Makes room for one more: what is of no use goes, and if nothing is, all: it is only memory.
fn make_room<T>(all: &mut HashMap<Fingerprint, T>, most: usize, is_of_use: impl Fn(&T) -> bool) {
    if all.len() >= most {
        all.retain(|_, it| is_of_use(it));
    }
    if all.len() >= most {
        all.clear();
    }
}

/// How long a token lasts by what it says, if that is less than answers about it do. It is believed, as the API server
/// believes the token.
fn life(token: &[u8]) -> Option<Duration> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let claims = token.split(|it| *it == b'.').nth(1)?;
    let claims = URL_SAFE_NO_PAD.decode(claims).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let left = Duration::from_secs(claims.exp).saturating_sub(now.unwrap_or_default());
    (left < DURING_AN_OUTAGE).then_some(left)
}

#[cfg(test)]
#[path = "remembered_tests.rs"]
mod tests;
