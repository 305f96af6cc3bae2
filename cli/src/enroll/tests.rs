use super::*;

fn namespace(metadata: Value) -> Namespace {
    let mut namespace: Namespace =
        serde_json::from_value(json!({"metadata": metadata})).expect("a namespace");
    namespace.metadata.name = Some("shop".to_owned());
    namespace
}

/// A pod of a Deployment that runs.
fn pod(name: &str, more: Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "shop", "uid": name, "labels": {"pod-template-hash": "5d4"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d4", "uid": "r",
                "controller": true}]},
        "spec": {"nodeName": "one", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.1"}]}});
    merge(&mut pod, more);
    serde_json::from_value(pod).expect("a pod")
}

fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (name, value) in more {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, more) => *into = more,
    }
}

fn report(target: &str, way: Way, namespace: &Namespace, pods: &[Pod]) -> Report {
    let target = target.parse().expect("a target");
    Report::new(&target, way, namespace, pods, false).expect("a report")
}

/// Object, label before, label after.
fn changes(report: &Report) -> Vec<(&str, Option<&str>, Option<&str>)> {
    let changes = report.changes.iter();
    let shown = changes.map(|it| (it.name.as_str(), it.before.as_deref(), it.after.as_deref()));
    shown.collect()
}

/// Pod, in before, in after, whether it is not what was asked for.
fn pods(report: &Report) -> Vec<(&str, bool, bool, bool)> {
    let pods = report.pods.iter();
    pods.map(|it| (it.name.as_str(), it.before, it.after, it.reason.is_some()))
        .collect()
}

fn labelled(value: &str) -> Value {
    json!({"metadata": {"labels": {"weft.dev/mesh": value}}})
}

#[test]
fn a_namespace_takes_its_pods_along() {
    let all = [
        pod("web-1", json!({})),
        pod("own", labelled("enabled")),
        pod("not", labelled("disabled")),
        pod("node", json!({"spec": {"hostNetwork": true}})),
        pod(
            "old",
            json!({"spec": {"containers": [{"name": "c"}, {"name": "linkerd-proxy"}]}}),
        ),
        pod("new", json!({"spec": {"nodeName": null}})),
    ];
    let into = report("ns/shop", Way::In, &namespace(json!({})), &all);
    assert_eq!(changes(&into), [("shop", None, Some("enabled"))]);
    assert_eq!(
        pods(&into),
        [
            ("web-1", false, true, false),
            ("own", true, true, false),
            ("not", false, false, true),
            ("node", false, false, true),
            ("old", false, false, true),
            ("new", false, false, true),
        ]
    );
    let mut text = vec![];
    into.write(&mut text, false).expect("a vector");
    let text = String::from_utf8(text).expect("text");
    let expected = "\
LABEL OF         NOW  IS
Namespace shop   -    enabled

1 of 6 pods join the mesh, 1 are in it already; nothing restarts
connections that they have are ended once, so that they come back through the mesh
‼   not    it says itself that it does not take part, by label or annotation
‼   node   it has the node's network, which is never in the mesh
‼   old    it has the proxy of another mesh, and joins when it is made anew without
‼   new    it has no node yet: it joins when it has
";
    let squeezed = |it: &str| {
        it.split(' ')
            .filter(|it| !it.is_empty())
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(squeezed(&text), squeezed(expected));

    let enabled = namespace(json!({"labels": {"weft.dev/mesh": "enabled"}}));
    let out = report("ns/shop", Way::Out, &enabled, &all[..2]);
    assert_eq!(changes(&out), [("shop", Some("enabled"), None)]);
    assert_eq!(
        pods(&out),
        [("web-1", true, false, false), ("own", true, true, true)]
    );
    let injected = namespace(json!({"annotations": {"linkerd.io/inject": "enabled"}}));
    let out = report("ns/shop", Way::Out, &injected, &all[..1]);
    assert_eq!(changes(&out), [("shop", None, Some("disabled"))]);
    assert_eq!(pods(&out), [("web-1", true, false, false)]);
}

#[test]
fn pods_of_a_workload_are_labelled_as_they_run() {
    let other = json!({"metadata": {"ownerReferences": [], "labels": {"app": "x"}}});
    let all = [pod("web-1", json!({})), pod("other", other)];
    let plain = namespace(json!({}));
    for target in ["deploy/web", "rs/web-5d4", "pod/web-1"] {
        let into = report(target, Way::In, &plain, &all);
        assert_eq!(changes(&into), [("web-1", None, Some("enabled"))]);
        assert_eq!(pods(&into), [("web-1", false, true, false)]);
    }
    let enabled = namespace(json!({"labels": {"weft.dev/mesh": "enabled"}}));
    let again = report(
        "deploy/web",
        Way::In,
        &enabled,
        &[pod("web-1", labelled("enabled"))],
    );
    assert_eq!(changes(&again), []);
    let both = json!({"spec": {"containers": [{"name": "c"}, {"name": "linkerd-proxy"}]}});
    let kept = report("deploy/web", Way::In, &plain, &[pod("web-1", both)]);
    assert_eq!(changes(&kept), []);
    assert_eq!(pods(&kept), [("web-1", false, false, true)]);
    // Where the namespace is in, a pod has to say that it is not.
    for (namespace, after) in [(&plain, None), (&enabled, Some("disabled"))] {
        let out = report(
            "deploy/web",
            Way::Out,
            namespace,
            &[pod("web-1", labelled("enabled"))],
        );
        assert_eq!(changes(&out), [("web-1", Some("enabled"), after)]);
        assert_eq!(pods(&out), [("web-1", true, false, false)]);
    }
    let nobody = Report::new(
        &"sts/db".parse().expect("a target"),
        Way::In,
        &plain,
        &all,
        false,
    );
    assert_eq!(
        nobody.expect_err("nobody").to_string(),
        "no pod of StatefulSet/db is in the namespace shop"
    );
}

#[test]
fn what_is_none_is_refused() {
    for (text, reason) in [
        ("shop", "is none of ns/NAME"),
        ("svc/web", "is none of ns/NAME"),
        ("ns/", "is no name"),
        ("deploy/Web_1", "is no name"),
    ] {
        let refused = text.parse::<Target>().expect_err("refused").to_string();
        assert!(refused.contains(reason), "{refused}");
    }
}
