//! A cluster on one machine, for the end-to-end tests, the demo and the benchmarks.
//!
//! Nodes and pods are network namespaces and cgroups, applications are the real programs, the
//! agent and the controller are the shipped binaries, and the wire is really captured. Nothing
//! here knows how Weft works inside: it sees what an operator and an application would see.
//!
//! Reading order: [`cluster`] builds the machine, [`pod`] puts workloads on it, [`apps`] runs
//! programs in them, [`testapp`] opens connections with fine control, [`capture`] and [`metrics`]
//! say what happened. Everything a [`cluster::Cluster`] creates carries the name of its
//! [`run::Run`] and is removed when it is dropped, also by a panic; what a killed run left behind
//! is removed when the next one starts.
//!
//! The harness is blocking on purpose: tests read as the list of what they do. All of it needs
//! root.

pub mod apps;
pub mod capture;
pub mod cgroup;
pub mod checks;
pub mod cluster;
pub mod cni;
pub mod command;
pub mod contain;
pub mod containers;
pub mod deployed;
pub mod dns;
pub mod hbone;
pub mod hostile;
pub mod http;
pub mod layout;
pub mod manifests;
pub mod metrics;
pub mod netns;
pub mod pki;
pub mod pod;
pub mod run;
pub mod scenario;
mod sys;
pub mod terminal;
pub mod testapp;
pub mod usage;
pub mod wait;
pub mod webapp;
pub mod weft1;
mod yaml;

pub use checks::Checks;
pub use cluster::{Cluster, ClusterOptions};
pub use layout::Layout;
pub use pod::{Pod, PodSpec};
pub use wait::{DEADLINE, wait_for};
