//! Services and endpoints.

use weft_core as core;

use super::{
    ConvertError, Converted, address_bytes, address_from, addresses, all, non_empty, object_name,
    parsed, port,
};
use crate::v1;

impl From<core::Service> for v1::Service {
    fn from(service: core::Service) -> Self {
        let port = |it: core::ServicePort| v1::ServicePort {
            number: it.number.into(),
            name: it.name.map(|name| name.to_string()).unwrap_or_default(),
            app_protocol: it.app_protocol.unwrap_or_default(),
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
            app_protocol: non_empty(message.app_protocol),
        })
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
