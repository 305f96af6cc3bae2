//! Policies of CNIs' own kinds. Their rules are the CNI's: read is only whom they select. Their definitions are those
//! of Cilium and Calico, and whoever has neither has none.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A policy of a CNI's own kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CniPolicy {
    /// Its metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(default)]
    pub spec: Value,
    /// Of Cilium: what it says besides, each as if it were a policy of its own.
    #[serde(default)]
    pub specs: Value,
}

/// Their kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CniKind {
    /// `CiliumNetworkPolicy`
    Cilium,
    /// `CiliumClusterwideNetworkPolicy`
    CiliumClusterwide,
    /// `NetworkPolicy` of `projectcalico.org`, which Calico's own API server has.
    Calico,
    /// `GlobalNetworkPolicy` of the same.
    CalicoGlobal,
    /// `NetworkPolicy` of `crd.projectcalico.org`, as Calico keeps it.
    CalicoKept,
    /// `GlobalNetworkPolicy` of the same.
    CalicoGlobalKept,
}

impl CniKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Cilium,
        Self::CiliumClusterwide,
        Self::Calico,
        Self::CalicoGlobal,
        Self::CalicoKept,
        Self::CalicoGlobalKept,
    ];

    /// The API group.
    pub fn group(self) -> &'static str {
        match self {
            Self::Cilium | Self::CiliumClusterwide => "cilium.io",
            Self::Calico | Self::CalicoGlobal => "projectcalico.org",
            Self::CalicoKept | Self::CalicoGlobalKept => "crd.projectcalico.org",
        }
    }

    /// The versions of the group in which it can be read.
    pub fn versions(self) -> &'static [&'static str] {
        match self {
            Self::Cilium | Self::CiliumClusterwide => &["v2"],
            Self::Calico | Self::CalicoGlobal => &["v3"],
            Self::CalicoKept | Self::CalicoGlobalKept => &["v1"],
        }
    }

    /// The kind's name as in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cilium => "CiliumNetworkPolicy",
            Self::CiliumClusterwide => "CiliumClusterwideNetworkPolicy",
            Self::Calico | Self::CalicoKept => "NetworkPolicy",
            Self::CalicoGlobal | Self::CalicoGlobalKept => "GlobalNetworkPolicy",
        }
    }

    /// Whether its policies belong to a namespace, and are for pods there only.
    pub fn is_namespaced(self) -> bool {
        matches!(self, Self::Cilium | Self::Calico | Self::CalicoKept)
    }

    /// The kind as which Calico keeps its policies, of one that its own API server shows.
    pub fn kept(self) -> Option<Self> {
        match self {
            Self::Calico => Some(Self::CalicoKept),
            Self::CalicoGlobal => Some(Self::CalicoGlobalKept),
            _ => None,
        }
    }

    /// The kind as which Calico's own API server shows policies, of one as which they are kept.
    pub fn shown(self) -> Option<Self> {
        match self {
            Self::CalicoKept => Some(Self::Calico),
            Self::CalicoGlobalKept => Some(Self::CalicoGlobal),
            _ => None,
        }
    }

    /// Whether they are Cilium's.
    pub fn is_of_cilium(self) -> bool {
        matches!(self, Self::Cilium | Self::CiliumClusterwide)
    }
}
