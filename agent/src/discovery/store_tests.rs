use weft_core::{
    AccessPolicy, Authorization, AuthorizationName, DenyReason, PolicyGroup, PortRanges,
    ProxyProtocol, Server, ServerBinding, ServerName, WorkloadPolicy,
};

use super::super::services::{Balanced, of_family};
use super::super::testing::*;
use super::*;
use crate::balance::EndpointEntry;

fn key(kind: Kind, name: &str) -> Key {
    Key {
        kind,
        name: name.to_owned(),
    }
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("valid")
}

fn id(text: &str) -> WorkloadId {
    text.parse().expect("valid")
}

fn targets(store: &Store, destination: &str) -> Vec<(String, u16)> {
    let Destination::Service(entry) = store.classify(at(destination)) else {
        panic!("{destination} is no service port");
    };
    let endpoints = entry.endpoints.load();
    let target = |it: &Arc<EndpointEntry>| (it.address.to_string(), it.port);
    endpoints.iter().map(target).collect()
}

fn owner(store: &Store, address: &str) -> Option<String> {
    let address = address.parse().expect("valid");
    store.workload_at(address).map(|it| it.id.to_string())
}

#[test]
fn destinations_are_classified() {
    let store = Store::new();
    let kind = |destination: &str| match store.classify(at(destination)) {
        Destination::Service(entry) => format!("service {} {}", entry.service, entry.port),
        Destination::ServiceWithoutPort(name) => format!("no port of {name}"),
        Destination::Workload(workload) => format!("workload {}", workload.id),
        Destination::Outside => "outside".to_owned(),
        Destination::Unknown => "unknown".to_owned(),
    };
    assert_eq!(kind("192.0.2.1:80"), "unknown");
    store.apply(
        vec![
            cluster(),
            workload("shop/web-0", &["10.1.0.2", "fd00:1::2"]),
            workload("vm/legacy", &["203.0.113.7"]),
            service("shop/web", "10.2.0.1", &[80, 443]),
        ],
        vec![],
    );
    // Not everything was received yet: it might belong to somebody.
    assert_eq!(kind("192.0.2.1:80"), "unknown");
    store.set_complete();
    for (destination, expected) in [
        ("10.2.0.1:80", "service shop/web 80"),
        ("10.2.0.1:81", "no port of shop/web"),
        ("10.1.0.2:8080", "workload shop/web-0"),
        ("[fd00:1::2]:8080", "workload shop/web-0"),
        ("203.0.113.7:22", "workload vm/legacy"),
        ("10.1.0.3:8080", "unknown"),
        ("10.2.0.2:80", "unknown"),
        ("[fd00:1::3]:80", "unknown"),
        ("192.0.2.1:80", "outside"),
        ("[2001:db8::1]:80", "outside"),
        ("169.254.169.254:80", "outside"),
        ("127.0.0.1:80", "unknown"),
        ("[::1]:80", "unknown"),
        ("0.0.0.0:80", "unknown"),
        ("224.0.0.1:80", "unknown"),
        ("255.255.255.255:80", "unknown"),
    ] {
        assert_eq!(kind(destination), expected, "{destination}");
    }
    store.apply(vec![], vec![key(Kind::Cluster, "cluster")]);
    assert_eq!(kind("192.0.2.1:80"), "unknown");
}

#[test]
fn workloads_move_and_addresses_are_reused() {
    let store = Store::new();
    store.apply(vec![workload("shop/a", &["10.1.0.2"])], vec![]);
    store.apply(vec![workload("shop/a", &["10.1.0.3"])], vec![]);
    assert_eq!(owner(&store, "10.1.0.2"), None);
    assert_eq!(owner(&store, "10.1.0.3").as_deref(), Some("shop/a"));
    // b gets a's address before a is known to be gone.
    store.apply(vec![workload("shop/b", &["10.1.0.3"])], vec![]);
    assert_eq!(owner(&store, "10.1.0.3"), None);
    store.apply(vec![], vec![key(Kind::Workload, "shop/a")]);
    assert_eq!(owner(&store, "10.1.0.3").as_deref(), Some("shop/b"));
    assert!(store.workload(&id("shop/a")).is_none());
    // One push that says both, the removal of the old owner last in the message.
    let removed = vec![key(Kind::Workload, "shop/b")];
    store.apply(vec![workload("shop/c", &["10.1.0.3"])], removed);
    assert_eq!(owner(&store, "10.1.0.3").as_deref(), Some("shop/c"));
    store.apply(vec![], vec![key(Kind::Workload, "shop/c")]);
    assert_eq!(owner(&store, "10.1.0.3"), None);
    assert!(store.writer().contested.is_empty());
}

/// What several claim is nobody's: not even outside of the cluster, where what is nobody's would be
/// reached in the clear.
#[test]
fn contested_addresses_are_unknown() {
    let store = Store::new();
    store.apply(vec![cluster()], vec![]);
    store.set_complete();
    for address in ["10.1.0.9", "192.0.2.9"] {
        let destination = || store.classify(at(&format!("{address}:80")));
        let is_unknown = || matches!(destination(), Destination::Unknown);
        let claims = |name: &str| store.apply(vec![workload(name, &[address])], vec![]);
        let gone = |kind, name| store.apply(vec![], vec![key(kind, name)]);
        claims("shop/a");
        assert!(!is_unknown());
        claims("attacker/x");
        assert!(is_unknown());
        gone(Kind::Workload, "attacker/x");
        assert!(matches!(destination(), Destination::Workload(it) if it.id == id("shop/a")));
        store.apply(vec![service("attacker/s", address, &[80])], vec![]);
        assert!(is_unknown(), "a service and a workload");
        gone(Kind::Workload, "shop/a");
        assert!(matches!(destination(), Destination::Service(_)));
        store.apply(vec![service("shop/s", address, &[80])], vec![]);
        assert!(is_unknown(), "two services");
        gone(Kind::Service, "attacker/s");
        gone(Kind::Service, "shop/s");
    }
}

#[test]
fn a_mapped_address_is_the_same_address() {
    let store = Store::new();
    store.apply(vec![workload("shop/a", &["::ffff:10.1.0.2"])], vec![]);
    assert_eq!(owner(&store, "10.1.0.2").as_deref(), Some("shop/a"));
}

#[test]
fn services_are_assembled_in_any_order_and_keep_their_entries() {
    let store = Store::new();
    store.apply(
        vec![endpoint("shop/web", "10.1.0.3", &[(80, 8080)])],
        vec![],
    );
    store.apply(
        vec![
            service("shop/web", "10.2.0.1", &[80, 443]),
            endpoint("shop/web", "10.1.0.2", &[(80, 8081), (443, 8443)]),
        ],
        vec![],
    );
    let expected = [("10.1.0.2".to_owned(), 8081), ("10.1.0.3".to_owned(), 8080)];
    assert_eq!(targets(&store, "10.2.0.1:80"), expected);
    assert_eq!(targets(&store, "10.2.0.1:443").len(), 1);
    let Destination::Service(before) = store.classify(at("10.2.0.1:80")) else {
        panic!("no service");
    };
    // Another address, another endpoint: the entry with its balance state stays.
    store.apply(
        vec![service("shop/web", "10.2.0.9", &[80])],
        vec![key(Kind::Endpoint, "shop/web@10.1.0.3")],
    );
    let Destination::Service(after) = store.classify(at("10.2.0.9:80")) else {
        panic!("no service");
    };
    assert!(Arc::ptr_eq(&before, &after));
    assert_eq!(before.endpoints.load().len(), 1);
    assert!(matches!(
        store.classify(at("10.2.0.9:443")),
        Destination::ServiceWithoutPort(_)
    ));
    assert!(matches!(
        store.classify(at("10.2.0.1:80")),
        Destination::Unknown
    ));
    store.apply(vec![], vec![key(Kind::Service, "shop/web")]);
    assert!(matches!(
        store.classify(at("10.2.0.9:80")),
        Destination::Unknown
    ));
    store.apply(vec![], vec![key(Kind::Endpoint, "shop/web@10.1.0.2")]);
    assert!(store.dump().services.is_empty() && store.held().is_empty());
}

#[test]
fn an_ipv6_endpoint_is_removed_by_its_name() {
    let store = Store::new();
    store.apply(
        vec![
            service("shop/web", "10.2.0.1", &[80]),
            endpoint("shop/web", "fd00:1::2", &[(80, 8080)]),
        ],
        vec![],
    );
    assert_eq!(targets(&store, "10.2.0.1:80").len(), 1);
    store.apply(vec![], vec![key(Kind::Endpoint, "shop/web@fd00:1::2")]);
    assert!(targets(&store, "10.2.0.1:80").is_empty());
}

fn server(access_policy: AccessPolicy, authorizations: Vec<Authorization>) -> Server {
    Server {
        name: ServerName {
            group: PolicyGroup::Weft,
            name: "shop/web".parse().expect("valid"),
        },
        access_policy,
        proxy_protocol: ProxyProtocol::Unknown,
        authorizations,
        routes: None,
        rate_limit: None,
    }
}

#[test]
fn policy_denies_until_all_of_it_is_known() {
    let store = Store::new();
    let pod = id("shop/web-0");
    let client = Client {
        address: "10.1.0.9".parse().expect("valid"),
        identity: None,
    };
    let verdict = |port| store.authorize(&pod, port, client);
    let unknown = Verdict::Deny {
        server: None,
        reason: DenyReason::WorkloadPolicyUnknown,
    };
    let binding = ServerBinding {
        port: 8080,
        server: server(AccessPolicy::Deny, vec![]).name,
    };
    let policy = Resource::WorkloadPolicy(WorkloadPolicy {
        workload: pod.clone(),
        default: AccessPolicy::AllUnauthenticated,
        servers: vec![binding],
        network: None,
        network_egress: None,
    });
    assert_eq!(verdict(9090), unknown);
    store.apply(vec![policy], vec![]);
    // Its ranges are not known, so nothing can be said.
    assert_eq!(verdict(9090), unknown);
    store.apply(vec![cluster()], vec![]);
    assert!(verdict(9090).is_allowed());
    assert!(matches!(
        verdict(8080),
        Verdict::Deny {
            reason: DenyReason::ServerUnknown,
            ..
        }
    ));
    let everybody = Authorization {
        name: AuthorizationName {
            group: PolicyGroup::Weft,
            name: "shop/all".parse().expect("valid"),
        },
        required: vec![],
    };
    let named = server(AccessPolicy::Deny, vec![everybody]);
    let name = named.name.to_string();
    store.apply(vec![Resource::Server(named)], vec![]);
    assert!(verdict(8080).is_allowed());
    store.apply(vec![], vec![key(Kind::Server, &name)]);
    assert!(!verdict(8080).is_allowed());
    store.apply(vec![], vec![key(Kind::WorkloadPolicy, "shop/web-0")]);
    assert_eq!(verdict(9090), unknown);
}

#[test]
fn a_mapped_client_address_is_in_the_clusters_ranges() {
    let store = Store::new();
    let policy = workload_policy("shop/web-0", AccessPolicy::ClusterUnauthenticated);
    store.apply(vec![cluster(), policy], vec![]);
    for (address, expected) in [
        ("10.1.0.9", true),
        ("::ffff:10.1.0.9", true),
        ("192.0.2.1", false),
        ("::ffff:192.0.2.1", false),
    ] {
        let client = Client {
            address: address.parse().expect("valid"),
            identity: None,
        };
        let verdict = store.authorize(&id("shop/web-0"), 80, client);
        assert_eq!(verdict.is_allowed(), expected, "{address}");
    }
}

#[test]
fn only_those_concerned_are_woken() {
    let store = Store::new();
    let mut changes = store.changes();
    let mut moved = |resources, removed| {
        let before = *changes.borrow_and_update();
        store.apply(resources, removed);
        let after = *changes.borrow_and_update();
        [
            after.node_pods - before.node_pods,
            after.policies - before.policies,
            after.trust - before.trust,
        ]
    };
    let bundle = |root: u8| {
        Resource::TrustBundle(TrustBundle {
            trust_domain: "cluster.local".parse().expect("valid"),
            roots: vec![vec![root]],
        })
    };
    let elsewhere = || vec![workload("shop/far", &["10.1.9.9"])];
    assert_eq!(moved(vec![bundle(1)], vec![]), [0, 0, 0]);
    assert_eq!(moved(vec![cluster()], vec![]), [0, 1, 2]);
    assert_eq!(moved(vec![bundle(1)], vec![]), [0, 0, 0]);
    assert_eq!(moved(vec![bundle(2)], vec![]), [0, 0, 1]);
    assert_eq!(moved(elsewhere(), vec![]), [0, 0, 0]);
    assert_eq!(moved(vec![node_pod("shop/a")], vec![]), [1, 0, 0]);
    let a = || vec![workload("shop/a", &["10.1.0.1"])];
    assert_eq!(moved(a(), vec![]), [1, 0, 0]);
    let policy = workload_policy("shop/a", AccessPolicy::Deny);
    assert_eq!(moved(vec![policy], vec![]), [0, 1, 0]);
    let gone = vec![key(Kind::NodePod, "shop/a")];
    assert_eq!(moved(vec![], gone), [1, 0, 0]);
    assert_eq!(moved(a(), vec![]), [0, 0, 0]);
    let service = service("shop/web", "10.2.0.1", &[80]);
    assert_eq!(moved(vec![service], vec![]), [0, 0, 0]);
}

#[test]
fn equal_names_are_shared() {
    let store = Store::new();
    let resources = vec![
        workload("shop/a", &["10.1.0.1"]),
        workload("shop/b", &["10.1.0.2"]),
    ];
    store.apply(resources, vec![]);
    let [a, b] = ["shop/a", "shop/b"].map(|it| store.workload(&id(it)).expect("known"));
    let same = |a: &weft_core::Name, b: &weft_core::Name| {
        std::ptr::eq(a.as_str().as_ptr(), b.as_str().as_ptr())
    };
    assert!(same(&a.node, &b.node));
    assert!(same(&a.id.0.namespace, &b.id.0.namespace));
    let [a, b] = [&a, &b].map(|it| it.identity().expect("meshed").clone());
    assert!(same(&a.namespace, &b.namespace));
    assert!(same(&a.service_account, &b.service_account));
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages = statm.split(' ').nth(1).expect("has it");
    pages.parse::<usize>().expect("a number") * 4096
}

/// The promise is below 64 MiB. Measured in a process of its own: what other tests take at the same time would count.
#[test]
fn a_hundred_thousand_workloads_are_small() {
    const ALONE: &str = "WEFT_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = std::thread::current().name().expect("a test").to_owned();
        let itself = std::env::current_exe().expect("it runs");
        let args = ["--exact", &name, "--nocapture", "--test-threads=1"];
        let output = std::process::Command::new(itself)
            .args(args)
            .env(ALONE, "1")
            .output()
            .expect("it runs again");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        assert!(said.contains(" KiB"), "it was measured: {said}");
        return;
    }
    let store = Store::new();
    let before = resident_bytes();
    for batch in 0..100 {
        let resources = (0..1000).flat_map(|it| {
            let number = batch * 1000 + it;
            let (name, app) = (number, number / 20);
            let address = IpAddr::from((0x0a10_0000_u32 + number).to_be_bytes()).to_string();
            let Resource::Workload(mut workload) = workload(
                &format!("team-{}/app-{app}-x{name}", app % 100),
                &[&address],
            ) else {
                panic!("a workload");
            };
            workload.node = format!("node-{}", number % 1000).parse().expect("valid");
            workload.owner = Some(weft_core::Owner {
                kind: "deployment".parse().expect("valid"),
                name: format!("app-{app}").parse().expect("valid"),
            });
            let service = format!("team-{}/app-{app}", app % 100);
            let endpoint = endpoint(&service, &address, &[(80, 8080)]);
            [(Resource::Workload(workload), 1), (endpoint, 2)]
        });
        store.apply_push(resources.collect(), vec![]);
    }
    let resources = (0..5000_u32).map(|app| {
        let address = IpAddr::from((0x0a02_0000_u32 + app).to_be_bytes()).to_string();
        let name = format!("team-{}/app-{app}", app % 100);
        (service(&name, &address, &[80]), 3)
    });
    store.apply_push(resources.collect(), vec![]);
    let took = resident_bytes().saturating_sub(before);
    println!("{} KiB", took / 1024);
    assert!(store.workload(&id("team-0/app-0-x0")).is_some());
    assert!(took < 64 << 20, "{} KiB", took / 1024);
}

#[test]
fn what_is_held_is_told_by_name_and_version() {
    let store = Store::new();
    let resources = vec![
        (cluster(), 1),
        (workload("shop/a", &["10.1.0.1"]), 2),
        (service("shop/web", "10.2.0.1", &[80]), 3),
        (endpoint("shop/web", "fd00:1::2", &[(80, 8080)]), 4),
        (endpoint("shop/web", "10.1.0.1", &[(80, 8080)]), 5),
        (workload_policy("shop/a", AccessPolicy::Deny), 6),
        (node_pod("shop/a"), 7),
    ];
    let mut expected: Vec<(Key, u64)> = resources
        .iter()
        .map(|(it, version)| (it.key(), *version))
        .collect();
    store.apply_push(resources, vec![]);
    expected.sort();
    let held = || {
        let mut held = store.held();
        held.sort();
        held
    };
    assert_eq!(held(), expected);
    store.apply_push(vec![(workload("shop/a", &["10.1.0.1"]), 8)], vec![]);
    assert_eq!(held().iter().map(|(_, it)| it).max(), Some(&8));
    let all = expected.into_iter().map(|(key, _)| key).collect();
    store.apply_push(vec![], all);
    assert_eq!(held(), []);
}

#[test]
fn targets_are_chosen_by_the_family_that_the_client_used() {
    let target = |address: &str| EndpointEntry::new(address.parse().expect("valid"), 80);
    let targets = [target("10.0.0.1"), target("10.0.0.2"), target("fd00::1")];
    let of = |like: &str| of_family(&targets, like.parse().expect("valid"));
    assert_eq!(of("10.96.0.1"), 0..2);
    assert_eq!(of("fd01::1"), 2..3);
    assert!(of_family(&targets[..2], targets[2].address).is_empty());
}

#[test]
fn an_endpoint_keeps_its_load_as_long_as_it_backs_the_port() {
    let store = Store::new();
    let web = |ports: &[u16]| service("shop/web", "10.2.0.1", ports);
    let of = |address, targets| endpoint("shop/web", address, targets);
    store.apply(
        vec![web(&[80, 443]), of("10.1.0.2", &[(80, 8080), (443, 8080)])],
        vec![],
    );
    let entries = |destination: &str| {
        let Destination::Service(port) = store.classify(at(destination)) else {
            panic!("no service port");
        };
        port.endpoints.load_full()
    };
    let first = entries("10.2.0.1:80");
    let kept = |now: &[Arc<EndpointEntry>], place: usize| Arc::ptr_eq(&now[place], &first[0]);
    assert!(!kept(&entries("10.2.0.1:443"), 0));
    // Others come before and behind it, and go.
    let others = vec![
        of("10.1.0.1", &[(80, 8080)]),
        of("fd00:1::3", &[(80, 8080)]),
    ];
    store.apply(others, vec![]);
    let now = entries("10.2.0.1:80");
    assert!(now.len() == 3 && kept(&now, 1));
    store.apply(
        vec![web(&[80])],
        vec![key(Kind::Endpoint, "shop/web@10.1.0.1")],
    );
    assert!(kept(&entries("10.2.0.1:80"), 0));
    // What changes nothing is not published.
    let published = entries("10.2.0.1:80");
    store.apply(vec![of("10.1.0.2", &[(80, 8080)])], vec![]);
    assert!(Arc::ptr_eq(&published, &entries("10.2.0.1:80")));
    // Another application at the same address.
    store.apply(vec![of("10.1.0.2", &[(80, 9090)])], vec![]);
    assert!(!kept(&entries("10.2.0.1:80"), 0));
    store.apply(vec![], vec![key(Kind::Endpoint, "shop/web@10.1.0.2")]);
    store.apply(vec![of("10.1.0.2", &[(80, 8080)])], vec![]);
    assert!(!kept(&entries("10.2.0.1:80"), 0));
}

#[test]
fn ports_that_a_pod_used_are_known() {
    let store = Store::new();
    let resources = vec![
        service("shop/web", "10.2.0.1", &[80, 443]),
        endpoint("shop/web", "10.1.0.2", &[(80, 8080)]),
    ];
    store.apply(resources, vec![]);
    assert!(store.used_ports().is_empty());
    let Destination::Service(port) = store.classify(at("10.2.0.1:80")) else {
        panic!("no service port");
    };
    let like = "10.2.0.1".parse().expect("valid");
    assert_eq!(port.tries(Balanced::Exchanges, like).candidates(), 1);
    let used = store.used_ports();
    assert!(used.len() == 1 && Arc::ptr_eq(&used[0], &port));
    assert!(port.balances(Balanced::Exchanges) && !port.balances(Balanced::Connections));
}

#[test]
fn dumps_name_things_alike() {
    let store = Store::new();
    let resources = vec![
        cluster(),
        workload("shop/a", &["10.1.0.1"]),
        service("shop/web", "10.2.0.1", &[80]),
        endpoint("shop/web", "10.1.0.1", &[(80, 8080)]),
        workload_policy("shop/a", AccessPolicy::Deny),
        Resource::Server(server(AccessPolicy::Audit, vec![])),
    ];
    store.apply(resources, vec![]);
    let dump = serde_json::to_value(store.dump()).expect("serializes");
    for (section, name) in [
        ("/workloads/0", "a"),
        ("/services/0", "web"),
        ("/policies/workloads/0", "a"),
        ("/policies/servers/0", "web"),
    ] {
        let entry = dump.pointer(section).expect(section);
        assert_eq!(entry["namespace"], "shop", "{section}");
        assert_eq!(entry["name"], name, "{section}");
    }
    let endpoint = &dump["services"][0]["ports"][0]["endpoints"][0];
    assert_eq!(endpoint["port"], 8080);
    assert_eq!(
        (&endpoint["weight"], &endpoint["outstanding"]),
        (&100.into(), &0.into())
    );
    let latency = endpoint["latency_ms"].as_f64().expect("a number");
    assert!((1.0..=30.0).contains(&latency), "{latency}");
    assert_eq!(dump["policies"]["servers"][0]["access_policy"], "audit");
    assert_eq!(dump["workloads"][0]["mesh"]["meshed"]["tunnel"], "weft-h2");
}

fn routes(store: &Store, service: &str, port: u16) -> Option<String> {
    let entry = store.service_port(&service.parse().expect("valid"), port)?;
    let routes = entry.routes.load();
    let route = routes.as_ref()?.routes().first()?;
    Some(route.name.name.to_string())
}

/// They may come before their service, and go with it or by themselves; whoever holds the port sees it.
#[test]
fn routes_belong_to_ports() {
    let store = Store::new();
    store.apply(vec![route_table("shop/web:80", "shop/first")], vec![]);
    assert_eq!(routes(&store, "shop/web", 80), None);
    store.apply(vec![service("shop/web", "10.2.0.1", &[80, 81])], vec![]);
    assert_eq!(
        routes(&store, "shop/web", 80).as_deref(),
        Some("shop/first")
    );
    assert_eq!(routes(&store, "shop/web", 81), None);
    let held = store.service_port(&"shop/web".parse().expect("valid"), 80);
    let held = held.expect("there is one");
    store.apply(vec![route_table("shop/web:80", "shop/second")], vec![]);
    let now = held.routes.load_full().expect("routes");
    assert_eq!(now.routes()[0].name.name.to_string(), "shop/second");
    let other = vec![key(Kind::RouteTable, "shop/web:81")];
    store.apply(vec![], other);
    assert_eq!(
        routes(&store, "shop/web", 80).as_deref(),
        Some("shop/second")
    );
    store.apply(vec![], vec![key(Kind::RouteTable, "shop/web:80")]);
    assert!(held.routes.load().is_none());
    let gone = vec![key(Kind::Service, "shop/web"), key(Kind::RouteTable, "x")];
    store.apply(vec![], gone);
    assert!(store.service_port(&held.service, 80).is_none());
}

#[test]
fn routes_are_held_with_their_versions() {
    let store = Store::new();
    let table = route_table("shop/web:80", "shop/first");
    let name = table.key();
    store.apply_push(vec![(table, 7)], vec![]);
    assert_eq!(store.held(), [(name.clone(), 7)]);
    store.apply(vec![], vec![name]);
    assert!(store.held().is_empty());
}

#[test]
fn the_protocol_of_a_service_port_changes_in_place() {
    let store = Store::new();
    let speaking = |protocol| match service("shop/web", "10.2.0.1", &[80]) {
        Resource::Service(mut it) => {
            it.ports[0].protocol = protocol;
            Resource::Service(it)
        }
        other => other,
    };
    store.apply(vec![speaking(PortProtocol::Detect)], vec![]);
    let name = "shop/web".parse().expect("valid");
    let held = store.service_port(&name, 80).expect("there is one");
    assert_eq!(held.protocol(), PortProtocol::Detect);
    store.apply(vec![speaking(PortProtocol::Http2)], vec![]);
    assert_eq!(held.protocol(), PortProtocol::Http2);
}

/// A Server comes before the pod's lists, and these before the default.
#[test]
fn inbound_protocols() {
    let store = Store::new();
    let pod = id("shop/web-0");
    let at = |port| store.inbound_protocol(&pod, port);
    assert_eq!(at(3306), PortProtocol::Opaque);
    assert_eq!(at(8080), PortProtocol::Detect);
    let described = match node_pod("shop/web-0") {
        Resource::NodePod(mut it) => {
            it.opaque_ports = PortRanges::new([(8080, 8081)]);
            it.opaque_outbound_ports = PortRanges::new([(9000, 9000)]);
            Resource::NodePod(it)
        }
        other => other,
    };
    store.apply(vec![described], vec![]);
    assert_eq!(at(3306), PortProtocol::Detect);
    assert_eq!(at(8080), PortProtocol::Opaque);
    assert!(store.is_outbound_opaque(&pod, 9000));
    assert!(!store.is_outbound_opaque(&pod, 8080));
    assert!(!store.is_outbound_opaque(&id("shop/other"), 9000));
    for (declared, expected) in [
        (ProxyProtocol::Unknown, PortProtocol::Opaque),
        (ProxyProtocol::Http1, PortProtocol::Http1),
        (ProxyProtocol::Http2, PortProtocol::Http2),
        (ProxyProtocol::Grpc, PortProtocol::Http2),
        (ProxyProtocol::Tls, PortProtocol::Tls),
        (ProxyProtocol::Opaque, PortProtocol::Opaque),
    ] {
        let name = ServerName {
            group: PolicyGroup::Weft,
            name: "shop/web".parse().expect("valid"),
        };
        let policy = WorkloadPolicy {
            workload: pod.clone(),
            default: AccessPolicy::Deny,
            servers: vec![ServerBinding {
                port: 8080,
                server: name.clone(),
            }],
            network: None,
            network_egress: None,
        };
        let server = Server {
            name,
            access_policy: AccessPolicy::Deny,
            proxy_protocol: declared,
            authorizations: vec![],
            routes: None,
            rate_limit: None,
        };
        store.apply(
            vec![Resource::WorkloadPolicy(policy), Resource::Server(server)],
            vec![],
        );
        assert_eq!(at(8080), expected, "{declared:?}");
        assert_eq!(at(8081), PortProtocol::Opaque);
    }
}

/// What a client's agent says of a Service is found in the store, or not believed.
#[test]
fn opaque_by_a_service() {
    let store = Store::new();
    let speaking = |name, address, protocol| match service(name, address, &[80, 81]) {
        Resource::Service(mut it) => {
            it.ports[0].protocol = protocol;
            Resource::Service(it)
        }
        other => other,
    };
    store.apply(
        vec![
            speaking("shop/web", "10.2.0.1", PortProtocol::Opaque),
            speaking("shop/plain", "10.2.0.2", PortProtocol::Detect),
            speaking("other/web", "10.2.0.3", PortProtocol::Opaque),
            endpoint("shop/web", "10.1.0.1", &[(80, 8080), (81, 8081)]),
            endpoint("shop/plain", "10.1.0.1", &[(80, 8080)]),
            endpoint("other/web", "10.1.0.9", &[(80, 8080)]),
            // For clients of another zone.
            placed("10.1.0.1", "n", "west"),
            placed("10.1.0.2", "n", "east"),
            zoned_pod(Some("east")),
        ],
        vec![],
    );
    let web = store.service_port(&"shop/web".parse().expect("valid"), 80);
    let ours = web.expect("there is one").endpoints.load_full();
    assert_eq!(ours.len(), 1, "one is left out for clients of this node");
    for (pod, to, by, is_opaque) in [
        ("shop/web-0", "10.1.0.1:8080", ("web", 80), true),
        ("shop/web-0", "10.1.0.2:8080", ("web", 80), true),
        ("shop/web-0", "10.1.0.3:8080", ("web", 80), false),
        ("shop/web-0", "10.1.0.1:8081", ("web", 80), false),
        ("shop/web-0", "10.1.0.1:8081", ("web", 81), false),
        ("shop/web-0", "10.1.0.1:8080", ("web", 82), false),
        ("shop/web-0", "10.1.0.1:8080", ("plain", 80), false),
        ("shop/web-0", "10.1.0.1:8080", ("none", 80), false),
        ("other/web-0", "10.1.0.1:8080", ("web", 80), false),
        ("other/web-0", "10.1.0.9:8080", ("web", 80), true),
        ("shop/web-0", "10.1.0.9:8080", ("web", 80), false),
    ] {
        let name = by.0.parse().expect("valid");
        let to = to.parse().expect("valid");
        let found = store.inbound_protocol_by(&id(pod), to, (&name, by.1));
        assert_eq!(found.is_opaque(), is_opaque, "{pod} at {to} by {by:?}");
    }
    store.apply(vec![], vec![key(Kind::Service, "shop/web")]);
    let name = "web".parse().expect("valid");
    let to = "10.1.0.1:8080".parse().expect("valid");
    let found = store.inbound_protocol_by(&id("shop/web-0"), to, (&name, 80));
    assert_eq!(found, PortProtocol::Detect);
}

/// An endpoint that is meant for a zone, on a node.
fn placed(address: &str, node: &str, zone: &str) -> Resource {
    let Resource::Endpoint(mut it) = endpoint("shop/web", address, &[(80, 8080)]) else {
        panic!("an endpoint");
    };
    it.place = weft_core::EndpointPlace {
        node: Some(node.parse().expect("valid")),
        for_nodes: vec![],
        for_zones: vec![zone.to_owned()],
    };
    Resource::Endpoint(it)
}

fn zoned_pod(zone: Option<&str>) -> Resource {
    let Resource::NodePod(mut pod) = node_pod("shop/client") else {
        panic!("a pod of the node");
    };
    pod.zone = zone.map(str::to_owned);
    Resource::NodePod(pod)
}

#[test]
fn endpoints_are_those_for_clients_of_this_node() {
    let store = Store::on("node-a".parse().expect("valid"));
    let found = || -> Vec<String> {
        let targets = targets(&store, "10.2.0.1:80").into_iter();
        targets.map(|(address, _)| address).collect()
    };
    store.apply(
        vec![
            service("shop/web", "10.2.0.1", &[80]),
            placed("10.1.0.2", "node-a", "east"),
            placed("10.1.0.3", "node-b", "west"),
            placed("fd00:1::3", "node-b", "east"),
        ],
        vec![],
    );
    // In no zone, hints mean nothing.
    assert_eq!(found(), ["10.1.0.2", "10.1.0.3", "fd00:1::3"]);
    // The families are looked at apart.
    store.apply(vec![zoned_pod(Some("west"))], vec![]);
    assert_eq!(found(), ["10.1.0.3", "fd00:1::3"]);
    store.apply(vec![zoned_pod(Some("east"))], vec![]);
    assert_eq!(found(), ["10.1.0.2", "fd00:1::3"]);
    // One of its family says nothing now.
    let silent = endpoint("shop/web", "10.1.0.4", &[(80, 8080)]);
    store.apply(vec![silent], vec![]);
    assert_eq!(found(), ["10.1.0.2", "10.1.0.3", "10.1.0.4", "fd00:1::3"]);
    let Resource::Service(mut local) = service("shop/web", "10.2.0.1", &[80]) else {
        panic!("a service");
    };
    local.internal_traffic = weft_core::InternalTraffic::Local;
    store.apply(vec![Resource::Service(local)], vec![]);
    assert_eq!(found(), ["10.1.0.2"]);
    store.apply(vec![], vec![key(Kind::Endpoint, "shop/web@10.1.0.2")]);
    assert!(found().is_empty());
}

#[test]
fn a_weight_changes_and_the_endpoint_stays() {
    let store = Store::new();
    let weighted = |percent| {
        let Resource::Endpoint(mut it) = endpoint("shop/web", "10.1.0.2", &[(80, 8080)]) else {
            panic!("an endpoint");
        };
        it.weight = weft_core::Weight::new(percent).expect("valid");
        Resource::Endpoint(it)
    };
    store.apply(
        vec![service("shop/web", "10.2.0.1", &[80]), weighted(50)],
        vec![],
    );
    let Destination::Service(port) = store.classify(at("10.2.0.1:80")) else {
        panic!("a service");
    };
    let before = Arc::clone(&port.endpoints.load()[0]);
    assert_eq!(before.load.weight(), 50);
    store.apply(vec![weighted(300)], vec![]);
    assert!(Arc::ptr_eq(&before, &port.endpoints.load()[0]));
    assert_eq!(before.load.weight(), 300);
}
