//! Services and endpoints.

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
        Self {
            service: Some(endpoint.name.service.into()),
            address: address_bytes(endpoint.name.address),
            ports: endpoint.ports.into_iter().map(port).collect(),
        }
    }
}

impl TryFrom<v1::Endpoint> for core::Endpoint {
    type Error = ConvertError;

    fn try_from(message: v1::Endpoint) -> Converted<Self> {
        Ok(Self {
            name: core::EndpointName {
                service: object_name("endpoint.service", message.service)?,
                address: address_from("endpoint.address", &message.address)?,
            },
            ports: all(message.ports)?,
        })
    }
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
