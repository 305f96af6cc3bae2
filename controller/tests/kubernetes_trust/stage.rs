//! An API server with two nodes and their agents' pods, a controller that reads it, and somebody with a token.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use weft_apiserver::tokens::Token;
use weft_apiserver::{Options, Rights, Server, Store, Tls};
use weft_controller::objects::decode;
use weft_proto::v1::control_client::ControlClient;
use weft_proto::v1::controller_message;
use weft_proto::{Key, Kind, v1};

use crate::served::{self, Served};

/// Nothing here may take longer, on a machine that has much else to do.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

const CLUSTER: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: weft-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {weft.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec: {nodeName: one, serviceAccountName: web, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop}
spec: {nodeName: two, serviceAccountName: cart, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: job, namespace: shop}
spec: {nodeName: one, serviceAccountName: job, containers: [{name: c}]}
status: {phase: Succeeded}
";

/// All of it.
pub(crate) struct Stage {
    pub(crate) store: Arc<Store>,
    /// None while it is down.
    pub(crate) server: Option<Server>,
    api_address: SocketAddr,
    options: Options,
    pub(crate) folder: TempDir,
    controller: Running,
}

/// A controller that reads it.
pub(crate) struct Running {
    store: Arc<Store>,
    served: Served,
}

impl Stage {
    /// With a controller that is ready.
    pub(crate) async fn start() -> Self {
        let stage = Self::with(Store::of_mesh(), &[]).await;
        stage.until("/ready", "ready\n").await;
        stage
    }

    /// With a controller of these flags, on a store that may hold more.
    pub(crate) async fn with(store: Arc<Store>, further: &[&str]) -> Self {
        for document in decode::documents(CLUSTER).expect("YAML") {
            store.apply(&document).expect("of a kind that is served");
        }
        for (name, node) in [("agent-1", "one"), ("agent-2", "two")] {
            store.apply(&agent_pod(name, node)).expect("applied");
        }
        let options = Options {
            token: Some("token-of-the-controller".to_owned()),
            tls: Some(Tls::new(&["127.0.0.1"]).expect("made")),
            rights: Some(rights()),
            ..Options::default()
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::start(store.clone(), any, options.clone()).await;
        let server = server.expect("started");
        let folder = tempfile::tempdir().expect("made");
        let kubeconfig = folder.path().join("kubeconfig");
        std::fs::write(&kubeconfig, server.kubeconfig()).expect("written");
        let controller = Running::start(&kubeconfig, store.clone(), further).await;
        Self {
            store,
            api_address: server.address(),
            server: Some(server),
            options,
            folder,
            controller,
        }
    }

    /// Starts one more controller.
    pub(crate) async fn another(&self, further: &[&str]) -> Running {
        let kubeconfig = self.folder.path().join("kubeconfig");
        Running::start(&kubeconfig, self.store.clone(), further).await
    }

    /// Starts one more API server of the same objects, and a controller that reads from it.
    pub(crate) async fn beside(&self) -> (Beside, Running) {
        let mut beside = Beside {
            store: self.store.clone(),
            options: self.options.clone(),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            server: None,
        };
        beside.start().await;
        let kubeconfig = self.folder.path().join("beside");
        let server = beside.server.as_ref().expect("started");
        std::fs::write(&kubeconfig, server.kubeconfig()).expect("written");
        let controller = Running::start(&kubeconfig, self.store.clone(), &[]).await;
        (beside, controller)
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().expect("it is up")
    }

    /// Ends the API server, with all its connections.
    pub(crate) async fn stop_server(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop().await;
        }
    }

    /// Starts it again where it was.
    pub(crate) async fn start_server(&mut self) {
        let (store, options) = (self.store.clone(), self.options.clone());
        let server = Server::start(store, self.api_address, options).await;
        self.server = Some(server.expect("started"));
    }

    /// How many tokens were reviewed.
    pub(crate) fn reviews(&self) -> usize {
        let requests = self.server().requests().into_iter();
        requests.filter(|it| it.contains("tokenreviews")).count()
    }
}

/// A further API server of the same objects.
pub(crate) struct Beside {
    store: Arc<Store>,
    options: Options,
    address: SocketAddr,
    server: Option<Server>,
}

impl Beside {
    /// Starts it, where it was if it was there before.
    pub(crate) async fn start(&mut self) {
        let server = Server::start(self.store.clone(), self.address, self.options.clone()).await;
        let server = server.expect("started");
        self.address = server.address();
        self.server = Some(server);
    }

    /// Ends it, with all its connections.
    pub(crate) async fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop().await;
        }
    }
}

impl Deref for Stage {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.controller
    }
}

impl Running {
    async fn start(kubeconfig: &Path, store: Arc<Store>, further: &[&str]) -> Self {
        let kubeconfig = kubeconfig.display().to_string();
        let mut arguments = vec!["--source", "kubernetes", "--namespace", "weft-system"];
        arguments.extend(["--kubeconfig", &kubeconfig]);
        arguments.extend(further);
        Self {
            store,
            served: Served::start(&arguments, DEADLINE).await,
        }
    }

    /// The roots as agents have them mounted.
    pub(crate) async fn roots(&self) -> String {
        let roots = || {
            let map = object(&self.store, "ConfigMap", "weft-identity-roots")?;
            map["data"]["ca.crt"].as_str().map(str::to_owned)
        };
        wait_for("the roots", roots).await
    }

    pub(crate) async fn client(&self) -> ControlClient<Channel> {
        self.served.client(&self.roots().await).await
    }

    /// Opens the stream of a node, and takes the first push.
    pub(crate) async fn subscribe(&self, token: &str, node: &str) -> Result<Agent, Status> {
        let hello = served::hello(node, vec![]);
        let (sender, receiver) = served::subscribe(&mut self.client().await, token, hello).await?;
        let mut agent = Agent {
            sender,
            receiver,
            told: HashMap::new(),
        };
        agent.pushed().await?;
        Ok(agent)
    }

    pub(crate) async fn sign(&self, token: &str, account: &str) -> Result<Vec<Vec<u8>>, Status> {
        sign(&mut self.client().await, token, account).await
    }

    /// The code with which a token is refused for a stream and for a signature; none: it is not.
    pub(crate) async fn refused(&self, token: &str) -> [Option<Code>; 2] {
        let streamed = self.subscribe(token, "one").await;
        let signed = self.sign(token, "web").await;
        [streamed.err(), signed.err()].map(|it| it.map(|it| it.code()))
    }

    /// A counter of the controller's, or another number without a fraction.
    pub(crate) async fn counted(&self, series: &str) -> u64 {
        let text = self.get("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        let number = line.map(|it| it.trim().trim_end_matches(".0"));
        number.map_or(0, |it| it.parse().expect("a number"))
    }
}

impl Deref for Running {
    type Target = Served;

    fn deref(&self) -> &Served {
        &self.served
    }
}

/// What the controller may do, by the manifests.
pub(crate) fn rights() -> Rights {
    Rights::of(&roles(), "weft-system", "weft-controller")
}

/// Accounts, roles and bindings of the manifests.
pub(crate) fn roles() -> Vec<Value> {
    let mut documents = vec![];
    for file in ["base", "components/webhook"] {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../daemonset");
        let text = std::fs::read_to_string(format!("{folder}/{file}/rbac.yaml")).expect("there");
        documents.extend(decode::documents(&text).expect("YAML"));
    }
    documents
}

/// A stream that is open.
#[derive(Debug)]
pub(crate) struct Agent {
    sender: mpsc::Sender<v1::AgentMessage>,
    receiver: Streaming<v1::ControllerMessage>,
    /// Versions of what it was told last.
    told: HashMap<Key, u64>,
}

impl Agent {
    /// Rejects what it was told of this name, in the version that it was told last, or an earlier one.
    pub(crate) async fn rejects(&self, kind: Kind, name: &str, earlier: bool, reason: &str) {
        let key = Key {
            kind,
            name: name.to_owned(),
        };
        let version = self.told[&key];
        let rejection = v1::Rejection {
            version: version.wrapping_add(u64::from(earlier)),
            key: Some(key.into()),
            reason: reason.to_owned(),
        };
        let answer = v1::Answer {
            push: 1,
            rejected: vec![rejection],
        };
        let message = Some(v1::agent_message::Message::Answer(answer));
        let sent = self.sender.send(v1::AgentMessage { message }).await;
        sent.expect("the stream is open");
    }

    /// Takes pushes until it is told of something of this name.
    pub(crate) async fn told_of(&mut self, kind: Kind, name: &str) {
        let is_it = |it: &v1::Resource| {
            let key = it.key.clone().and_then(|it| Key::try_from(it).ok());
            key.is_some_and(|it| it.kind == kind && it.name == name)
        };
        while !self.pushed().await.expect("open").changed.iter().any(is_it) {}
    }

    /// Takes the next push.
    pub(crate) async fn pushed(&mut self) -> Result<v1::Push, Status> {
        let message = timeout(DEADLINE, self.receiver.message()).await;
        let message = message.expect("in time")?;
        let message = message.ok_or_else(|| Status::unavailable("ended"))?;
        match message.message {
            Some(controller_message::Message::Push(push)) => {
                for it in &push.changed {
                    let key = it.key.clone().expect("named");
                    let key = key.try_into().expect("of a kind that is known");
                    self.told.insert(key, it.version);
                }
                Ok(push)
            }
            other => panic!("not a push: {other:?}"),
        }
    }

    /// Waits for the end of the stream.
    pub(crate) async fn ended(mut self) -> Status {
        loop {
            if let Err(status) = self.pushed().await {
                return status;
            }
        }
    }
}

/// Asks for a certificate, with a token.
pub(crate) async fn sign(
    client: &mut ControlClient<Channel>,
    token: &str,
    account: &str,
) -> Result<Vec<Vec<u8>>, Status> {
    served::sign(client, token, ("shop", account)).await
}

/// The pod of an agent; its uid is its name with `uid-` before it.
pub(crate) fn agent_pod(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "weft-system", "uid": format!("uid-{name}")},
        "spec": {"nodeName": node, "serviceAccountName": "weft-agent", "hostNetwork": true,
            "containers": [{"name": "agent"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "192.0.2.1"}]},
    })
}

/// The token of an agent's pod.
pub(crate) fn token_of(name: &str, node: &str) -> Token {
    Token::of_agent(name, &format!("uid-{name}"), node)
}

/// An object of the controller's namespace.
pub(crate) fn object(store: &Store, kind: &str, name: &str) -> Option<Arc<Value>> {
    let mut objects = store.objects().into_iter();
    objects.find(|it| {
        let metadata = &it["metadata"];
        it["kind"] == kind && metadata["name"] == name && metadata["namespace"] == "weft-system"
    })
}

/// Waits until there is something.
pub(crate) async fn wait_for<T>(what: &str, found: impl Fn() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        match found() {
            Some(found) => return found,
            None if tokio::time::Instant::now() > deadline => panic!("waiting for {what}"),
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
