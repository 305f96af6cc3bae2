//! Settings and trust bundles.

use weft_core as core;

use super::{ConvertError, Converted, error, parsed, ranges};
use crate::v1;

impl From<core::ClusterSettings> for v1::Cluster {
    fn from(settings: core::ClusterSettings) -> Self {
        let texts = |list: Vec<ipnet::IpNet>| list.iter().map(ToString::to_string).collect();
        Self {
            trust_domain: settings.trust_domain.to_string(),
            pod_ranges: texts(settings.pod_ranges),
            service_ranges: texts(settings.service_ranges),
            force_tunnels: settings.force_tunnels,
        }
    }
}

impl TryFrom<v1::Cluster> for core::ClusterSettings {
    type Error = ConvertError;

    fn try_from(message: v1::Cluster) -> Converted<Self> {
        Ok(Self {
            trust_domain: parsed("cluster.trust_domain", &message.trust_domain)?,
            pod_ranges: ranges("cluster.pod_ranges", &message.pod_ranges)?,
            service_ranges: ranges("cluster.service_ranges", &message.service_ranges)?,
            force_tunnels: message.force_tunnels,
        })
    }
}

impl From<core::TrustBundle> for v1::TrustBundle {
    fn from(bundle: core::TrustBundle) -> Self {
        Self {
            trust_domain: bundle.trust_domain.to_string(),
            roots: bundle.roots,
        }
    }
}

impl TryFrom<v1::TrustBundle> for core::TrustBundle {
    type Error = ConvertError;

    fn try_from(message: v1::TrustBundle) -> Converted<Self> {
        if message.roots.is_empty() {
            return Err(error(
                "trust_bundle.roots",
                "empty: nobody could be trusted",
            ));
        }
        Ok(Self {
            trust_domain: parsed("trust_bundle.trust_domain", &message.trust_domain)?,
            roots: message.roots,
        })
    }
}
