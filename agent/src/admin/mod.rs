//! What an operator sees and changes: metrics and readiness on a port of the node, dumps and the log
//! level on a Unix socket that only root can open.
//!
//! The port may be reachable for pods, so it tells nothing that metrics do not, and changes
//! nothing. Both speak small, bounded HTTP/1.1: one request per connection, no bodies to speak of.

mod ask;
mod port;
mod readiness;
mod recent;
mod routes;
mod views;

pub use ask::{AskError, ask};
pub use port::Port;
pub use readiness::{Facts, Readiness, readiness};
pub use views::Views;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use weft_admin::{Accept, Limits, Socket};

use weft_proto::v1::Page;

use crate::discovery::Answers;
use routes::Surface;

/// Answers of all endpoints; each is computed when it is asked for.
pub struct Admin {
    /// The metrics, as OpenMetrics text.
    pub metrics: Answer<String>,
    /// By how much metrics grew in a time up to now, as OpenMetrics text.
    pub recent: Recent,
    /// Whether the agent is ready.
    pub readiness: Answer<Readiness>,
    /// What is in force, as one JSON object, written out. Never a key.
    pub dump: Answer<Vec<u8>>,
    /// The pods of the node, as JSON.
    pub pods: Answer<Vec<u8>>,
    /// What would become of a connection, as JSON, or why that question has no answer. Blocks.
    pub explain: Explain,
    /// The log filter in force.
    pub log_level: Answer<String>,
    /// Puts another log filter in force; the error says what is wrong with it.
    pub set_log_level: SetLogLevel,
}

/// Computes an answer.
pub type Answer<T> = Box<dyn Fn() -> T + Send + Sync>;

/// Tells what happened in a time up to now: see `PAGE_RECENT` of the protocol.
pub type Recent = Box<dyn Fn(Duration) -> String + Send + Sync>;

/// Explains what a query asks for: see `PAGE_EXPLAIN` of the protocol.
pub type Explain = Box<dyn Fn(&str) -> Result<Vec<u8>, String> + Send + Sync>;

/// Changes the log filter.
pub type SetLogLevel = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

impl Admin {
    /// What the agent answers its controller, as the socket answers root: nothing that changes anything.
    pub fn answers(self: &Arc<Self>) -> Answers {
        let admin = Arc::clone(self);
        Arc::new(move |page, query| match page {
            Page::Metrics => Some(Ok((admin.metrics)().into_bytes())),
            Page::Readiness => serde_json::to_vec(&(admin.readiness)()).ok().map(Ok),
            Page::State => Some(Ok((admin.dump)())),
            Page::Pods => Some(Ok((admin.pods)())),
            Page::Explain => Some((admin.explain)(query)),
            Page::Recent => Some(admin.recent(query).map(String::into_bytes)),
            Page::Unspecified => None,
        })
    }

    /// What happened in the time that a query has, or what is wrong with that.
    fn recent(&self, query: &str) -> Result<String, String> {
        recent::window(query).map(|it| (self.recent)(it))
    }
}

/// Serves `/metrics`, `/live` and `/ready` until `stop`.
pub async fn serve_port(admin: Arc<Admin>, listener: TcpListener, stop: CancellationToken) {
    serve(listener, Surface::Port, admin, stop).await;
}

/// Serves `/config_dump`, `/log_level`, `/recent`, `/metrics`, `/live` and `/ready` at `path` until `stop`, then removes the socket. A socket
/// that an earlier agent left there is replaced.
///
/// # Errors
/// What is there is no socket, or the directory cannot be written.
pub fn serve_socket(
    admin: Arc<Admin>,
    path: &Path,
    stop: CancellationToken,
) -> io::Result<impl Future<Output = ()> + Send + use<>> {
    let socket = Socket::open(path)?;
    Ok(serve(socket, Surface::Socket, admin, stop))
}

async fn serve(
    listener: impl Accept,
    surface: Surface,
    admin: Arc<Admin>,
    stop: CancellationToken,
) {
    let answer = move |request| {
        let admin = Arc::clone(&admin);
        async move { routes::answer(&admin, surface, request).await }
    };
    weft_admin::serve(listener, LIMITS, answer, stop).await;
}

const LIMITS: Limits = Limits {
    connections: 256,
    per_address: 64,
};

#[cfg(test)]
mod tests;
