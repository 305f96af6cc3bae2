//! Takes objects in, kind by kind: each is read into a record, and what depends on it is marked.

use k8s_openapi::api::core::v1::Node;
use weft_core::route::RouteName;
use weft_core::{AuthorizationName, EgressName, Name, ServerName};

use super::egress::EgressRecord;
use super::limits::LimitRecord;
use super::network::NetworkPolicyRecord;
use super::pods::{NamespaceRecord, PodRecord};
use super::policies::{self, AuthorizationRecord, ServerRecord, Setting};
use super::profiles::ProfileRecord;
use super::ranges::{self, NodeRecord};
use super::routes::{GrantRecord, RouteRecord};
use super::services::{ServiceRecord, SliceRecord};
use super::{Index, object_name};
use crate::objects::{Fault, Object, ObjectKey, ObjectKind};

impl Index {
    pub(super) fn upsert(&mut self, key: &ObjectKey, object: &Object) -> Result<Vec<Fault>, Fault> {
        match object {
            Object::Namespace(namespace) => {
                let before = self.namespaces.get(&key.name);
                let (record, faults) = NamespaceRecord::check(&namespace.metadata, before);
                self.set_namespace(&key.name, Some(record));
                Ok(faults)
            }
            Object::Node(node) => {
                let record = NodeRecord {
                    ranges: ranges::node_ranges(node)?,
                    zone: node_zone(node),
                };
                self.set_node(&key.name, Some(record));
                Ok(vec![])
            }
            Object::ServiceCidr(cidr) => {
                let ranges = ranges::service_cidr(cidr)?;
                self.set_service_cidr(&key.name, Some(ranges));
                Ok(vec![])
            }
            Object::Pod(pod) => {
                let name = object_name(key);
                let (mut record, faults) = PodRecord::check(name.clone(), pod)?;
                if let Some(before) = self.pods.get(&name).filter(|it| it.uid == record.uid) {
                    record.complete_by(before);
                }
                self.set_pod(&name, Some(record));
                Ok(faults)
            }
            Object::Service(service) => {
                let name = object_name(key);
                let (mut record, faults) = ServiceRecord::check(name.clone(), service)?;
                if let Some(before) = self.services.get(&name) {
                    record.ports_choice.complete_by(&before.ports_choice);
                    record.accrual.complete_by(&before.accrual);
                    record.reliability.complete_by(&before.reliability);
                }
                self.set_service(&name, Some(record));
                Ok(faults)
            }
            Object::EndpointSlice(slice) => {
                let name = object_name(key);
                let record = SliceRecord::check(&name.namespace, slice)?;
                self.set_slice(&name, record);
                Ok(vec![])
            }
            Object::NetworkPolicy(policy) => {
                let record = NetworkPolicyRecord::check(policy)?;
                self.set_network_policy(&object_name(key), Some(record));
                Ok(vec![])
            }
            Object::Cni(kind, policy) => self.read_cni_policy(key, *kind, policy),
            // Identities follow from pods; a service account by itself changes nothing.
            Object::ServiceAccount(_) => Ok(vec![]),
            Object::Route(kind, route) => {
                let name = RouteName {
                    name: object_name(key),
                    kind: *kind,
                };
                let (record, faults) =
                    RouteRecord::check(name.clone(), &route.metadata, &route.spec)?;
                self.routes.refused.remove(&name);
                self.refused_changed(&name.name);
                self.set_route(&name, Some(record));
                Ok(faults)
            }
            Object::ReferenceGrant(grant) => {
                let record = GrantRecord::check(&grant.spec)?;
                self.set_grant(&object_name(key), Some(record));
                Ok(vec![])
            }
            Object::ServiceProfile(profile) => {
                let name = object_name(key);
                let (record, faults) = ProfileRecord::check(&name, &profile.spec)?;
                self.set_profile(&name, Some(record));
                Ok(faults)
            }
            policy => self.upsert_policy(key, policy),
        }
    }

    fn upsert_policy(&mut self, key: &ObjectKey, object: &Object) -> Result<Vec<Fault>, Fault> {
        let name = object_name(key);
        let trust_domain = self.settings.trust_domain.clone();
        let setting = Setting {
            namespace: &name.namespace,
            trust_domain: &trust_domain,
        };
        match object {
            Object::Server(group, server) => {
                let (group, created) = (*group, server.metadata.creation_timestamp.clone());
                let name = ServerName { group, name };
                let record = ServerRecord::check(name.clone(), created, &server.spec)?;
                self.set_server(&name, Some(record));
                Ok(vec![])
            }
            Object::AuthorizationPolicy(group, policy) => {
                let id = AuthorizationName {
                    group: *group,
                    name: name.clone(),
                };
                let record = AuthorizationRecord::check(id.clone(), &policy.spec, setting)?;
                let faults = record.faults();
                self.set_authorization(&id, Some(record));
                Ok(faults)
            }
            Object::MeshTlsAuthentication(group, authentication) => {
                let matches = policies::check_mesh_tls(&authentication.spec, setting)?;
                self.policies
                    .mesh_tls
                    .insert((*group, name.clone()), matches);
                self.authentication_changed(&name);
                Ok(vec![])
            }
            Object::NetworkAuthentication(group, authentication) => {
                let networks = policies::check_networks(&authentication.spec.networks)?;
                self.policies
                    .networks
                    .insert((*group, name.clone()), networks);
                self.authentication_changed(&name);
                Ok(vec![])
            }
            Object::HttpLocalRateLimitPolicy(group, policy) => {
                let id = AuthorizationName {
                    group: *group,
                    name: name.clone(),
                };
                let created = policy.metadata.creation_timestamp.clone();
                let record = LimitRecord::check(id.clone(), created, &policy.spec, setting)?;
                self.set_limit(&id, Some(record));
                Ok(vec![])
            }
            Object::EgressNetwork(group, network) => {
                let id = EgressName {
                    name: name.clone(),
                    group: *group,
                };
                let created = network.metadata.creation_timestamp.clone();
                let global = &self.settings.egress_namespace;
                let record = EgressRecord::check(id.clone(), created, &network.spec, global)?;
                self.set_egress(&id, Some(record));
                Ok(vec![])
            }
            // All others are handled by the caller.
            _ => Ok(vec![]),
        }
    }

    pub(super) fn delete(&mut self, key: &ObjectKey) {
        match key.kind {
            ObjectKind::Namespace => self.set_namespace(&key.name, None),
            ObjectKind::Node => self.set_node(&key.name, None),
            ObjectKind::ServiceCidr => self.set_service_cidr(&key.name, None),
            ObjectKind::Pod => self.set_pod(&object_name(key), None),
            ObjectKind::Service => self.set_service(&object_name(key), None),
            ObjectKind::EndpointSlice => self.set_slice(&object_name(key), None),
            ObjectKind::ServiceAccount => {}
            ObjectKind::NetworkPolicy => self.set_network_policy(&object_name(key), None),
            ObjectKind::Server(group) => {
                let name = object_name(key);
                self.set_server(&ServerName { group, name }, None);
            }
            ObjectKind::AuthorizationPolicy(group) => {
                let name = object_name(key);
                self.set_authorization(&AuthorizationName { group, name }, None);
            }
            ObjectKind::HttpLocalRateLimitPolicy(group) => {
                let name = object_name(key);
                self.set_limit(&AuthorizationName { group, name }, None);
            }
            ObjectKind::EgressNetwork(group) => {
                let name = object_name(key);
                self.set_egress(&EgressName { name, group }, None);
            }
            ObjectKind::MeshTlsAuthentication(group) => {
                let name = object_name(key);
                self.policies.mesh_tls.remove(&(group, name.clone()));
                self.authentication_changed(&name);
            }
            ObjectKind::NetworkAuthentication(group) => {
                let name = object_name(key);
                self.policies.networks.remove(&(group, name.clone()));
                self.authentication_changed(&name);
            }
            ObjectKind::Route(kind) => {
                let name = object_name(key);
                let name = RouteName { name, kind };
                self.routes.refused.remove(&name);
                self.refused_changed(&name.name);
                self.set_route(&name, None);
            }
            ObjectKind::ReferenceGrant => self.set_grant(&object_name(key), None),
            ObjectKind::ServiceProfile => self.set_profile(&object_name(key), None),
            ObjectKind::Cni(_) => self.delete_cni_policy(key),
        }
    }

    pub(super) fn set_namespace(&mut self, name: &Name, record: Option<NamespaceRecord>) {
        let before = match record.clone() {
            Some(record) => self.namespaces.insert(name.clone(), record),
            None => self.namespaces.remove(name),
        };
        let (before, now) = (before.unwrap_or_default(), record.unwrap_or_default());
        if before != now {
            let pods = self.pods_in.get(name).into_iter().flatten().cloned();
            self.dirty.pods.extend(pods);
        }
        if before.mesh != now.mesh {
            self.dirty.left.insert(name.clone());
            self.tell_namespace(name);
        }
        if before.labels != now.labels {
            self.network_namespace_changed();
        }
        if before.ports != now.ports {
            let services = self.services_in.get(name).into_iter().flatten().cloned();
            self.dirty.services.extend(services);
        }
    }
}

fn node_zone(node: &Node) -> Option<String> {
    let labels = node.metadata.labels.as_ref()?;
    let zone = labels.get("topology.kubernetes.io/zone")?;
    Some(zone.clone()).filter(|it| !it.is_empty())
}
