use proptest::prelude::*;
use weft_core::*;

use super::*;

fn samples() -> Vec<Resource> {
    let identity: Identity = "spiffe://cluster.local/ns/shop/sa/web"
        .parse()
        .expect("valid");
    let server_name = ServerName {
        group: PolicyGroup::Weft,
        name: "shop/web".parse().expect("valid"),
    };
    let workload = |mesh, owner| {
        Resource::Workload(Workload {
            id: "shop/web-0".parse().expect("valid"),
            addresses: vec![
                "10.1.0.2".parse().expect("valid"),
                "fd00::2".parse().expect("valid"),
            ],
            node: "node-a".parse().expect("valid"),
            owner,
            mesh,
        })
    };
    let meshed = |tunnel| Mesh::Meshed {
        identity: identity.clone(),
        tunnel,
    };
    let owner = Owner {
        kind: "deployment".parse().expect("valid"),
        name: "web".parse().expect("valid"),
    };
    let mut samples = vec![
        Resource::Cluster(ClusterSettings {
            trust_domain: "cluster.local".parse().expect("valid"),
            pod_ranges: vec!["10.0.0.0/8".parse().expect("valid")],
            service_ranges: vec!["fd01::/112".parse().expect("valid")],
            force_tunnels: true,
        }),
        Resource::TrustBundle(TrustBundle {
            trust_domain: "cluster.local".parse().expect("valid"),
            roots: vec![vec![1, 2, 3]],
        }),
        workload(Mesh::Unmeshed, None),
        workload(meshed(Tunnel::WeftH2), Some(owner)),
        workload(meshed(Tunnel::Hbone), None),
        Resource::NodePod(NodePod {
            id: "shop/web-0".parse().expect("valid"),
            uid: "1234".to_owned(),
            netns: Some("/run/netns/x".into()),
            probe_ports: vec![8080],
        }),
        Resource::Service(Service {
            name: "shop/web".parse().expect("valid"),
            addresses: vec!["10.96.0.1".parse().expect("valid")],
            ports: vec![ServicePort {
                number: 80,
                name: Some("http".parse().expect("valid")),
                app_protocol: Some("kubernetes.io/h2c".to_owned()),
            }],
        }),
        Resource::Endpoint(Endpoint {
            name: EndpointName {
                service: "shop/web".parse().expect("valid"),
                address: "10.1.0.2".parse().expect("valid"),
            },
            ports: vec![EndpointPort {
                service_port: 80,
                target_port: 8080,
            }],
        }),
        Resource::WorkloadPolicy(WorkloadPolicy {
            workload: "shop/web-0".parse().expect("valid"),
            default: AccessPolicy::ClusterAuthenticated,
            servers: vec![ServerBinding {
                port: 8080,
                server: server_name.clone(),
            }],
        }),
    ];
    samples.push(Resource::Server(Server {
        name: server_name,
        access_policy: AccessPolicy::Deny,
        proxy_protocol: ProxyProtocol::Http2,
        authorizations: vec![Authorization {
            name: AuthorizationName {
                group: PolicyGroup::Linkerd,
                name: "shop/allow".parse().expect("valid"),
            },
            required: vec![
                Authentication::MeshTls(vec![
                    IdentityMatch::Any,
                    IdentityMatch::Exact(identity.clone()),
                    IdentityMatch::Namespace {
                        trust_domain: identity.trust_domain.clone(),
                        namespace: identity.namespace.clone(),
                    },
                ]),
                Authentication::Networks(vec![NetworkMatch {
                    cidr: "10.0.0.0/8".parse().expect("valid"),
                    except: vec!["10.1.0.0/16".parse().expect("valid")],
                }]),
                Authentication::Unknown("MeshTLSAuthentication shop/x".to_owned()),
            ],
        }],
    }));
    samples
}

#[test]
fn every_kind_round_trips() {
    for sample in samples() {
        let message = v1::Resource::from(sample.clone());
        let bytes = message.encode_to_vec();
        let decoded = v1::Resource::decode(bytes.as_slice()).expect("decodes");
        assert_eq!(Resource::try_from(decoded), Ok(sample));
    }
}

#[test]
fn versions_follow_content() {
    let versions: Vec<u64> = samples()
        .into_iter()
        .map(|it| v1::Resource::from(it).version)
        .collect();
    let again: Vec<u64> = samples()
        .into_iter()
        .map(|it| v1::Resource::from(it).version)
        .collect();
    assert_eq!(versions, again);
    let distinct: std::collections::HashSet<u64> = versions.iter().copied().collect();
    assert_eq!(distinct.len(), versions.len());
}

#[test]
fn a_key_that_names_something_else_is_refused() {
    let mut message = v1::Resource::from(samples().remove(2));
    message.key.as_mut().expect("has one").name = "shop/other".to_owned();
    let refused = Resource::try_from(message).expect_err("must be refused");
    assert_eq!(refused.field, "key");
}

#[test]
fn an_authentication_of_an_unknown_kind_is_refused() {
    let message = v1::Authentication { kind: None };
    assert!(Authentication::try_from(message).is_err());
}

proptest! {
    #[test]
    fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        if let Ok(message) = v1::Resource::decode(bytes.as_slice()) {
            let _ = Resource::try_from(message);
        }
    }
}
