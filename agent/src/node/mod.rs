//! The pods of this node: found, enrolled, kept current, and let go.
//!
//! The control stream says which pods are wanted; [`run`] makes the kernel and the proxy agree. For
//! each pod it opens its network namespace, opens three listeners inside, enrolls it in the kernel's
//! maps and lets the proxy serve the listeners. A pod that cannot be enrolled yet (its namespace is
//! not there) is tried again, and readiness names it meanwhile. A pod that is no longer described,
//! or that a previous agent left, is refused everything until its namespace is dead or the cluster
//! says that it is not meshed.
//!
//! Removals come before additions, so that a reused address or namespace never meets its
//! predecessor's entries.

mod closed;
mod enroll;
mod listen;
mod loopback;
mod pods;
mod tenure;

pub use pods::{Hooks, LocalPod, Pods, Waiting};
pub use tenure::run;

use weft_core::WorkloadId;

use crate::bpf::BpfError;

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// Its own record has not arrived, or says that it is not meshed.
    #[error("its workload record is missing or not meshed yet")]
    NoRecord,
    /// The source does not say where its namespace is.
    #[error("its network namespace is not known: set the annotation weft.dev/netns")]
    NetnsUnknown,
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
            Self::HostNetns | Self::NetnsShared(_) => "",
            _ => "; until then its connections are plaintext, unless an earlier agent had it",
        }
    }
}
