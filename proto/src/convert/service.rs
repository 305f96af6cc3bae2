//! Services and endpoints.

use std::time::Duration;

use weft_core as core;

use super::{
    ConvertError, Converted, address_bytes, address_from, addresses, all, error, non_empty,
    object_name, parsed, port,
};
use crate::v1;

impl From<core::Service> for v1::Service {
    fn from(service: core::Service) -> Self {
        let port = |it: core::ServicePort| v1::ServicePort {
            number: it.number.into(),
            name: it.name.map(|name| name.to_string()).unwrap_or_default(),
            app_protocol: it.app_protocol.unwrap_or_default(),
            protocol: v1::PortProtocol::from(it.protocol).into(),
        };
        Self {
            name: Some(service.name.into()),
            addresses: service.addresses.into_iter().map(address_bytes).collect(),
            ports: service.ports.into_iter().map(port).collect(),
            internal_traffic: v1::InternalTraffic::from(service.internal_traffic).into(),
            failure_accrual: service.failure_accrual.map(Into::into),
        }
    }
}

impl TryFrom<v1::Service> for core::Service {
    type Error = ConvertError;

    fn try_from(message: v1::Service) -> Converted<Self> {
        Ok(Self {
            name: object_name("service.name", message.name)?,
            addresses: addresses("service.addresses", &message.addresses)?,
            ports: all(message.ports)?,
            internal_traffic: internal_traffic(message.internal_traffic)?,
            failure_accrual: message.failure_accrual.map(TryInto::try_into).transpose()?,
        })
    }
}

impl TryFrom<v1::ServicePort> for core::ServicePort {
    type Error = ConvertError;

    fn try_from(message: v1::ServicePort) -> Converted<Self> {
        let name = non_empty(message.name)
            .map(|name| parsed("service.ports.name", &name))
            .transpose()?;
        Ok(Self {
            number: port("service.ports.number", message.number)?,
            name,
            protocol: protocol(message.protocol)?,
            app_protocol: non_empty(message.app_protocol),
        })
    }
}

impl From<core::InternalTraffic> for v1::InternalTraffic {
    fn from(traffic: core::InternalTraffic) -> Self {
        match traffic {
            core::InternalTraffic::Cluster => Self::Cluster,
            core::InternalTraffic::Local => Self::Local,
        }
    }
}

fn internal_traffic(message: i32) -> Converted<core::InternalTraffic> {
    match v1::InternalTraffic::try_from(message) {
        Ok(v1::InternalTraffic::Cluster) => Ok(core::InternalTraffic::Cluster),
        Ok(v1::InternalTraffic::Local) => Ok(core::InternalTraffic::Local),
        Err(_) => {
            let reason = format!("unknown policy {message}");
            Err(error("service.internal_traffic", reason))
        }
    }
}

impl From<core::FailureAccrual> for v1::FailureAccrual {
    fn from(accrual: core::FailureAccrual) -> Self {
        let rate = |it: core::SuccessRate| v1::SuccessRate {
            threshold_permille: it.threshold_permille,
            window_ms: milliseconds(it.window),
            min_requests: it.min_requests,
        };
        Self {
            max_failures: accrual.max_failures,
            success_rate: accrual.success_rate.map(rate),
            min_penalty_ms: milliseconds(accrual.min_penalty),
            max_penalty_ms: milliseconds(accrual.max_penalty),
            jitter_permille: accrual.jitter_permille,
        }
    }
}

impl TryFrom<v1::FailureAccrual> for core::FailureAccrual {
    type Error = ConvertError;

    fn try_from(message: v1::FailureAccrual) -> Converted<Self> {
        let rate = |it: v1::SuccessRate| core::SuccessRate {
            threshold_permille: it.threshold_permille,
            window: Duration::from_millis(it.window_ms),
            min_requests: it.min_requests,
        };
        let accrual = Self {
            max_failures: message.max_failures,
            success_rate: message.success_rate.map(rate),
            min_penalty: Duration::from_millis(message.min_penalty_ms),
            max_penalty: Duration::from_millis(message.max_penalty_ms),
            jitter_permille: message.jitter_permille,
        };
        match accrual.fault() {
            None => Ok(accrual),
            Some(fault) => Err(error("service.failure_accrual", fault)),
        }
    }
}

/// What does not fit is longer than anything lasts.
fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl From<core::PortProtocol> for v1::PortProtocol {
    fn from(protocol: core::PortProtocol) -> Self {
        match protocol {
            core::PortProtocol::Detect => Self::Detect,
            core::PortProtocol::Opaque => Self::Opaque,
            core::PortProtocol::Http1 => Self::Http1,
            core::PortProtocol::Http2 => Self::Http2,
            core::PortProtocol::Tls => Self::Tls,
        }
    }
}

fn protocol(message: i32) -> Converted<core::PortProtocol> {
    match v1::PortProtocol::try_from(message) {
        Ok(v1::PortProtocol::Detect) => Ok(core::PortProtocol::Detect),
        Ok(v1::PortProtocol::Opaque) => Ok(core::PortProtocol::Opaque),
        Ok(v1::PortProtocol::Http1) => Ok(core::PortProtocol::Http1),
        Ok(v1::PortProtocol::Http2) => Ok(core::PortProtocol::Http2),
        Ok(v1::PortProtocol::Tls) => Ok(core::PortProtocol::Tls),
        Err(_) => {
            let reason = format!("unknown protocol {message}");
            Err(error("service.ports.protocol", reason))
        }
    }
}

impl From<core::Endpoint> for v1::Endpoint {
    fn from(endpoint: core::Endpoint) -> Self {
        let port = |it: core::EndpointPort| v1::EndpointPort {
            service_port: it.service_port.into(),
            target_port: it.target_port.into(),
        };
        let core::EndpointPlace {
            node,
            for_nodes,
            for_zones,
        } = endpoint.place;
        Self {
            service: Some(endpoint.name.service.into()),
            address: address_bytes(endpoint.name.address),
            ports: endpoint.ports.into_iter().map(port).collect(),
            node: node.map(|it| it.to_string()).unwrap_or_default(),
            for_nodes: for_nodes.iter().map(ToString::to_string).collect(),
            for_zones,
            weight: match endpoint.weight {
                weight if weight == core::Weight::default() => 0,
                weight => weight.percent().into(),
            },
        }
    }
}

impl TryFrom<v1::Endpoint> for core::Endpoint {
    type Error = ConvertError;

    fn try_from(message: v1::Endpoint) -> Converted<Self> {
        let for_nodes = message.for_nodes.iter();
        Ok(Self {
            name: core::EndpointName {
                service: object_name("endpoint.service", message.service)?,
                address: address_from("endpoint.address", &message.address)?,
            },
            ports: all(message.ports)?,
            place: core::EndpointPlace {
                node: non_empty(message.node)
                    .map(|name| parsed("endpoint.node", &name))
                    .transpose()?,
                for_nodes: for_nodes
                    .map(|name| parsed("endpoint.for_nodes", name))
                    .collect::<Converted<_>>()?,
                for_zones: message.for_zones,
            },
            weight: weight(message.weight)?,
        })
    }
}

fn weight(percent: u32) -> Converted<core::Weight> {
    if percent == 0 {
        return Ok(core::Weight::default());
    }
    let weight = u16::try_from(percent).ok().and_then(core::Weight::new);
    weight.ok_or_else(|| error("endpoint.weight", format!("{percent} is too much")))
}

impl TryFrom<v1::EndpointPort> for core::EndpointPort {
    type Error = ConvertError;

    fn try_from(message: v1::EndpointPort) -> Converted<Self> {
        Ok(Self {
            service_port: port("endpoint.ports.service_port", message.service_port)?,
            target_port: port("endpoint.ports.target_port", message.target_port)?,
        })
    }
}
