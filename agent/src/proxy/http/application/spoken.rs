//! What applications speak, as their first bytes have shown. Only for a while: one that was replaced by another
//! program at the same place is heard anew.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::proxy::http::Version;

/// What applications speak. Shared by all pods of the node.
#[derive(Debug, Default)]
pub(crate) struct Spoken(Mutex<HashMap<Key, Known>>);

/// An application: its address, and the cookie of the network namespace that it is in, if that is one of this
/// node's pods. Another pod has another one, even at the same address.
pub(super) type Key = (SocketAddr, Option<u64>);

/// Whether it speaks HTTP/1, and HTTP/2, and since when that is known.
#[derive(Debug, Default)]
struct Known([Option<(bool, Instant)>; 2]);

/// What an application's first bytes tell of the version that it was spoken to in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// It speaks it.
    Speaks,
    /// It speaks the other one.
    SpeaksOther,
    /// Nothing.
    Nothing,
}

impl Spoken {
    /// Whether the application speaks the version, if that is known.
    pub(super) fn speaks(&self, of: Key, version: Version) -> Option<bool> {
        let known = self.known();
        let (speaks, since) = known.get(&of)?.0[version as usize]?;
        (since.elapsed() < REMEMBERED).then_some(speaks)
    }

    /// Remembers that it does, or does not.
    pub(super) fn remember(&self, of: Key, version: Version, speaks: bool) {
        let mut known = self.known();
        if known.len() >= MOST_KNOWN && !known.contains_key(&of) {
            // What is still of use is heard again, at the next connection.
            known.clear();
        }
        known.entry(of).or_default().0[version as usize] = Some((speaks, Instant::now()));
    }

    /// What was known of it turned out to be wrong.
    pub(super) fn forget(&self, of: Key) {
        self.known().remove(&of);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Key, Known>> {
        // Every change under the lock is complete in itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an application's first bytes tell, where it was spoken to in this version.
pub(super) fn hear(version: Version, first: &[u8]) -> Heard {
    match version {
        Version::Http1 if first.starts_with(b"HTTP/") => Heard::Speaks,
        Version::Http1 if is_of_connection(first) => Heard::SpeaksOther,
        // Garbage, or too little to tell: for who reads it in earnest.
        Version::Http1 => Heard::Nothing,
        Version::Http2 if is_of_connection(first) => Heard::Speaks,
        // Anything else is no beginning of HTTP/2: an answer of HTTP/1, or, of the oldest kind, a page without a head.
        Version::Http2 => Heard::SpeaksOther,
    }
}

/// Whether this begins with SETTINGS, with which a server of HTTP/2 begins, or with GOAWAY, as some do that were
/// spoken to in HTTP/1 (RFC 9113, sections 3.4, 6.5 and 6.8).
fn is_of_connection(first: &[u8]) -> bool {
    // Length, type, flags, stream.
    let Some(&[0, _, _, kind, _, 0, 0, 0, 0]) = first.first_chunk::<9>() else {
        return false;
    };
    matches!(kind, 4 | 7)
}

/// An application that is replaced by one that speaks otherwise is met with the wrong version for so long.
const REMEMBERED: Duration = Duration::from_secs(60);
const MOST_KNOWN: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell() {
        let settings: &[u8] = &[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100];
        let goaway: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0];
        let data: &[u8] = &[0, 0, 8, 0, 0, 0, 0, 0, 1];
        for (first, http1, http2) in [
            (settings, Heard::SpeaksOther, Heard::Speaks),
            (goaway, Heard::SpeaksOther, Heard::Speaks),
            (b"HTTP/1.1 400 Bad", Heard::Speaks, Heard::SpeaksOther),
            (b"HTTP/1.0 505 ", Heard::Speaks, Heard::SpeaksOther),
            (b"<!DOCTYPE HTML>", Heard::Nothing, Heard::SpeaksOther),
            (data, Heard::Nothing, Heard::SpeaksOther),
            (&[0, 0, 6, 4], Heard::Nothing, Heard::SpeaksOther),
        ] {
            assert_eq!(hear(Version::Http1, first), http1, "{first:?}");
            assert_eq!(hear(Version::Http2, first), http2, "{first:?}");
        }
    }

    #[test]
    fn what_is_known_is_of_one_place_and_one_version() {
        let spoken = Spoken::default();
        let to: SocketAddr = "10.0.0.1:80".parse().expect("valid");
        spoken.remember((to, Some(1)), Version::Http2, false);
        assert_eq!(spoken.speaks((to, Some(1)), Version::Http2), Some(false));
        assert_eq!(spoken.speaks((to, Some(1)), Version::Http1), None);
        // Another pod at the same address.
        assert_eq!(spoken.speaks((to, Some(2)), Version::Http2), None);
        assert_eq!(spoken.speaks((to, None), Version::Http2), None);
        spoken.forget((to, Some(1)));
        assert_eq!(spoken.speaks((to, Some(1)), Version::Http2), None);
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let spoken = Spoken::default();
        for port in 0..=u16::try_from(MOST_KNOWN).expect("small") {
            let to = SocketAddr::from(([10, 0, 0, 1], port));
            spoken.remember((to, None), Version::Http1, true);
        }
        assert_eq!(spoken.known().len(), 1);
    }
}
