//! How many requests a pod takes: what has come lately, for each Server with a limit that governs a port of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use weft_core::{Identity, Limited, RateLimit, ServerName};

/// A pod's limiters.
#[derive(Debug, Default)]
pub struct Limiters(Mutex<HashMap<ServerName, Arc<Limiter>>>);

/// One Server's at the pod.
#[derive(Debug)]
pub struct Limiter {
    since: Instant,
    state: Mutex<weft_core::Limiter>,
    limit: RateLimit,
}

impl Limiters {
    /// The limiter of a Server: the one that is there, as long as the limit is the same.
    pub fn of(&self, server: &ServerName, limit: &RateLimit) -> Arc<Limiter> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = all.get(server).filter(|it| it.limit == *limit) {
            return Arc::clone(found);
        }
        let limiter = Arc::new(Limiter {
            since: Instant::now(),
            state: Mutex::new(weft_core::Limiter::new(limit.clone())),
            limit: limit.clone(),
        });
        // A pod has few Servers, and may have had more.
        if all.len() >= MOST_SERVERS {
            all.clear();
        }
        all.insert(server.clone(), Arc::clone(&limiter));
        limiter
    }
}

impl Limiter {
    /// Takes a request.
    ///
    /// # Errors
    /// It is above a limit.
    pub fn take(&self, client: Option<&Identity>) -> Result<(), Limited> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.take(client, self.since.elapsed())
    }

    /// Whether it would be taken now: nothing is counted.
    ///
    /// # Errors
    /// It would be above a limit.
    pub fn look(&self, client: Option<&Identity>) -> Result<(), Limited> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.look(client, self.since.elapsed())
    }

    /// The limit.
    pub fn limit(&self) -> &RateLimit {
        &self.limit
    }
}

const MOST_SERVERS: usize = 1024;
