//! What holds of an object that cannot be used.

use serde::Deserialize;
use serde_json::{Value, json};
use weft_core::route::RouteName;
use weft_core::{AuthorizationName, EgressName, ServerName};

use super::egress::EgressRecord;
use super::network::NetworkPolicyRecord;
use super::pods::{self, Created, NamespaceRecord, PodRecord};
use super::policies::ServerRecord;
use super::routes::Refused;
use super::{Index, object_name, publish_inbound};
use crate::objects::{Fault, Object, ObjectKey, ObjectKind};
use crate::problems::Facet;

impl Index {
    /// An object exists and cannot be used: what was in force stays. Of what never was, as after a
    /// restart, that holds which closes: a Server and an EgressNetwork close what they may have meant, a
    /// namespace and a pod stay in the mesh.
    pub(super) fn refuse(&mut self, key: &ObjectKey, fault: Fault, document: &Value) {
        let mut effect = if self.holds(key) {
            "what was in force before stays"
        } else {
            "it is ignored"
        };
        if let ObjectKind::Server(group) = key.kind {
            let name = ServerName {
                group,
                name: object_name(key),
            };
            let readable = self.policies.servers.get(&name);
            if readable.is_none_or(|it| it.closed) {
                effect = "it lets nobody in, at all ports that it may mean";
                let spec = document.get("spec").unwrap_or(&Value::Null);
                let record = ServerRecord::closed(name.clone(), None, spec);
                self.set_server(&name, Some(record));
            }
        }
        if let ObjectKind::EgressNetwork(group) = key.kind {
            let name = object_name(key);
            let name = EgressName { name, group };
            let readable = self.policies.egress.get(&name);
            if readable.is_none_or(|it| it.closed) {
                effect = "nothing leaves the cluster for the addresses that it may mean";
                let spec = document.get("spec").unwrap_or(&Value::Null);
                let global = &self.settings.egress_namespace;
                let created = document.pointer("/metadata/creationTimestamp");
                let created = created.and_then(|it| Created::deserialize(it).ok());
                let record = EgressRecord::closed(name.clone(), created, spec, global);
                self.set_egress(&name, Some(record));
            }
        }
        if let ObjectKind::Cni(_) = key.kind {
            effect = self.refuse_cni_policy(key);
        }
        if key.kind == ObjectKind::NetworkPolicy {
            let name = object_name(key);
            let readable = self.network_policies.get(&name);
            if readable.is_none_or(|it| it.closed) {
                effect = "it lets nobody through, at all pods that it may mean";
                let spec = document.get("spec").unwrap_or(&Value::Null);
                let record = NetworkPolicyRecord::closed(spec);
                self.set_network_policy(&name, Some(record));
            }
        }
        if let ObjectKind::Route(kind) = key.kind {
            let name = object_name(key);
            let name = RouteName { name, kind };
            let generation = document.pointer("/metadata/generation");
            let servers = publish_inbound::meant_servers(document);
            if !self.holds(key) && !servers.is_empty() {
                effect = "its Servers let in only what their own policies do, to other routes";
            }
            let refused = Refused {
                fault: fault.clone(),
                generation: generation.and_then(Value::as_i64),
                servers,
            };
            self.routes.refused.insert(name.clone(), refused);
            self.refused_changed(&name.name);
            self.dirty.routes.insert(name);
        }
        if key.kind == ObjectKind::Namespace && !self.holds(key) {
            effect = "what can be read of it holds; what cannot closes";
            let metadata = pods::readable_metadata(document);
            let (record, _) = NamespaceRecord::check(&metadata, None);
            self.set_namespace(&key.name, Some(record));
        }
        if key.kind == ObjectKind::Pod {
            let name = object_name(key);
            let readable = PodRecord::readable(name.clone(), document);
            let before = self.pods.get(&name);
            // Another pod of the same name is not described by what was in force.
            if let Some(record) =
                readable.filter(|it| before.is_none_or(|before| before.uid != it.uid))
            {
                effect = "what can be read of it holds; ports without a Server let nobody in";
                self.set_pod(&name, Some(record));
            }
        }
        self.report(key, Facet::Content, vec![fault], effect);
    }

    fn holds(&self, key: &ObjectKey) -> bool {
        match key.kind {
            ObjectKind::Namespace => self.namespaces.contains_key(&key.name),
            ObjectKind::Node => self.nodes.contains_key(&key.name),
            ObjectKind::ServiceCidr => self.ranges.has_service_cidr(&key.name),
            ObjectKind::Pod => self.pods.contains_key(&object_name(key)),
            ObjectKind::Service => self.services.contains_key(&object_name(key)),
            ObjectKind::EndpointSlice => self.slices.contains_key(&object_name(key)),
            ObjectKind::ServiceAccount => false,
            ObjectKind::NetworkPolicy => {
                let known = self.network_policies.get(&object_name(key));
                known.is_some()
            }
            ObjectKind::Server(group) => {
                let name = object_name(key);
                let servers = &self.policies.servers;
                servers.contains_key(&ServerName { group, name })
            }
            ObjectKind::AuthorizationPolicy(group) => {
                let name = object_name(key);
                let authorizations = &self.policies.authorizations;
                authorizations.contains_key(&AuthorizationName { group, name })
            }
            ObjectKind::HttpLocalRateLimitPolicy(group) => {
                let name = object_name(key);
                let limits = &self.policies.limits;
                limits.contains_key(&AuthorizationName { group, name })
            }
            ObjectKind::EgressNetwork(group) => {
                let name = object_name(key);
                self.policies
                    .egress
                    .contains_key(&EgressName { name, group })
            }
            ObjectKind::MeshTlsAuthentication(group) => {
                let name = (group, object_name(key));
                self.policies.mesh_tls.contains_key(&name)
            }
            ObjectKind::NetworkAuthentication(group) => {
                let name = (group, object_name(key));
                self.policies.networks.contains_key(&name)
            }
            ObjectKind::Route(kind) => {
                let name = object_name(key);
                self.routes.records.contains_key(&RouteName { name, kind })
            }
            ObjectKind::ReferenceGrant => {
                let name = object_name(key);
                let grants = self.routes.grants.get(&name.namespace);
                grants.is_some_and(|it| it.contains_key(&name.name))
            }
            ObjectKind::ServiceProfile => self.profiles.records.contains_key(&object_name(key)),
            ObjectKind::Cni(_) => self.cni_policies.get(key).is_some(),
        }
    }
}

/// An object as a document, of the kinds of which [`Index::refuse`] uses parts.
pub(super) fn document(object: &Object) -> Value {
    let written = match object {
        Object::Server(_, server) => serde_json::to_value(server),
        Object::EgressNetwork(_, network) => serde_json::to_value(network),
        Object::Pod(pod) => serde_json::to_value(pod),
        Object::NetworkPolicy(policy) => serde_json::to_value(policy),
        Object::Route(_, route) => Ok(json!({
            "metadata": {"generation": route.metadata.generation},
            "spec": {"parentRefs": route.spec.parent_refs()},
        })),
        _ => return Value::Null,
    };
    written.unwrap_or_default()
}
