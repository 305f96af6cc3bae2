//! Whom a request asks for, as a label. What a client writes into `Host` is its own; a label is only what
//! the mesh knows already.

use std::net::{IpAddr, SocketAddr};

use weft_core::{Name, ObjectName, WorkloadId};

use super::OVERFLOW;

/// A host that the mesh knows, or that there is none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AuthorityLabel {
    /// A port of a service.
    Service {
        /// The service.
        service: ObjectName,
        /// The port.
        port: u16,
    },
    /// A pod, by its name within a service.
    Pod {
        /// The pod's name.
        pod: Name,
        /// The service.
        service: ObjectName,
        /// The port.
        port: u16,
    },
    /// An address of the pod.
    Address(SocketAddr),
    /// Anything else.
    Other,
    /// One too many.
    Overflow,
}

/// What is known where a host was written.
#[derive(Debug)]
pub struct HostScope<'a, K, A> {
    /// Short names are of this namespace: the client's.
    pub namespace: &'a Name,
    /// The pod that the request has come to.
    pub pod: &'a WorkloadId,
    /// The port that it has come to.
    pub port: u16,
    /// Whether a service has a port.
    pub is_known: K,
    /// Whether an address is the pod's.
    pub is_own: A,
}

impl AuthorityLabel {
    /// What a `Host` or `:authority` names: a service that is known (`web`, `web.shop`, `web.shop.svc` or
    /// `web.shop.svc.cluster.local`), the pod within one (`web-0.web.shop...`), or one of the pod's addresses; each
    /// with a port, or without for 80.
    pub fn of_host<K, A>(host: &[u8], scope: &HostScope<'_, K, A>) -> Self
    where
        K: Fn(&ObjectName, u16) -> bool,
        A: Fn(IpAddr) -> bool,
    {
        let host = std::str::from_utf8(host).ok();
        let host = host.filter(|it| it.len() <= MOST_HOST_BYTES);
        host.and_then(|it| Self::known(it, scope))
            .unwrap_or(Self::Other)
    }

    fn known<K, A>(host: &str, scope: &HostScope<'_, K, A>) -> Option<Self>
    where
        K: Fn(&ObjectName, u16) -> bool,
        A: Fn(IpAddr) -> bool,
    {
        if let Some(address) = address(host) {
            let is_own = address.port() == scope.port && (scope.is_own)(address.ip());
            return is_own.then_some(Self::Address(address));
        }
        let (host, port) = match host.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok()?),
            None => (host, HTTP_PORT),
        };
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        if let Some(service) = service(&host, scope.namespace)
            && (scope.is_known)(&service, port)
        {
            return Some(Self::Service { service, port });
        }
        let WorkloadId(pod) = scope.pod;
        let rest = host.strip_prefix(pod.name.as_str())?.strip_prefix('.')?;
        let service = service(rest, scope.namespace)?;
        let is_known = service.namespace == pod.namespace && (scope.is_known)(&service, port);
        is_known.then(|| Self::Pod {
            pod: pod.name.clone(),
            service,
            port,
        })
    }

    /// Whether there may be many like it.
    pub(super) fn is_counted(&self) -> bool {
        !matches!(self, Self::Other | Self::Overflow)
    }

    pub(super) fn render(&self) -> String {
        let full = |ObjectName { namespace, name }: &ObjectName, port| {
            format!("{name}.{namespace}.{SERVICE_SUFFIX}:{port}")
        };
        match self {
            Self::Service { service, port } => full(service, port),
            Self::Pod { pod, service, port } => format!("{pod}.{}", full(service, port)),
            Self::Address(address) => address.to_string(),
            Self::Other => "other".to_owned(),
            Self::Overflow => OVERFLOW.to_owned(),
        }
    }
}

/// An address with a port, or without.
fn address(host: &str) -> Option<SocketAddr> {
    if let Ok(address) = host.parse() {
        return Some(address);
    }
    let inner = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    let address = match inner {
        Some(inner) => IpAddr::V6(inner.parse().ok()?),
        None => IpAddr::V4(host.parse().ok()?),
    };
    Some(SocketAddr::new(address, HTTP_PORT))
}

fn service(host: &str, namespace: &Name) -> Option<ObjectName> {
    let mut parts = host.splitn(3, '.');
    let (name, of, suffix) = (parts.next()?, parts.next(), parts.next());
    if !matches!(suffix, None | Some("svc" | SERVICE_SUFFIX)) {
        return None;
    }
    Some(ObjectName {
        namespace: match of {
            Some(of) => of.parse().ok()?,
            None => namespace.clone(),
        },
        name: name.parse().ok()?,
    })
}

/// What follows the namespace in a service's full name.
const SERVICE_SUFFIX: &str = "svc.cluster.local";
/// Of a host without one.
const HTTP_PORT: u16 = 80;
/// The longest name there is (RFC 1035, section 2.3.4), with a port.
const MOST_HOST_BYTES: usize = 255 + 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_becomes_an_authority() {
        let pod = "shop/web-0".parse().expect("valid");
        let namespace = "shop".parse().expect("valid");
        let scope = HostScope {
            namespace: &namespace,
            pod: &pod,
            port: 8080,
            is_known: |name: &ObjectName, port| {
                let ports: &[u16] = match name.to_string().as_str() {
                    "shop/web" => &[80, 8080],
                    "bank/vault" => &[80],
                    _ => &[],
                };
                ports.contains(&port)
            },
            is_own: |address: IpAddr| {
                ["10.2.0.1", "fd00::1"].contains(&address.to_string().as_str())
            },
        };
        let of = |host: &str| AuthorityLabel::of_host(host.as_bytes(), &scope).render();
        let long = format!("{}.shop", "w".repeat(300));
        for (host, label) in [
            ("web", "web.shop.svc.cluster.local:80"),
            ("web:80", "web.shop.svc.cluster.local:80"),
            ("Web.Shop.svc", "web.shop.svc.cluster.local:80"),
            (
                "web.shop.svc.cluster.local.",
                "web.shop.svc.cluster.local:80",
            ),
            ("web.shop:8080", "web.shop.svc.cluster.local:8080"),
            ("vault.bank", "vault.bank.svc.cluster.local:80"),
            ("web-0.web", "web-0.web.shop.svc.cluster.local:80"),
            (
                "web-0.web.shop.svc.cluster.local:8080",
                "web-0.web.shop.svc.cluster.local:8080",
            ),
            ("10.2.0.1:8080", "10.2.0.1:8080"),
            ("[fd00::1]:8080", "[fd00::1]:8080"),
            ("10.2.0.1", "other"),
            ("10.2.0.1:81", "other"),
            ("10.2.0.2:8080", "other"),
            ("[fd00::1]", "other"),
            ("fd00::1", "other"),
            ("", "other"),
            (":80", "other"),
            ("web:99999", "other"),
            ("web:81", "other"),
            ("web.bank", "other"),
            ("api", "other"),
            ("web-0", "other"),
            ("web-1.web", "other"),
            ("web-0.vault.bank", "other"),
            ("example.com", "other"),
            ("web.shop.svc.example.com", "other"),
            ("web..svc", "other"),
            ("we b", "other"),
            (&long, "other"),
        ] {
            assert_eq!(of(host), label, "{host}");
        }
        let no_text = AuthorityLabel::of_host(b"w\xffb", &scope);
        assert_eq!(no_text, AuthorityLabel::Other);
    }
}
