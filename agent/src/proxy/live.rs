//! The flows to the node's pods that are open now, so that a change of policy can end those it no
//! longer allows. Those that left them are in no list: `let_out` wakes them.
//!
//! A flow is entered before it is decided: a change that comes between its decision and its entry
//! would otherwise be missed.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use tokio::sync::Notify;
use weft_core::{Client, Identity, Verdict, WorkloadId};

use super::error::FlowError;
use super::live_requests::LiveRequests;
use super::{http, let_out};
use crate::discovery::Store;
use crate::node::Pods;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct LiveFlows {
    /// The requests at Servers that have routes.
    pub(super) requests: Arc<LiveRequests>,
    pods: Mutex<HashMap<WorkloadId, HashMap<u64, Arc<LiveFlow>>>>,
    next: AtomicU64,
}

/// What a decision depends on, and how to end the flow.
#[derive(Debug)]
struct LiveFlow {
    port: u16,
    client: IpAddr,
    identity: Option<Identity>,
    /// Each of its requests is asked about.
    requests_only: AtomicBool,
    /// Nothing passes that is no request, whatever its port was declared to be when it began.
    is_http: AtomicBool,
    revoked: OnceLock<Revoked>,
    ended: Notify,
}

/// Why a flow has to end.
#[derive(Clone, Debug)]
enum Revoked {
    /// It would be denied now.
    Denied(Verdict),
    /// Its port takes nothing but HTTP now, and nobody knows what it carries.
    NotHttp,
}

/// A flow's entry; dropping it takes it out.
#[derive(Debug)]
pub(super) struct LiveEntry {
    all: Arc<LiveFlows>,
    pod: WorkloadId,
    number: u64,
    flow: Arc<LiveFlow>,
}

impl LiveFlows {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Enters a flow, unless the pod has `most` already.
    pub(super) fn enter(
        self: &Arc<Self>,
        pod: &WorkloadId,
        port: u16,
        client: Client<'_>,
        most: usize,
    ) -> Option<LiveEntry> {
        let flow = Arc::new(LiveFlow {
            port,
            client: client.address,
            identity: client.identity.cloned(),
            requests_only: AtomicBool::new(false),
            is_http: AtomicBool::new(false),
            revoked: OnceLock::new(),
            ended: Notify::new(),
        });
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let mut pods = self.pods();
        if pods.get(pod).map_or(0, HashMap::len) >= most {
            return None;
        }
        let flows = pods.entry(pod.clone()).or_default();
        flows.insert(number, Arc::clone(&flow));
        Some(LiveEntry {
            all: Arc::clone(self),
            pod: pod.clone(),
            number,
            flow,
        })
    }

    /// Decides anew about every flow, and ends those that are denied.
    fn recheck(&self, store: &Store) {
        let all: Vec<(WorkloadId, Arc<LiveFlow>)> = {
            let pods = self.pods();
            let each = |(pod, flows): (&WorkloadId, &HashMap<_, Arc<LiveFlow>>)| {
                flows
                    .values()
                    .map(|flow| (pod.clone(), Arc::clone(flow)))
                    .collect::<Vec<_>>()
            };
            pods.iter().flat_map(each).collect()
        };
        self.requests.recheck(store);
        for (pod, flow) in all {
            let client = Client {
                address: flow.client,
                identity: flow.identity.as_ref(),
            };
            let verdict = store.authorize(&pod, flow.port, client);
            // What a flow carries that nobody asked about must be allowed whatever it is.
            let holds = match flow.requests_only.load(Ordering::Acquire) {
                true => verdict.admits_requests(),
                false => verdict.is_allowed(),
            };
            let revoked = if !holds {
                Revoked::Denied(verdict)
            } else if !flow.is_http.load(Ordering::Acquire)
                && http::takes_nothing_else(store.inbound_protocol(&pod, flow.port))
            {
                Revoked::NotHttp
            } else {
                continue;
            };
            // It may have been before, and be about to end.
            let _ = flow.revoked.set(revoked);
            flow.ended.notify_waiters();
        }
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<WorkloadId, HashMap<u64, Arc<LiveFlow>>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LiveEntry {
    /// It was let in for requests, each of which is asked about.
    pub(super) fn requests_only(&self) {
        self.flow.requests_only.store(true, Ordering::Release);
    }

    /// Nothing but HTTP passes.
    pub(super) fn is_http(&self) {
        self.flow.is_http.store(true, Ordering::Release);
    }

    /// Ends when policy no longer allows the flow, with what it says instead.
    pub(super) async fn revoked(&self) -> FlowError {
        loop {
            // Counts as waiting from here on: what is said after looking wakes it.
            let ended = self.flow.ended.notified();
            match self.flow.revoked.get() {
                Some(Revoked::Denied(verdict)) => return FlowError::PolicyChanged(verdict.clone()),
                Some(Revoked::NotHttp) => return FlowError::NotHttp,
                None => ended.await,
            }
        }
    }
}

impl Drop for LiveEntry {
    fn drop(&mut self) {
        let mut pods = self.all.pods();
        if let Some(flows) = pods.get_mut(&self.pod) {
            flows.remove(&self.number);
            if flows.is_empty() {
                pods.remove(&self.pod);
            }
        }
    }
}

/// Watches for changes of policy until the flows' registry is gone.
pub(super) async fn end_flows_no_longer_allowed(
    live: Weak<LiveFlows>,
    store: Arc<Store>,
    pods: Arc<Pods>,
) {
    let mut changes = store.changes();
    let mut seen = changes.borrow_and_update().policies;
    while changes.changed().await.is_ok() {
        let current = changes.borrow_and_update().policies;
        if current == seen {
            continue;
        }
        seen = current;
        let Some(live) = live.upgrade() else { return };
        live.recheck(&store);
        let_out::tell(&pods, &store);
    }
}

#[cfg(test)]
mod tests {
    use weft_core::{
        AccessPolicy, ClusterSettings, PolicyGroup, ProxyProtocol, Server, ServerBinding,
        ServerName, WorkloadPolicy,
    };
    use weft_proto::Resource;

    use super::*;

    const POD: &str = "shop/web-0";

    fn pod() -> WorkloadId {
        POD.parse().expect("valid")
    }

    fn client<'a>() -> Client<'a> {
        Client {
            address: "10.1.2.3".parse().expect("valid"),
            identity: None,
        }
    }

    fn store(default: AccessPolicy) -> Arc<Store> {
        let store = Store::new();
        let cluster = ClusterSettings {
            trust_domain: "cluster.local".parse().expect("valid"),
            pod_ranges: vec![],
            service_ranges: vec![],
            force_tunnels: false,
        };
        store.apply(vec![Resource::Cluster(cluster)], vec![]);
        change(&store, default);
        store
    }

    fn change(store: &Store, default: AccessPolicy) {
        let policy = WorkloadPolicy {
            workload: pod(),
            default,
            servers: vec![],
            network: None,
            network_egress: None,
        };
        store.apply(vec![Resource::WorkloadPolicy(policy)], vec![]);
    }

    #[tokio::test]
    async fn a_change_of_policy_ends_what_it_no_longer_allows() {
        let store = store(AccessPolicy::AllUnauthenticated);
        let live = LiveFlows::new();
        tokio::spawn(end_flows_no_longer_allowed(
            Arc::downgrade(&live),
            Arc::clone(&store),
            Arc::default(),
        ));
        let who = "spiffe://cluster.local/ns/shop/sa/curl"
            .parse()
            .expect("valid");
        let known = Client {
            identity: Some(&who),
            ..client()
        };
        let known = live.enter(&pod(), 80, known, 10).expect("there is room");
        let unknown = live.enter(&pod(), 80, client(), 10).expect("there is room");
        tokio::task::yield_now().await;
        change(&store, AccessPolicy::AllAuthenticated);
        let soon = std::time::Duration::from_secs(10);
        let verdict = tokio::time::timeout(soon, unknown.revoked()).await;
        let ended = verdict.expect("ends");
        assert!(
            matches!(&ended, FlowError::PolicyChanged(verdict) if !verdict.is_allowed()),
            "{ended:?}"
        );
        assert!(known.flow.revoked.get().is_none());
        change(&store, AccessPolicy::Deny);
        let verdict = tokio::time::timeout(soon, known.revoked()).await;
        let ended = verdict.expect("ends");
        assert!(
            matches!(&ended, FlowError::PolicyChanged(verdict) if verdict.by() == "default:deny"),
            "{ended:?}"
        );
    }

    /// What nobody looks at must not go on where nothing but HTTP may pass now.
    #[tokio::test]
    async fn a_declaration_ends_what_passes_unseen() {
        let store = store(AccessPolicy::AllUnauthenticated);
        let live = LiveFlows::new();
        let seen = live.enter(&pod(), 80, client(), 10).expect("there is room");
        let unseen = live.enter(&pod(), 80, client(), 10).expect("there is room");
        let other = live.enter(&pod(), 81, client(), 10).expect("there is room");
        seen.is_http();
        let name = ServerName {
            group: PolicyGroup::Weft,
            name: "shop/web".parse().expect("valid"),
        };
        let policy = WorkloadPolicy {
            workload: pod(),
            default: AccessPolicy::AllUnauthenticated,
            servers: vec![ServerBinding {
                port: 80,
                server: name.clone(),
            }],
            network: None,
            network_egress: None,
        };
        let server = Server {
            name,
            access_policy: AccessPolicy::AllUnauthenticated,
            proxy_protocol: ProxyProtocol::Http1,
            authorizations: vec![],
            routes: None,
            rate_limit: None,
        };
        store.apply(
            vec![Resource::WorkloadPolicy(policy), Resource::Server(server)],
            vec![],
        );
        live.recheck(&store);
        let ended = unseen.revoked().await;
        assert!(matches!(ended, FlowError::NotHttp), "{ended:?}");
        assert!(seen.flow.revoked.get().is_none());
        assert!(other.flow.revoked.get().is_none());
    }

    #[test]
    fn a_pod_has_so_many_flows_and_no_more() {
        let live = LiveFlows::new();
        let first = live.enter(&pod(), 80, client(), 2);
        let second = live.enter(&pod(), 80, client(), 2);
        assert!(first.is_some() && second.is_some());
        assert!(live.enter(&pod(), 80, client(), 2).is_none());
        let other = "shop/web-1".parse().expect("valid");
        assert!(live.enter(&other, 80, client(), 2).is_some());
        drop(first);
        let third = live.enter(&pod(), 80, client(), 2);
        assert!(third.is_some());
        drop((second, third));
        assert!(live.pods().is_empty(), "nothing is left");
        assert!(live.enter(&pod(), 80, client(), 0).is_none());
        assert!(live.pods().is_empty(), "not even of a refusal");
    }
}
