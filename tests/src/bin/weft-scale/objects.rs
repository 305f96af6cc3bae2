//! The objects of the cluster, as large as real ones are: most of a pod is of no interest to a mesh, and is sent to it
//! all the same.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use crate::world::{Pod, SYSTEM, Service};

pub(crate) fn namespace(name: &str, meshed: bool) -> Value {
    let annotations = match meshed {
        true => json!({"linkerd.io/inject": "enabled"}),
        false => json!({}),
    };
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name,
        "labels": {"kubernetes.io/metadata.name": name}, "annotations": annotations}})
}

pub(crate) fn node(name: &str, number: usize) -> Value {
    let images: Vec<Value> = (0..20)
        .map(|it| json!({"names": [format!("registry.example.com/team/application-{it}:1.2.3")], "sizeBytes": 52_428_800}))
        .collect();
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64", "topology.kubernetes.io/region": "region-1",
            "topology.kubernetes.io/zone": zone(number)}},
        "spec": {"podCIDR": format!("10.244.{number}.0/24"), "podCIDRs": [format!("10.244.{number}.0/24")]},
        "status": {"addresses": [{"type": "InternalIP", "address": host(number)}, {"type": "Hostname", "address": name}],
            "capacity": {"cpu": "16", "memory": "65536000Ki", "pods": "110"}, "images": images,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}})
}

pub(crate) fn service_account(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
}

pub(crate) fn service(namespace: &str, name: &str, address: Ipv4Addr) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "labels": labels(name),
            "uid": format!("of-{namespace}-{name}")},
        "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack", "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
            "selector": {"app.kubernetes.io/name": name},
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP", "appProtocol": "http"},
                {"name": "metrics", "port": 9090, "targetPort": "metrics", "protocol": "TCP"}]}})
}

/// A slice of a Service, with its pods, their nodes, and the numbers of these.
pub(crate) fn slice<'a>(
    of: &Service,
    number: usize,
    pods: impl Iterator<Item = (&'a Pod, &'a str, usize)>,
) -> Value {
    let endpoint = |(pod, node, place): (&Pod, &str, usize)| {
        json!({"addresses": [pod.address],
            "conditions": {"ready": pod.ready, "serving": pod.ready, "terminating": false},
            "nodeName": node, "zone": zone(place),
            "targetRef": {"kind": "Pod", "name": pod.name, "namespace": of.namespace, "uid": pod.uid}})
    };
    let endpoints: Vec<Value> = pods.map(endpoint).collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": format!("{}-{number:05}", of.name), "namespace": of.namespace,
            "labels": {"kubernetes.io/service-name": of.name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": of.name,
                "uid": format!("of-{}-{}", of.namespace, of.name), "controller": true, "blockOwnerDeletion": true}]},
        "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "http", "port": HTTP, "protocol": "TCP", "appProtocol": "http"},
            {"name": "metrics", "port": METRICS, "protocol": "TCP"}]})
}

pub(crate) fn pod(of: &Service, pod: &Pod, node: &str) -> Value {
    let owner = format!("{}-{TEMPLATE}", of.name);
    let mut labels = labels(&of.name);
    labels["pod-template-hash"] = json!(TEMPLATE);
    let ready = if pod.ready { "True" } else { "False" };
    let condition = |kind: &str, status: &str| {
        json!({"type": kind, "status": status, "lastProbeTime": null,
            "lastTransitionTime": "2026-01-01T00:00:00Z"})
    };
    let variables: Vec<Value> = (0..8)
        .map(|it| json!({"name": format!("SETTING_{it}"), "value": format!("the value of setting {it}")}))
        .collect();
    let probe = |path: &str| {
        json!({"httpGet": {"path": path, "port": "http", "scheme": "HTTP"}, "periodSeconds": 10,
            "timeoutSeconds": 1, "successThreshold": 1, "failureThreshold": 3})
    };
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod.name, "namespace": of.namespace, "uid": pod.uid,
            "generateName": format!("{owner}-"), "labels": labels,
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": METRICS.to_string(),
                "checksum/config": "b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner,
                "uid": format!("of-{owner}"), "controller": true, "blockOwnerDeletion": true}]},
        "spec": {"nodeName": node, "serviceAccountName": of.name, "serviceAccount": of.name,
            "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "terminationGracePeriodSeconds": 30,
            "schedulerName": "default-scheduler", "priority": 0, "enableServiceLinks": true,
            "containers": [{"name": "application", "image": "registry.example.com/team/application:1.2.3",
                "imagePullPolicy": "IfNotPresent", "args": ["--listen", "0.0.0.0:8080", "--log-level", "info"],
                "env": variables, "terminationMessagePath": "/dev/termination-log",
                "ports": [{"name": "http", "containerPort": HTTP, "protocol": "TCP"},
                    {"name": "metrics", "containerPort": METRICS, "protocol": "TCP"}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
                "livenessProbe": probe("/live"), "readinessProbe": probe("/ready"),
                "volumeMounts": [{"name": "config", "mountPath": "/etc/application", "readOnly": true},
                    {"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
                        "readOnly": true}]}],
            "volumes": [{"name": "config", "configMap": {"name": of.name, "defaultMode": 420}},
                {"name": "kube-api-access", "projected": {"defaultMode": 420, "sources": [
                    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                    {"configMap": {"name": "kube-root-ca.crt"}}]}}],
            "tolerations": [
                {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute",
                    "tolerationSeconds": 300},
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute",
                    "tolerationSeconds": 300}]},
        "status": {"phase": "Running", "podIP": pod.address, "podIPs": [{"ip": pod.address}], "qosClass": "Burstable",
            "startTime": "2026-01-01T00:00:00Z",
            "conditions": [condition("Initialized", "True"), condition("PodScheduled", "True"),
                condition("ContainersReady", ready), condition("Ready", ready)],
            "containerStatuses": [{"name": "application", "ready": pod.ready, "restartCount": 0, "started": true,
                "image": "registry.example.com/team/application:1.2.3",
                "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]}})
}

/// The pod of a node's agent.
pub(crate) fn agent_pod(name: &str, uid: &str, node: &str, number: usize) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": SYSTEM, "uid": uid, "labels": labels("weft-agent"),
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "weft-agent",
                "uid": "of-weft-agent", "controller": true, "blockOwnerDeletion": true}]},
        "spec": {"nodeName": node, "serviceAccountName": "weft-agent", "hostNetwork": true,
            "containers": [{"name": "agent", "image": "registry.example.com/weft-agent:0.1.0"}]},
        "status": {"phase": "Running", "podIP": host(number), "podIPs": [{"ip": host(number)}],
            "conditions": [{"type": "Ready", "status": "True"}]}})
}

fn labels(name: &str) -> Value {
    json!({"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "shop", "app.kubernetes.io/version": "1.2.3"})
}

fn zone(node: usize) -> String {
    format!("zone-{}", node % 3)
}

fn host(node: usize) -> String {
    format!("172.16.{}.{}", node / 250, node % 250 + 2)
}

/// What a Deployment adds to the names of its pods.
pub(crate) const TEMPLATE: &str = "7d9f8c6b5";
/// The ports of the application.
pub(crate) const HTTP: u16 = 8080;
const METRICS: u16 = 9090;
