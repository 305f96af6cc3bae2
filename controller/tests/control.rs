//! The whole controller as an agent sees it: a real server, a directory of manifests, a gRPC client.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use weft_core::{Authentication, IdentityMatch, Server};
use weft_proto::v1::control_client::ControlClient;
use weft_proto::v1::{agent_message, controller_message};
use weft_proto::{Key, Kind, Resource, convert, v1};

use served::{Served, with_token};

mod served;

const TOKEN_ONE: &str = "token-of-node-one-0123";
const TOKEN_TWO: &str = "token-of-node-two-0123";

/// Nothing here may take longer.
const DEADLINE: Duration = Duration::from_secs(10);

const PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: production, labels: {weft.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata:
  {name: payment-0, namespace: production, uid: u1, labels: {app: payment},
   annotations: {weft.dev/netns: /run/netns/payment}}
spec: {nodeName: one, serviceAccountName: payment, containers: [{name: c}]}
status: {podIPs: [{ip: 10.1.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: order-0, namespace: production, uid: u2, labels: {app: order}}
spec: {nodeName: two, serviceAccountName: order-service, containers: [{name: c}]}
status: {podIPs: [{ip: 10.1.0.2}]}
---
apiVersion: v1
kind: Service
metadata: {name: payment, namespace: production}
spec: {clusterIP: 10.2.0.1, selector: {app: payment}, ports: [{port: 80, targetPort: 8080}]}
";

/// The pair of the first issue of every mesh: references without a group.
const POLICY: &str = "
apiVersion: policy.linkerd.io/v1beta1
kind: Server
metadata: {name: payment-api, namespace: production}
spec:
  podSelector: {matchLabels: {app: payment}}
  port: 8080
  proxyProtocol: HTTP/2
---
apiVersion: policy.linkerd.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: payment-access, namespace: production}
spec:
  targetRef: {kind: Server, name: payment-api}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: order-service, namespace: production}
";

struct Cluster {
    folder: TempDir,
    served: Served,
}

impl Cluster {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("made");
        fs::create_dir(folder.path().join("source")).expect("made");
        fs::write(folder.path().join("source/pods.yaml"), PODS).expect("written");
        fs::write(folder.path().join("source/policy.yaml"), POLICY).expect("written");
        let tokens = format!("one {TOKEN_ONE}\ntwo {TOKEN_TWO}\n");
        fs::write(folder.path().join("tokens"), tokens).expect("written");
        Self::on(folder).await
    }

    /// Starts a controller on a folder that is there.
    async fn on(folder: TempDir) -> Self {
        let path = |name: &str| folder.path().join(name).display().to_string();
        let arguments = [
            "--source",
            &path("source"),
            "--ca",
            &path("ca"),
            "--join-tokens",
            &path("tokens"),
        ];
        let served = Served::start(&arguments, DEADLINE).await;
        assert!(served.webhook.is_none(), "nobody asked for one");
        Self { served, folder }
    }

    async fn stop(mut self) -> TempDir {
        self.served.stop.cancel();
        let serving = self.served.serving.take().expect("it serves");
        let ended = timeout(DEADLINE, serving).await.expect("in time");
        ended.expect("no panic").expect("no error");
        self.folder
    }

    fn source(&self, name: &str) -> PathBuf {
        self.folder.path().join("source").join(name)
    }

    fn roots(&self) -> String {
        fs::read_to_string(self.folder.path().join("ca/ca.crt")).expect("read")
    }

    async fn client(&self) -> ControlClient<Channel> {
        self.served.client(&self.roots()).await
    }

    async fn subscribe(&self, token: &str, hello: v1::Hello) -> Result<Agent, Status> {
        let (sender, receiver) = served::subscribe(&mut self.client().await, token, hello).await?;
        Ok(Agent {
            sender,
            receiver,
            resources: BTreeMap::new(),
            versions: BTreeMap::new(),
            pushes: 0,
        })
    }

    async fn sign(&self, token: &str, account: &str) -> Result<Vec<Vec<u8>>, Status> {
        let account = ("production", account);
        served::sign(&mut self.client().await, token, account).await
    }
}

impl Deref for Cluster {
    type Target = Served;

    fn deref(&self) -> &Served {
        &self.served
    }
}

/// An agent that keeps what it is told.
#[derive(Debug)]
struct Agent {
    sender: mpsc::Sender<v1::AgentMessage>,
    receiver: Streaming<v1::ControllerMessage>,
    resources: BTreeMap<Key, Resource>,
    versions: BTreeMap<Key, u64>,
    pushes: u64,
}

impl Agent {
    async fn message(&mut self) -> Result<controller_message::Message, Status> {
        let message = timeout(DEADLINE, self.receiver.message())
            .await
            .expect("in time");
        let message = message?.ok_or_else(|| Status::unavailable("ended"))?;
        Ok(message.message.expect("not empty"))
    }

    /// Takes in the next push.
    async fn push(&mut self) -> Result<v1::Push, Status> {
        let controller_message::Message::Push(push) = self.message().await? else {
            panic!("not a push");
        };
        self.pushes += 1;
        assert_eq!(push.id, self.pushes);
        for resource in push.changed.clone() {
            let version = resource.version;
            let resource = Resource::try_from(resource).expect("valid");
            self.versions.insert(resource.key(), version);
            self.resources.insert(resource.key(), resource);
        }
        for key in push.removed.clone() {
            let key = Key::try_from(key).expect("valid");
            assert!(self.resources.remove(&key).is_some(), "{key} was not held");
            self.versions.remove(&key);
        }
        Ok(push)
    }

    async fn full(&mut self) {
        while !self.push().await.expect("pushed").complete {}
    }

    fn keys(&self, kind: Kind) -> Vec<&str> {
        let keys = self.resources.keys().filter(|it| it.kind == kind);
        keys.map(|it| it.name.as_str()).collect()
    }

    fn server(&self, name: &str) -> Option<&Server> {
        let key = Key {
            kind: Kind::Server,
            name: name.to_owned(),
        };
        match self.resources.get(&key) {
            Some(Resource::Server(server)) => Some(server),
            _ => None,
        }
    }

    async fn send(&self, message: agent_message::Message) {
        let message = Some(message);
        self.sender
            .send(v1::AgentMessage { message })
            .await
            .expect("open");
    }

    fn held(&self) -> Vec<v1::Held> {
        let held = |(key, version): (&Key, &u64)| v1::Held {
            key: Some(key.clone().into()),
            version: *version,
        };
        self.versions.iter().map(held).collect()
    }
}

fn hello(node: &str, held: Vec<v1::Held>) -> v1::Hello {
    v1::Hello {
        incarnation: 1,
        ..served::hello(node, held)
    }
}

async fn refused(agent: Result<Agent, Status>) -> Code {
    match agent {
        Err(status) => status.code(),
        Ok(mut agent) => agent.message().await.expect_err("refused").code(),
    }
}

const PAYMENT_API: &str = "policy.linkerd.io/production/payment-api";

#[tokio::test]
async fn only_agents_with_their_own_token_are_served() {
    let cluster = Cluster::start().await;
    let wrong = cluster.subscribe("token-of-nobody-at-all", hello("one", vec![]));
    assert_eq!(refused(wrong.await).await, Code::Unauthenticated);
    let foreign = cluster.subscribe(TOKEN_ONE, hello("two", vec![]));
    assert_eq!(refused(foreign.await).await, Code::PermissionDenied);
    let mut other = hello("one", vec![]);
    other.protocol += 1;
    let other = cluster.subscribe(TOKEN_ONE, other);
    assert_eq!(refused(other.await).await, Code::FailedPrecondition);

    let (_sender, receiver) = mpsc::channel(1);
    let request = Request::new(ReceiverStream::new(receiver));
    let without = cluster.client().await.subscribe(request).await;
    assert_eq!(without.expect_err("refused").code(), Code::Unauthenticated);
    let denied = cluster.sign("token-of-nobody-at-all", "payment").await;
    assert_eq!(denied.expect_err("refused").code(), Code::Unauthenticated);

    let metrics = cluster.get("/metrics").await;
    assert!(metrics.contains("weft_controller_refused_total{reason=\"no_token\"} 1"));
    assert!(metrics.contains("weft_controller_refused_total{reason=\"wrong_token\"} 2"));
    cluster.stop().await;
}

#[tokio::test]
async fn agents_get_everything_of_their_node_and_then_changes() {
    let cluster = Cluster::start().await;
    let agent = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let mut agent = agent.await.expect("served");
    agent.full().await;
    assert_eq!(agent.keys(Kind::Cluster), ["cluster"]);
    assert_eq!(agent.keys(Kind::TrustBundle), ["cluster.local"]);
    assert_eq!(
        agent.keys(Kind::Workload),
        ["production/order-0", "production/payment-0"]
    );
    assert_eq!(agent.keys(Kind::NodePod), ["production/payment-0"]);
    assert_eq!(agent.keys(Kind::WorkloadPolicy), ["production/payment-0"]);
    assert_eq!(agent.keys(Kind::Service), ["production/payment"]);
    assert_eq!(agent.keys(Kind::Endpoint), ["production/payment@10.1.0.1"]);
    assert_eq!(agent.keys(Kind::Server), [PAYMENT_API]);
    let server = agent.server(PAYMENT_API).expect("there");
    let order = "spiffe://cluster.local/ns/production/sa/order-service";
    let order = IdentityMatch::Exact(order.parse().expect("valid"));
    assert_eq!(
        server.authorizations[0].required,
        [Authentication::MeshTls(vec![order])]
    );

    // The other node's agent knows nothing of this one's pods but how to reach them.
    let other = cluster.subscribe(TOKEN_TWO, hello("two", vec![]));
    let mut other = other.await.expect("served");
    other.full().await;
    assert_eq!(other.keys(Kind::NodePod), ["production/order-0"]);
    assert_eq!(other.keys(Kind::Server), [""; 0]);

    // One change, one small message.
    let changed = std::time::Instant::now();
    let policy = POLICY.replace("name: order-service", "name: somebody");
    fs::write(cluster.source("policy.yaml"), policy).expect("written");
    let push = agent.push().await.expect("pushed");
    assert!(
        changed.elapsed() < Duration::from_secs(1),
        "{:?}",
        changed.elapsed()
    );
    assert_eq!((push.changed.len(), push.removed.len()), (1, 0));
    let server = agent.server(PAYMENT_API).expect("there");
    assert!(format!("{server:?}").contains("somebody"));

    // A pod that is gone.
    let pods = PODS.replace("name: order-0", "name: order-1");
    fs::write(cluster.source("pods.yaml"), pods).expect("written");
    // First what is new, then, when it was not found for a moment, what is gone.
    for _ in 0..2 {
        agent.push().await.expect("pushed");
        other.push().await.expect("pushed");
    }
    assert_eq!(
        agent.keys(Kind::Workload),
        ["production/order-1", "production/payment-0"]
    );
    assert_eq!(other.keys(Kind::NodePod), ["production/order-1"]);
    cluster.stop().await;
}

#[tokio::test]
async fn a_broken_manifest_changes_nothing() {
    let cluster = Cluster::start().await;
    let agent = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let mut agent = agent.await.expect("served");
    agent.full().await;
    for (policy, problem) in [
        (
            POLICY.replace("port: 8080", "port: 80800"),
            "\"field\": \"spec.port\"",
        ),
        (
            POLICY.replace("kind: Server\n", "kin: Server\n"),
            "\"field\": \"kind\"",
        ),
        (POLICY.replace("spec:", "spec"), "not YAML"),
    ] {
        fs::write(cluster.source("policy.yaml"), policy).expect("written");
        cluster.until("/problems", problem).await;
    }
    fs::write(cluster.source("policy.yaml"), POLICY).expect("written");
    cluster
        .until("/metrics", "weft_controller_problems 0")
        .await;
    // Nothing was sent for any of these; the next push is this deletion.
    fs::remove_file(cluster.source("policy.yaml")).expect("removed");
    let push = agent.push().await.expect("pushed");
    assert_eq!(push.removed.len(), 1);
    assert_eq!(agent.keys(Kind::Server), [""; 0]);
    cluster.stop().await;
}

#[tokio::test]
async fn a_reconnecting_agent_gets_only_the_difference() {
    let cluster = Cluster::start().await;
    let first = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let mut first = first.await.expect("served");
    first.full().await;

    // The same state, from the same controller: nothing to send. The older stream ends.
    let second = cluster.subscribe(TOKEN_ONE, hello("one", first.held()));
    let mut second = second.await.expect("served");
    let push = second.push().await.expect("pushed");
    assert!(push.complete && push.changed.is_empty() && push.removed.is_empty());
    assert_eq!(
        first.message().await.expect_err("ended").code(),
        Code::Aborted
    );

    // While it is away something goes, something comes, and the controller starts anew.
    let folder = cluster.stop().await;
    let pods = PODS.replace("name: order-0", "name: order-1");
    fs::write(folder.path().join("source/pods.yaml"), pods).expect("written");
    let cluster = Cluster::on(folder).await;
    let third = cluster.subscribe(TOKEN_ONE, hello("one", first.held()));
    let mut third = third.await.expect("served");
    third.resources = first.resources;
    let push = third.push().await.expect("pushed");
    assert!(push.complete);
    assert_eq!((push.changed.len(), push.removed.len()), (1, 1));
    assert_eq!(
        third.keys(Kind::Workload),
        ["production/order-1", "production/payment-0"]
    );
    cluster.stop().await;
}

#[tokio::test]
async fn rejections_show_until_they_are_solved() {
    let cluster = Cluster::start().await;
    let agent = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let mut agent = agent.await.expect("served");
    agent.full().await;
    let key = Key {
        kind: Kind::Server,
        name: PAYMENT_API.to_owned(),
    };
    let rejection = v1::Rejection {
        version: agent.versions[&key],
        key: Some(key.into()),
        reason: "it is too strange".to_owned(),
    };
    let answer = v1::Answer {
        push: agent.pushes,
        rejected: vec![rejection],
    };
    agent.send(agent_message::Message::Answer(answer)).await;
    cluster.until("/problems", "it is too strange").await;
    cluster
        .until(
            "/metrics",
            "weft_controller_rejections_total{node=\"one\"} 1",
        )
        .await;
    let policy = POLICY.replace("name: order-service", "name: somebody");
    fs::write(cluster.source("policy.yaml"), policy).expect("written");
    agent.push().await.expect("pushed");
    cluster
        .until("/metrics", "weft_controller_problems 0")
        .await;
    cluster.stop().await;
}

#[tokio::test]
async fn wants_are_answered_after_what_is_known() {
    let cluster = Cluster::start().await;
    let agent = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let mut agent = agent.await.expect("served");
    agent.full().await;
    let address = convert::address_bytes("10.1.0.9".parse().expect("an address"));
    let want = v1::Want {
        address: address.clone(),
    };
    agent.send(agent_message::Message::Want(want)).await;
    let controller_message::Message::Looked(looked) = agent.message().await.expect("answered")
    else {
        panic!("not looked");
    };
    assert_eq!(looked.address, address);
    cluster.stop().await;
}

#[tokio::test]
async fn certificates_are_signed_for_the_workloads_of_the_node_only() {
    let cluster = Cluster::start().await;
    cluster.until("/ready", "200 OK").await;
    let chain = cluster.sign(TOKEN_ONE, "payment").await.expect("signed");
    let (_, leaf) = x509_parser::parse_x509_certificate(&chain[0]).expect("a certificate");
    let names = leaf
        .subject_alternative_name()
        .expect("valid")
        .expect("there");
    assert_eq!(
        names.value.general_names,
        [x509_parser::extensions::GeneralName::URI(
            "spiffe://cluster.local/ns/production/sa/payment"
        )]
    );
    for (token, account, code) in [
        (TOKEN_ONE, "order-service", Code::PermissionDenied),
        (TOKEN_TWO, "payment", Code::PermissionDenied),
        (TOKEN_ONE, "nobody", Code::PermissionDenied),
        (TOKEN_ONE, "Pay/ment", Code::InvalidArgument),
    ] {
        let denied = cluster.sign(token, account).await.expect_err("denied");
        assert_eq!(denied.code(), code, "{account}");
    }

    // Of the pod that leaves the mesh, nothing is signed any more.
    let pods = PODS.replace(
        "labels: {app: payment}",
        "labels: {app: payment, weft.dev/mesh: disabled}",
    );
    fs::write(cluster.source("pods.yaml"), pods).expect("written");
    let unsigned = async {
        while cluster.sign(TOKEN_ONE, "payment").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, unsigned).await.expect("in time");
    let metrics = cluster.get("/metrics").await;
    assert!(metrics.contains("weft_controller_signs_total{result=\"denied\"} 4"));
    cluster.stop().await;
}

#[tokio::test]
async fn a_revoked_token_ends_the_stream() {
    let cluster = Cluster::start().await;
    let agent = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let mut agent = agent.await.expect("served");
    agent.full().await;
    let tokens = format!("two {TOKEN_TWO}\n");
    fs::write(cluster.folder.path().join("tokens"), tokens).expect("written");
    let ended = agent.message().await.expect_err("ended");
    assert_eq!(ended.code(), Code::Unauthenticated);
    let again = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    assert_eq!(refused(again.await).await, Code::Unauthenticated);
    cluster.stop().await;
}

#[tokio::test]
async fn new_roots_reach_agents_without_a_restart() {
    let cluster = Cluster::start().await;
    let agent = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let mut agent = agent.await.expect("served");
    agent.full().await;
    let key = KeyPair::generate().expect("made");
    let mut root = CertificateParams::default();
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    root.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let root = root.self_signed(&key).expect("made").pem();
    let bundle = cluster.roots() + &root;
    fs::write(cluster.folder.path().join("ca/ca.crt"), bundle).expect("written");
    let push = agent.push().await.expect("pushed");
    assert_eq!(push.changed.len(), 1);
    let bundle = agent.resources.values().find_map(|it| match it {
        Resource::TrustBundle(bundle) => Some(bundle),
        _ => None,
    });
    assert_eq!(bundle.expect("there").roots.len(), 2);
    cluster.stop().await;
}

/// The controller that starts anew does not know what a broken file said before: it must not tell
/// agents that policies are gone.
#[tokio::test]
async fn a_controller_waits_for_what_it_never_could_read() {
    let cluster = Cluster::start().await;
    cluster.until("/ready", "200 OK").await;
    let folder = cluster.stop().await;
    let policy = folder.path().join("source/policy.yaml");
    fs::write(&policy, "spec: [").expect("written");
    let cluster = Cluster::on(folder).await;
    cluster.until("/problems", "policy.yaml").await;
    cluster.until("/ready", "503").await;
    let agent = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let mut agent = agent.await.expect("served");
    fs::write(&policy, POLICY).expect("written");
    agent.full().await;
    assert_eq!(agent.keys(Kind::Server), [PAYMENT_API]);
    cluster.stop().await;
}

/// Whoever holds sockets open, before a handshake or after it, keeps no agent away, and does not
/// hold them for long.
#[tokio::test]
async fn idle_strangers_keep_nobody_away() {
    let cluster = Cluster::start().await;
    cluster.until("/ready", "200 OK").await;
    let mut idle = vec![];
    for _ in 0..300 {
        idle.push(
            tokio::net::TcpStream::connect(cluster.address)
                .await
                .expect("accepted"),
        );
    }
    let agent = cluster.subscribe(TOKEN_ONE, hello("one", vec![]));
    let agent = timeout(Duration::from_secs(2), agent).await;
    let mut agent = agent.expect("at once").expect("served");
    agent.full().await;
    for socket in &mut idle {
        let ended = timeout(Duration::from_secs(6), socket.read(&mut [0; 16])).await;
        assert!(matches!(ended.expect("ended"), Ok(0) | Err(_)));
    }
    // The stream is not a stranger's.
    fs::write(cluster.source("policy.yaml"), "# nothing\n").expect("written");
    agent.push().await.expect("still open");
    cluster.stop().await;
}

#[tokio::test]
async fn large_requests_for_signatures_are_refused() {
    let cluster = Cluster::start().await;
    let request = v1::SignRequest {
        csr: vec![0; 1024 * 1024],
        namespace: "production".to_owned(),
        service_account: "payment".to_owned(),
    };
    let request = with_token(request, TOKEN_ONE);
    let refused = cluster.client().await.sign(request).await;
    let refused = refused.expect_err("too large");
    assert_eq!(refused.code(), Code::OutOfRange);
    cluster.stop().await;
}

/// What is said of pods that are being started: to the agent of their node only, and as soon as it is known.
#[tokio::test]
async fn agents_ask_about_pods_that_are_being_started() {
    let cluster = Cluster::start().await;
    let ask = async |token: &str, name: &str, uid: &str| {
        let request = v1::DescribePodRequest {
            name: Some(v1::ObjectName {
                namespace: "production".into(),
                name: name.into(),
            }),
            uid: uid.into(),
        };
        let mut client = cluster.client().await;
        let asked = client.describe_pod(with_token(request, token));
        let answer = timeout(DEADLINE, asked).await.expect("in time");
        answer.map(|it| it.into_inner().standing())
    };
    let meshed = ask(TOKEN_ONE, "payment-0", "u1").await;
    assert_eq!(meshed.expect("answered"), v1::PodStanding::Meshed);
    // Of another node, of an earlier pod, of no pod; all at the same time, as each takes a while.
    let (of_another, earlier, nobody) = tokio::join!(
        ask(TOKEN_TWO, "payment-0", "u1"),
        ask(TOKEN_ONE, "payment-0", "u0"),
        ask(TOKEN_ONE, "nobody", "u1")
    );
    for answer in [of_another, earlier, nobody] {
        assert_eq!(answer.expect("answered"), v1::PodStanding::Unknown);
    }
    for (token, name, code) in [
        ("token-of-nobody-at-all", "payment-0", Code::Unauthenticated),
        (TOKEN_ONE, "../payment", Code::InvalidArgument),
    ] {
        let refused = ask(token, name, "u1").await.expect_err("refused");
        assert_eq!(refused.code(), code);
    }
    // It is answered when it appears.
    let late = "
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: production, uid: u9, labels: {weft.dev/mesh: disabled}}
spec: {nodeName: one, containers: [{name: c}]}
";
    let appears = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        fs::write(cluster.source("late.yaml"), late).expect("written");
    };
    let (answer, ()) = tokio::join!(ask(TOKEN_ONE, "late", "u9"), appears);
    assert_eq!(answer.expect("answered"), v1::PodStanding::NotMeshed);
    cluster.stop().await;
}
