//! Where servers have spoken first lately: there the next client is likely to be one that waits for its server, and is not
//! waited for. It decides on nothing else. What a client says is looked at as everywhere, and policy is asked
//! as if nothing were remembered.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Ports of Services, and of addresses that are no Service's, at which the server was the first to speak the last time.
/// Each pod has its own: what one pod has seen, or has brought about, decides nothing for others.
#[derive(Debug, Default)]
pub(crate) struct ServersFirst(Mutex<HashMap<SocketAddr, Instant>>);

impl ServersFirst {
    /// Whether the server was the first the last time.
    pub(crate) fn has(&self, at: SocketAddr) -> bool {
        let since = self.known().get(&at).copied();
        since.is_some_and(|it| it.elapsed() < REMEMBERED)
    }

    /// Remembers who was the first, now that it is known.
    pub(crate) fn remember(&self, at: SocketAddr, server_was_first: bool) {
        let mut known = self.known();
        if !server_was_first {
            known.remove(&at);
            return;
        }
        if known.len() >= MOST_KNOWN && !known.contains_key(&at) {
            // What is still of use is found out again, by the next client.
            known.clear();
        }
        known.insert(at, Instant::now());
    }

    fn known(&self) -> MutexGuard<'_, HashMap<SocketAddr, Instant>> {
        // Every change under the lock is complete in itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is remembered wrongly costs a connection to a server that is not used.
const REMEMBERED: Duration = Duration::from_secs(600);
const MOST_KNOWN: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_time_counts() {
        let servers = ServersFirst::default();
        let [one, other] = [80, 81].map(|port| SocketAddr::from(([10, 0, 0, 1], port)));
        assert!(!servers.has(one));
        servers.remember(one, true);
        assert!(servers.has(one) && !servers.has(other));
        servers.remember(one, false);
        assert!(!servers.has(one));
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let servers = ServersFirst::default();
        for port in 0..=u16::try_from(MOST_KNOWN).expect("small") {
            servers.remember(SocketAddr::from(([10, 0, 0, 1], port)), true);
        }
        assert_eq!(servers.known().len(), 1);
    }
}
