//! The requests that are being served by Servers that have routes, so that a change of policy can end
//! those which it no longer allows: streams, long answers, and what a connection was upgraded to.
//!
//! As with flows, a request is entered before it is decided.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::request::Parts;
use tokio_util::sync::CancellationToken;
use weft_core::{Client, Identity, WorkloadId};

use crate::discovery::Store;

/// All of them, in parts, each with a lock of its own.
#[derive(Debug, Default)]
pub(super) struct LiveRequests {
    parts: [Mutex<HashMap<u64, Arc<LiveRequest>>>; PARTS],
    next: AtomicU64,
}

/// What a decision depends on, and how to end the request.
#[derive(Debug)]
pub(super) struct LiveRequest {
    /// The server's pod.
    pub(super) pod: WorkloadId,
    /// Its port.
    pub(super) port: u16,
    /// Where the client connects from.
    pub(super) client: IpAddr,
    /// Who it is.
    pub(super) identity: Option<Identity>,
    /// What it asks for.
    pub(super) head: Parts,
    /// Whether it is a call of gRPC.
    pub(super) is_grpc: bool,
    /// Cancelled when it must end.
    pub(super) end: CancellationToken,
}

/// A request's entry; dropping it takes it out.
#[derive(Debug)]
pub(super) struct RequestEntry {
    all: Arc<LiveRequests>,
    number: u64,
    end: CancellationToken,
}

impl LiveRequests {
    /// Enters a request.
    pub(super) fn enter(self: &Arc<Self>, request: LiveRequest) -> RequestEntry {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let end = request.end.clone();
        self.part(number).insert(number, Arc::new(request));
        RequestEntry {
            all: Arc::clone(self),
            number,
            end,
        }
    }

    /// Decides anew about every request, and ends those that are denied.
    pub(super) fn recheck(&self, store: &Store) {
        for number in 0..PARTS as u64 {
            let all: Vec<Arc<LiveRequest>> = self.part(number).values().cloned().collect();
            for request in all {
                if !request.is_allowed(store) {
                    request.end.cancel();
                }
            }
        }
    }

    fn part(&self, number: u64) -> MutexGuard<'_, HashMap<u64, Arc<LiveRequest>>> {
        let part = &self.parts[(number % PARTS as u64) as usize];
        part.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LiveRequest {
    fn is_allowed(&self, store: &Store) -> bool {
        let client = Client {
            address: self.client,
            identity: self.identity.as_ref(),
        };
        let (_, connection, requests) = store.authorize_requests(&self.pod, self.port, client);
        match requests {
            None => connection.is_allowed(),
            Some(policy) => {
                let decided = policy.authorize(client, &self.head, self.is_grpc);
                connection.admits_requests() && decided.is_ok()
            }
        }
    }
}

impl RequestEntry {
    /// Cancelled when the request must end.
    pub(super) fn end(&self) -> &CancellationToken {
        &self.end
    }
}

impl Drop for RequestEntry {
    fn drop(&mut self) {
        self.all.part(self.number).remove(&self.number);
    }
}

const PARTS: usize = 16;
