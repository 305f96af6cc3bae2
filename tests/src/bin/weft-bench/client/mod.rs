//! What runs inside the pods, where no ordinary program does it: an open-loop latency client,
//! clients that open connections, connections that are held, floods.
//!
//! All of them take as little CPU as they can: what they need is part of both figures of a ratio,
//! and pulls it towards 1.

mod connections;
mod exchanges;
mod flood;
mod hold;
mod http;
mod latency;
mod serve;

pub(crate) use connections::{Connections, Each};
pub(crate) use flood::Flood;
pub(crate) use hold::Hold;
pub(crate) use latency::Latency;
pub(crate) use serve::Serve;

use anyhow::Result;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// A runtime of one thread.
fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// As many descriptors as this process may have.
fn raise_descriptor_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}
