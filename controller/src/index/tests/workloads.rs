use super::*;

/// A pod of node `one`, with what a test adds to metadata, spec and status.
fn pod(metadata: &str, spec: &str, status: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: web, namespace: shop, {metadata}}},
           spec: {{nodeName: one, containers: [{{name: c}}], {spec}}},
           status: {{podIPs: [{{ip: 10.1.0.1}}], {status}}}}}"
    )
}

fn namespace(metadata: &str) -> String {
    format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: shop, {metadata}}}}}")
}

#[test]
fn meshed_is_what_pod_or_namespace_say() {
    let (label, inject) = (
        "labels: {weft.dev/mesh: X}",
        "annotations: {linkerd.io/inject: X}",
    );
    let with = |form: &str, value: &str| form.replace('X', value);
    let on = |form| with(form, "enabled");
    let off = |form| with(form, "disabled");
    let no = String::new;
    let both = |one: String, other: String| format!("{one}, {other}");
    for (of_namespace, of_pod, expected) in [
        (no(), no(), false),
        (no(), on(label), true),
        (no(), on(inject), true),
        (no(), with(inject, "ingress"), true),
        // What cannot be read closes, as long as nobody says "disabled".
        (no(), with(label, "'true'"), true),
        (no(), with(inject, "Disabled"), true),
        (with(label, "Enabled"), no(), true),
        (with(label, "Enabled"), off(label), false),
        (no(), both(with(label, "Enabled"), off(inject)), false),
        (on(label), no(), true),
        (on(inject), no(), true),
        (on(label), off(label), false),
        (on(label), off(inject), false),
        (on(inject), off(label), false),
        (off(label), on(label), true),
        (off(label), no(), false),
        (no(), both(on(label), off(inject)), false),
        (no(), both(off(label), on(inject)), false),
        (both(on(label), off(inject)), no(), false),
    ] {
        let mut cluster = Cluster::of(&pod(&of_pod, "", ""));
        cluster.apply(&namespace(&of_namespace));
        let meshed = cluster.is_meshed("shop/web");
        assert_eq!(
            meshed, expected,
            "namespace {of_namespace:?}, pod {of_pod:?}"
        );
        assert_eq!(cluster.node_pod("shop/web").is_some(), expected);
    }
}

#[test]
fn pods_of_another_mesh_are_left_to_it() {
    let (on, off) = (
        "labels: {weft.dev/mesh: enabled}",
        "labels: {weft.dev/mesh: disabled}",
    );
    let inject = "annotations: {linkerd.io/inject: enabled}";
    let ambient = "annotations: {ambient.istio.io/redirection: enabled}";
    let as_container = "containers: [{name: c}, {name: linkerd-proxy}]";
    let of_istio = "containers: [{name: istio-proxy}, {name: c}]";
    let gateway = "containers: [{name: istio-proxy}]";
    let as_sidecar = "initContainers: [{name: linkerd-proxy, restartPolicy: Always}]";
    let that_ends = "initContainers: [{name: linkerd-proxy}]";
    for (of_namespace, of_pod, spec, expected) in [
        (on, "", as_container, false),
        (on, "", of_istio, false),
        (on, "", as_sidecar, false),
        (on, "", that_ends, true),
        (on, "", gateway, true),
        (on, ambient, "", false),
        (
            on,
            "annotations: {ambient.istio.io/redirection: disabled}",
            "",
            true,
        ),
        (inject, inject, as_container, false),
        (inject, inject, "", true),
        // Whoever wants both says so on the pod itself.
        ("", on, as_container, true),
        ("", "labels: {weft.dev/mesh: 'true'}", as_container, true),
        (on, off, as_container, false),
    ] {
        let of_pod = pod(of_pod, "", "").replace(
            "containers: [{name: c}], ",
            match spec.starts_with("containers") {
                true => format!("{spec}, "),
                false => format!("containers: [{{name: c}}], {spec}"),
            }
            .as_str(),
        );
        let mut cluster = Cluster::of(&of_pod);
        cluster.apply(&namespace(of_namespace));
        assert_eq!(
            cluster.is_meshed("shop/web"),
            expected,
            "namespace {of_namespace:?}, pod {of_pod:?}"
        );
    }
}

/// Who opts in and is not there is told so: not as a mistake, and only of pods that would take part.
#[test]
fn pods_that_are_left_to_another_mesh_are_listed() {
    let on = "labels: {weft.dev/mesh: enabled}";
    let inject = "annotations: {linkerd.io/inject: enabled}";
    let of_linkerd = |metadata: &str| {
        pod(metadata, "", "").replace("{name: c}", "{name: c}, {name: linkerd-proxy}")
    };
    let left = |count: usize| match count {
        0 => vec![],
        _ => vec![("shop".to_owned(), count, vec!["web".to_owned()])],
    };
    let mut cluster = Cluster::of(&of_linkerd(""));
    assert_eq!(cluster.left_to_other_meshes(), left(0));
    for (objects, count) in [
        (namespace(on), 1),
        (namespace(""), 0),
        (of_linkerd(inject), 1),
        (of_linkerd("labels: {weft.dev/mesh: disabled}"), 0),
        (namespace(on), 0),
        (of_linkerd(""), 1),
        (pod("", "", ""), 0),
        (of_linkerd(""), 1),
        (
            of_linkerd("").replace("spec: {", "spec: {hostNetwork: true, "),
            0,
        ),
    ] {
        cluster.apply(&objects);
        assert_eq!(cluster.left_to_other_meshes(), left(count), "{objects}");
        assert_eq!(cluster.problems(), [""; 0]);
    }
}

#[test]
fn a_choice_that_is_none_is_reported() {
    let cluster = Cluster::of(&pod("labels: {weft.dev/mesh: \"true\"}", "", ""));
    let reason = "metadata.labels[\"weft.dev/mesh\"]: \"true\" is neither enabled nor disabled";
    assert_eq!(cluster.problems(), [reason]);
}

/// A typing error in the opt-in neither takes a pod out of the mesh nor puts it in.
#[test]
fn an_unreadable_choice_changes_nothing() {
    let labels = |value: &str| format!("labels: {{weft.dev/mesh: {value}}}");
    let of_pod = |value: &str| pod(&labels(value), "", "");
    let of_namespace = |value: &str| namespace(&labels(value));
    for (good, bad, meshed) in [
        (of_pod("enabled"), of_pod("Enabled"), true),
        (of_pod("disabled"), of_pod("Disabled"), false),
        (pod("", "", ""), of_pod("Enabled"), false),
        (of_namespace("enabled"), of_namespace("Enabled"), true),
        (of_namespace("enabled"), of_namespace("1"), true),
        (of_namespace("disabled"), of_namespace("Disabled"), false),
        (namespace(""), of_namespace("Enabled"), false),
    ] {
        let mut cluster = Cluster::of(&pod("", "", ""));
        cluster.apply(&good);
        let told = cluster.told("one");
        assert_eq!(cluster.is_meshed("shop/web"), meshed, "{good}");
        cluster.apply(&bad);
        assert_eq!(cluster.told("one"), told, "{bad}");
        assert_eq!(cluster.problems().len(), 1);
    }
}

/// A controller that starts knows nothing of before: what it cannot read stays in the mesh.
#[test]
fn what_was_never_readable_stays_in_the_mesh() {
    let deny = "annotations: {weft.dev/default-inbound-policy: deny}";
    let bad = namespace(&format!(
        "labels: {{weft.dev/mesh: enabled, tier: 1}}, {deny}"
    ));
    let mut cluster = Cluster::of(&(pod("", "", "") + "\n---\n" + &bad));
    assert!(cluster.is_meshed("shop/web"));
    assert_eq!(cluster.policy("shop/web").default, AccessPolicy::Deny);
    cluster.apply(&namespace(""));
    assert!(!cluster.is_meshed("shop/web"));
    assert!(cluster.problems().is_empty());

    let (meshed, netns) = (
        "labels: {weft.dev/mesh: enabled}",
        "annotations: {weft.dev/netns: /run/netns/web}",
    );
    let good = pod(&format!("uid: u1, {meshed}, {netns}"), "", "");
    for bad in [
        good.replace("enabled}", "enabled, tier: 1}"),
        good.replace("containers: [{name: c}]", "containers: 7"),
        good.replace("[{ip: 10.1.0.1}]", "[{ip: 10.1.0.1}, {ip: nonsense}]"),
    ] {
        let mut cluster = Cluster::of(&bad);
        let workload = cluster.workload("shop/web").expect("told");
        assert_eq!(workload.addresses.len(), 1, "{bad}");
        let node_pod = cluster.node_pod("shop/web").expect("told");
        assert_eq!(node_pod.uid, "u1");
        assert!(node_pod.netns.is_some());
        assert_eq!(cluster.policy("shop/web").default, AccessPolicy::Deny);
        assert_eq!(cluster.problems().len(), 1);
        cluster.apply(&good);
        let default = cluster.policy("shop/web").default;
        assert_eq!(default, AccessPolicy::AllUnauthenticated);
        assert!(cluster.problems().is_empty());
        // Another pod of that name is not the one that was in force.
        cluster.apply(&bad.replace("u1", "u2"));
        assert_eq!(cluster.node_pod("shop/web").expect("told").uid, "u2");
    }
}

#[test]
fn some_pods_are_no_workloads() {
    for (spec, status, expected) in [
        ("", "", true),
        ("", "phase: Running", true),
        ("", "phase: Pending", true),
        ("hostNetwork: true", "", false),
        ("", "phase: Succeeded", false),
        ("", "phase: Failed", false),
        ("", "podIPs: []", false),
        ("nodeName: ''", "", false),
    ] {
        // A later field replaces an earlier one of the same name.
        let text = match (spec, status) {
            ("nodeName: ''", _) => pod("", "", "").replace("nodeName: one", spec),
            (_, "podIPs: []") => pod("", "", "").replace("podIPs: [{ip: 10.1.0.1}]", status),
            _ => pod("", spec, status),
        };
        let cluster = Cluster::of(&text);
        let is_workload = cluster.workload("shop/web").is_some();
        assert_eq!(is_workload, expected, "{spec:?} {status:?}");
    }
}

#[test]
fn identities_follow_service_accounts() {
    let meshed = "labels: {weft.dev/mesh: enabled}";
    for (spec, expected) in [
        ("", "spiffe://cluster.local/ns/shop/sa/default"),
        (
            "serviceAccountName: ''",
            "spiffe://cluster.local/ns/shop/sa/default",
        ),
        (
            "serviceAccountName: web",
            "spiffe://cluster.local/ns/shop/sa/web",
        ),
    ] {
        let cluster = Cluster::of(&pod(meshed, spec, ""));
        let workload = cluster.workload("shop/web").expect("there");
        assert_eq!(workload.identity().expect("meshed").to_string(), expected);
        let account = expected.rsplit('/').next().expect("a name");
        let account = ObjectName::parse("shop", account).expect("valid");
        assert!(cluster.views.runs(&"one".parse().expect("valid"), &account));
        assert!(!cluster.views.runs(&"two".parse().expect("valid"), &account));
    }
    let cluster = Cluster::of(&pod(meshed, "serviceAccountName: Web/x", ""));
    assert!(cluster.workload("shop/web").is_none());
    assert!(cluster.problems()[0].starts_with("spec.serviceAccountName: "));
}

#[test]
fn accounts_count_until_the_last_pod_goes() {
    let meshed = "labels: {weft.dev/mesh: enabled}";
    let first = pod(meshed, "", "");
    let second = first
        .replace("name: web", "name: api")
        .replace("10.1.0.1", "10.1.0.2");
    let account = "shop/default".parse().expect("valid");
    let runs = |cluster: &Cluster| cluster.views.runs(&"one".parse().expect("valid"), &account);
    let mut cluster = Cluster::of(&format!("{first}\n---\n{second}"));
    assert!(runs(&cluster));
    cluster.delete(&first);
    assert!(runs(&cluster));
    cluster.apply(&second.replace("nodeName: one", "nodeName: two"));
    assert!(!runs(&cluster));
    assert!(cluster.views.runs(&"two".parse().expect("valid"), &account));
    cluster.delete(&second);
    assert!(!cluster.views.runs(&"two".parse().expect("valid"), &account));
}

#[test]
fn owners_are_called_as_people_know_them() {
    let owner = |kind: &str, name: &str| {
        format!(
            "ownerReferences: [{{apiVersion: a, kind: {kind}, name: {name}, uid: u, controller: true}}]"
        )
    };
    for (metadata, expected) in [
        (String::new(), None),
        (
            format!(
                "labels: {{pod-template-hash: 5d8f}}, {}",
                owner("ReplicaSet", "web-5d8f")
            ),
            Some("deployment web"),
        ),
        (
            format!(
                "labels: {{pod-template-hash: other}}, {}",
                owner("ReplicaSet", "web-5d8f")
            ),
            Some("replicaset web-5d8f"),
        ),
        (owner("ReplicaSet", "web-5d8f"), Some("replicaset web-5d8f")),
        (owner("StatefulSet", "db"), Some("statefulset db")),
        (owner("DaemonSet", "log"), Some("daemonset log")),
        (owner("Job", "backup"), Some("job backup")),
        // Due at 2026-01-01T00:00:00Z.
        (
            format!(
                "creationTimestamp: '2026-01-01T00:07:00Z', {}",
                owner("Job", "backup-29453760")
            ),
            Some("cronjob backup"),
        ),
        (
            format!(
                "creationTimestamp: '2026-01-01T00:07:00Z', {}",
                owner("Job", "backup-20260101")
            ),
            Some("job backup-20260101"),
        ),
        (owner("Job", "backup-29453760"), Some("job backup-29453760")),
        (
            owner("Job", "backup").replace("controller: true", "controller: false"),
            None,
        ),
    ] {
        let cluster = Cluster::of(&pod(&metadata, "", ""));
        let owner = cluster.workload("shop/web").expect("there").owner;
        let owner = owner.map(|it| format!("{} {}", it.kind, it.name));
        assert_eq!(owner.as_deref(), expected, "{metadata}");
    }
}

#[test]
fn the_nodes_agent_is_told_about_namespace_and_probes() {
    let text = "
apiVersion: v1
kind: Pod
metadata:
  {name: web, namespace: shop, uid: u1, labels: {weft.dev/mesh: enabled},
   annotations: {weft.dev/netns: /run/netns/web}}
spec:
  nodeName: one
  containers:
  - name: c
    ports: [{name: http, containerPort: 8080}, {name: dns, containerPort: 53, protocol: UDP}]
    livenessProbe: {httpGet: {port: http, path: /}}
    readinessProbe: {tcpSocket: {port: 9000}}
    startupProbe: {httpGet: {port: 9999, host: 192.0.2.1}}
  initContainers:
  - {name: once, livenessProbe: {tcpSocket: {port: 1}}}
  - {name: sidecar, restartPolicy: Always, livenessProbe: {grpc: {port: 7000}}}
  - {name: unnamed, restartPolicy: Always, livenessProbe: {tcpSocket: {port: http}}}
status: {podIPs: [{ip: 10.1.0.1}]}";
    let cluster = Cluster::of(text);
    let pod = cluster.node_pod("shop/web").expect("told");
    assert_eq!(pod.uid, "u1");
    assert_eq!(pod.netns.expect("there").to_str(), Some("/run/netns/web"));
    assert_eq!(pod.probe_ports, [7000, 8080, 9000]);
    assert!(cluster.names("two", Kind::NodePod).is_empty());
    assert_eq!(cluster.names("two", Kind::Workload), ["shop/web"]);
}

#[test]
fn addresses_that_cannot_be_a_pods_are_refused() {
    for address in [
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "169.254.1.1",
        "fe80::1",
        "x",
    ] {
        let cluster = Cluster::of(&pod("", "", "").replace("10.1.0.1", &format!("'{address}'")));
        assert!(cluster.workload("shop/web").is_none(), "{address}");
        assert!(
            cluster.problems()[0].starts_with("status.podIPs[0].ip: "),
            "{address}"
        );
    }
    let cluster = Cluster::of(&pod("", "", "").replace("10.1.0.1", "'::ffff:10.1.0.1'"));
    let workload = cluster.workload("shop/web").expect("there");
    assert_eq!(
        workload.addresses,
        ["10.1.0.1".parse::<IpAddr>().expect("valid")]
    );
}

/// A contested address is nobody's: agents are told of both claims. What claims it later, by
/// whatever age it says to have, changes nothing of what holds for the other.
#[test]
fn a_claim_takes_nothing_from_others() {
    let victim = pod("labels: {weft.dev/mesh: enabled}", "", "");
    let mut cluster = Cluster::of(&victim);
    let told = cluster.told("one");
    let thief = pod("creationTimestamp: '2099-01-01T00:00:00Z'", "", "")
        .replace("name: web, namespace: shop", "name: x, namespace: attacker")
        .replace("nodeName: one", "nodeName: two");
    cluster.apply(&thief);
    let mut after = cluster.told("one");
    let claim = after.remove(&Key {
        kind: Kind::Workload,
        name: "attacker/x".to_owned(),
    });
    assert!(claim.is_some(), "agents find the conflict by it");
    assert_eq!(after, told);
    assert_eq!(
        cluster.problems(),
        [
            "status.podIPs: 10.1.0.1 is claimed by pod shop/web too",
            "status.podIPs: 10.1.0.1 is claimed by pod attacker/x too"
        ]
    );
    // What is completed claims nothing.
    cluster.apply(&thief.replace("10.1.0.1}],", "10.1.0.1}], phase: Succeeded"));
    assert_eq!(cluster.told("one"), told);
    assert!(cluster.problems().is_empty());
}

/// A pod has no address of a Service: who connects to that means the Service.
#[test]
fn a_pod_claims_no_address_of_services() {
    let meshed = "labels: {weft.dev/mesh: enabled}, annotations: {weft.dev/netns: /n}";
    let text = pod(meshed, "", "").replace("10.1.0.1", "10.2.0.1");
    let cluster = Cluster::of(&text);
    assert!(
        cluster
            .workload("shop/web")
            .expect("meshed")
            .addresses
            .is_empty()
    );
    assert!(cluster.node_pod("shop/web").is_some());
    let reason = "status.podIPs: 10.2.0.1 lies in the range of Services";
    assert_eq!(cluster.problems(), [reason]);
}

#[test]
fn a_running_pod_stays_enrolled_without_address() {
    let meshed = "labels: {weft.dev/mesh: enabled}, annotations: {weft.dev/netns: /n}";
    let good = pod(meshed, "", "");
    let empty = good.replace("{ip: 10.1.0.1}", "");
    let mut cluster = Cluster::of(&good);
    let told = cluster.told("one");
    cluster.apply(&empty);
    assert_eq!(cluster.told("one"), told, "the same pod, which runs");
    // A controller that starts knows no address of it.
    let cluster = Cluster::of(&empty);
    assert!(
        cluster
            .workload("shop/web")
            .expect("there")
            .addresses
            .is_empty()
    );
    assert!(cluster.node_pod("shop/web").is_some());
    assert_eq!(cluster.policy("shop/web").workload.to_string(), "shop/web");
}

/// Agents enroll a pod before its first container runs, which is before it has an address.
#[test]
fn the_nodes_agent_is_told_as_soon_as_there_is_a_node() {
    let of = |node: &str, status: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: web, namespace: shop, uid: u1,
               labels: {{weft.dev/mesh: enabled}}}},
               spec: {{{node} containers: [{{name: c}}]}}, status: {{{status}}}}}"
        )
    };
    let mut cluster = Cluster::of(&of("", "phase: Pending"));
    let told = |cluster: &Cluster| cluster.node_pod("shop/web").is_some();
    assert!(!told(&cluster));
    cluster.apply(&of("nodeName: one,", "phase: Pending"));
    assert!(told(&cluster));
    let workload = cluster.workload("shop/web").expect("told");
    assert!(workload.addresses.is_empty());
    assert!(workload.identity().is_some());
    assert_eq!(cluster.policy("shop/web").workload.to_string(), "shop/web");
    let account = "shop/default".parse().expect("valid");
    assert!(cluster.views.runs(&"one".parse().expect("valid"), &account));
    cluster.apply(&of("nodeName: one,", "podIPs: [{ip: 10.1.0.1}]"));
    assert_eq!(
        cluster.workload("shop/web").expect("told").addresses.len(),
        1
    );
    for ended in ["Succeeded", "Failed"] {
        cluster.apply(&of("nodeName: one,", &format!("phase: {ended}")));
        assert!(!told(&cluster));
        assert!(cluster.workload("shop/web").is_none());
    }
    // Those outside of the mesh are of no interest before they have an address.
    let mut cluster = Cluster::of(&of("nodeName: one,", "").replace("enabled", "disabled"));
    assert!(!told(&cluster));
    assert!(cluster.workload("shop/web").is_none());
    // Nor are those of the host's network, in any case.
    cluster.apply(&of("nodeName: one, hostNetwork: true,", ""));
    assert!(!told(&cluster));
}

#[test]
fn the_nodes_agent_is_told_by_what_to_find_a_pod() {
    let id = |digit: &str| digit.repeat(64);
    let status = |list: &str, id: &str| format!("{list}: [{{name: c, containerID: '{id}'}}]");
    let meshed = "labels: {weft.dev/mesh: enabled}";
    let told = |status: &str| {
        let cluster = Cluster::of(&pod(meshed, "runtimeClassName: kata", status));
        let pod = cluster.node_pod("shop/web").expect("told");
        let containers: Vec<_> = pod
            .runtime
            .containers
            .iter()
            .map(ToString::to_string)
            .collect();
        (containers, pod.runtime.class, cluster.problems())
    };
    let class = Some("kata".to_owned());
    for (list, runtime) in [
        ("containerStatuses", "containerd"),
        ("initContainerStatuses", "cri-o"),
        ("ephemeralContainerStatuses", "docker"),
    ] {
        let status = status(list, &format!("{runtime}://{}", id("a")));
        assert_eq!(told(&status), (vec![id("a")], class.clone(), vec![]));
    }
    let both = [
        status("containerStatuses", &format!("containerd://{}", id("a"))),
        status(
            "initContainerStatuses",
            &format!("containerd://{}", id("b")),
        ),
    ];
    assert_eq!(
        told(&both.join(", ")),
        (vec![id("a"), id("b")], class.clone(), vec![])
    );
    assert_eq!(
        told(&status("containerStatuses", "")),
        (vec![], class.clone(), vec![])
    );
    for bad in [
        id("a"),
        format!("://{}", id("a")),
        format!("Containerd://{}", id("a")),
        format!("containerd://{}", id("A")),
        format!("containerd://{}", &id("a")[1..]),
        format!("containerd://../{}", id("a")),
    ] {
        let (containers, _, problems) = told(&status("containerStatuses", &bad));
        assert!(containers.is_empty(), "{bad}");
        assert_eq!(problems.len(), 1, "{bad}");
        let field = "status.containerStatuses[0].containerID: ";
        assert!(problems[0].starts_with(field), "{problems:?}");
    }
}

#[test]
fn a_pod_may_have_users_of_its_own() {
    let labels = "labels: {weft.dev/mesh: enabled}";
    for (spec, expected) in [
        ("", false),
        ("hostUsers: true", false),
        ("hostUsers: false", true),
    ] {
        let cluster = Cluster::of(&pod(labels, spec, ""));
        let told = cluster.node_pod("shop/web").expect("told");
        assert_eq!(told.runtime.own_users, expected, "{spec}");
    }
}

/// The object of a static pod says by which UID the kubelet has it. Anybody may write the same words.
#[test]
fn a_static_pod_is_known_by_the_uid_of_its_kubelet() {
    let hash = "0123456789abcdef0123456789abcdef";
    let uid = "6f1d2c3b-0000-4000-8000-000000000001";
    let good = format!(
        "uid: {uid}, labels: {{weft.dev/mesh: enabled}}, annotations: {{kubernetes.io/config.hash: {hash},
           kubernetes.io/config.mirror: {hash}}},
         ownerReferences: [{{apiVersion: v1, kind: Node, name: one, uid: n, controller: true}}]"
    );
    let other = "00000000000000000000000000000000";
    for (metadata, expected) in [
        (good.clone(), Some(hash)),
        (good.replace("kind: Node", "kind: ReplicaSet"), None),
        (good.replace("name: one", "name: two"), None),
        (good.replace("controller: true", "controller: false"), None),
        (
            good.replace(
                "config.hash: 0123456789abcdef0123456789abcdef",
                &format!("config.hash: '{other}'"),
            ),
            None,
        ),
        (good.replace("kubernetes.io/config.mirror", "a"), None),
        // The UID of another pod, which none of a static pod looks like.
        (good.replace(hash, uid), None),
        // Without the dashes it does; agents take it for a static pod's only.
        (
            good.replace(hash, "6f1d2c3b000040008000000000000002"),
            Some("6f1d2c3b000040008000000000000002"),
        ),
    ] {
        let cluster = Cluster::of(&pod(&metadata, "", ""));
        let told = cluster.node_pod("shop/web").expect("told");
        assert_eq!(told.runtime.static_uid.as_deref(), expected, "{metadata}");
        assert_eq!(told.uid, uid);
    }
}

/// Also of a pod that is in the host's network, or not meshed.
#[test]
fn static_pods_of_the_same_uid_are_none() {
    let hash = "0123456789abcdef0123456789abcdef";
    let of = |node: &str, labels: &str| {
        let metadata = format!(
            "labels: {{{labels}}}, annotations: {{kubernetes.io/config.hash: {hash},
               kubernetes.io/config.mirror: {hash}}},
             ownerReferences: [{{apiVersion: v1, kind: Node, name: {node}, uid: n, controller: true}}]"
        );
        pod(&metadata, "", "phase: Running")
    };
    let enabled = "weft.dev/mesh: enabled";
    let mut cluster = Cluster::of(&of("one", enabled));
    let told = |cluster: &Cluster| {
        let pod = cluster.node_pod("shop/web").expect("told");
        pod.runtime.static_uid
    };
    assert_eq!(told(&cluster).as_deref(), Some(hash));
    let other = of("one", "").replace("name: web", "name: other");
    assert_ne!(other, of("one", ""));
    let other = other.replace("10.1.0.1", "10.1.0.2");
    cluster.apply(&other);
    assert_eq!(told(&cluster), None);
    // One that has ended is nobody.
    assert_ne!(other, other.replace("Running", "Succeeded"));
    cluster.apply(&other.replace("Running", "Succeeded"));
    assert_eq!(told(&cluster).as_deref(), Some(hash));
    cluster.apply(&other);
    assert_eq!(told(&cluster), None);
    // Of another node.
    cluster.delete(&other);
    assert_eq!(told(&cluster).as_deref(), Some(hash));
    let elsewhere = of("two", "").replace("name: web", "name: other");
    cluster.apply(&elsewhere.replace("nodeName: one", "nodeName: two"));
    assert_eq!(told(&cluster).as_deref(), Some(hash));
}

#[test]
fn an_invalid_pod_stays_as_it_was() {
    let good = pod("labels: {weft.dev/mesh: enabled}", "", "");
    let mut cluster = Cluster::of(&good);
    let told = cluster.told("one");
    cluster.apply(&good.replace("10.1.0.1", "nonsense"));
    assert_eq!(cluster.told("one"), told);
    assert_eq!(cluster.problems().len(), 1);
    cluster.apply(&good);
    assert!(cluster.problems().is_empty());
}
