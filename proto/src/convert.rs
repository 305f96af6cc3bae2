//! Conversions between messages and the domain, both ways.
//!
//! Towards messages nothing can fail. From messages everything is checked: what arrives from the
//! network is refused with the field and the reason, never half-taken.

use std::hash::Hasher;
use std::net::IpAddr;

use ipnet::IpNet;
use prost::Message;
use weft_core as core;

use crate::resource::{Key, Kind, Resource};
use crate::v1;

/// Why a message is no resource.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct ConvertError {
    /// The offending field, as a path within the message.
    pub field: String,
    /// What is wrong with it.
    pub reason: String,
}

type Converted<T> = Result<T, ConvertError>;

impl From<Resource> for v1::Resource {
    /// Makes the message, with the version that its content hashes to.
    fn from(resource: Resource) -> Self {
        let key = resource.key();
        let mut message = Self {
            key: None,
            version: 0,
            body: Some(body(resource)),
        };
        message.version = version(&message);
        message.key = Some(key.into());
        message
    }
}

impl TryFrom<v1::Resource> for Resource {
    type Error = ConvertError;

    fn try_from(message: v1::Resource) -> Converted<Self> {
        use v1::resource::Body;
        let key: Key = required("key", message.key)?.try_into()?;
        let resource = match required("body", message.body)? {
            Body::Cluster(it) => Self::Cluster(it.try_into()?),
            Body::TrustBundle(it) => Self::TrustBundle(it.try_into()?),
            Body::Workload(it) => Self::Workload(it.try_into()?),
            Body::NodePod(it) => Self::NodePod(it.try_into()?),
            Body::Service(it) => Self::Service(it.try_into()?),
            Body::Endpoint(it) => Self::Endpoint(it.try_into()?),
            Body::WorkloadPolicy(it) => Self::WorkloadPolicy(it.try_into()?),
            Body::Server(it) => Self::Server(it.try_into()?),
            Body::RouteTable(it) => Self::RouteTable(it.try_into()?),
            Body::EgressNetwork(it) => Self::EgressNetwork(it.try_into()?),
            Body::MeshNamespace(it) => {
                let name = it.name.parse();
                let name = name.map_err(|reason: core::NameError| {
                    error("mesh_namespace.name", reason.to_string())
                });
                Self::MeshNamespace(name?)
            }
        };
        if resource.key() == key {
            Ok(resource)
        } else {
            Err(error("key", format!("{key} names a {}", resource.key())))
        }
    }
}

impl From<Key> for v1::Key {
    fn from(key: Key) -> Self {
        let kind = match key.kind {
            Kind::Cluster => v1::Kind::Cluster,
            Kind::TrustBundle => v1::Kind::TrustBundle,
            Kind::Workload => v1::Kind::Workload,
            Kind::NodePod => v1::Kind::NodePod,
            Kind::Service => v1::Kind::Service,
            Kind::Endpoint => v1::Kind::Endpoint,
            Kind::WorkloadPolicy => v1::Kind::WorkloadPolicy,
            Kind::Server => v1::Kind::Server,
            Kind::RouteTable => v1::Kind::RouteTable,
            Kind::EgressNetwork => v1::Kind::EgressNetwork,
            Kind::MeshNamespace => v1::Kind::MeshNamespace,
        };
        Self {
            kind: kind.into(),
            name: key.name,
        }
    }
}

impl TryFrom<v1::Key> for Key {
    type Error = ConvertError;

    fn try_from(message: v1::Key) -> Converted<Self> {
        let kind = match message.kind() {
            v1::Kind::Unspecified => {
                return Err(error("key.kind", format!("unknown kind {}", message.kind)));
            }
            v1::Kind::Cluster => Kind::Cluster,
            v1::Kind::TrustBundle => Kind::TrustBundle,
            v1::Kind::Workload => Kind::Workload,
            v1::Kind::NodePod => Kind::NodePod,
            v1::Kind::Service => Kind::Service,
            v1::Kind::Endpoint => Kind::Endpoint,
            v1::Kind::WorkloadPolicy => Kind::WorkloadPolicy,
            v1::Kind::Server => Kind::Server,
            v1::Kind::RouteTable => Kind::RouteTable,
            v1::Kind::EgressNetwork => Kind::EgressNetwork,
            v1::Kind::MeshNamespace => Kind::MeshNamespace,
        };
        Ok(Self {
            kind,
            name: message.name,
        })
    }
}

/// An address as 4 or 16 bytes in network order.
pub fn address_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Reads an address from 4 or 16 bytes in network order.
///
/// # Errors
/// Any other length.
pub fn address_from(field: &str, bytes: &[u8]) -> Converted<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        Ok(IpAddr::from(v4))
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        Ok(IpAddr::from(v6))
    } else {
        let reason = format!("{} bytes are no IP address: 4 or 16 needed", bytes.len());
        Err(error(field, reason))
    }
}

fn body(resource: Resource) -> v1::resource::Body {
    use v1::resource::Body;
    match resource {
        Resource::Cluster(it) => Body::Cluster(it.into()),
        Resource::TrustBundle(it) => Body::TrustBundle(it.into()),
        Resource::Workload(it) => Body::Workload(it.into()),
        Resource::NodePod(it) => Body::NodePod(it.into()),
        Resource::Service(it) => Body::Service(it.into()),
        Resource::Endpoint(it) => Body::Endpoint(it.into()),
        Resource::WorkloadPolicy(it) => Body::WorkloadPolicy(it.into()),
        Resource::Server(it) => Body::Server(it.into()),
        Resource::RouteTable(it) => Body::RouteTable(it.into()),
        Resource::EgressNetwork(it) => Body::EgressNetwork(it.into()),
        Resource::MeshNamespace(it) => Body::MeshNamespace(v1::MeshNamespace {
            name: it.to_string(),
        }),
    }
}

/// Hashes the encoded body, so that equal content has equal versions across restarts: FNV-1a, 64
/// bits. No secret depends on it; a hostile author of objects could only hide their own changes.
fn version(body: &v1::Resource) -> u64 {
    let mut hasher = Fnv1a::default();
    hasher.write(&body.encode_to_vec());
    hasher.finish()
}

struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv1a {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn error(field: &str, reason: impl ToString) -> ConvertError {
    ConvertError {
        field: field.to_owned(),
        reason: reason.to_string(),
    }
}

fn required<T>(field: &str, value: Option<T>) -> Converted<T> {
    value.ok_or_else(|| error(field, "missing"))
}

fn parsed<T: std::str::FromStr>(field: &str, text: &str) -> Converted<T>
where
    T::Err: ToString,
{
    text.parse().map_err(|reason: T::Err| error(field, reason))
}

fn port(field: &str, number: u32) -> Converted<u16> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(error(field, format!("{number} is no port: 1 to 65535"))),
    }
}

fn addresses(field: &str, list: &[Vec<u8>]) -> Converted<Vec<IpAddr>> {
    list.iter().map(|it| address_from(field, it)).collect()
}

fn ranges(field: &str, list: &[String]) -> Converted<Vec<IpNet>> {
    list.iter().map(|it| parsed(field, it)).collect()
}

fn all<T, U: TryFrom<T, Error = ConvertError>>(list: Vec<T>) -> Converted<Vec<U>> {
    list.into_iter().map(U::try_from).collect()
}

fn non_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

impl From<core::ObjectName> for v1::ObjectName {
    fn from(name: core::ObjectName) -> Self {
        Self {
            namespace: name.namespace.to_string(),
            name: name.name.to_string(),
        }
    }
}

impl TryFrom<v1::ObjectName> for core::ObjectName {
    type Error = ConvertError;

    fn try_from(message: v1::ObjectName) -> Converted<Self> {
        Self::parse(&message.namespace, &message.name).map_err(|reason| error("name", reason))
    }
}

fn object_name(field: &str, message: Option<v1::ObjectName>) -> Converted<core::ObjectName> {
    required(field, message)?.try_into()
}

pub use egress::closed_egress;

mod cluster;
mod egress;
mod filter;
mod network;
mod policy;
mod profile;
mod reliability;
mod route;
mod service;
mod workload;

#[cfg(test)]
mod tests;
