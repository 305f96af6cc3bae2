//! What the index keeps of routes and ReferenceGrants: checked, with references read but not followed
//! (what they name may come later, or go).

use std::collections::{BTreeSet, HashMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use weft_core::route::{Filter, Route, RouteKind, RouteName, RouteRules, Target};
use weft_core::{Name, ObjectName};

use super::reliability::Annotated;
use super::route_rules::{Aside, FiltersOf, Reader, few, parsed};
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
    /// What was found in its rules besides.
    pub(super) aside: Aside,
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
        let (parents, mut ignored) = parents(&name, spec.parent_refs())?;
        let mut reader = Reader::new(
            &namespace,
            match spec {
                RouteSpec::Http(_) => FiltersOf::Http,
                RouteSpec::Grpc(_) => FiltersOf::Grpc,
                RouteSpec::Tls(_) | RouteSpec::Tcp(_) => FiltersOf::Flows,
            },
            match spec {
                // Nor are annotations of routes that are not the mesh's.
                RouteSpec::Http(_) | RouteSpec::Grpc(_) if !parents.is_empty() => {
                    Annotated::of_route(metadata)?
                }
                _ => Annotated::default(),
            },
        );
        // Routes of gateways are not read further: see `decode`.
        let rules = match spec {
            _ if parents.is_empty() => RouteRules::Http(vec![]),
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
        let created = metadata.creation_timestamp.as_ref();
        let record = Self {
            route: Route {
                name,
                created: created.map(|it| it.0.as_second()),
                rules,
            },
            generation: metadata.generation,
            parents,
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

    /// The route as agents are told it for a port of a Service, given where references lead.
    pub(super) fn resolved(
        &self,
        parent: &ServiceRecord,
        port: u16,
        resolve: impl Fn(&ObjectName, u16) -> Result<(), (Unresolved, String)>,
    ) -> Route {
        let follow = |target: &mut Target| {
            if let Target::Service { name, port } = target
                && let Err((_, reason)) = resolve(name, *port)
            {
                *target = Target::Invalid(reason);
            }
        };
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
                    let reliability = said.over(&parent.reliability);
                    rule.reliability = reliability.is_any().then(|| Box::new(reliability));
                    follow_filters(&mut rule.filters);
                    for backend in &mut rule.backends {
                        follow(&mut backend.target);
                        follow_filters(&mut backend.filters);
                    }
                    // Linkerd's routes go to their parent where they do not say where to.
                    if rule.backends.is_empty() && route.name.kind == RouteKind::LinkerdHttp {
                        rule.backends.push(weft_core::route::Backend {
                            weight: 1,
                            target: Target::Service {
                                name: parent.name.clone(),
                                port,
                            },
                            filters: vec![],
                        });
                    }
                }
            }
            RouteRules::Flow(rule) => {
                for backend in &mut rule.backends {
                    follow(&mut backend.target);
                }
            }
        }
        route
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

fn parents(
    name: &RouteName,
    list: &[written::ParentRef],
) -> Result<(Vec<ParentRecord>, Vec<Fault>), Fault> {
    few("spec.parentRefs", list.len(), MAX_PARENTS)?;
    let mut ignored = vec![];
    let mut parents = vec![];
    for (index, it) in list.iter().enumerate() {
        let field = format!("spec.parentRefs[{index}]");
        if !it.is_service() {
            // Gateways are somebody else's; of Linkerd's kind, nobody's.
            if name.kind == RouteKind::LinkerdHttp {
                ignored.push(Fault::new(field, "only a Service can be a parent"));
            }
            continue;
        }
        parents.push(ParentRecord {
            index,
            service: ObjectName {
                namespace: match &it.namespace {
                    Some(text) => parsed(&format!("{field}.namespace"), text)?,
                    None => name.name.namespace.clone(),
                },
                name: parsed(&format!("{field}.name"), &it.name)?,
            },
            port: match it.port.map(u16::try_from) {
                None => None,
                Some(Ok(port)) if port != 0 => Some(port),
                Some(_) => {
                    return Err(Fault::new(format!("{field}.port"), "no port: 1 to 65535"));
                }
            },
            section: match it.section_name.as_deref().filter(|it| !it.is_empty()) {
                Some(text) => Some(parsed(&format!("{field}.sectionName"), text)?),
                None => None,
            },
            written: it.clone(),
        });
    }
    Ok((parents, ignored))
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
