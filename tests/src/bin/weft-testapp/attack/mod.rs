//! `attack`: what only somebody does who means harm. It needs no more than a pod may have: `NET_ADMIN`
//! and `NET_RAW` in its own network namespace.

mod descriptors;
mod families;
mod heir;
mod http;
mod http_server;
mod nested;
mod ring;
mod scatter;
mod trickle;

use anyhow::Result;
use clap::Subcommand;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[derive(Subcommand)]
pub(crate) enum Attack {
    /// Connects from a network namespace of its own making, to which it moves the pod's interface.
    Nested(nested::Nested),
    /// Connects, sends and receives by `io_uring`, without a system call for any of them.
    Ring(ring::Ring),
    /// Says which protocols besides TCP and UDP there are sockets of.
    Families,
    /// Makes sockets and gives them to whoever connects to a Unix socket.
    Lend(descriptors::Lend),
    /// Takes a socket from a lender, and uses it as if it were its own.
    Borrow(descriptors::Borrow),
    /// Connects whenever it is told to, always as the same process.
    Heir(heir::Heir),
    /// Connects to as many destinations as there are.
    Scatter(scatter::Scatter),
    /// Does what a hostile client of HTTP does.
    Http(http::Http),
    /// Answers as a hostile server of HTTP does.
    HttpServer(http_server::HttpServer),
    /// Opens connections and sends little or nothing, until the other side has had enough.
    Trickle(trickle::Trickle),
}

impl Attack {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Attack::Nested(nested) => nested.run(),
            Attack::Ring(ring) => ring.run(),
            Attack::Families => families::run(),
            Attack::Lend(lend) => lend.run(),
            Attack::Borrow(borrow) => borrow.run(),
            Attack::Heir(heir) => heir.run(),
            Attack::Scatter(scatter) => scatter.run(),
            Attack::Http(http) => http.run(),
            Attack::HttpServer(server) => server.run(),
            Attack::Trickle(trickle) => trickle.run(),
        }
    }
}

/// Lets this process have as many descriptors as it may.
fn raise_descriptors() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}
