//! What Servers and what opens them are in the state of agents.

use weft_core::{
    AccessPolicy, Authentication, Authorization, AuthorizationName, IdentityMatch, NetworkMatch,
    ObjectName, PolicyGroup, Server, ServerName,
};
use weft_proto::{Key, Kind, Resource};

use super::Index;
use super::authentications::meant;
use super::policies::{AuthorizationRecord, Required, ServerRecord, Target};
use super::publish_inbound::patterns;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;
use crate::views::Audience;

/// What a reference of a policy leads to.
enum Found<'a> {
    Identity(&'a IdentityMatch),
    MeshTls(&'a [IdentityMatch]),
    Networks(&'a [NetworkMatch]),
    Nothing,
}

/// Regular expressions of one Server: as many as agents take.
const MAX_PATTERNS: usize = 1024;

/// A Server that holds more identities and networks than this is not built: one object must not
/// take the memory of everybody.
const MAX_ENTRIES: usize = 16_384;

impl Index {
    pub(super) fn set_server(&mut self, name: &ServerName, record: Option<ServerRecord>) {
        let namespace = &name.name.namespace;
        self.dirty_pods_of(self.policies.servers.get(name).cloned().as_ref());
        self.dirty_pods_of(record.as_ref());
        // The same name in the other group may have been meant by policies without a group.
        for group in [PolicyGroup::Weft, PolicyGroup::Linkerd] {
            let name = name.name.clone();
            self.dirty.servers.insert(ServerName { group, name });
        }
        self.dirty_references(namespace);
        self.dirty_limits_of(&name.name);
        let routes = self.routes.of_server.get(&name.name);
        self.dirty
            .routes
            .extend(routes.into_iter().flatten().cloned());
        let members = self.policies.servers_in.entry(namespace.clone());
        let members = members.or_default();
        match record {
            Some(record) => {
                members.insert(name.clone());
                self.policies.servers.insert(name.clone(), record);
            }
            None => {
                members.remove(name);
                self.policies.servers.remove(name);
            }
        }
    }

    pub(super) fn set_authorization(
        &mut self,
        name: &AuthorizationName,
        record: Option<AuthorizationRecord>,
    ) {
        let namespace = name.name.namespace.clone();
        let before = self.policies.authorizations.get(name);
        let targets = before.iter().copied().chain(record.as_ref());
        let targets: Vec<_> = targets.map(|it| it.target.clone()).collect();
        for target in &targets {
            self.dirty_servers(&namespace, target);
        }
        self.dirty.authorizations.insert(name.clone());
        let members = self.policies.authorizations_in.entry(namespace);
        let members = members.or_default();
        match &record {
            Some(_) => members.insert(name.clone()),
            None => members.remove(name),
        };
        let all = &mut self.policies.authorizations;
        let before = match record.clone() {
            Some(record) => all.insert(name.clone(), record),
            None => all.remove(name),
        };
        self.names_authentications(name, before.as_ref(), record.as_ref());
    }

    /// What policies of a namespace name may be there now, or gone.
    pub(super) fn dirty_references(&mut self, namespace: &weft_core::Name) {
        let policies = self.policies.authorizations_in.get(namespace);
        let policies = policies.into_iter().flatten().cloned();
        self.dirty.authorizations.extend(policies);
    }

    /// The Servers that a policy of a namespace opens are to be made anew.
    pub(super) fn dirty_servers(&mut self, namespace: &weft_core::Name, target: &Target) {
        match target {
            Target::Route(_, name) => self.dirty_servers_of_routes(&ObjectName {
                namespace: namespace.clone(),
                name: name.clone(),
            }),
            Target::Namespace => {
                let servers = self.policies.servers_in.get(namespace);
                let servers = servers.into_iter().flatten().cloned();
                self.dirty.servers.extend(servers);
            }
            Target::Server(_, name) => {
                for group in [PolicyGroup::Weft, PolicyGroup::Linkerd] {
                    let name = ObjectName {
                        namespace: namespace.clone(),
                        name: name.clone(),
                    };
                    self.dirty.servers.insert(ServerName { group, name });
                }
            }
        }
    }

    /// Counts a pod that a Server governs, on a node whose agent then needs the Server.
    pub(super) fn count_server(
        &mut self,
        server: &ServerName,
        node: &weft_core::Name,
        difference: isize,
    ) {
        let nodes = self.published.server_nodes.entry(server.clone());
        let nodes = nodes.or_default();
        let count = nodes.entry(node.clone()).or_default();
        let before = *count;
        *count = count.saturating_add_signed(difference);
        if *count == 0 {
            nodes.remove(node);
            if nodes.is_empty() {
                self.published.server_nodes.remove(server);
            }
            self.changes
                .insert((Audience::Node(node.clone()), server_key(server)), None);
        } else if before == 0 {
            self.dirty.servers.insert(server.clone());
        }
    }

    /// Publishes a Server to the nodes that need it.
    pub(super) fn publish_server(&mut self, name: &ServerName) {
        let Some(nodes) = self.published.server_nodes.get(name).cloned() else {
            return;
        };
        let record = self.policies.servers.get(name);
        if record.is_some_and(|it| self.entries(it) > MAX_ENTRIES) {
            self.too_large(server_key(name));
            return;
        }
        let server = record.map(|it| self.server(it));
        let routes = server.as_ref().and_then(|it| it.routes.as_ref());
        if routes.is_some_and(|it| patterns(it) > MAX_PATTERNS) {
            self.too_large(server_key(name));
            return;
        }
        for node in nodes.into_keys() {
            self.changes.insert(
                (Audience::Node(node), server_key(name)),
                server.clone().map(Resource::Server),
            );
        }
    }

    /// The policies that open a Server.
    pub(super) fn opening<'a>(
        &'a self,
        record: &'a ServerRecord,
    ) -> impl Iterator<Item = &'a AuthorizationRecord> {
        let namespace = &record.name.name.namespace;
        let names = self.policies.authorizations_in.get(namespace);
        names
            .into_iter()
            .flatten()
            .filter_map(|name| self.policies.authorizations.get(name))
            .filter(|policy| !record.closed && self.opens(policy, &record.name))
    }

    /// How much a Server would hold: a few large authentications that many policies name are as
    /// large as they are often named.
    fn entries(&self, record: &ServerRecord) -> usize {
        let mut entries = 0;
        for policy in self.opening(record).chain(self.opening_routes(record)) {
            for required in &policy.required {
                entries += 1 + match self.found(policy.name.group, required) {
                    Found::MeshTls(identities) => identities.len(),
                    Found::Networks(networks) => {
                        networks.iter().map(|it| 1 + it.except.len()).sum()
                    }
                    Found::Identity(_) | Found::Nothing => 1,
                };
            }
        }
        entries
    }

    fn server(&self, record: &ServerRecord) -> Server {
        let opening = self.opening(record);
        let authorizations = opening.map(|it| self.authorization(it)).collect();
        let access_policy = match record.closed {
            true => AccessPolicy::Deny,
            false => record.access_policy,
        };
        Server {
            name: record.name.clone(),
            access_policy,
            proxy_protocol: record.proxy_protocol,
            authorizations,
            routes: self.inbound_routes(record),
            rate_limit: self.rate_limit(&record.name).cloned(),
        }
    }

    /// What agents are told of a policy.
    pub(super) fn authorization(&self, policy: &AuthorizationRecord) -> Authorization {
        let required = policy.required.iter();
        let required = required.map(|it| self.authentication(policy.name.group, it));
        Authorization {
            name: policy.name.clone(),
            required: required.collect(),
        }
    }

    /// Whether a policy opens a Server of its namespace.
    fn opens(&self, policy: &AuthorizationRecord, server: &ServerName) -> bool {
        match &policy.target {
            Target::Route(..) => false,
            Target::Namespace => true,
            Target::Server(group, name) => {
                *name == server.name.name
                    && *group.as_ref().unwrap_or(&self.server_group(policy, name)) == server.group
            }
        }
    }

    /// The group of a Server that is named without one: the policy's own, or the other one if
    /// only that has it.
    fn server_group(&self, policy: &AuthorizationRecord, name: &weft_core::Name) -> PolicyGroup {
        let has = |group| {
            self.policies.servers.contains_key(&ServerName {
                group,
                name: ObjectName {
                    namespace: policy.name.name.namespace.clone(),
                    name: name.clone(),
                },
            })
        };
        own_or_other(policy.name.group, has)
    }

    /// What a policy requires, followed.
    fn found<'a>(&'a self, own: PolicyGroup, required: &'a Required) -> Found<'a> {
        let policies = &self.policies;
        match required {
            Required::Identity(identity) => Found::Identity(identity),
            Required::MeshTls(group, name) => {
                let found = policies
                    .mesh_tls
                    .get(&meant(&policies.mesh_tls, own, *group, name));
                found.map_or(Found::Nothing, |it| Found::MeshTls(it))
            }
            Required::Network(group, name) => {
                let found = policies
                    .networks
                    .get(&meant(&policies.networks, own, *group, name));
                found.map_or(Found::Nothing, |it| Found::Networks(it))
            }
            Required::Nothing(_) => Found::Nothing,
        }
    }

    fn authentication(&self, own: PolicyGroup, required: &Required) -> Authentication {
        match self.found(own, required) {
            Found::Identity(identity) => Authentication::MeshTls(vec![identity.clone()]),
            Found::MeshTls(identities) => Authentication::MeshTls(identities.to_vec()),
            Found::Networks(networks) => Authentication::Networks(networks.to_vec()),
            Found::Nothing => Authentication::Unknown(describe(required)),
        }
    }

    /// Reports what a policy names and is not there.
    pub(super) fn report_references(&mut self, name: &AuthorizationName) {
        let key = ObjectKey {
            kind: ObjectKind::AuthorizationPolicy(name.group),
            namespace: Some(name.name.namespace.clone()),
            name: name.name.name.clone(),
        };
        let policy = self.policies.authorizations.get(name);
        let target = policy.and_then(|it| self.missing_target(it));
        let references = policy.map(|it| self.missing_authentications(it));
        self.note_target(name, target.is_none());
        let effect = "it opens nothing until that is there";
        self.report(&key, Facet::Target, target.into_iter().collect(), effect);
        let references = references.unwrap_or_default();
        self.report(&key, Facet::Reference, references, effect);
    }

    /// What a policy is for, if that is not there.
    fn missing_target(&self, policy: &AuthorizationRecord) -> Option<Fault> {
        match &policy.target {
            Target::Namespace => None,
            Target::Route(..) => self.missing_route(policy),
            Target::Server(group, server) => {
                let group = group.unwrap_or_else(|| self.server_group(policy, server));
                let name = ObjectName {
                    namespace: policy.name.name.namespace.clone(),
                    name: server.clone(),
                };
                let reason = format!("Server {name} is not known");
                let servers = &self.policies.servers;
                let is_known = servers.contains_key(&ServerName { group, name });
                (!is_known).then(|| Fault::new("spec.targetRef", reason))
            }
        }
    }

    fn missing_authentications(&self, policy: &AuthorizationRecord) -> Vec<Fault> {
        let mut faults = vec![];
        for (index, required) in policy.required.iter().enumerate() {
            let found = self.found(policy.name.group, required);
            if let (Found::Nothing, false) = (found, matches!(required, Required::Nothing(_))) {
                let field = format!("spec.requiredAuthenticationRefs[{index}]");
                let what = describe(required);
                faults.push(Fault::new(field, format!("{what} is not known")));
            }
        }
        faults
    }

    /// Reports ports that a Server selects and another governs.
    pub(super) fn report_overlaps(&mut self, name: &ServerName) {
        let key = ObjectKey {
            kind: ObjectKind::Server(name.group),
            namespace: Some(name.name.namespace.clone()),
            name: name.name.name.clone(),
        };
        let overlaps = self.published.overlaps.get(name);
        let faults = overlaps.and_then(|overlaps| {
            let ((pod, port), winner) = overlaps.first_key_value()?;
            let more = match overlaps.len() - 1 {
                0 => String::new(),
                more => format!(" (and {more} more ports of pods)"),
            };
            let reason = format!("port {port} of {pod} is governed by the older {winner}{more}");
            Some(Fault::new("spec.port", reason))
        });
        if faults.is_none() {
            self.published.overlaps.remove(name);
        }
        let effect = "the other Server holds there";
        self.report(&key, Facet::Conflict, faults.into_iter().collect(), effect);
    }

    fn dirty_pods_of(&mut self, server: Option<&ServerRecord>) {
        let Some(server) = server else {
            return;
        };
        let names = self.pods_in.get(&server.name.name.namespace);
        let selected = names.into_iter().flatten().filter(|name| {
            let pod = self.pods.get(*name);
            pod.is_some_and(|it| server.selects(it))
        });
        self.dirty.pods.extend(selected.cloned());
    }
}

pub(super) fn own_or_other(own: PolicyGroup, has: impl Fn(PolicyGroup) -> bool) -> PolicyGroup {
    let other = match own {
        PolicyGroup::Weft => PolicyGroup::Linkerd,
        PolicyGroup::Linkerd => PolicyGroup::Weft,
    };
    if !has(own) && has(other) { other } else { own }
}

fn describe(required: &Required) -> String {
    match required {
        Required::Identity(_) => "an identity".to_owned(),
        Required::MeshTls(_, name) => format!("MeshTLSAuthentication {name}"),
        Required::Network(_, name) => format!("NetworkAuthentication {name}"),
        Required::Nothing(fault) => fault.to_string(),
    }
}

fn server_key(name: &ServerName) -> Key {
    Key {
        kind: Kind::Server,
        name: name.to_string(),
    }
}
