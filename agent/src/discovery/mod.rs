//! What the agent knows of the cluster, and where it learns it.
//!
//! The control stream's task ([`ControlStream`]) is the only writer of the [`Store`]; the data path
//! reads the store without a lock. When the controller is away, what is known stays in force: the
//! store never forgets by itself. Addresses that should be known and are not are asked for through
//! [`Discovery`].

mod addresses;
mod asks;
pub mod backoff;
mod calls;
mod controller;
mod dump;
mod inspect;
mod interner;
mod let_out;
mod newcomers;
mod places;
mod policies;
mod position;
mod services;
mod sharded;
mod state;
mod store;
mod stream;
mod tap;

pub use asks::Discovery;
pub use calls::{CallError, Calls, PodStanding};
pub use controller::{Connection, Controller, ControllerConfig, ControllerError};
pub use dump::StoreDump;
pub use inspect::Answers;
pub use policies::RequestPolicy;
pub use services::{Balanced, ServicePortEntry};
pub use state::StreamState;
pub(crate) use store::is_reachable;
pub use store::{Destination, Generations, Store};
pub use stream::ControlStream;

#[cfg(test)]
pub(crate) mod testing;
