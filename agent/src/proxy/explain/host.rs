//! What somebody calls a destination by: an address, or the name of a Service as a pod's resolver completes it.
//!
//! Names of elsewhere are not looked up: the mesh sees addresses, and which one a resolver in the pod gives is not for
//! the agent to guess.

use std::net::IpAddr;

use weft_core::{Name, ObjectName};

/// A destination without its port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// An address.
    Address(IpAddr),
    /// What may be a Service: `web`, `web.shop`, `web.shop.svc`, `web.shop.svc.cluster.local`.
    Service(ObjectName),
    /// The name of something else.
    Elsewhere(String),
}

/// A destination that is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoDestination {
    #[error("{0:?} is no HOST:PORT, as web.shop:80, 10.0.0.1:80 or [fd00::1]:80")]
    Form(String),
    #[error("{0:?} is no port from 1 to 65535")]
    Port(String),
}

/// Reads `HOST:PORT`, as a pod of a namespace means it.
pub(super) fn read(text: &str, namespace: &Name) -> Result<(Host, u16), NoDestination> {
    let form = || NoDestination::Form(text.to_owned());
    let (host, port) = text.rsplit_once(':').ok_or_else(form)?;
    let number = port.parse().ok().filter(|it| *it != 0);
    let port = number.ok_or_else(|| NoDestination::Port(port.to_owned()))?;
    let bracketed = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    if let Some(address) = bracketed {
        let address: IpAddr = address.parse().map_err(|_| form())?;
        return Ok((Host::Address(address.to_canonical()), port));
    }
    if host.is_empty() || host.contains(':') {
        return Err(form());
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok((Host::Address(address), port));
    }
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let mut labels = host.split('.');
    let name = labels.next().unwrap_or_default();
    let of = labels.next().unwrap_or(namespace.as_str());
    let is_service = matches!(labels.next(), None | Some("svc"));
    let service = is_service.then(|| {
        Some(ObjectName {
            namespace: of.parse().ok()?,
            name: name.parse().ok()?,
        })
    });
    Ok(match service.flatten() {
        Some(service) => (Host::Service(service), port),
        None => (Host::Elsewhere(host), port),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_as_a_pod_means_them() {
        let namespace: Name = "shop".parse().expect("valid");
        let service = |name: &str| Host::Service(name.parse().expect("valid"));
        let address = |it: &str| Host::Address(it.parse().expect("valid"));
        for (text, host, port) in [
            ("web:80", service("shop/web"), 80),
            ("Web.:80", service("shop/web"), 80),
            ("web.old:80", service("old/web"), 80),
            ("web.old.svc:81", service("old/web"), 81),
            ("web.old.svc.cluster.local:81", service("old/web"), 81),
            ("10.0.0.1:65535", address("10.0.0.1"), 65535),
            ("[fd00::1]:1", address("fd00::1"), 1),
            ("[::ffff:10.0.0.1]:1", address("10.0.0.1"), 1),
            (
                "api.example.com:443",
                Host::Elsewhere("api.example.com".to_owned()),
                443,
            ),
            ("a_b:80", Host::Elsewhere("a_b".to_owned()), 80),
        ] {
            assert_eq!(read(text, &namespace), Ok((host, port)), "{text}");
        }
        for bad in ["web", "", ":80", "fd00::1:80", "[web]:80"] {
            let read = read(bad, &namespace);
            assert_eq!(read, Err(NoDestination::Form(bad.to_owned())), "{bad}");
        }
        for bad in ["web:0", "web:65536", "web:http", "web:"] {
            let read = read(bad, &namespace);
            assert!(matches!(read, Err(NoDestination::Port(_))), "{bad}");
        }
    }
}
