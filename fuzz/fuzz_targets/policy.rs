//! Policy as an agent is told it: whatever an agent accepts, it can decide by, and what no Server
//! selects and no default allows is denied, and so is whom NetworkPolicies do not let in. Where there are
//! routes, a request passes only by one of them.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_core::{Client, ClusterSettings, Identity, Server, authorize, authorize_request};
use weft_proto::{Resource, v1};

/// What passes is a route's, if there are any, and some connection's that was admitted.
fn requests(cluster: &ClusterSettings, server: &Server, client: Client<'_>, is_admitted: bool) {
    for url in PATHS {
        let Ok(request) = http::Request::get(*url).body(()) else {
            continue;
        };
        let (head, ()) = request.into_parts();
        for is_grpc in [false, true] {
            let decided = authorize_request(cluster, server, client, &head, is_grpc);
            let Ok(passed) = decided else { continue };
            assert!(is_admitted, "a request of who may not connect");
            assert_eq!(passed.rule.is_some(), server.routes.is_some());
        }
    }
}

const PATHS: &[&str] = &[
    "http://shop/",
    "http://a.example.com/a/b?c=d",
    "http://shop/a/../b",
    "http://shop/%61;x//b/.",
    "http://shop/shop.Cart/Add",
];

fuzz_target!(|bytes: &[u8]| {
    let Ok(push) = v1::Push::decode(bytes) else {
        return;
    };
    let mut cluster = ClusterSettings {
        trust_domain: "cluster.local".parse().expect("a trust domain"),
        pod_ranges: vec!["10.0.0.0/8".parse().expect("a range")],
        service_ranges: vec![],
        force_tunnels: false,
    };
    let mut servers = Vec::new();
    let mut policies = Vec::new();
    let mut workloads = Vec::new();
    for resource in push.changed {
        match Resource::try_from(resource) {
            Ok(Resource::Cluster(settings)) => cluster = settings,
            Ok(Resource::Server(server)) => servers.push(server),
            Ok(Resource::WorkloadPolicy(policy)) => policies.push(policy),
            Ok(Resource::Workload(workload)) => workloads.push(Arc::new(workload)),
            _ => {}
        }
    }
    let identity: Identity = "spiffe://cluster.local/ns/shop/sa/web"
        .parse()
        .expect("an identity");
    for policy in &policies {
        for port in policy
            .servers
            .iter()
            .map(|it| it.port)
            .chain([1, 80, 65535])
        {
            for identity in [None, Some(&identity)] {
                let client = Client {
                    address: IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3)),
                    identity,
                };
                let find = |name: &_| servers.iter().find(|it| it.name == *name);
                let at = |address| {
                    let mut workloads = workloads.iter();
                    workloads
                        .find(|it| it.addresses.contains(&address))
                        .cloned()
                };
                let verdict = authorize(&cluster, Some(policy), find, at, port, client);
                let _ = (verdict.is_allowed(), verdict.by(), verdict.server());
                let network = policy.network.as_ref();
                if network.is_some_and(|it| !it.allow(port, client, at)) {
                    assert!(
                        !verdict.admits_requests(),
                        "NetworkPolicies do not let it in"
                    );
                    continue;
                }
                let named = policy.servers.iter().find(|it| it.port == port);
                let known = named.is_none_or(|it| find(&it.server).is_some());
                assert!(
                    known || !verdict.admits_requests(),
                    "an unknown Server let in"
                );
                if let Some(server) = named.and_then(|it| find(&it.server)) {
                    requests(&cluster, server, client, verdict.admits_requests());
                }
            }
        }
    }
});
