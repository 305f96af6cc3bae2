//! What the index keeps of policy objects: checked, with references read but not yet followed
//! (what they name may come later, or go).

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;
use weft_core::route::RouteKind;
use weft_core::{
    AccessPolicy, AuthorizationName, Identity, IdentityMatch, Name, NetworkMatch, ObjectName,
    PolicyGroup, ProxyProtocol, ServerName, TrustDomain,
};

use super::pods::{Created, PodRecord};
use super::selector::Selector;
use crate::objects::policy as written;
use crate::objects::{Fault, GATEWAY_GROUP};

/// A Server.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ServerRecord {
    /// Its name.
    pub(super) name: ServerName,
    /// When it was created, where that is known.
    pub(super) created: Option<Created>,
    /// The pods that it governs; none for machines outside Kubernetes.
    pub(super) selector: Option<Selector>,
    /// The port of those pods.
    pub(super) port: PortChoice,
    /// What holds where no authorization covers.
    pub(super) access_policy: AccessPolicy,
    /// What the port speaks.
    pub(super) proxy_protocol: ProxyProtocol,
    /// Whether it was never readable: it lets nobody in, whatever authorizations say.
    pub(super) closed: bool,
}

/// Which port a Server governs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PortChoice {
    /// This one.
    Number(u16),
    /// Those of this name.
    Named(String),
    /// What was written cannot be read: it may have meant any.
    Any,
}

/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AuthorizationRecord {
    /// Its name.
    pub(super) name: AuthorizationName,
    /// What it opens.
    pub(super) target: Target,
    /// What clients must satisfy.
    pub(super) required: Vec<Required>,
}

/// What an AuthorizationPolicy opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A Server of the policy's namespace; of this group, or of whichever has it.
    Server(Option<PolicyGroup>, Name),
    /// All Servers of the policy's namespace.
    Namespace,
    /// Requests of a route of the policy's namespace: of the first of these kinds that has it.
    Route(&'static [RouteKind], Name),
}

/// What clients must satisfy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Required {
    /// To have this identity.
    Identity(IdentityMatch),
    /// A MeshTLSAuthentication; of this group, or of whichever has it.
    MeshTls(Option<PolicyGroup>, ObjectName),
    /// A NetworkAuthentication.
    Network(Option<PolicyGroup>, ObjectName),
    /// Something nobody satisfies.
    Nothing(Fault),
}

/// What references and identities are read against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting<'a> {
    /// The object's namespace.
    pub(super) namespace: &'a Name,
    /// Where identities of service accounts belong.
    pub(super) trust_domain: &'a TrustDomain,
}

impl ServerRecord {
    /// Checks a Server.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(
        name: ServerName,
        created: Option<Created>,
        spec: &written::ServerSpec,
    ) -> Result<Self, Fault> {
        let selector = match (&spec.pod_selector, &spec.external_workload_selector) {
            (Some(selector), None) => Some(Selector::check("spec.podSelector", selector)?),
            (None, Some(_)) => None,
            (None, None) => return Err(Fault::new("spec.podSelector", "missing")),
            (Some(_), Some(_)) => {
                let reason = "podSelector and externalWorkloadSelector exclude each other";
                return Err(Fault::new("spec.podSelector", reason));
            }
        };
        Ok(Self {
            name,
            created,
            selector,
            port: port_choice(&spec.port)?,
            access_policy: spec.access_policy.map_or(AccessPolicy::Deny, access_policy),
            proxy_protocol: spec
                .proxy_protocol
                .map_or(ProxyProtocol::Unknown, proxy_protocol),
            closed: false,
        })
    }

    /// What a Server that cannot be read, and never could, closes: the ports that it may have
    /// meant. Its selector or port count if they can be read by themselves.
    pub(super) fn closed(name: ServerName, created: Option<Created>, spec: &Value) -> Self {
        let selector = spec
            .get("podSelector")
            .and_then(|it| serde_json::from_value(it.clone()).ok())
            .and_then(|it| Selector::check("spec.podSelector", &it).ok())
            .unwrap_or_default();
        let port = spec
            .get("port")
            .and_then(|it| serde_json::from_value(it.clone()).ok())
            .and_then(|it| port_choice(&it).ok())
            .unwrap_or(PortChoice::Any);
        Self {
            name,
            created,
            selector: Some(selector),
            port,
            access_policy: AccessPolicy::Deny,
            proxy_protocol: ProxyProtocol::Unknown,
            closed: true,
        }
    }

    /// Whether it governs some port of a pod of its namespace.
    pub(super) fn selects(&self, pod: &PodRecord) -> bool {
        let selector = self.selector.as_ref();
        selector.is_some_and(|it| it.selects(&pod.labels))
    }

    /// Sorts the older Server first; then by name, so that the order never depends on chance.
    pub(super) fn precedence(&self) -> (bool, Option<&Created>, &ServerName) {
        (self.created.is_none(), self.created.as_ref(), &self.name)
    }
}

impl AuthorizationRecord {
    /// Checks an AuthorizationPolicy.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(
        name: AuthorizationName,
        spec: &written::AuthorizationPolicySpec,
        setting: Setting<'_>,
    ) -> Result<Self, Fault> {
        let references = &spec.required_authentication_refs;
        few("spec.requiredAuthenticationRefs", references.len(), 64)?;
        let target = target(&spec.target_ref, setting)?;
        let mut required = vec![];
        for (index, reference) in spec.required_authentication_refs.iter().enumerate() {
            let field = format!("spec.requiredAuthenticationRefs[{index}]");
            required.push(required_reference(&field, reference, setting)?);
        }
        Ok(Self {
            name,
            target,
            required,
        })
    }

    /// Parts of it that nobody satisfies.
    pub(super) fn faults(&self) -> Vec<Fault> {
        let required = self.required.iter().filter_map(|it| match it {
            Required::Nothing(fault) => Some(fault.clone()),
            _ => None,
        });
        required.collect()
    }
}

/// Checks a MeshTLSAuthentication.
///
/// # Errors
/// The first field that cannot be used.
pub(super) fn check_mesh_tls(
    spec: &written::MeshTlsAuthenticationSpec,
    setting: Setting<'_>,
) -> Result<Vec<IdentityMatch>, Fault> {
    let count = |list: Option<usize>| list.unwrap_or(0);
    let identities = count(spec.identities.as_ref().map(Vec::len));
    let references = count(spec.identity_refs.as_ref().map(Vec::len));
    few("spec.identities", identities + references, MAX_MATCHES)?;
    let mut matches = vec![];
    for (index, text) in spec.identities.iter().flatten().enumerate() {
        let field = format!("spec.identities[{index}]");
        matches.push(identity_match(text).map_err(|reason| Fault::new(field, reason))?);
    }
    for (index, reference) in spec.identity_refs.iter().flatten().enumerate() {
        let field = format!("spec.identityRefs[{index}]");
        matches.push(match (reference.kind.as_str(), is_core(reference)) {
            ("ServiceAccount", true) => service_account(&field, reference, setting)?,
            ("Namespace", true) => namespace(&field, reference, setting)?,
            _ => {
                let reason = "neither a ServiceAccount nor a Namespace";
                return Err(Fault::new(format!("{field}.kind"), reason));
            }
        });
    }
    if matches.is_empty() {
        let reason = "identities or identityRefs are needed";
        return Err(Fault::new("spec", reason));
    }
    Ok(matches)
}

/// Checks the networks of a NetworkAuthentication or an EgressNetwork.
///
/// # Errors
/// The first field that cannot be used.
pub(super) fn check_networks(written: &[written::Network]) -> Result<Vec<NetworkMatch>, Fault> {
    if written.is_empty() {
        return Err(Fault::new("spec.networks", "empty"));
    }
    let excepted = |it: &written::Network| it.except.as_ref().map_or(0, Vec::len);
    let count = written.iter().map(|it| 1 + excepted(it)).sum();
    few("spec.networks", count, MAX_MATCHES)?;
    let mut networks = vec![];
    for (index, written) in written.iter().enumerate() {
        let field = format!("spec.networks[{index}]");
        let cidr = network(&format!("{field}.cidr"), &written.cidr)?;
        let mut except = vec![];
        for (position, text) in written.except.iter().flatten().enumerate() {
            let field = format!("{field}.except[{position}]");
            let excepted = network(&field, text)?;
            if !super::ranges::overlap(&cidr, &excepted) {
                let reason = format!("{excepted} lies outside of {cidr}, so it excepts nobody");
                return Err(Fault::new(field, reason));
            }
            except.push(excepted);
        }
        networks.push(NetworkMatch { cidr, except });
    }
    Ok(networks)
}

/// Identities or networks of one authentication.
const MAX_MATCHES: usize = 2048;

pub(super) fn few(field: &str, count: usize, most: usize) -> Result<(), Fault> {
    if count <= most {
        return Ok(());
    }
    Err(Fault::new(
        field,
        format!("{count} entries, more than {most}"),
    ))
}

pub(super) fn port_choice(written: &IntOrString) -> Result<PortChoice, Fault> {
    match written {
        IntOrString::Int(number) => match u16::try_from(*number) {
            Ok(port) if port != 0 => Ok(PortChoice::Number(port)),
            _ => {
                let reason = format!("{number} is no port: 1 to 65535");
                Err(Fault::new("spec.port", reason))
            }
        },
        // As Kubernetes names ports (RFC 6335): a number in quotes is no name.
        IntOrString::String(text) => {
            let allowed = text
                .bytes()
                .all(|it| matches!(it, b'a'..=b'z' | b'0'..=b'9' | b'-'));
            let lettered = text.bytes().any(|it| it.is_ascii_lowercase());
            if allowed && lettered && text.len() <= 63 {
                Ok(PortChoice::Named(text.clone()))
            } else {
                let shown: String = text.chars().take(64).collect();
                let reason = format!("{shown:?} is neither a port number nor a port's name");
                Err(Fault::new("spec.port", reason))
            }
        }
    }
}

pub(super) fn target(
    reference: &written::Reference,
    setting: Setting<'_>,
) -> Result<Target, Fault> {
    let foreign = reference
        .namespace
        .as_deref()
        .is_some_and(|it| !it.is_empty() && it != setting.namespace.as_str());
    if foreign {
        let reason = "a policy opens nothing outside its own namespace";
        return Err(Fault::new("spec.targetRef.namespace", reason));
    }
    let field = |name: &str| format!("spec.targetRef.{name}");
    let group = reference.group.as_deref().unwrap_or("");
    Ok(match (reference.kind.as_str(), group) {
        ("Server", _) => Target::Server(
            policy_group(&field("group"), group)?,
            name(&field("name"), &reference.name)?,
        ),
        ("Namespace", "" | "core") if reference.name == setting.namespace.as_str() => {
            Target::Namespace
        }
        ("Namespace", "" | "core") => {
            let reason = "a policy opens nothing outside its own namespace";
            return Err(Fault::new(field("name"), reason));
        }
        ("HTTPRoute" | "GRPCRoute", _) => {
            let kinds: &[RouteKind] = match (reference.kind.as_str(), group) {
                ("HTTPRoute", "") => &[RouteKind::LinkerdHttp, RouteKind::Http],
                ("HTTPRoute", "policy.linkerd.io") => &[RouteKind::LinkerdHttp],
                ("HTTPRoute", GATEWAY_GROUP) => &[RouteKind::Http],
                ("GRPCRoute", "" | GATEWAY_GROUP) => &[RouteKind::Grpc],
                (kind, _) => {
                    let reason = format!("not the group of a {kind}");
                    return Err(Fault::new(field("group"), reason));
                }
            };
            Target::Route(kinds, name(&field("name"), &reference.name)?)
        }
        _ => {
            let reason = "none of Server, Namespace, HTTPRoute and GRPCRoute";
            return Err(Fault::new(field("kind"), reason));
        }
    })
}

fn required_reference(
    field: &str,
    reference: &written::Reference,
    setting: Setting<'_>,
) -> Result<Required, Fault> {
    let group = || {
        let written = reference.group.as_deref().unwrap_or("");
        policy_group(&format!("{field}.group"), written)
    };
    Ok(match reference.kind.as_str() {
        "ServiceAccount" if is_core(reference) => {
            Required::Identity(service_account(field, reference, setting)?)
        }
        "Namespace" if is_core(reference) => {
            Required::Identity(namespace(field, reference, setting)?)
        }
        "MeshTLSAuthentication" => {
            Required::MeshTls(group()?, object_name(field, reference, setting)?)
        }
        "NetworkAuthentication" => {
            Required::Network(group()?, object_name(field, reference, setting)?)
        }
        kind => {
            let shown: String = kind.chars().take(64).collect();
            let reason = format!("{shown:?} is not known: nobody satisfies it");
            Required::Nothing(Fault::new(format!("{field}.kind"), reason))
        }
    })
}

/// Reads a group that must be one of the two policy groups; absent: either.
fn policy_group(field: &str, written: &str) -> Result<Option<PolicyGroup>, Fault> {
    match written {
        "" => Ok(None),
        "policy.weft.dev" => Ok(Some(PolicyGroup::Weft)),
        "policy.linkerd.io" => Ok(Some(PolicyGroup::Linkerd)),
        _ => {
            let reason = "neither policy.weft.dev nor policy.linkerd.io";
            Err(Fault::new(field, reason))
        }
    }
}

pub(super) fn is_core(reference: &written::Reference) -> bool {
    matches!(reference.group.as_deref(), None | Some("" | "core"))
}

fn name(field: &str, text: &str) -> Result<Name, Fault> {
    text.parse().map_err(|reason| Fault::new(field, reason))
}

fn object_name(
    field: &str,
    reference: &written::Reference,
    setting: Setting<'_>,
) -> Result<ObjectName, Fault> {
    let namespace = match reference.namespace.as_deref() {
        None | Some("") => setting.namespace.clone(),
        Some(namespace) => name(&format!("{field}.namespace"), namespace)?,
    };
    Ok(ObjectName {
        namespace,
        name: name(&format!("{field}.name"), &reference.name)?,
    })
}

pub(super) fn service_account(
    field: &str,
    reference: &written::Reference,
    setting: Setting<'_>,
) -> Result<IdentityMatch, Fault> {
    let account = object_name(field, reference, setting)?;
    Ok(IdentityMatch::Exact(Identity {
        trust_domain: setting.trust_domain.clone(),
        namespace: account.namespace,
        service_account: account.name,
    }))
}

fn namespace(
    field: &str,
    reference: &written::Reference,
    setting: Setting<'_>,
) -> Result<IdentityMatch, Fault> {
    Ok(IdentityMatch::Namespace {
        trust_domain: setting.trust_domain.clone(),
        namespace: name(&format!("{field}.name"), &reference.name)?,
    })
}

/// Reads an identity as written in a MeshTLSAuthentication.
fn identity_match(text: &str) -> Result<IdentityMatch, String> {
    const LINKERD: &str = ".serviceaccount.identity.linkerd.";
    if text == "*" {
        return Ok(IdentityMatch::Any);
    }
    if text.starts_with("spiffe://") {
        let identity = text.parse::<Identity>().map_err(|it| it.to_string())?;
        return Ok(IdentityMatch::Exact(identity));
    }
    let form = || {
        let shown: String = text.chars().take(128).collect();
        format!(
            "{shown:?} is no identity: \"*\", \
             spiffe://<trust-domain>/ns/<namespace>/sa/<service-account> or \
             <service-account or *>.<namespace>.serviceaccount.identity.linkerd.<trust-domain>"
        )
    };
    let (who, domain) = text.split_once(LINKERD).ok_or_else(form)?;
    // A namespace has no dots, a service account may.
    let (account, namespace) = who.rsplit_once('.').ok_or_else(form)?;
    let trust_domain: TrustDomain = domain.parse().map_err(|_| form())?;
    let namespace: Name = namespace.parse().map_err(|_| form())?;
    Ok(match account {
        "*" => IdentityMatch::Namespace {
            trust_domain,
            namespace,
        },
        account => IdentityMatch::Exact(Identity {
            trust_domain,
            namespace,
            service_account: account.parse().map_err(|_| form())?,
        }),
    })
}

pub(super) fn network(field: &str, text: &str) -> Result<IpNet, Fault> {
    let parsed = match text.parse::<IpNet>() {
        Ok(network) => Ok(network.trunc()),
        Err(_) => text.parse::<std::net::IpAddr>().map(IpNet::from),
    };
    let refuse = |reason: &str| {
        let shown: String = text.chars().take(64).collect();
        Fault::new(field, format!("{shown:?} {reason}"))
    };
    let network = parsed.map_err(|_| refuse("is neither a network nor an address"))?;
    canonical(network).ok_or_else(|| refuse("is only in part of IPv4: write that part as IPv4"))
}

/// An IPv4-mapped network as the IPv4 network that it is, as clients' addresses are taken too. None:
/// it holds mapped addresses and others.
fn canonical(network: IpNet) -> Option<IpNet> {
    let IpNet::V6(v6) = network else {
        return Some(network);
    };
    let Some(v4) = v6.network().to_ipv4_mapped() else {
        return Some(network);
    };
    let length = v6.prefix_len().checked_sub(96)?;
    let network = ipnet::Ipv4Net::new(v4, length).ok()?;
    Some(network.into())
}

fn access_policy(written: written::AccessPolicy) -> AccessPolicy {
    match written {
        written::AccessPolicy::AllUnauthenticated => AccessPolicy::AllUnauthenticated,
        written::AccessPolicy::AllAuthenticated => AccessPolicy::AllAuthenticated,
        written::AccessPolicy::ClusterUnauthenticated => AccessPolicy::ClusterUnauthenticated,
        written::AccessPolicy::ClusterAuthenticated => AccessPolicy::ClusterAuthenticated,
        written::AccessPolicy::Deny => AccessPolicy::Deny,
        written::AccessPolicy::Audit => AccessPolicy::Audit,
    }
}

fn proxy_protocol(written: written::ProxyProtocol) -> ProxyProtocol {
    match written {
        written::ProxyProtocol::Unknown => ProxyProtocol::Unknown,
        written::ProxyProtocol::Http1 => ProxyProtocol::Http1,
        written::ProxyProtocol::Http2 => ProxyProtocol::Http2,
        written::ProxyProtocol::Grpc => ProxyProtocol::Grpc,
        written::ProxyProtocol::Opaque => ProxyProtocol::Opaque,
        written::ProxyProtocol::Tls => ProxyProtocol::Tls,
    }
}
