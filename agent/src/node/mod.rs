//! The pods of this node: found, enrolled, kept current, and let go.
//!
//! The control stream says which pods are wanted; [`run`] makes the kernel and the proxy agree. For
//! each pod it [finds](find) its network namespace, opens three listeners inside, enrolls it in the kernel's
//! maps and lets the proxy serve the listeners. A pod that cannot be enrolled yet (its namespace is
//! not there) is tried again, and readiness names it meanwhile. A pod that is no longer described,
//! or that a previous agent left, is refused everything until its namespace is dead or the cluster
//! says that it is not meshed.
//!
//! Removals come before additions, so that a reused address or namespace never meets its
//! predecessor's entries.

mod closed;
pub mod cni;
mod enroll;
pub mod find;
mod listen;
mod loopback;
mod opt_in;
mod pods;
mod priority;
mod shortage;
mod socket_diag;
mod tenure;
mod threads;

pub use pods::{Hooks, LocalPod, Pods, Waiting};
pub use tenure::run;
pub use threads::PodThreads;
pub(crate) use threads::{come_first, threads_of};

use std::path::PathBuf;

use weft_core::WorkloadId;

use crate::bpf::BpfError;
use find::NotFound;

/// How pods of the node are found and treated.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The host's `/proc`.
    pub proc: PathBuf,
    /// Whether the connections that a pod has are ended when it joins the mesh.
    pub end_connections: bool,
}

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// Its own record has not arrived, or says that it is not meshed.
    #[error("its workload record is missing or not meshed yet")]
    NoRecord,
    /// The kubelet has not started it yet.
    #[error("it has not started yet: it has neither an address nor a container")]
    NotStarted,
    /// It cannot be said where its namespace is.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The namespace cannot be opened.
    #[error("opening its network namespace {path}: {error}")]
    Netns {
        /// Where it should be.
        path: String,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// It is the agent's own namespace: a host-network pod is never meshed.
    #[error("its network namespace is the node's own; host-network pods are never meshed")]
    HostNetns,
    /// Another pod is already enrolled with this namespace.
    #[error("its network namespace belongs to {0} already")]
    NetnsShared(WorkloadId),
    /// A listener cannot be opened.
    #[error("opening listeners in its network namespace: {0}")]
    Listen(std::io::Error),
    /// Threads for its flows cannot be made.
    #[error("starting threads for its flows: {0}")]
    Threads(std::io::Error),
    /// The kernel refused.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// Something else is in the way, and its connections are refused meanwhile.
    #[error("{0}")]
    Refused(Box<EnrollError>),
}

impl EnrollError {
    /// What becomes of the pod's connections meanwhile, as the end of a sentence.
    pub(crate) fn exposure(&self) -> &'static str {
        match self {
            Self::Refused(_) => "; until then its connections are refused",
            Self::HostNetns | Self::NetnsShared(_) | Self::NotStarted => "",
            Self::NotFound(NotFound::Sandboxed(_)) => "; its connections are plaintext",
            _ => "; until then its connections are plaintext, unless an earlier agent had it",
        }
    }

    /// Whether somebody has to do something about it before this agent is all that it should be.
    pub(crate) fn is_fault(&self) -> bool {
        // Of the latter it is known that it never will be.
        !matches!(
            self,
            Self::NotStarted | Self::NotFound(NotFound::Sandboxed(_))
        )
    }

    /// As metrics name it: one of [`WAITING_REASONS`].
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::NoRecord => "no_record",
            Self::NotStarted => "not_started",
            Self::NotFound(NotFound::NotYet) => "looked_for",
            Self::NotFound(NotFound::Nowhere { .. }) => "not_found",
            Self::NotFound(NotFound::Denied(_) | NotFound::Proc { .. }) => "not_readable",
            Self::NotFound(NotFound::Sandboxed(_)) => "not_meshable",
            Self::HostNetns | Self::NotFound(NotFound::HostNetwork(_)) => "host_network",
            Self::NotFound(NotFound::Ambiguous(_)) => "ambiguous",
            Self::NotFound(NotFound::OtherUsers(_)) => "other_users",
            Self::NetnsShared(_) | Self::NotFound(NotFound::Shared) => "shared",
            Self::Netns { .. } => "netns",
            Self::Listen(_) => "listeners",
            Self::Threads(_) => "threads",
            Self::Bpf(_) => "kernel",
            Self::Refused(why) => why.label(),
        }
    }
}

/// All reasons why a pod may have to wait, as metrics name them.
pub const WAITING_REASONS: [&str; 14] = [
    "no_record",
    "not_started",
    "looked_for",
    "not_found",
    "not_readable",
    "not_meshable",
    "host_network",
    "ambiguous",
    "other_users",
    "shared",
    "netns",
    "listeners",
    "threads",
    "kernel",
];
