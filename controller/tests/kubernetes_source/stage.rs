//! An API server, the source that reads it, and the index that it feeds.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use weft_apiserver::{Behaviour, Options, Server, Store, slices};
use weft_controller::index::{Index, Settings};
use weft_controller::objects::decode;
use weft_controller::problems::Problems;
use weft_controller::source::Source;
use weft_controller::source::directory::Directory;
use weft_controller::source::kubernetes::{Connection, Kubernetes, Pace};
use weft_controller::views::Views;
use weft_proto::{Key, Resource};

use crate::balancer::Balancer;

/// In more of a hurry than with clusters.
pub(crate) const PACE: Pace = Pace {
    look: Duration::from_millis(50),
    removed: Duration::from_millis(400),
    settle: Duration::from_millis(5),
    shortest_pause: Duration::from_millis(10),
    longest_pause: Duration::from_millis(100),
    longest_asked_pause: Duration::from_secs(60),
    page: 2,
    anew: Duration::from_secs(3600),
    outage: Duration::from_secs(1),
    silence: Duration::from_secs(1)..Duration::from_secs(3600),
    between_lists: Duration::from_millis(50),
    watch_seconds: 2,
};

/// Nothing here may take longer, on a machine that has much else to do.
const DEADLINE: Duration = Duration::from_secs(60);

/// A store that is served, and what the source makes of it.
pub(crate) struct Stage {
    pub(crate) store: Arc<Store>,
    /// None while it is down.
    pub(crate) server: Option<Server>,
    pub(crate) controller: Fed,
    address: SocketAddr,
}

/// An index that a source feeds.
pub(crate) struct Fed {
    views: Arc<Views>,
    problems: Problems,
    stop: CancellationToken,
}

/// What the agents of two nodes are told.
pub(crate) type World = BTreeMap<(&'static str, Key), Resource>;

impl Stage {
    /// The store of a mesh with these objects, served, and read from the beginning.
    pub(crate) async fn of(manifests: &str) -> Self {
        Self::with(stored(manifests), |_| {}).await
    }

    /// A store, served by a server that behaves from the beginning as it is told to.
    pub(crate) async fn with(store: Arc<Store>, behave: impl FnOnce(&mut Behaviour)) -> Self {
        Self::made(store, behave, PACE).await
    }

    /// A store, read at a pace.
    pub(crate) async fn at_pace(store: Arc<Store>, pace: Pace) -> Self {
        Self::made(store, |_| {}, pace).await
    }

    /// The same, read at a pace.
    pub(crate) async fn made(
        store: Arc<Store>,
        behave: impl FnOnce(&mut Behaviour),
        pace: Pace,
    ) -> Self {
        let server = Self::served(&store).await;
        server.behave(behave);
        let kubeconfig = server.kubeconfig();
        Self::read(store, server, &kubeconfig, pace).await
    }

    /// A store that is read through a load balancer.
    pub(crate) async fn behind_balancer(store: Arc<Store>, pace: Pace) -> (Self, Balancer) {
        let server = Self::served(&store).await;
        let balancer = Balancer::before(server.address()).await;
        let at = |it: SocketAddr| format!("http://{it}");
        let kubeconfig = server.kubeconfig();
        let kubeconfig = kubeconfig.replace(&at(server.address()), &at(balancer.address()));
        (Self::read(store, server, &kubeconfig, pace).await, balancer)
    }

    async fn served(store: &Arc<Store>) -> Server {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::start(store.clone(), any, Options::default()).await;
        server.expect("started")
    }

    async fn read(store: Arc<Store>, server: Server, kubeconfig: &str, pace: Pace) -> Self {
        let folder = tempfile::tempdir().expect("made");
        let file = folder.path().join("kubeconfig");
        std::fs::write(&file, kubeconfig).expect("written");
        let controller = Fed::at_pace(&file, true, pace).await;
        Self {
            store,
            address: server.address(),
            server: Some(server),
            controller,
        }
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().expect("it is up")
    }

    /// Ends the server, with all its connections.
    pub(crate) async fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop().await;
        }
    }

    /// Another store takes the place of the one that is served.
    pub(crate) async fn replace(&mut self, store: Arc<Store>) {
        self.stop().await;
        self.store = store;
        self.start().await;
    }

    /// Starts it again where it was.
    pub(crate) async fn start(&mut self) {
        let store = self.store.clone();
        let server = Server::start(store, self.address, Options::default()).await;
        self.server = Some(server.expect("started"));
    }

    pub(crate) fn apply(&self, manifests: &str) {
        apply(&self.store, manifests);
    }

    pub(crate) fn delete(&self, manifests: &str) {
        for document in decode::documents(manifests).expect("YAML") {
            self.store.delete(&document).expect("it was there");
        }
        slices::reconcile(&self.store).expect("reconciled");
    }

    /// What a controller is told that reads the same objects from a directory.
    pub(crate) async fn as_directory(&self) -> World {
        let folder = tempfile::tempdir().expect("made");
        for (number, object) in self.store.objects().iter().enumerate() {
            let file = folder.path().join(format!("{number}.json"));
            std::fs::write(file, object.to_string()).expect("written");
        }
        let fed = Fed::by_directory(folder.path(), true);
        fed.wait_complete().await;
        fed.world()
    }

    /// Waits until agents are told what a directory of the same objects says.
    pub(crate) async fn wait_same(&self, when: &str) {
        let expected = self.as_directory().await;
        wait_for(when, || {
            let now = self.controller.world();
            (now == expected)
                .then_some(())
                .ok_or_else(|| difference(&now, &expected))
        })
        .await;
    }
}

impl Fed {
    /// One fed by the API server of a kubeconfig.
    pub(crate) async fn by_kubeconfig(file: &Path) -> Self {
        Self::by_cluster(file, true).await
    }

    /// The same, said whether annotations say where network namespaces are.
    pub(crate) async fn by_cluster(file: &Path, believe_netns: bool) -> Self {
        Self::at_pace(file, believe_netns, PACE).await
    }

    /// The same, at a pace.
    pub(crate) async fn at_pace(file: &Path, believe_netns: bool, pace: Pace) -> Self {
        let connection = Connection {
            kubeconfig: Some(file.to_owned()),
            context: None,
        };
        let client = connection.client().await.expect("a client");
        let problems = Problems::default();
        let source = Kubernetes::new(client, believe_netns, problems.clone()).with_pace(pace);
        Self::by(source, problems, true)
    }

    /// One fed by a directory.
    pub(crate) fn by_directory(folder: &Path, slices_only: bool) -> Self {
        let problems = Problems::default();
        let source = Directory::new(folder.to_owned(), problems.clone());
        Self::by(source, problems, slices_only)
    }

    fn by(source: impl Source, problems: Problems, slices_only: bool) -> Self {
        let settings = Settings {
            service_ranges: ["10.2.0.0/16", "fd02::/112"]
                .map(|it| it.parse().expect("valid"))
                .into(),
            slices_only,
            ..Settings::default()
        };
        let views = Arc::new(Views::default());
        let stop = CancellationToken::new();
        let (sender, mut batches) = mpsc::channel(1);
        tokio::spawn(source.run(sender, stop.clone()));
        let mut index = Index::new(settings, views.clone(), problems.clone());
        let told = views.clone();
        tokio::spawn(async move {
            while let Some(batch) = batches.recv().await {
                index.apply(batch);
                told.set_complete();
            }
        });
        Self {
            views,
            problems,
            stop,
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.views.is_complete()
    }

    pub(crate) async fn wait_complete(&self) {
        wait_for("the first batch", || match self.is_complete() {
            true => Ok(()),
            false => Err(format!("not complete: {:?}", self.problems())),
        })
        .await;
    }

    /// Waits for something that agents are told.
    pub(crate) async fn wait_told(&self, what: &str, is_so: impl Fn(&World) -> bool) {
        wait_for(what, || {
            let world = self.world();
            is_so(&world).then_some(()).ok_or_else(|| names(&world))
        })
        .await;
    }

    /// Waits until a problem's text contains this.
    pub(crate) async fn wait_problem(&self, text: &str) {
        wait_for(text, || {
            let problems = self.problems();
            let found = problems.iter().any(|it| it.contains(text));
            found.then_some(()).ok_or_else(|| format!("{problems:?}"))
        })
        .await;
    }

    /// Waits until there is no problem.
    pub(crate) async fn wait_no_problem(&self) {
        wait_for("no problem", || {
            let problems = self.problems();
            let none = problems.is_empty();
            none.then_some(()).ok_or_else(|| format!("{problems:?}"))
        })
        .await;
    }

    /// Waits until the API server is no problem, whatever its objects are.
    pub(crate) async fn wait_reached(&self) {
        wait_for("no problem of the API server", || {
            let mut problems = self.problems.list();
            problems.retain(|it| it.object.is_none() && it.file.as_deref() == Some("kubernetes"));
            let none = problems.is_empty();
            none.then_some(()).ok_or_else(|| format!("{problems:?}"))
        })
        .await;
    }

    /// Problems as `object field: reason`.
    pub(crate) fn problems(&self) -> Vec<String> {
        let problems = self.problems.list().into_iter();
        let shown = problems.map(|it| {
            let object = it.object.unwrap_or_default();
            format!("{object} {}: {}", it.field, it.reason)
        });
        shown.collect()
    }

    /// Whether the agent of a node may have certificates for a service account.
    pub(crate) fn may_sign(&self, node: &str, account: &str) -> bool {
        let (node, account) = (node.parse(), account.parse());
        let (node, account) = (node.expect("valid"), account.expect("valid"));
        self.views.runs(&node, &account)
    }

    pub(crate) fn world(&self) -> World {
        let mut world = World::new();
        for node in ["one", "two"] {
            let name = node.parse().expect("valid");
            for resource in self.views.beyond(&name, HashMap::new()).changed {
                let resource = resource.message().expect("encoded");
                let resource = Resource::try_from(resource).expect("agents accept it");
                world.insert((node, resource.key()), resource);
            }
        }
        world
    }
}

impl Drop for Fed {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A mesh's store with these objects, and the slices that follow from them.
pub(crate) fn stored(manifests: &str) -> Arc<Store> {
    let store = Store::of_mesh();
    apply(&store, manifests);
    store
}

pub(crate) fn apply(store: &Store, manifests: &str) {
    for document in decode::documents(manifests).expect("YAML") {
        store.apply(&document).expect("of a kind that is served");
    }
    slices::reconcile(store).expect("reconciled");
}

/// Whether a resource of this name is told.
pub(crate) fn has(world: &World, name: &str) -> bool {
    world.keys().any(|(_, key)| key.name == name)
}

/// Waits until there is no error.
pub(crate) async fn wait_for(what: &str, check: impl Fn() -> Result<(), String>) {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        match check() {
            Ok(()) => return,
            Err(state) if tokio::time::Instant::now() > deadline => {
                panic!("waiting for {what}: {state}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

fn names(world: &World) -> String {
    let names = world.keys().map(|(node, key)| format!("{node} {key:?}"));
    names.collect::<Vec<_>>().join("\n")
}

fn difference(now: &World, expected: &World) -> String {
    let mut lines = vec![];
    for (key, resource) in expected {
        if now.get(key) != Some(resource) {
            lines.push(format!("{:?} instead of {resource:?}", now.get(key)));
        }
    }
    for key in now.keys().filter(|it| !expected.contains_key(it)) {
        lines.push(format!("{key:?} should not be there"));
    }
    lines.join("\n")
}

/// A pod of the namespace `shop`.
pub(crate) fn pod(name: &str, node: &str, address: &str, label: &str) -> Value {
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": label}},
        "spec": {"nodeName": node, "serviceAccountName": name,
            "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

/// A namespace, two nodes, a Service and its pods, and a policy for them.
pub(crate) const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {weft.dev/mesh: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: one, labels: {topology.kubernetes.io/zone: a}}
spec: {podCIDRs: [10.1.1.0/24, 'fd01:1::/64']}
---
apiVersion: v1
kind: Node
metadata: {name: two, labels: {topology.kubernetes.io/zone: b}}
spec: {podCIDRs: [10.1.2.0/24, 'fd01:2::/64']}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}, annotations: {weft.dev/netns: /run/netns/web-0}}
spec:
  nodeName: one
  serviceAccountName: web
  containers: [{name: c, ports: [{name: web, containerPort: 8080}], readinessProbe: {httpGet: {port: web}}}]
status:
  phase: Running
  podIPs: [{ip: 10.1.1.10}, {ip: 'fd01:1::10'}]
  conditions: [{type: Ready, status: 'True'}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec:
  nodeName: two
  serviceAccountName: web
  containers: [{name: c, ports: [{name: web, containerPort: 8081}]}]
status: {phase: Running, podIPs: [{ip: 10.1.2.10}], conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIPs: [10.2.0.1, 'fd02::1']
  ipFamilies: [IPv4, IPv6]
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: web}]
---
apiVersion: policy.weft.dev/v1alpha1
kind: Server
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: web}}, port: web, proxyProtocol: HTTP/1}
";
