//! What the targets share: TLS of a server that anybody may talk to, and a runtime.

pub mod tls;

use tokio::runtime::{Builder, Runtime};

/// A runtime for a target that reads from sockets.
///
/// # Panics
/// If the machine has none to give.
pub fn runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}
