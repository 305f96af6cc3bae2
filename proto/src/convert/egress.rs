//! EgressNetworks.

use core::route::Route;
use weft_core as core;

use super::policy::group;
use super::route::few_patterns;
use super::{ConvertError, Converted, all, error, object_name, parsed, port, required};
use crate::v1;

/// Ports that the routes of one network name: for each there is an order of its own of all routes.
pub(super) const MAX_PORTS: usize = 64;

impl From<core::EgressName> for v1::EgressName {
    fn from(name: core::EgressName) -> Self {
        Self {
            group: v1::PolicyGroup::from(name.group).into(),
            name: Some(name.name.into()),
        }
    }
}

impl TryFrom<v1::EgressName> for core::EgressName {
    type Error = ConvertError;

    fn try_from(message: v1::EgressName) -> Converted<Self> {
        Ok(Self {
            group: group("egress_name.group", message.group())?,
            name: object_name("egress_name.name", message.name)?,
        })
    }
}

impl From<core::EgressNetwork> for v1::EgressNetwork {
    fn from(network: core::EgressNetwork) -> Self {
        let routes = network.routes().iter().cloned();
        let settings = network.settings().clone();
        let traffic_policy = match settings.traffic_policy {
            core::TrafficPolicy::Allow => v1::TrafficPolicy::Allow,
            core::TrafficPolicy::Deny => v1::TrafficPolicy::Deny,
        };
        Self {
            name: Some(settings.name.into()),
            created: settings.created,
            is_global: settings.is_global,
            networks: settings.networks.into_iter().map(Into::into).collect(),
            traffic_policy: traffic_policy.into(),
            routes: routes.map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::EgressNetwork> for core::EgressNetwork {
    type Error = ConvertError;

    fn try_from(message: v1::EgressNetwork) -> Converted<Self> {
        let traffic_policy = match message.traffic_policy() {
            v1::TrafficPolicy::Allow => core::TrafficPolicy::Allow,
            v1::TrafficPolicy::Deny => core::TrafficPolicy::Deny,
            v1::TrafficPolicy::Unspecified => {
                let reason = format!("unknown traffic policy {}", message.traffic_policy);
                return Err(error("egress_network.traffic_policy", reason));
            }
        };
        let routes = message.routes.iter().filter_map(|it| it.route.as_ref());
        few_patterns("egress_network.routes", routes)?;
        few_ports(&message.routes)?;
        let settings = core::EgressSettings {
            name: required("egress_network.name", message.name)?.try_into()?,
            created: message.created,
            is_global: message.is_global,
            networks: all(message.networks)?,
            traffic_policy,
        };
        Ok(Self::new(settings, all(message.routes)?))
    }
}

/// What holds in place of a network that was sent and cannot be used, where none is held: nothing leaves for its
/// addresses, or for any if these cannot be read.
pub fn closed_egress(message: v1::EgressNetwork) -> Option<core::EgressNetwork> {
    let networks = all(message.networks).unwrap_or_default();
    let settings = core::EgressSettings {
        name: message.name?.try_into().ok()?,
        created: message.created,
        is_global: message.is_global,
        networks,
        traffic_policy: core::TrafficPolicy::Deny,
    };
    Some(core::EgressNetwork::new(settings, vec![]))
}

fn few_ports(routes: &[v1::EgressRoute]) -> Converted<()> {
    let mut ports: Vec<u32> = routes.iter().flat_map(|it| it.ports.clone()).collect();
    ports.sort_unstable();
    ports.dedup();
    if ports.len() <= MAX_PORTS {
        return Ok(());
    }
    let reason = format!("{} ports, more than {MAX_PORTS}", ports.len());
    Err(error("egress_network.routes.ports", reason))
}

impl From<core::EgressRoute> for v1::EgressRoute {
    fn from(route: core::EgressRoute) -> Self {
        Self {
            route: Some(route.route.into()),
            hostnames: route.hostnames.iter().map(ToString::to_string).collect(),
            ports: route.ports.into_iter().map(u32::from).collect(),
        }
    }
}

impl TryFrom<v1::EgressRoute> for core::EgressRoute {
    type Error = ConvertError;

    fn try_from(message: v1::EgressRoute) -> Converted<Self> {
        let route: Route = required("egress_route.route", message.route)?.try_into()?;
        let of_requests = route.name.kind.route_type().is_of_requests();
        if !of_requests && !message.hostnames.is_empty() {
            let reason = format!(
                "the hosts of a {} stand in its rule",
                route.name.kind.as_str()
            );
            return Err(error("egress_route.hostnames", reason));
        }
        let hostnames = message.hostnames.iter();
        let hostnames = hostnames.map(|it| parsed("egress_route.hostnames", it));
        let ports = message.ports.iter();
        let ports = ports.map(|it| port("egress_route.ports", *it));
        Ok(Self {
            route,
            hostnames: hostnames.collect::<Converted<_>>()?,
            ports: ports.collect::<Converted<_>>()?,
        })
    }
}

#[cfg(test)]
#[path = "egress_tests.rs"]
mod tests;
