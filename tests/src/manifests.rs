//! The directory of Kubernetes manifests that the controller watches, one file per object.
//!
//! Files appear, change and disappear atomically: written under a hidden name, then renamed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::yaml::to_yaml;

/// A directory of manifests.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    /// Makes the directory.
    pub fn create(dir: PathBuf) -> Result<Manifests> {
        fs::create_dir_all(&dir)?;
        Ok(Manifests { dir })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes or replaces the file `<name>.yaml` with YAML text, of one or many documents.
    pub fn apply(&self, name: &str, yaml: &str) -> Result<()> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let temporary = self
            .dir
            .join(format!(".{}.tmp", COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::write(&temporary, yaml)?;
        fs::rename(&temporary, self.file(name)).with_context(|| format!("writing {name}.yaml"))
    }

    /// Writes or replaces one object, in a file named after its kind, namespace and name.
    pub fn apply_object(&self, object: &Value) -> Result<()> {
        self.apply(&file_name(object), &to_yaml(object))
    }

    /// Removes `<name>.yaml`.
    pub fn remove(&self, name: &str) -> Result<()> {
        fs::remove_file(self.file(name)).with_context(|| format!("removing {name}.yaml"))
    }

    /// Removes the file of an object.
    pub fn remove_object(&self, object: &Value) -> Result<()> {
        self.remove(&file_name(object))
    }

    /// Writes the object unless a file for it exists.
    pub fn ensure_object(&self, object: &Value) -> Result<()> {
        if self.file(&file_name(object)).exists() {
            Ok(())
        } else {
            self.apply_object(object)
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.yaml"))
    }
}

/// A Service.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    namespace: String,
    name: String,
    selector: Value,
    annotations: Value,
    ports: Vec<Value>,
    fields: Vec<(String, Value)>,
}

impl ServiceSpec {
    /// A Service in the namespace `default`.
    pub fn new(name: &str) -> ServiceSpec {
        ServiceSpec {
            namespace: "default".into(),
            name: name.into(),
            selector: json!({}),
            annotations: json!({}),
            ports: Vec::new(),
            fields: Vec::new(),
        }
    }

    /// Puts it into another namespace.
    pub fn namespace(mut self, namespace: &str) -> ServiceSpec {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// Adds a label that its pods have.
    pub fn select(mut self, key: &str, value: &str) -> ServiceSpec {
        self.selector[key] = value.into();
        self
    }

    /// Adds a port.
    pub fn port(mut self, port: u16, target: u16) -> ServiceSpec {
        let name = format!("p{port}");
        self.ports
            .push(json!({"name": name, "port": port, "targetPort": target, "protocol": "TCP"}));
        self
    }

    /// Says what the port that was added last speaks, as `appProtocol`.
    pub fn speaks(mut self, app_protocol: &str) -> ServiceSpec {
        if let Some(port) = self.ports.last_mut() {
            port["appProtocol"] = app_protocol.into();
        }
        self
    }

    /// Adds an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> ServiceSpec {
        self.annotations[key] = value.into();
        self
    }

    /// Sets another field of its `spec`.
    pub fn field(mut self, name: &str, value: impl Into<Value>) -> ServiceSpec {
        self.fields.push((name.into(), value.into()));
        self
    }

    /// The object, with these addresses.
    pub fn manifest(&self, addresses: &[String]) -> Value {
        let mut manifest = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": self.name, "namespace": self.namespace,
                "annotations": self.annotations},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": addresses.first(),
                "clusterIPs": addresses,
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "PreferDualStack",
                "selector": self.selector,
                "ports": self.ports,
            },
        });
        for (name, value) in &self.fields {
            manifest["spec"][name] = value.clone();
        }
        manifest
    }

    pub(crate) fn namespace_name(&self) -> &str {
        &self.namespace
    }
}

/// A Namespace.
pub fn namespace(name: &str, labels: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A ServiceAccount.
pub fn service_account(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": name, "namespace": namespace}})
}

/// A Server of Weft's own group, selecting pods by their `app` label and a port.
pub fn server(namespace: &str, name: &str, app: &str, port: u16) -> Value {
    json!({
        "apiVersion": "policy.weft.dev/v1alpha1",
        "kind": "Server",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": {"matchLabels": {"app": app}}, "port": port, "proxyProtocol": "opaque"},
    })
}

/// An AuthorizationPolicy that lets service accounts of the same namespace reach a Server.
pub fn authorization(namespace: &str, name: &str, server: &str, accounts: &[&str]) -> Value {
    let references: Vec<Value> = accounts
        .iter()
        .map(|account| json!({"kind": "ServiceAccount", "name": account, "namespace": namespace}))
        .collect();
    json!({
        "apiVersion": "policy.weft.dev/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "targetRef": {"group": "policy.weft.dev", "kind": "Server", "name": server},
            "requiredAuthenticationRefs": references,
        },
    })
}

/// An HTTPRoute of the Gateway API for one port of a Service of the same namespace.
pub fn http_route(namespace: &str, name: &str, service: &str, port: u16, rules: &Value) -> Value {
    route("HTTPRoute", namespace, name, service, port, rules)
}

/// A GRPCRoute of the Gateway API for one port of a Service of the same namespace.
pub fn grpc_route(namespace: &str, name: &str, service: &str, port: u16, rules: &Value) -> Value {
    route("GRPCRoute", namespace, name, service, port, rules)
}

fn route(
    kind: &str,
    namespace: &str,
    name: &str,
    service: &str,
    port: u16,
    rules: &Value,
) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": service, "port": port}],
            "rules": rules,
        },
    })
}

/// An entry of a route's `backendRefs`.
pub fn backend(service: &str, port: u16, weight: u32) -> Value {
    json!({"name": service, "port": port, "weight": weight})
}

fn file_name(object: &Value) -> String {
    let word = |path: &str| {
        object
            .pointer(path)
            .and_then(Value::as_str)
            .unwrap_or("cluster")
    };
    format!(
        "{}-{}-{}",
        word("/kind"),
        word("/metadata/namespace"),
        word("/metadata/name")
    )
    .to_lowercase()
}
