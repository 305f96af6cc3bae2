//! The requests that are being served by Servers that have routes, and what leaves the cluster, so that a
//! change of policy can end what it no longer allows: streams, long answers, and what a connection was
//! upgraded to.
//!
//! As with flows, a request is entered before it is decided.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::request::Parts;
use tokio_util::sync::CancellationToken;
use weft_core::{Client, Identity, WorkloadId};

use super::egress::LiveEgress;
use crate::discovery::Store;

/// All of them, in parts, each with a lock of its own.
#[derive(Debug, Default)]
pub(super) struct LiveRequests {
    parts: [Mutex<HashMap<u64, Arc<Live>>>; PARTS],
    next: AtomicU64,
}

/// What may have to end.
#[derive(Debug)]
pub(super) enum Live {
    /// A request that has arrived.
    Request(Box<LiveRequest>),
    /// What leaves the cluster.
    Egress(LiveEgress),
}

/// What a decision depends on, and how to end the request.
#[derive(Debug)]
pub(super) struct LiveRequest {
    /// The server's pod.
    pub(super) pod: WorkloadId,
    /// Its port.
    pub(super) port: u16,
    /// Where the client connects from.
    pub(super) client: IpAddr,
    /// Who it is.
    pub(super) identity: Option<Identity>,
    /// What it asks for.
    pub(super) head: Parts,
    /// Whether it is a call of gRPC.
    pub(super) is_grpc: bool,
    /// Cancelled when it must end.
    pub(super) end: CancellationToken,
}

/// A request's entry; dropping it takes it out.
#[derive(Debug)]
pub(super) struct RequestEntry {
    all: Arc<LiveRequests>,
    number: u64,
    end: CancellationToken,
}

impl LiveRequests {
    /// Enters something.
    pub(super) fn enter(self: &Arc<Self>, live: Live) -> RequestEntry {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let end = live.end().clone();
        self.part(number).insert(number, Arc::new(live));
        RequestEntry {
            all: Arc::clone(self),
            number,
            end,
        }
    }

    /// Decides anew about all of them, and ends those that are denied.
    pub(super) fn recheck(&self, store: &Store) {
        for number in 0..PARTS as u64 {
            let all: Vec<Arc<Live>> = self.part(number).values().cloned().collect();
            for live in all {
                if !live.is_allowed(store) {
                    live.end().cancel();
                }
            }
        }
    }

    fn part(&self, number: u64) -> MutexGuard<'_, HashMap<u64, Arc<Live>>> {
        let part = &self.parts[(number % PARTS as u64) as usize];
        part.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    fn is_allowed(&self, store: &Store) -> bool {
        match self {
            Self::Request(it) => it.is_allowed(store),
            Self::Egress(it) => it.is_allowed(store),
        }
    }

    fn end(&self) -> &CancellationToken {
        match self {
            Self::Request(it) => &it.end,
            Self::Egress(it) => &it.end,
        }
    }
}

impl LiveRequest {
    fn is_allowed(&self, store: &Store) -> bool {
        let client = Client {
            address: self.client,
            identity: self.identity.as_ref(),
        };
        let (_, connection, requests) = store.authorize_requests(&self.pod, self.port, client);
        match requests {
            None => connection.is_allowed(),
            Some(policy) => {
                let decided = policy.authorize(client, &self.head, self.is_grpc);
                connection.admits_requests() && decided.is_ok()
            }
        }
    }
}

impl RequestEntry {
    /// Cancelled when the request must end.
    pub(super) fn end(&self) -> &CancellationToken {
        &self.end
    }
}

impl Drop for RequestEntry {
    fn drop(&mut self) {
        self.all.part(self.number).remove(&self.number);
    }
}

const PARTS: usize = 16;

#[cfg(test)]
mod tests {
    use weft_core::route::{
        HttpMatch, InboundRoute, InboundRoutes, PathMatch, PathPrefix, Route, RouteKind, RouteName,
        RouteRules, Rule,
    };
    use weft_core::{
        AccessPolicy, Authorization, AuthorizationName, ClusterSettings, PolicyGroup,
        ProxyProtocol, Server, ServerBinding, ServerName, WorkloadPolicy,
    };
    use weft_proto::Resource;

    use super::*;

    /// A Server with one route for a prefix, which is open to everybody or to nobody.
    fn change(store: &Store, prefix: &str, is_open: bool) {
        let name = ServerName {
            group: PolicyGroup::Weft,
            name: "shop/web".parse().expect("valid"),
        };
        let policy = WorkloadPolicy {
            workload: "shop/web-0".parse().expect("valid"),
            default: AccessPolicy::Deny,
            servers: vec![ServerBinding {
                port: 80,
                server: name.clone(),
            }],
            network: None,
            network_egress: None,
        };
        let everybody = Authorization {
            name: AuthorizationName {
                group: PolicyGroup::Weft,
                name: "shop/open".parse().expect("valid"),
            },
            required: vec![],
        };
        let rule = Rule {
            name: None,
            matches: vec![HttpMatch {
                path: PathMatch::Prefix(PathPrefix::new(prefix)),
                ..HttpMatch::any()
            }],
            filters: vec![],
            backends: vec![],
            reliability: None,
        };
        let route = InboundRoute {
            route: Route {
                name: RouteName {
                    name: "shop/r".parse().expect("valid"),
                    kind: RouteKind::Http,
                },
                created: None,
                rules: RouteRules::Http(vec![rule]),
            },
            hostnames: vec![],
            authorizations: is_open.then_some(everybody).into_iter().collect(),
        };
        let server = Server {
            name,
            access_policy: AccessPolicy::Deny,
            proxy_protocol: ProxyProtocol::Unknown,
            authorizations: vec![],
            routes: Some(InboundRoutes::new(vec![route])),
            rate_limit: None,
        };
        let cluster = ClusterSettings {
            trust_domain: "cluster.local".parse().expect("valid"),
            pod_ranges: vec![],
            service_ranges: vec![],
            force_tunnels: false,
        };
        let changed = vec![
            Resource::Cluster(cluster),
            Resource::WorkloadPolicy(policy),
            Resource::Server(server),
        ];
        store.apply(changed, vec![]);
    }

    #[test]
    fn requests_end_when_they_are_no_longer_allowed() {
        let store = Store::new();
        change(&store, "/", true);
        let live = Arc::new(LiveRequests::default());
        let enter = |path: &str| {
            let request = http::Request::get(path).body(()).expect("valid");
            live.enter(Live::Request(Box::new(LiveRequest {
                pod: "shop/web-0".parse().expect("valid"),
                port: 80,
                client: "10.1.2.3".parse().expect("valid"),
                identity: None,
                head: request.into_parts().0,
                is_grpc: false,
                end: CancellationToken::new(),
            })))
        };
        let (one, other) = (enter("/a/x"), enter("/b/x"));
        live.recheck(&store);
        assert!(!one.end().is_cancelled() && !other.end().is_cancelled());
        // The route is for less now.
        change(&store, "/a", true);
        live.recheck(&store);
        assert!(!one.end().is_cancelled() && other.end().is_cancelled());
        change(&store, "/a", false);
        live.recheck(&store);
        assert!(one.end().is_cancelled());
        drop((one, other));
        assert!((0..PARTS as u64).all(|it| live.part(it).is_empty()));
    }
}
