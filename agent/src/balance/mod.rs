//! Endpoint choice: which endpoint of a service port an exchange or a connection goes to, and which
//! comes next when that fails.
//!
//! Power of two choices over peak-EWMA latency, as Finagle and Linkerd do it: of two endpoints drawn
//! at random the one with the lower [cost](EndpointLoad::cost) is taken. Two draws are enough to keep
//! away from what is slow, and few enough that many clients do not all run to what is fast. What is
//! known of an endpoint is shared by all pods of the node.
//!
//! What comes before the choice: `topology` says which endpoints there are for this node, and `breaker`
//! which of them are left out because they fail. When that leaves nobody, `queue` holds whoever comes for
//! a while.
//!
//! The decisions are pure: time and random numbers are handed in. Only [`InFlight`], [`health`] and the queue
//! read a clock.

pub mod breaker;
mod budget;
mod budgets;
mod choose;
pub mod health;
mod load;
pub mod queue;
pub mod topology;

#[cfg(test)]
mod simulation;

pub use budget::RetryBudget;
pub use budgets::{BudgetOwner, EgressBudgets, PodBudgets, PortBudgets, SharedBudget};
pub use choose::{Forbidden, Tries, random_below};
pub use load::{EndpointEntry, EndpointLoad, InFlight};
