//! What the index keeps of routes and ReferenceGrants: checked, with references read but not followed
//! (what they name may come later, or go).

use std::collections::{BTreeSet, HashMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use weft_core::route::{
    Backend, Filter, HostMatch, Route, RouteKind, RouteName, RouteRules, Rule, Target,
};
use weft_core::{EgressName, Name, ObjectName, PolicyGroup};

use super::reliability::{Annotated, ReliabilitySaid};
use super::route_rules::{Aside, FiltersOf, MAX_HOSTNAMES, Reader, few, parsed};
use super::services::ServiceRecord;
use crate::objects::routes::{self as written, RouteSpec};
use crate::objects::{Fault, ObjectKind};

/// All routes and grants.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// The routes that are in force, where what they refer to allows it.
    pub(super) records: HashMap<RouteName, RouteRecord>,
    /// Routes whose newest version cannot be used, and why.
    pub(super) refused: HashMap<RouteName, Refused>,
    /// Routes by the Services that they are attached to.
    pub(super) of_parent: HashMap<ObjectName, BTreeSet<RouteName>>,
    /// Routes by the Servers that they are attached to, of whichever group.
    pub(super) of_server: HashMap<ObjectName, BTreeSet<RouteName>>,
    /// Routes by the EgressNetworks that they are attached to, of whichever group.
    pub(super) of_egress: HashMap<ObjectName, BTreeSet<RouteName>>,
    /// Routes by the Services that they refer to.
    pub(super) naming: HashMap<ObjectName, BTreeSet<RouteName>>,
    /// Grants by namespace and name.
    pub(super) grants: HashMap<Name, HashMap<Name, GrantRecord>>,
}

/// A version of a route that cannot be used.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Refused {
    /// What is wrong with it.
    pub(super) fault: Fault,
    /// Which version of the object it is.
    pub(super) generation: Option<i64>,
    /// Servers that it is meant for: what it would have kept from them is not known.
    pub(super) servers: BTreeSet<MeantServer>,
}

/// A Server that a route is meant for which cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum MeantServer {
    /// This one, of either group.
    Named(Name),
    /// Its name cannot be read: any of the route's namespace.
    Any,
}

/// A route.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RouteRecord {
    /// What agents are told of it if all its references are good.
    pub(super) route: Route,
    /// Which version of the object this is.
    pub(super) generation: Option<i64>,
    /// The Services that it is attached to.
    pub(super) parents: Vec<ParentRecord>,
    /// The Servers that it is attached to.
    pub(super) servers: Vec<ServerParent>,
    /// The EgressNetworks that it is attached to.
    pub(super) egress: Vec<EgressParent>,
    /// The hosts that it is for, where Servers or EgressNetworks are its parents; none: all.
    pub(super) hostnames: Vec<HostMatch>,
    /// What was found in its rules besides.
    pub(super) aside: Aside,
}

/// A Server that a route is attached to: one of the route's namespace.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ServerParent {
    /// Which of the parents it is.
    pub(super) index: usize,
    /// Its group; none: whichever has it.
    pub(super) group: Option<PolicyGroup>,
    /// Its name.
    pub(super) name: Name,
    /// As it is written.
    pub(super) written: written::ParentRef,
}

/// An EgressNetwork that a route is attached to.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct EgressParent {
    /// Which of the parents it is.
    pub(super) index: usize,
    /// Its group; none: whichever has it.
    pub(super) group: Option<PolicyGroup>,
    /// Its name.
    pub(super) network: ObjectName,
    /// Only connections to this port.
    pub(super) port: Option<u16>,
    /// As it is written.
    pub(super) written: written::ParentRef,
}

/// Whose route it is told as.
#[derive(Clone, Copy, Debug)]
pub(super) enum Parent<'a> {
    /// That of a port of a Service.
    Service(&'a ServiceRecord, u16),
    /// That of an EgressNetwork.
    Egress(&'a EgressName),
}

/// A Service that a route is attached to.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ParentRecord {
    /// Which of the parents it is.
    pub(super) index: usize,
    /// The Service.
    pub(super) service: ObjectName,
    /// Only this port of it.
    pub(super) port: Option<u16>,
    /// Only the port of this name.
    pub(super) section: Option<Name>,
    /// As it is written.
    pub(super) written: written::ParentRef,
}

/// What a ReferenceGrant lets.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct GrantRecord {
    /// Routes of this kind in this namespace
    from: Vec<(RouteKind, Name)>,
    /// refer to these Services; none: all.
    to: Vec<Option<Name>>,
}

/// Where references of a route lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Unresolved {
    /// No grant lets them.
    NotPermitted,
    /// They name something that can be no backend.
    InvalidKind,
    /// They name a Service, or a port, that is not there.
    NotFound,
}

/// Why a route leads nowhere that names an EgressNetwork which it is not one of.
pub(super) const OTHER_NETWORK: &str = "only routes of the same EgressNetwork can lead to it";
const NO_MIRROR: &str = "requests that have arrived at a Server are not mirrored";
const MAX_PARENTS: usize = 32;
const MAX_GRANTS: usize = 16;

impl RouteRecord {
    /// Checks a route. Also returned: faults of parts that are ignored.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(
        name: RouteName,
        metadata: &ObjectMeta,
        spec: &RouteSpec,
    ) -> Result<(Self, Vec<Fault>), Fault> {
        let namespace = name.name.namespace.clone();
        let Parents {
            services: parents,
            servers,
            egress,
            mut ignored,
        } = Parents::read(&name, spec.parent_refs())?;
        let hostnames = match servers.is_empty() && egress.is_empty() {
            true => vec![],
            false => hostnames(spec)?,
        };
        let is_led = !(parents.is_empty() && egress.is_empty());
        let mut reader = Reader::new(
            &namespace,
            match spec {
                RouteSpec::Http(_) => FiltersOf::Http,
                RouteSpec::Grpc(_) => FiltersOf::Grpc,
                RouteSpec::Tls(_) | RouteSpec::Tcp(_) => FiltersOf::Flows,
            },
            match spec {
                // Nor are annotations of routes that are not the mesh's.
                RouteSpec::Http(_) | RouteSpec::Grpc(_) if is_led => Annotated::of_route(metadata)?,
                _ => Annotated::default(),
            },
        );
        // Routes of gateways are not read further: see `decode`.
        let rules = match spec {
            _ if !is_led && servers.is_empty() => RouteRules::Http(vec![]),
            RouteSpec::Http(spec) => RouteRules::Http(reader.http_rules(spec.rules.as_deref())?),
            RouteSpec::Grpc(spec) => RouteRules::Http(reader.grpc_rules(&spec.rules)?),
            RouteSpec::Tls(spec) => {
                RouteRules::Flow(reader.flow_rule(&spec.hostnames, &spec.rules)?)
            }
            RouteSpec::Tcp(spec) => RouteRules::Flow(reader.flow_rule(&[], &spec.rules)?),
        };
        let aside = reader.aside;
        ignored.extend(aside.ignored.iter().cloned());
        ignored.extend(aside.unsupported.iter().cloned());
        if !servers.is_empty() {
            ignored.extend(unsupported_at_servers(&rules));
        }
        let created = metadata.creation_timestamp.as_ref();
        let record = Self {
            route: Route {
                name,
                created: created.map(|it| it.0.as_second()),
                rules,
            },
            generation: metadata.generation,
            parents,
            servers,
            egress,
            hostnames,
            aside,
        };
        Ok((record, ignored))
    }

    /// The ports of a Service that a parent means; none: it is attached to nothing.
    pub(super) fn ports_of(parent: &ParentRecord, service: &ServiceRecord) -> Vec<u16> {
        let meant = service.ports.iter().filter(|it| {
            let by_number = parent.port.is_none_or(|port| port == it.number);
            let by_name = parent.section.is_none() || parent.section == it.name;
            by_number && by_name
        });
        meant.map(|it| it.number).collect()
    }

    /// The route as agents are told it for one of its parents, given where references lead.
    pub(super) fn resolved(
        &self,
        parent: Parent<'_>,
        resolve: impl Fn(&ObjectName, u16) -> Result<(), (Unresolved, String)>,
    ) -> Route {
        let follow = |target: &mut Target| match target {
            Target::Service { name, port } => {
                if let Err((_, reason)) = resolve(name, *port) {
                    *target = Target::Invalid(reason);
                }
            }
            Target::Egress(name) if !parent.is_egress(name) => {
                *target = Target::Invalid(OTHER_NETWORK.to_owned());
            }
            Target::Egress(_) | Target::Invalid(_) => {}
        };
        let silent = ReliabilitySaid::default();
        let said_by_parent = match parent {
            Parent::Service(service, _) => &service.reliability,
            Parent::Egress(_) => &silent,
        };
        let by_default = parent.default_backend(self.route.name.kind);
        let follow_filters = |filters: &mut Vec<Filter>| {
            for filter in filters {
                if let Filter::Mirror(mirror) = filter {
                    follow(&mut mirror.target);
                }
            }
        };
        let mut route = self.route.clone();
        match &mut route.rules {
            RouteRules::Http(rules) => {
                for (rule, said) in rules.iter_mut().zip(&self.aside.reliability) {
                    let reliability = said.over(said_by_parent);
                    rule.reliability = reliability.is_any().then(|| Box::new(reliability));
                    follow_filters(&mut rule.filters);
                    for backend in &mut rule.backends {
                        follow(&mut backend.target);
                        follow_filters(&mut backend.filters);
                    }
                    if rule.backends.is_empty() {
                        rule.backends.extend(by_default.clone());
                    }
                }
            }
            RouteRules::Flow(rule) => {
                for backend in &mut rule.backends {
                    follow(&mut backend.target);
                }
                if rule.backends.is_empty() {
                    rule.backends.extend(by_default);
                }
            }
        }
        route
    }

    /// The route as agents are told it for a Server: where requests go is settled there.
    pub(super) fn inbound(&self) -> Route {
        let mut route = self.route.clone();
        if let RouteRules::Http(rules) = &mut route.rules {
            for rule in rules {
                rule.backends.clear();
                for filter in &mut rule.filters {
                    if matches!(filter, Filter::Mirror(_)) {
                        *filter = Filter::Invalid(NO_MIRROR.to_owned());
                    }
                }
            }
        }
        route
    }

    /// The names of the Servers that it is attached to.
    pub(super) fn parent_servers(&self) -> BTreeSet<ObjectName> {
        let servers = self.servers.iter().map(|it| ObjectName {
            namespace: self.route.name.name.namespace.clone(),
            name: it.name.clone(),
        });
        servers.collect()
    }

    /// The names of the EgressNetworks that it is attached to.
    pub(super) fn parent_networks(&self) -> BTreeSet<ObjectName> {
        self.egress.iter().map(|it| it.network.clone()).collect()
    }

    /// The Services that it is attached to.
    pub(super) fn parent_services(&self) -> BTreeSet<ObjectName> {
        self.parents.iter().map(|it| it.service.clone()).collect()
    }

    /// The Services that it refers to.
    pub(super) fn named_services(&self) -> BTreeSet<ObjectName> {
        let references = self.aside.references.iter();
        references.map(|it| it.service.clone()).collect()
    }
}

impl Parent<'_> {
    fn is_egress(self, name: &EgressName) -> bool {
        matches!(self, Self::Egress(it) if it == name)
    }

    /// Where a rule leads that does not say where to; none: nowhere. Linkerd's routes go to their parent, and all
    /// of an EgressNetwork to where the client wanted to go.
    fn default_backend(self, kind: RouteKind) -> Option<Backend> {
        let target = match self {
            Self::Service(service, port) if kind == RouteKind::LinkerdHttp => Target::Service {
                name: service.name.clone(),
                port,
            },
            Self::Service(..) => return None,
            Self::Egress(name) => Target::Egress(name.clone()),
        };
        Some(Backend {
            weight: 1,
            target,
            filters: vec![],
        })
    }
}

/// Hosts, as far as a kind of route has them.
fn hostnames(spec: &RouteSpec) -> Result<Vec<HostMatch>, Fault> {
    let written = match spec {
        RouteSpec::Http(spec) => spec.hostnames.as_ref(),
        RouteSpec::Grpc(spec) => spec.hostnames.as_ref(),
        RouteSpec::Tls(_) | RouteSpec::Tcp(_) => None,
    };
    let Some(written) = written else {
        return Ok(vec![]);
    };
    let list: Vec<String> = serde_json::from_value(written.clone())
        .map_err(|reason| Fault::new("spec.hostnames", reason))?;
    few("spec.hostnames", list.len(), MAX_HOSTNAMES)?;
    let hosts = list.iter().enumerate();
    hosts
        .map(|(index, text)| parsed(&format!("spec.hostnames[{index}]"), text))
        .collect()
}

fn unsupported_at_servers(rules: &RouteRules) -> Vec<Fault> {
    let RouteRules::Http(rules) = rules else {
        return vec![];
    };
    let mirrors = |rule: &Rule| {
        rule.filters
            .iter()
            .any(|it| matches!(it, Filter::Mirror(_)))
    };
    let faulty = rules.iter().enumerate().filter(|(_, rule)| mirrors(rule));
    faulty
        .map(|(index, _)| Fault::new(format!("spec.rules[{index}].filters"), NO_MIRROR))
        .collect()
}

fn server_parent(
    name: &RouteName,
    index: usize,
    it: &written::ParentRef,
) -> Result<ServerParent, Fault> {
    let field = |name: &str| format!("spec.parentRefs[{index}].{name}");
    if !name.kind.route_type().is_of_requests() {
        let reason = format!("a Server can be no parent of a {}", name.kind.as_str());
        return Err(Fault::new(field("kind"), reason));
    }
    let own = name.name.namespace.as_str();
    if it.namespace.as_deref().is_some_and(|it| it != own) {
        let reason = "a route is for Servers of its own namespace only";
        return Err(Fault::new(field("namespace"), reason));
    }
    if it.port.is_some() || it.section_name.as_deref().is_some_and(|it| !it.is_empty()) {
        return Err(Fault::new(field("port"), "a Server has one port"));
    }
    Ok(ServerParent {
        index,
        group: it.group.as_deref().and_then(ObjectKind::policy_group_named),
        name: parsed(&field("name"), &it.name)?,
        written: it.clone(),
    })
}

fn egress_parent(
    name: &RouteName,
    index: usize,
    it: &written::ParentRef,
) -> Result<EgressParent, Fault> {
    let field = format!("spec.parentRefs[{index}]");
    if it.section_name.as_deref().is_some_and(|it| !it.is_empty()) {
        let reason = "an EgressNetwork has no sections";
        return Err(Fault::new(format!("{field}.sectionName"), reason));
    }
    Ok(EgressParent {
        index,
        group: it.group.as_deref().and_then(ObjectKind::policy_group_named),
        network: parent_name(name, &field, it)?,
        port: parent_port(&field, it)?,
        written: it.clone(),
    })
}

fn parent_name(
    route: &RouteName,
    field: &str,
    it: &written::ParentRef,
) -> Result<ObjectName, Fault> {
    Ok(ObjectName {
        namespace: match &it.namespace {
            Some(text) => parsed(&format!("{field}.namespace"), text)?,
            None => route.name.namespace.clone(),
        },
        name: parsed(&format!("{field}.name"), &it.name)?,
    })
}

fn parent_port(field: &str, it: &written::ParentRef) -> Result<Option<u16>, Fault> {
    match it.port.map(u16::try_from) {
        None => Ok(None),
        Some(Ok(port)) if port != 0 => Ok(Some(port)),
        Some(_) => Err(Fault::new(format!("{field}.port"), "no port: 1 to 65535")),
    }
}

/// What a route is attached to, by kind; and what is not the mesh's, and has no effect.
#[derive(Default)]
struct Parents {
    services: Vec<ParentRecord>,
    servers: Vec<ServerParent>,
    egress: Vec<EgressParent>,
    ignored: Vec<Fault>,
}

impl Parents {
    fn read(name: &RouteName, list: &[written::ParentRef]) -> Result<Self, Fault> {
        few("spec.parentRefs", list.len(), MAX_PARENTS)?;
        let mut parents = Self::default();
        for (index, it) in list.iter().enumerate() {
            let field = format!("spec.parentRefs[{index}]");
            if it.is_server() {
                parents.servers.push(server_parent(name, index, it)?);
            } else if it.is_egress_network() {
                parents.egress.push(egress_parent(name, index, it)?);
            } else if it.is_service() {
                parents.services.push(ParentRecord {
                    index,
                    service: parent_name(name, &field, it)?,
                    port: parent_port(&field, it)?,
                    section: match it.section_name.as_deref().filter(|it| !it.is_empty()) {
                        Some(text) => Some(parsed(&format!("{field}.sectionName"), text)?),
                        None => None,
                    },
                    written: it.clone(),
                });
            } else if name.kind == RouteKind::LinkerdHttp {
                // Gateways are somebody else's; of Linkerd's kind, nobody's.
                let reason = "only a Service, a Server or an EgressNetwork can be a parent";
                parents.ignored.push(Fault::new(field, reason));
            }
        }
        Ok(parents)
    }
}

impl GrantRecord {
    /// Checks a ReferenceGrant. What it says of other kinds is nothing that routes need.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(spec: &written::ReferenceGrantSpec) -> Result<Self, Fault> {
        few("spec.from", spec.from.len(), MAX_GRANTS)?;
        few("spec.to", spec.to.len(), MAX_GRANTS)?;
        let mut record = Self::default();
        for (index, it) in spec.from.iter().enumerate() {
            let namespace = parsed(&format!("spec.from[{index}].namespace"), &it.namespace)?;
            if let Some(ObjectKind::Route(kind)) = ObjectKind::find(&it.group, &it.kind) {
                record.from.push((kind, namespace));
            }
        }
        for (index, it) in spec.to.iter().enumerate() {
            let name = it.name.as_deref().filter(|it| !it.is_empty());
            let name = name.map(|name| parsed(&format!("spec.to[{index}].name"), name));
            let name = name.transpose()?;
            if it.kind == "Service" && matches!(it.group.as_str(), "" | "core") {
                record.to.push(name);
            }
        }
        Ok(record)
    }

    fn lets(&self, route: &RouteName, service: &Name) -> bool {
        let mut from = self.from.iter();
        let mut to = self.to.iter();
        from.any(|(kind, namespace)| *kind == route.kind && *namespace == route.name.namespace)
            && to.any(|it| it.as_ref().is_none_or(|it| it == service))
    }
}

impl Routes {
    /// Whether a route may refer to a Service: one of its own namespace, one that it is attached to, which
    /// its requests go to anyway, or one that a ReferenceGrant is for.
    pub(super) fn permits(&self, record: &RouteRecord, service: &ObjectName) -> bool {
        let route = &record.route.name;
        let grants = self.grants.get(&service.namespace);
        let mut grants = grants.into_iter().flat_map(HashMap::values);
        service.namespace == route.name.namespace
            || record.parents.iter().any(|it| it.service == *service)
            || grants.any(|it| it.lets(route, &service.name))
    }
}

impl Unresolved {
    /// The reason of the condition `ResolvedRefs`.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NotPermitted => "RefNotPermitted",
            Self::InvalidKind => "InvalidKind",
            Self::NotFound => "BackendNotFound",
        }
    }
}
