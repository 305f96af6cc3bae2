//! Against a real gRPC server over TLS, whose side of each stream the test plays.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Mutex;

use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Streaming};
use v1::control_server::{Control, ControlServer};
use weft_core::{AccessPolicy, WorkloadId};
use weft_proto::Kind;

use super::super::calls::{CallError, Calls, PodStanding};
use super::super::testing::*;
use super::super::{Connection, ControllerConfig};
use super::*;
use crate::identity::testing::{Authority, WEB, names};
use crate::identity::{ControllerSigner, SignError, Signer};

const TOKEN: &str = "a-good-token";

/// The controller's side of one stream.
struct Session {
    hello: v1::Hello,
    from_agent: Streaming<v1::AgentMessage>,
    to_agent: mpsc::Sender<Result<v1::ControllerMessage, Status>>,
}

struct TestController {
    sessions: mpsc::Sender<Session>,
    authority: Arc<Authority>,
    tokens: Arc<Mutex<Vec<String>>>,
}

type Messages = Pin<Box<dyn futures::Stream<Item = Result<v1::ControllerMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Control for TestController {
    type SubscribeStream = Messages;

    async fn subscribe(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Messages>, Status> {
        self.check(request.metadata())?;
        let mut from_agent = request.into_inner();
        let first = from_agent.message().await?.and_then(|it| it.message);
        let Some(v1::agent_message::Message::Hello(hello)) = first else {
            return Err(Status::invalid_argument("no Hello"));
        };
        let (to_agent, receiver) = mpsc::channel(16);
        let session = Session {
            hello,
            from_agent,
            to_agent,
        };
        let _ = self.sessions.send(session).await;
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type TapStream = ReceiverStream<Result<v1::TapCommand, Status>>;

    async fn tap(
        &self,
        _: Request<Streaming<v1::TapMessage>>,
    ) -> Result<Response<Self::TapStream>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    type InspectStream = ReceiverStream<Result<v1::InspectQuestion, Status>>;

    /// As of a controller from before there was such a call.
    async fn inspect(
        &self,
        _: Request<Streaming<v1::InspectAnswer>>,
    ) -> Result<Response<Self::InspectStream>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn sign(
        &self,
        request: Request<v1::SignRequest>,
    ) -> Result<Response<v1::SignResponse>, Status> {
        self.check(request.metadata())?;
        let request = request.into_inner();
        if request.service_account != "web" {
            return Err(Status::permission_denied("no such workload on this node"));
        }
        let chain = self.authority.sign(&request.csr, WEB, |_| {});
        let chain = chain.into_iter().map(|it| it.to_vec()).collect();
        Ok(Response::new(v1::SignResponse { chain }))
    }

    /// Pods named `web` take part, others do not, and nobody has heard of those without a UID.
    async fn describe_pod(
        &self,
        request: Request<v1::DescribePodRequest>,
    ) -> Result<Response<v1::DescribePodResponse>, Status> {
        self.check(request.metadata())?;
        let request = request.into_inner();
        let name = request.name.unwrap_or_default();
        let standing = match (name.name.as_str(), request.uid.as_str()) {
            (_, "") => v1::PodStanding::Unknown,
            ("web", _) => v1::PodStanding::Meshed,
            _ => v1::PodStanding::NotMeshed,
        };
        let standing = standing.into();
        Ok(Response::new(v1::DescribePodResponse { standing }))
    }
}

impl TestController {
    fn check(&self, metadata: &tonic::metadata::MetadataMap) -> Result<(), Status> {
        let value = metadata
            .get("authorization")
            .and_then(|it| it.to_str().ok());
        let value = value.unwrap_or_default().to_owned();
        self.tokens.lock().unwrap().push(value.clone());
        if value == format!("Bearer {TOKEN}") {
            Ok(())
        } else {
            Err(Status::unauthenticated("unknown token"))
        }
    }
}

impl Session {
    async fn push(&mut self, push: v1::Push) -> v1::Answer {
        let id = push.id;
        self.send(v1::controller_message::Message::Push(push)).await;
        let v1::agent_message::Message::Answer(answer) = self.receive().await else {
            panic!("no answer");
        };
        assert_eq!(answer.push, id);
        answer
    }

    async fn send(&self, message: v1::controller_message::Message) {
        let message = v1::ControllerMessage {
            message: Some(message),
        };
        self.to_agent.send(Ok(message)).await.expect("open");
    }

    async fn receive(&mut self) -> v1::agent_message::Message {
        let message = timeout(Duration::from_secs(10), self.from_agent.message()).await;
        let message = message.expect("in time").expect("open").expect("open");
        message.message.expect("not empty")
    }
}

fn push(id: u64, resources: Vec<Resource>, complete: bool) -> v1::Push {
    v1::Push {
        id,
        changed: resources.into_iter().map(Into::into).collect(),
        removed: vec![],
        complete,
        position: HashMap::from([("Pod".to_owned(), id)]),
    }
}

fn removal(id: u64, kind: Kind, name: &str) -> v1::Push {
    let name = name.to_owned();
    v1::Push {
        id,
        removed: vec![Key { kind, name }.into()],
        ..v1::Push::default()
    }
}

struct World {
    directory: tempfile::TempDir,
    authority: Arc<Authority>,
    tokens: Arc<Mutex<Vec<String>>>,
    address: SocketAddr,
    sessions: mpsc::Receiver<Session>,
    server: CancellationToken,
    agent: CancellationToken,
    controller: Arc<Controller>,
    store: Arc<Store>,
    discovery: Discovery,
}

impl Drop for World {
    fn drop(&mut self) {
        self.agent.cancel();
        self.server.cancel();
    }
}

impl World {
    async fn new() -> Self {
        Self::beside(Arc::new(Authority::new()), &[]).await
    }

    /// With further controllers.
    async fn beside(authority: Arc<Authority>, others: &[SocketAddr]) -> Self {
        let tokens = Arc::default();
        let (address, sessions, server) =
            serve("127.0.0.1:0".parse().expect("valid"), &authority, &tokens).await;
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str, content: &str| -> PathBuf {
            let path = directory.path().join(name);
            std::fs::write(&path, content).expect("writes");
            path
        };
        let config = ControllerConfig {
            urls: [address]
                .iter()
                .chain(others)
                .map(|it| format!("https://{it}"))
                .collect(),
            name: "weft-controller".to_owned(),
            trust_bundle: file("bundle", &authority.pem()),
            join_token: file("token", &format!("{TOKEN}\n")),
        };
        let controller = Arc::new(Controller::new(config).expect("good"));
        let store = Store::new();
        let node = "node-a".parse().expect("valid");
        let (stream, discovery) =
            ControlStream::new(Arc::clone(&controller), Arc::clone(&store), node);
        // That nobody asks does not matter.
        let stream = stream.answering(Arc::new(|_, _| None));
        let agent = CancellationToken::new();
        tokio::spawn(stream.run(agent.clone()));
        Self {
            directory,
            authority,
            tokens,
            address,
            sessions,
            server,
            agent,
            controller,
            store,
            discovery,
        }
    }

    async fn session(&mut self) -> Session {
        let session = timeout(Duration::from_secs(20), self.sessions.recv()).await;
        session.expect("in time").expect("served")
    }

    async fn until(&self, what: &str, holds: impl Fn(&StreamState) -> bool) {
        let mut changes = self.discovery.state_changes();
        let held = timeout(Duration::from_secs(20), changes.wait_for(holds)).await;
        let _held = held.expect(what).expect("runs");
    }

    fn knows(&self, id: &str) -> bool {
        let id: WorkloadId = id.parse().expect("valid");
        self.store.workload(&id).is_some()
    }
}

async fn serve(
    address: SocketAddr,
    authority: &Arc<Authority>,
    tokens: &Arc<Mutex<Vec<String>>>,
) -> (SocketAddr, mpsc::Receiver<Session>, CancellationToken) {
    let leaf = authority.leaf_with(|params| {
        params.subject_alt_names = names(&[], &["weft-controller"]);
    });
    let identity = Identity::from_pem(&leaf.pem, leaf.key.serialize_pem());
    // A server that was cancelled lets go of its port a moment later.
    let bound = async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(_) => sleep(Duration::from_millis(10)).await,
            }
        }
    };
    let listener = timeout(Duration::from_secs(10), bound)
        .await
        .expect("binds");
    let address = listener.local_addr().expect("bound");
    let (sessions, receiver) = mpsc::channel(16);
    let controller = TestController {
        sessions,
        authority: Arc::clone(authority),
        tokens: Arc::clone(tokens),
    };
    let stop = CancellationToken::new();
    let serving = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))
        .expect("good")
        .add_service(ControlServer::new(controller))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let stopped = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = serving => {}
            () = stopped.cancelled() => {}
        }
    });
    (address, receiver, stop)
}

#[tokio::test]
async fn state_arrives_and_is_complete_when_the_controller_says_so() {
    let mut world = World::new().await;
    let mut session = world.session().await;
    assert_eq!(session.hello.node, "node-a");
    assert_eq!(session.hello.protocol, PROTOCOL_VERSION);
    assert!(session.hello.held.is_empty());
    let first = vec![cluster(), workload("shop/a", &["10.1.0.1"])];
    assert!(
        session
            .push(push(1, first, false))
            .await
            .rejected
            .is_empty()
    );
    assert!(world.knows("shop/a"));
    assert!(!world.store.is_complete());
    assert_eq!(world.discovery.state().knowledge_age(), None);
    session.push(push(2, vec![], true)).await;
    assert!(world.store.is_complete());
    let state = world.discovery.state();
    assert!(state.connected && state.complete && state.current);
    assert_eq!(state.knowledge_age(), Some(Duration::ZERO));
    assert_eq!((state.pushes, state.rejections), (2, 0));
    session.push(removal(3, Kind::Workload, "shop/a")).await;
    assert!(!world.knows("shop/a"));
}

#[tokio::test]
async fn a_new_stream_resumes_where_the_old_one_ended() {
    let mut world = World::new().await;
    let mut session = world.session().await;
    let kept = workload("shop/kept", &["10.1.0.1"]);
    let gone = workload("shop/gone", &["10.1.0.2"]);
    let version = v1::Resource::from(kept.clone()).version;
    session
        .push(push(1, vec![cluster(), kept, gone], true))
        .await;
    session.push(removal(2, Kind::Workload, "shop/gone")).await;
    drop(session);
    world.server.cancel();
    world.until("away", |state| !state.connected).await;
    assert!(world.knows("shop/kept") && world.store.is_complete());
    let age = world.discovery.state().knowledge_age();
    assert!(age.is_some_and(|it| it > Duration::ZERO), "{age:?}");
    let address = world.address;
    let served = serve(address, &world.authority, &world.tokens).await;
    (_, world.sessions, world.server) = served;
    let mut session = world.session().await;
    let mut held: Vec<(String, u64)> = session
        .hello
        .held
        .iter()
        .map(|it| (it.key.clone().expect("has one").name, it.version))
        .collect();
    held.sort();
    assert_eq!(held.len(), 2);
    assert_eq!(held[1], ("shop/kept".to_owned(), version));
    assert_eq!(held[0].0, "cluster");
    // Connected is not current yet.
    assert!(world.discovery.state().knowledge_age() > Some(Duration::ZERO));
    session.push(push(1, vec![], true)).await;
    assert_eq!(
        world.discovery.state().knowledge_age(),
        Some(Duration::ZERO)
    );
    assert_eq!(world.discovery.state().connects, 2);
}

/// Two controllers: the stream goes from the one that ends it to the other, and back again, without a pause.
#[tokio::test]
async fn another_controller_is_gone_to_at_once() {
    let authority = Arc::new(Authority::new());
    let tokens = Arc::default();
    let any = "127.0.0.1:0".parse().expect("valid");
    let (address, mut others, other) = serve(any, &authority, &tokens).await;
    let mut world = World::beside(authority, &[address]).await;
    let first = timeout(Duration::from_secs(20), async {
        tokio::select! {
            session = world.sessions.recv() => (session, true),
            session = others.recv() => (session, false),
        }
    });
    let (session, mut at_world) = first.await.expect("in time");
    let mut session = session.expect("served");
    let kept = workload("shop/kept", &["10.1.0.1"]);
    session.push(push(1, vec![cluster(), kept], true)).await;
    for round in 1..4 {
        drop(session);
        at_world = !at_world;
        let sessions = match at_world {
            true => &mut world.sessions,
            false => &mut others,
        };
        let next = timeout(Duration::from_secs(20), sessions.recv()).await;
        session = next.expect("in time").expect("served");
        assert_eq!(session.hello.held.len(), 2, "what it has it keeps");
        session.push(push(1, vec![], true)).await;
        let state = world.discovery.state();
        let at = if at_world { world.address } else { address };
        assert_eq!(state.controller, Some(at));
        assert_eq!((state.connects, state.failures), (round + 1, round));
        // The first time neither had failed. Then one had, and the other had just been left: that is a round.
        if round == 1 {
            assert_eq!(state.retry_delay, Duration::ZERO);
        }
        assert!(world.knows("shop/kept"));
    }
    other.cancel();
}

/// Of what it holds a part may be of a controller that has come further than the next one.
#[tokio::test]
async fn how_far_it_has_come_is_shown_to_the_next_controller() {
    let mut world = World::new().await;
    for (shown, told, complete) in [
        (None, 7, true),
        (Some(7), 8, false),
        (Some(8), 5, false),
        (Some(8), 5, true),
        (Some(5), 6, true),
    ] {
        let mut session = world.session().await;
        assert_eq!(session.hello.position.get("Pod").copied(), shown);
        session.push(push(told, vec![cluster()], complete)).await;
    }
}

/// One that says that it is behind has told nothing: it is left for another, and said and counted.
#[tokio::test]
async fn a_controller_that_is_behind_is_left() {
    let authority = Arc::new(Authority::new());
    let any = "127.0.0.1:0".parse().expect("valid");
    let (other, mut others, server) = serve(any, &authority, &Arc::default()).await;
    let mut world = World::beside(authority, &[other]).await;
    let kinds = vec!["Pod".to_owned()];
    let behind = v1::controller_message::Message::Behind(v1::Behind { kinds });
    // Whichever it asks first.
    let (first, second) = tokio::select! {
        session = world.sessions.recv() => (session, &mut others),
        session = others.recv() => (session, &mut world.sessions),
    };
    let first = first.expect("asked");
    first.send(behind).await;
    let second = timeout(Duration::from_secs(20), second.recv()).await;
    let _second = second.expect("in time").expect("asked");
    world
        .until("said", |state| {
            let error = state.last_error.as_deref().unwrap_or_default();
            state.behind == 1
                && error.contains("has not heard of all")
                && error.ends_with("Pod: can it reach the API server?")
        })
        .await;
    server.cancel();
}

/// One that takes the stream and tells nothing is left for another.
#[tokio::test]
async fn a_controller_that_tells_nothing_is_left() {
    let authority = Arc::new(Authority::new());
    let tokens = Arc::default();
    let any = "127.0.0.1:0".parse().expect("valid");
    let (address, mut others, other) = serve(any, &authority, &tokens).await;
    let mut world = World::beside(authority, &[address]).await;
    let both = timeout(Duration::from_secs(60), async {
        let first = world.sessions.recv().await;
        (first, others.recv().await)
    });
    let (first, second) = both.await.expect("in time");
    assert!(first.is_some() && second.is_some());
    let error = world.discovery.state().last_error.unwrap_or_default();
    assert!(error.contains("told nothing"), "{error}");
    other.cancel();
}

#[tokio::test]
async fn what_cannot_be_used_is_rejected_and_the_last_good_one_stays() {
    let mut world = World::new().await;
    let mut session = world.session().await;
    let policy = workload_policy("shop/a", AccessPolicy::Deny);
    session.push(push(1, vec![cluster(), policy], true)).await;
    let mut broken: v1::Resource = workload_policy("shop/a", AccessPolicy::Audit).into();
    if let Some(v1::resource::Body::WorkloadPolicy(policy)) = &mut broken.body {
        policy.default = 99;
    }
    let bundle = Resource::TrustBundle(weft_core::TrustBundle {
        trust_domain: "cluster.local".parse().expect("valid"),
        roots: vec![vec![1, 2, 3]],
    });
    let mut second = push(
        2,
        vec![
            bundle,
            workload("shop/loop", &["127.0.0.1"]),
            workload("shop/b", &["10.1.0.2"]),
        ],
        false,
    );
    second.changed.push(broken);
    second.changed.push(v1::Resource::default());
    let answer = session.push(second).await;
    let rejected: Vec<String> = answer
        .rejected
        .iter()
        .map(|it| it.key.clone().unwrap_or_default().name)
        .collect();
    assert_eq!(rejected, ["cluster.local", "shop/loop", "shop/a", ""]);
    assert!(answer.rejected.iter().all(|it| !it.reason.is_empty()));
    assert!(world.knows("shop/b"));
    assert!(!world.knows("shop/loop"));
    assert!(world.store.trust_bundle().is_none());
    let client = weft_core::Client {
        address: "10.1.0.9".parse().expect("valid"),
        identity: None,
    };
    let verdict = || {
        let id = "shop/a".parse().expect("valid");
        world.store.authorize(&id, 80, client)
    };
    assert!(!verdict().is_allowed());
    let state = world.discovery.state();
    assert_eq!((state.rejections, state.rejected.len()), (4, 4));
    assert!(state.rejected.contains_key("workload policy shop/a"));
    let repaired = workload_policy("shop/a", AccessPolicy::AllUnauthenticated);
    session.push(push(3, vec![repaired], false)).await;
    assert!(verdict().is_allowed());
    assert_eq!(world.discovery.state().rejected.len(), 3);
}

#[tokio::test]
async fn addresses_are_asked_for_also_across_streams() {
    let mut world = World::new().await;
    let mut session = world.session().await;
    session.push(push(1, vec![cluster()], true)).await;
    let ask = |address: &str| {
        let (discovery, address) = (world.discovery.clone(), address.parse().expect("valid"));
        tokio::spawn(async move {
            discovery
                .ask(&"shop/client".parse().expect("valid"), address)
                .await
        })
    };
    let (found, absent) = (ask("10.1.0.7"), ask("10.1.0.8"));
    for _ in 0..2 {
        let v1::agent_message::Message::Want(_) = session.receive().await else {
            panic!("no question");
        };
    }
    let resource = workload("shop/new", &["10.1.0.7"]);
    session.push(push(2, vec![resource], false)).await;
    for last in [7, 8] {
        let address = vec![10, 1, 0, last];
        let looked = v1::controller_message::Message::Looked(v1::Looked { address });
        session.send(looked).await;
    }
    assert!(found.await.expect("no panic"));
    assert!(!absent.await.expect("no panic"));
    let again = ask("10.1.0.9");
    session.receive().await;
    drop(session);
    let mut session = world.session().await;
    let message = timeout(Duration::from_secs(1), session.receive()).await;
    assert!(matches!(
        message,
        Ok(v1::agent_message::Message::Want(want)) if want.address == [10, 1, 0, 9]
    ));
    again.await.expect("no panic");
}

#[tokio::test]
async fn a_refused_token_is_read_again() {
    let mut world = World::new().await;
    let mut session = world.session().await;
    session.push(push(1, vec![cluster()], true)).await;
    let path = world.directory.path().join("token");
    std::fs::write(&path, "a-bad-token").expect("writes");
    drop(session);
    let refused = |state: &StreamState| {
        let error = state.last_error.as_deref();
        error.is_some_and(|it| it.contains("unknown token") && !it.contains("a-bad-token"))
    };
    world.until("refused", refused).await;
    assert!(world.store.is_complete() && world.store.cluster().is_some());
    std::fs::write(&path, TOKEN).expect("writes");
    world.session().await;
    let tokens = world.tokens.lock().unwrap();
    assert!(tokens.iter().any(|it| it == "Bearer a-bad-token"));
}

/// What fails before any address was tried fails at the next as well, which has not failed yet.
#[tokio::test]
async fn what_cannot_be_read_is_not_read_again_at_once() {
    let mut world = World::new().await;
    let session = world.session().await;
    let path = world.directory.path().join("bundle");
    std::fs::write(&path, "").expect("writes");
    drop(session);
    let unreadable = |state: &StreamState| {
        let error = state.last_error.as_deref();
        error.is_some_and(|it| it.contains("no PEM certificate"))
    };
    world.until("no bundle", unreadable).await;
    assert!(world.discovery.state().retry_delay > Duration::ZERO);
    std::fs::write(&path, world.authority.pem()).expect("writes");
    world.session().await;
}

#[tokio::test]
async fn a_controller_without_our_root_gets_no_token() {
    let mut world = World::new().await;
    drop(world.session().await);
    let seen = world.tokens.lock().unwrap().len();
    let path = world.directory.path().join("bundle");
    std::fs::write(&path, Authority::new().pem()).expect("writes");
    world.server.cancel();
    let (address, authority) = (world.address, Arc::clone(&world.authority));
    (_, world.sessions, world.server) = serve(address, &authority, &world.tokens).await;
    world
        .until("distrusted", |state| {
            let error = state.last_error.as_deref().unwrap_or_default();
            error.contains("certificate")
        })
        .await;
    assert!(world.tokens.lock().unwrap().len() <= seen + 1);
    std::fs::write(&path, authority.pem()).expect("writes");
    world.session().await;
}

#[tokio::test]
async fn certificates_are_signed_over_the_same_way() {
    let world = World::new().await;
    let signer = ControllerSigner::new(Calls::new(Arc::clone(&world.controller)));
    let key = rcgen::KeyPair::generate().expect("a key");
    let request = rcgen::CertificateParams::default().serialize_request(&key);
    let request = request.expect("serializes").der().to_vec();
    let web: weft_core::Identity = WEB.parse().expect("valid");
    let chain = signer.sign(web.clone(), request.clone()).await;
    let chain = chain.expect("signed");
    assert_eq!(crate::identity::peer_identity(&chain), Ok(web));
    let other = "spiffe://cluster.local/ns/shop/sa/other".parse();
    let refused = signer.sign(other.expect("valid"), request.clone()).await;
    let Err(SignError(CallError::Refused(status))) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(status.code(), tonic::Code::PermissionDenied);
}

#[tokio::test]
async fn pods_are_asked_about_over_the_same_way() {
    let world = World::new().await;
    let calls = Calls::new(Arc::clone(&world.controller));
    for (pod, uid, expected) in [
        ("shop/web", "u1", PodStanding::Meshed),
        ("shop/other", "u1", PodStanding::NotMeshed),
        ("shop/web", "", PodStanding::Unknown),
    ] {
        let pod = pod.parse().expect("valid");
        let standing = calls.pod_standing(&pod, uid).await;
        assert_eq!(standing.expect("answered"), expected);
    }
}

#[test]
fn a_hello_too_large_leaves_things_unsaid_and_completion_removes_them() {
    let mut unsaid_of = Unsaid::default();
    let name = |it: usize| format!("team/{}-{it}", "x".repeat(220));
    let count = MAX_HELD_BYTES / 250;
    let held = (0..count).map(|it| {
        let kind = Kind::Workload;
        (
            Key {
                kind,
                name: name(it),
            },
            1,
        )
    });
    let hello = unsaid_of.hello(&"node-a".parse().expect("valid"), 1, held.collect());
    let unsaid = count - hello.held.len();
    assert!(unsaid > 0);
    let again = unsaid_of.0.iter().next().expect("one").name.clone();
    let Resource::Workload(workload) = workload(&again, &["10.1.0.1"]) else {
        panic!("a workload");
    };
    let mut push = push(1, vec![Resource::Workload(workload)], false);
    assert!(unsaid_of.still(&push).is_empty());
    push.complete = true;
    let gone = unsaid_of.still(&push);
    assert_eq!(gone.len(), unsaid - 1);
    assert!(gone.iter().all(|key| key.name != again));
    assert!(unsaid_of.still(&push).is_empty());
}

#[tokio::test]
async fn requests_carry_the_token_as_sensitive() {
    let world = World::new().await;
    let connection: Connection = world.controller.connect().await.expect("connects");
    let request = connection.request(());
    let value = request.metadata().get("authorization").expect("has it");
    assert!(value.is_sensitive());
    assert!(!format!("{value:?}").contains(TOKEN));
}
