//! Who connects and to what, as it is written on the command line.

use std::fmt;
use std::net::IpAddr;

use weft_core::{Identity, Name, NameError, ObjectName, TrustDomain};

/// A client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// A workload of the manifests, with its address and identity.
    Workload(Target),
    /// Somebody with this identity.
    Identity(Identity),
    /// Somebody without one.
    Address(IpAddr),
}

/// A workload or a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) kind: TargetKind,
    pub(super) name: ObjectName,
}

/// What can be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum TargetKind {
    Pod,
    Deployment,
    StatefulSet,
    DaemonSet,
    ReplicaSet,
    Job,
    CronJob,
    Service,
}

/// Why nothing is known by a name, or a question makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum WhoError {
    /// Of another form.
    #[error(
        "{0:?} is neither KIND/NAME or NAMESPACE/KIND/NAME, nor an identity (spiffe://…), nor an address"
    )]
    Form(String),
    /// A kind that cannot be named here.
    #[error("{0:?} is no kind of workload: pod, deploy, sts, ds, rs, job, cronjob, svc, sa")]
    Kind(String),
    /// No name of an object.
    #[error(transparent)]
    Name(#[from] NameError),
    /// An identity that is none.
    #[error("{0:?} is no identity: {1}")]
    Identity(String, String),
    /// A client that is none.
    #[error("{0} cannot be a client: name a workload, an identity or an address")]
    NoClient(String),
    /// A destination that is none.
    #[error("{0:?} cannot be connected to: name a workload or a Service")]
    NoDestination(String),
    /// Nothing of that name.
    #[error("the manifests have no {0}")]
    Unknown(String),
    /// Nobody behind a Service.
    #[error("no pod of the manifests is behind {0}: does its selector fit their labels?")]
    NoEndpoint(String),
    /// No such port.
    #[error("{of} has no port {port:?}{has}")]
    Port {
        /// What.
        of: String,
        /// The port.
        port: String,
        /// What it has instead.
        has: String,
    },
    /// Addresses decide, and nobody said which.
    #[error(
        "it depends on addresses that the manifests do not have: {one}, or {other}: say {what} \
         (of questions in a file: a field of the question)"
    )]
    Address {
        /// What would happen,
        one: String,
        /// or else.
        other: String,
        /// What is to be said.
        what: &'static str,
    },
    /// Hosts decide, and nobody said which.
    #[error(
        "the Server {0} has routes with hostnames: say with --host what the client asks for (of questions in a file: `host`)"
    )]
    Host(String),
    /// Not a request.
    #[error("this is no request: {0}")]
    Request(String),
}

impl Who {
    /// Reads a client.
    pub(super) fn parse(
        text: &str,
        namespace: &Name,
        trust_domain: &TrustDomain,
    ) -> Result<Self, WhoError> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if text.starts_with("spiffe://") {
            let identity = text.parse::<Identity>();
            let bad = |error: weft_core::IdentityError| {
                WhoError::Identity(text.to_owned(), error.to_string())
            };
            return identity.map(Self::Identity).map_err(bad);
        }
        let (kind, name) = parts(text, namespace)?;
        if matches!(kind, "sa" | "serviceaccount" | "serviceaccounts") {
            return Ok(Self::Identity(Identity {
                trust_domain: trust_domain.clone(),
                namespace: name.namespace,
                service_account: name.name,
            }));
        }
        let target = Target {
            kind: TargetKind::parse(kind)?,
            name,
        };
        match target.kind {
            TargetKind::Service => Err(WhoError::NoClient(target.to_string())),
            _ => Ok(Self::Workload(target)),
        }
    }
}

impl Target {
    /// Reads a destination.
    pub(super) fn parse(text: &str, namespace: &Name) -> Result<Self, WhoError> {
        if text.starts_with("spiffe://") || text.parse::<IpAddr>().is_ok() {
            return Err(WhoError::NoDestination(text.to_owned()));
        }
        let (kind, name) = parts(text, namespace)?;
        Ok(Self {
            kind: TargetKind::parse(kind)?,
            name,
        })
    }
}

fn parts<'a>(text: &'a str, namespace: &Name) -> Result<(&'a str, ObjectName), WhoError> {
    let parts: Vec<&str> = text.split('/').collect();
    match parts[..] {
        [kind, name] => {
            let name = ObjectName {
                namespace: namespace.clone(),
                name: name.parse()?,
            };
            Ok((kind, name))
        }
        [namespace, kind, name] => Ok((kind, ObjectName::parse(namespace, name)?)),
        _ => Err(WhoError::Form(text.to_owned())),
    }
}

impl TargetKind {
    /// As kubectl takes them.
    fn parse(text: &str) -> Result<Self, WhoError> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "po" | "pod" | "pods" => Self::Pod,
            "deploy" | "deployment" | "deployments" => Self::Deployment,
            "sts" | "statefulset" | "statefulsets" => Self::StatefulSet,
            "ds" | "daemonset" | "daemonsets" => Self::DaemonSet,
            "rs" | "replicaset" | "replicasets" => Self::ReplicaSet,
            "job" | "jobs" => Self::Job,
            "cj" | "cronjob" | "cronjobs" => Self::CronJob,
            "svc" | "service" | "services" => Self::Service,
            _ => return Err(WhoError::Kind(text.to_owned())),
        })
    }

    /// In lower case, and whole.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Deployment => "deployment",
            Self::StatefulSet => "statefulset",
            Self::DaemonSet => "daemonset",
            Self::ReplicaSet => "replicaset",
            Self::Job => "job",
            Self::CronJob => "cronjob",
            Self::Service => "service",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ObjectName { namespace, name } = &self.name;
        write!(formatter, "{namespace}/{}/{name}", self.kind.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_and_destinations_are_read_as_kubectl_has_them() {
        let (namespace, domain) = ("shop".parse().expect("valid"), "td".parse().expect("valid"));
        let client = |text: &str| Who::parse(text, &namespace, &domain);
        let shown = |text: &str| match client(text).expect("valid") {
            Who::Workload(target) => target.to_string(),
            Who::Identity(identity) => identity.to_string(),
            Who::Address(address) => address.to_string(),
        };
        for (text, expected) in [
            ("deploy/web", "shop/deployment/web"),
            ("Deployment/web", "shop/deployment/web"),
            ("other/sts/db", "other/statefulset/db"),
            ("sa/web", "spiffe://td/ns/shop/sa/web"),
            ("other/sa/web", "spiffe://td/ns/other/sa/web"),
            ("spiffe://x/ns/a/sa/b", "spiffe://x/ns/a/sa/b"),
            ("10.0.0.1", "10.0.0.1"),
            ("fd00::1", "fd00::1"),
        ] {
            assert_eq!(shown(text), expected);
        }
        for bad in [
            "",
            "web",
            "svc/web",
            "thing/web",
            "a/b/c/d",
            "deploy/W",
            "spiffe://x/y",
        ] {
            assert!(client(bad).is_err(), "{bad:?} was accepted");
        }
        let target = |text: &str| Target::parse(text, &namespace).map(|it| it.to_string());
        assert_eq!(target("svc/web").expect("valid"), "shop/service/web");
        for bad in ["10.0.0.1", "sa/web", "spiffe://x/ns/a/sa/b", "web"] {
            assert!(target(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
