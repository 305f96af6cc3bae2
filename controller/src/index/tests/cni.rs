//! Policies of CNIs' own kinds: which pods they select, and what follows for these.

use super::*;

/// Meshed pods `web` and `db` of the namespace `shop`, which is labelled; `web` of the namespace `other`; and one of
/// `shop` that is not in the mesh.
const PODS: &str = "
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: shop}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web, weft.dev/mesh: enabled}},
  spec: {nodeName: one, serviceAccountName: front, containers: [{name: c}]}, status: {podIPs: [{ip: 10.1.0.1}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: db, namespace: shop, labels: {app: db, weft.dev/mesh: enabled}},
  spec: {nodeName: one, containers: [{name: c}]}, status: {podIPs: [{ip: 10.1.0.2}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: other, labels: {app: web, weft.dev/mesh: enabled}},
  spec: {nodeName: one, containers: [{name: c}]}, status: {podIPs: [{ip: 10.1.0.3}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: plain, namespace: shop, labels: {app: web}},
  spec: {nodeName: one, containers: [{name: c}]}, status: {podIPs: [{ip: 10.1.0.4}]}}
";
const NAMES: [&str; 4] = ["shop/web", "shop/db", "other/web", "shop/plain"];

const CILIUM: &str = "apiVersion: cilium.io/v2, kind: CiliumNetworkPolicy";
const CLUSTERWIDE: &str = "apiVersion: cilium.io/v2, kind: CiliumClusterwideNetworkPolicy";
const CALICO: &str = "apiVersion: projectcalico.org/v3, kind: NetworkPolicy";
const GLOBAL: &str = "apiVersion: crd.projectcalico.org/v1, kind: GlobalNetworkPolicy";

fn policy(kind: &str, rest: &str) -> String {
    let namespace = match kind {
        CILIUM | CALICO => ", namespace: shop",
        _ => "",
    };
    format!("---\n{{{kind}, metadata: {{name: n{namespace}}}, {rest}}}\n")
}

impl Cluster {
    /// Which pods' connections never skip the CNI.
    fn by_tunnels_only(&self) -> Vec<usize> {
        let is = |name: &str| self.node_pod(name).is_some_and(|it| it.by_tunnels_only);
        let names = NAMES.iter().enumerate();
        names
            .filter(|(_, it)| is(it))
            .map(|(index, _)| index)
            .collect()
    }
}

/// policy -> whom it selects; whether something in it is reported that cannot be read
#[test]
fn policies_select() {
    let of = |selector: &str| format!("spec: {{endpointSelector: {selector}}}");
    let expression = |it: &str| format!("spec: {{selector: \"{it}\"}}");
    let table: Vec<(&str, String, &[usize], bool)> = vec![
        (CILIUM, of("{}"), &[0, 1], false),
        (CILIUM, of("{matchLabels: {app: web}}"), &[0], false),
        (CILIUM, of("{matchLabels: {'k8s:app': web}}"), &[0], false),
        (CILIUM, of("{matchLabels: {'any:app': db}}"), &[1], false),
        (CILIUM, of("{matchLabels: {'any:app': nobody}}"), &[], false),
        // Of what nobody knows, whom it may be for.
        (CILIUM, of("{matchLabels: {'container:x': y, app: db}}"), &[1], false),
        (CILIUM, of("{matchLabels: {'k8s:io.cilium.k8s.policy.cluster': x, app: db}}"), &[1], false),
        (CILIUM, of("{matchLabels: {'$world': ''}}"), &[0, 1], false),
        (CILIUM, of("{matchExpressions: [{key: 'reserved.init', operator: Exists}]}"), &[0, 1], false),
        // Of no other namespace, whatever it asks for.
        (CILIUM, of("{matchLabels: {'k8s:io.kubernetes.pod.namespace': other}}"), &[0, 1], false),
        (CILIUM, of("{matchExpressions: [{key: 'k8s:app', operator: NotIn, values: [db]}]}"), &[0], false),
        (CILIUM, of("{matchLabels: {'k8s:io.cilium.k8s.policy.serviceaccount': front}}"), &[0], false),
        (CILIUM, of("{matchExpressions: [{key: app, operator: Is}]}"), &[0, 1], true),
        (CILIUM, of("7"), &[0, 1], true),
        (CILIUM, "spec: {}".to_owned(), &[0, 1], true),
        (CILIUM, "specs: 7".to_owned(), &[0, 1], true),
        (CILIUM, "specs: [{endpointSelector: {matchLabels: {app: db}}}, {}]".to_owned(), &[0, 1], true),
        (CILIUM, "status: {}".to_owned(), &[0, 1], true),
        (
            CILIUM,
            "specs: [{endpointSelector: {matchLabels: {app: db}}}, {endpointSelector: {matchLabels: {app: x}}}]".to_owned(),
            &[1],
            false,
        ),
        (CLUSTERWIDE, of("{matchLabels: {app: web}}"), &[0, 2], false),
        (CLUSTERWIDE, of("{matchLabels: {'k8s:io.kubernetes.pod.namespace': other}}"), &[2], false),
        (CLUSTERWIDE, of("{matchLabels: {io.cilium.k8s.namespace.labels.team: shop}}"), &[0, 1], false),
        (CLUSTERWIDE, of("{matchLabels: {app: nobody}}"), &[], false),
        (CLUSTERWIDE, of("7"), &[0, 1, 2], true),
        (CLUSTERWIDE, "spec: {nodeSelector: {}}".to_owned(), &[], false),
        (CALICO, "spec: {}".to_owned(), &[0, 1], false),
        (CALICO, expression(""), &[0, 1], false),
        (CALICO, expression("app == 'web'"), &[0], false),
        (CALICO, expression("app in {'web', 'x'} || has(other)"), &[0], false),
        (CALICO, expression("projectcalico.org/serviceaccount == 'front'"), &[0], false),
        (CALICO, expression("app = 'web'"), &[0, 1], true),
        (CALICO, expression("pcns.team == 'shop' && app == 'db'"), &[1], false),
        (CALICO, expression("pcns.projectcalico.org/name == 'other'"), &[], false),
        (CALICO, expression("pcsa.team == 'x' && app == 'db'"), &[1], false),
        (CALICO, "spec: {namespaceSelector: \"team == 'x'\", selector: \"app == 'db'\"}".to_owned(), &[1], false),
        (CALICO, "spec: {selector: 7}".to_owned(), &[0, 1], true),
        (CALICO, "spec: 7".to_owned(), &[0, 1], true),
        (CALICO, "spec: {serviceAccountSelector: \"projectcalico.org/name == 'front'\"}".to_owned(), &[0], false),
        // What labels accounts have is not known.
        (CALICO, "spec: {serviceAccountSelector: \"team == 'x'\", selector: \"app == 'db'\"}".to_owned(), &[1], false),
        (GLOBAL, "spec: {}".to_owned(), &[0, 1, 2], false),
        (GLOBAL, expression("projectcalico.org/namespace == 'other'"), &[2], false),
        (GLOBAL, "spec: {namespaceSelector: \"team == 'shop'\", selector: \"app == 'web'\"}".to_owned(), &[0], false),
        (GLOBAL, "spec: {namespaceSelector: \"projectcalico.org/name == 'other'\"}".to_owned(), &[2], false),
        (GLOBAL, "spec: {namespaceSelector: global()}".to_owned(), &[], false),
    ];
    for (kind, rest, expected, is_wrong) in table {
        let policy = policy(kind, &rest);
        let mut cluster = Cluster::of(&[PODS, &policy].concat());
        assert_eq!(cluster.by_tunnels_only(), expected, "{policy}");
        let problems = cluster.problems();
        let (limits, wrong): (Vec<_>, Vec<_>) = problems
            .into_iter()
            .partition(|it| it.contains("port 15008 only"));
        assert_eq!(wrong.len(), usize::from(is_wrong), "{policy}: {wrong:?}");
        assert_eq!(limits.len(), usize::from(!expected.is_empty()), "{policy}");
        cluster.delete(&policy);
        assert!(cluster.by_tunnels_only().is_empty(), "{policy}");
        assert!(cluster.problems().is_empty(), "{policy}");
    }
}

#[test]
fn what_policies_select_follows_labels() {
    let of_shop = policy(GLOBAL, "spec: {namespaceSelector: \"team == 'shop'\"}");
    let of_web = policy(
        CILIUM,
        "spec: {endpointSelector: {matchLabels: {app: web}}}",
    );
    let mut cluster = Cluster::of(&[PODS, &of_shop, &of_web].concat());
    assert_eq!(cluster.by_tunnels_only(), [0, 1]);
    cluster.apply(&PODS.replace("team: shop", "team: x"));
    assert_eq!(cluster.by_tunnels_only(), [0]);
    cluster.apply(
        &PODS
            .replace("team: shop", "team: x")
            .replace("app: db", "app: web"),
    );
    assert_eq!(cluster.by_tunnels_only(), [0, 1]);
    assert_eq!(cluster.problems().len(), 1, "{:?}", cluster.problems());
    cluster.delete(&of_web);
    assert!(cluster.by_tunnels_only().is_empty());
    cluster.delete(PODS);
    assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
}

/// It is said of a policy for as long as it selects somebody in the mesh, whoever that is.
#[test]
fn what_is_said_of_policies_follows_pods() {
    let of = |kind| policy(kind, "spec: {endpointSelector: {matchLabels: {app: web}}}");
    let pods: Vec<&str> = PODS.split("---\n").skip(1).collect();
    let [space, front, db, other, plain] = pods[..] else {
        panic!("{pods:?}");
    };
    let mut cluster = Cluster::of(&[space, "---\n", plain, &of(CILIUM), &of(CLUSTERWIDE)].concat());
    let said = |cluster: &Cluster| cluster.problems().len();
    assert_eq!(said(&cluster), 0, "it is not in the mesh");
    cluster.apply(front);
    assert_eq!(said(&cluster), 2);
    cluster.apply(db);
    cluster.apply(&other.replace("enabled", "disabled"));
    cluster.delete(front);
    assert_eq!(said(&cluster), 0);
    cluster.apply(other);
    assert_eq!(said(&cluster), 1);
    cluster.apply(&db.replace("app: db", "app: web"));
    assert_eq!(said(&cluster), 2);
    cluster.delete(other);
    assert_eq!(said(&cluster), 2, "another one is selected");
    cluster.apply(&policy(
        CILIUM,
        "spec: {endpointSelector: {matchLabels: {app: x}}}",
    ));
    assert_eq!(said(&cluster), 1);
    cluster.apply(db);
    assert_eq!(said(&cluster), 0);
    assert!(cluster.by_tunnels_only().is_empty());
}

/// What cannot be read any more may hold for its CNI all the same.
#[test]
fn an_unreadable_policy_selects_whatever_it_did_before() {
    let of_web = policy(GLOBAL, "spec: {selector: \"app == 'web'\"}");
    let mut cluster = Cluster::of(&[PODS, &of_web].concat());
    assert_eq!(cluster.by_tunnels_only(), [0, 2]);
    cluster.apply(&of_web.replace("==", "="));
    assert_eq!(cluster.by_tunnels_only(), [0, 1, 2]);
    cluster.apply(&of_web);
    assert_eq!(cluster.by_tunnels_only(), [0, 2]);
    assert_eq!(cluster.problems().len(), 1, "{:?}", cluster.problems());
}

/// Calico's API server shows policies of Kubernetes, which are enforced here.
#[test]
fn policies_of_kubernetes_are_not_calicos() {
    let of = |name: &str| {
        policy(CALICO, "spec: {selector: all()}").replace("name: n,", &format!("name: {name},"))
    };
    let cluster = Cluster::of(&[PODS, &of("knp.default.web")].concat());
    assert!(cluster.by_tunnels_only().is_empty());
    let cluster = Cluster::of(&[PODS, &of("default.web")].concat());
    assert_eq!(cluster.by_tunnels_only(), [0, 1]);
}

/// What Calico keeps, and what its API server shows, are the same policies: each is told of once, as it is shown.
#[test]
fn a_policy_that_is_shown_and_kept_is_told_of_once() {
    const KEPT: &str = "apiVersion: crd.projectcalico.org/v1, kind: NetworkPolicy";
    let of = |kind: &str, name: &str, spec: &str| {
        format!("---\n{{{kind}, metadata: {{name: {name}, namespace: shop}}, spec: {spec}}}\n")
    };
    const ALL: &str = "{selector: all()}";
    const WEB: &str = "{selector: \"app == 'web'\"}";
    const NOBODY: &str = "{selector: \"app == 'x'\"}";
    const TIER: &str = "{selector: all(), tier: t}";
    let told = |cluster: &Cluster| cluster.problems().len();
    for (shown, kept, spec, count) in [
        ("n", "n", ALL, 1),
        ("n", "default.n", ALL, 1),
        ("default.n", "n", ALL, 1),
        ("default.n", "default.n", ALL, 1),
        ("t.n", "t.n", TIER, 1),
        ("n", "t.n", TIER, 1),
        ("n", "t.n", ALL, 2),
        ("n", "m", ALL, 2),
    ] {
        let (shown, kept) = (of(CALICO, shown, spec), of(KEPT, kept, spec));
        for first in [true, false] {
            let both = match first {
                true => [PODS, &shown, &kept],
                false => [PODS, &kept, &shown],
            };
            let mut cluster = Cluster::of(&both.concat());
            let problems = cluster.problems();
            assert_eq!(problems.len(), count, "{shown} {kept} {problems:?}");
            assert_eq!(cluster.by_tunnels_only(), [0, 1]);
            cluster.delete(if first { &shown } else { &kept });
            assert_eq!(told(&cluster), 1, "{shown} {kept}");
            assert_eq!(cluster.by_tunnels_only(), [0, 1]);
        }
    }
    // What is left over where it was kept before holds for whom it selects.
    let (shown, kept) = (of(CALICO, "n", NOBODY), of(KEPT, "default.n", WEB));
    let mut cluster = Cluster::of(&[PODS, &shown, &kept].concat());
    let of_what = |cluster: &Cluster| -> Vec<String> {
        let problems = cluster.problems.list().into_iter();
        problems.filter_map(|it| it.object).collect()
    };
    assert_eq!(cluster.by_tunnels_only(), [0]);
    assert_eq!(
        of_what(&cluster),
        ["NetworkPolicy.crd.projectcalico.org shop/default.n"]
    );
    cluster.apply(&of(CALICO, "n", ALL));
    assert_eq!(cluster.by_tunnels_only(), [0, 1]);
    assert_eq!(
        of_what(&cluster),
        ["NetworkPolicy.projectcalico.org shop/n"]
    );
    cluster.delete(PODS);
    assert_eq!(told(&cluster), 0);
}

/// Each is asked about each pod, by the one that does everything else.
#[test]
fn a_selector_that_is_too_large_is_not_evaluated() {
    let values = |count: usize| {
        let all: Vec<String> = (0..count).map(|it| format!("'v{it}'")).collect();
        all.join(", ")
    };
    let repeated = |what: &str, count: usize, between: &str| vec![what; count].join(between);
    type Written = Box<dyn Fn(usize) -> String>;
    let table: Vec<(&str, Written)> = vec![
        (
            CALICO,
            Box::new(move |it| format!("spec: {{selector: \"x in {{{}}}\"}}", values(it))),
        ),
        (
            CALICO,
            Box::new(move |it| {
                format!("spec: {{selector: \"{}\"}}", repeated("has(x)", it, " && "))
            }),
        ),
        (
            CALICO,
            Box::new(move |it| {
                format!(
                    "spec: {{selector: \"global() && {}\"}}",
                    repeated("all()", it - 1, " && ")
                )
            }),
        ),
        (
            GLOBAL,
            Box::new(move |it| {
                let pods = repeated("has(x)", it - 100, " || ");
                format!(
                    "spec: {{selector: \"{pods}\", namespaceSelector: \"x in {{{}}}\"}}",
                    values(100)
                )
            }),
        ),
        (
            CILIUM,
            Box::new(move |it| {
                format!(
                    "spec: {{endpointSelector: {{matchExpressions: [{{key: x, operator: In, values: [{}]}}]}}}}",
                    values(it)
                )
            }),
        ),
        (
            CILIUM,
            Box::new(move |it| {
                let one = "{endpointSelector: {matchLabels: {app: nobody}}}";
                format!("specs: [{}]", repeated(one, it, ", "))
            }),
        ),
    ];
    for (kind, written) in table {
        let cluster = Cluster::of(&[PODS, &policy(kind, &written(256))].concat());
        assert!(cluster.by_tunnels_only().is_empty(), "{}", written(256));
        let cluster = Cluster::of(&[PODS, &policy(kind, &written(257))].concat());
        assert!(
            cluster.by_tunnels_only().starts_with(&[0, 1]),
            "{}",
            written(257)
        );
        let problems = cluster.problems();
        assert!(
            problems.iter().any(|it| it.contains("more than 256")),
            "{problems:?}"
        );
    }
}
