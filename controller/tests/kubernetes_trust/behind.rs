//! Of several controllers one may be behind: an agent that comes from another is told nothing older than it knows. And one
//! that has lost the API server says so.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Streaming;
use weft_proto::v1::controller_message::Message;
use weft_proto::{Key, Kind, v1};

use crate::served;
use crate::stage::{DEADLINE, Running, Stage, token_of};

/// An agent at a controller.
pub(crate) struct Agent {
    _sender: mpsc::Sender<v1::AgentMessage>,
    receiver: Streaming<v1::ControllerMessage>,
}

/// What an agent knows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    held: HashMap<Key, u64>,
    position: HashMap<String, u64>,
}

impl Known {
    pub(crate) fn has(&self, name: &str) -> bool {
        let key = Key {
            kind: Kind::Workload,
            name: name.to_owned(),
        };
        self.held.contains_key(&key)
    }

    fn take(&mut self, push: &v1::Push) {
        for it in &push.changed {
            let key = it.key.clone().expect("named");
            self.held.insert(key.try_into().expect("known"), it.version);
        }
        for key in &push.removed {
            self.held.remove(&key.clone().try_into().expect("known"));
        }
        let position = push.position.iter();
        self.position
            .extend(position.map(|(kind, it)| (kind.clone(), *it)));
    }
}

impl Agent {
    /// One that knows so much, and comes to a controller.
    pub(crate) async fn comes_to(controller: &Running, token: &str, known: &Known) -> Self {
        Self::at(controller, ("one", token), known).await
    }

    /// The same, of a node by its agent's token.
    pub(crate) async fn at(
        controller: &Running,
        (node, token): (&str, &str),
        known: &Known,
    ) -> Self {
        let held = known.held.iter().map(|(key, version)| v1::Held {
            key: Some(key.clone().into()),
            version: *version,
        });
        let hello = v1::Hello {
            position: known.position.clone(),
            ..served::hello(node, held.collect())
        };
        let opened = served::subscribe(&mut controller.client().await, token, hello).await;
        let (sender, receiver) = opened.expect("let in");
        Self {
            _sender: sender,
            receiver,
        }
    }

    async fn next(&mut self) -> Message {
        let message = timeout(DEADLINE, self.receiver.message()).await;
        let message = message.expect("in time").expect("open").expect("open");
        message.message.expect("not empty")
    }

    /// Takes in pushes until it has everything, or what it waits for.
    pub(crate) async fn learns(&mut self, known: &mut Known, until: impl Fn(&Known, bool) -> bool) {
        loop {
            let message = self.next().await;
            let Message::Push(push) = message else {
                panic!("not a push: {message:?}");
            };
            known.take(&push);
            if until(known, push.complete) {
                return;
            }
        }
    }

    /// The same, where it may have to wait before it is told anything.
    pub(crate) async fn catches_up(&mut self, known: &mut Known) {
        loop {
            match self.next().await {
                Message::Behind(_) => {}
                Message::Push(push) => {
                    known.take(&push);
                    if push.complete {
                        return;
                    }
                }
                other => panic!("neither: {other:?}"),
            }
        }
    }

    async fn is_told_to_wait_for(&mut self, kinds: &[&str]) {
        match self.next().await {
            Message::Behind(behind) => assert_eq!(behind.kinds, kinds),
            other => panic!("not behind: {other:?}"),
        }
        let early = timeout(Duration::from_secs(2), self.receiver.message()).await;
        assert!(early.is_err(), "{early:?}");
    }
}

const CART: &str = "shop/cart";

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_has_lost_the_api_server_sets_nobody_back() {
    let stage = Stage::start().await;
    let token = token_of("agent-1", "one").signed();
    let (mut beside, lost) = stage.beside().await;
    lost.until("/ready", "ready\n").await;
    let mut known = Known::default();
    let mut agent = Agent::comes_to(&stage, &token, &known).await;
    agent.learns(&mut known, |_, complete| complete).await;
    assert!(known.has(CART));
    // Both have heard the same.
    let mut agent_of_lost = Agent::comes_to(&lost, &token, &known).await;
    agent_of_lost
        .learns(&mut known.clone(), |_, complete| complete)
        .await;
    beside.stop().await;
    // Of deletions no object tells how late it is.
    let cart = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cart", "namespace": "shop"}});
    stage.store.delete(&cart).expect("it was there");
    agent.learns(&mut known, |known, _| !known.has(CART)).await;
    let mut agent = Agent::comes_to(&lost, &token, &known).await;
    agent.is_told_to_wait_for(&["Pod"]).await;
    lost.until("/metrics", "weft_controller_agents_ahead 1.0\n")
        .await;
    // One that knows nothing is told what there is.
    let mut fresh = Known::default();
    let mut new = Agent::comes_to(&lost, &token, &fresh).await;
    new.learns(&mut fresh, |_, complete| complete).await;
    assert!(fresh.has(CART));
    beside.start().await;
    agent.learns(&mut known, |_, complete| complete).await;
    assert!(!known.has(CART));
    lost.until("/metrics", "weft_controller_agents_ahead 0.0\n")
        .await;
}

/// It has not heard of the deletion, and is not behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_starts_after_a_deletion_is_not_behind() {
    let stage = Stage::start().await;
    let token = token_of("agent-1", "one").signed();
    let mut known = Known::default();
    let mut agent = Agent::comes_to(&stage, &token, &known).await;
    agent.learns(&mut known, |_, complete| complete).await;
    let cart = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "cart", "namespace": "shop"}});
    stage.store.delete(&cart).expect("it was there");
    agent.learns(&mut known, |known, _| !known.has(CART)).await;
    let later = stage.another(&[]).await;
    later.until("/ready", "ready\n").await;
    let mut agent = Agent::comes_to(&later, &token, &known).await;
    agent.learns(&mut known, |_, complete| complete).await;
    assert!(!known.has(CART));
}

/// A cluster that was restored from a backup counts from there: a list says so, and nobody waits for ever.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_knows_what_never_was_is_told_once_that_is_clear() {
    let stage = Stage::start().await;
    let token = token_of("agent-1", "one").signed();
    let mut known = Known::default();
    known.position.insert("Pod".to_owned(), u64::MAX);
    known.position.insert("Pod.example.com".to_owned(), 7);
    let mut agent = Agent::comes_to(&stage, &token, &known).await;
    let message = agent.next().await;
    assert!(matches!(message, Message::Behind(_)), "{message:?}");
    let began = Instant::now();
    agent.learns(&mut known, |_, complete| complete).await;
    assert!(known.position["Pod"] < u64::MAX && known.has(CART));
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_hears_nothing_is_not_ready() {
    const SILENT: &str = "nothing was heard of the API server for long";
    let mut stage = Stage::with(weft_apiserver::Store::of_mesh(), &["--silent-after", "10s"]).await;
    let often = Duration::from_millis(500);
    stage.server().behave(|it| it.bookmark_every = often);
    // Watches wait for as long as they were told to when they began.
    stage.server().disconnect();
    stage.until("/ready", "ready\n").await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(13) {
        let answer = stage.get("/ready").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        tokio::time::sleep(often).await;
    }
    stage.stop_server().await;
    stage.until("/ready", SILENT).await;
    assert!(stage.get("/ready").await.starts_with("HTTP/1.1 503 "));
    stage.start_server().await;
    stage.until("/ready", "ready\n").await;
}

/// As after a while without changes of a kind: no failure, unless it never ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_has_to_begin_anew_is_counted() {
    let stage = Stage::start().await;
    let job = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "job", "namespace": "shop"}});
    stage.store.delete(&job).expect("it was there");
    stage.store.compact();
    stage.server().disconnect();
    let lost =
        r#"weft_controller_source_watches_lost_total{group="",resource="nodes",code="410"} 1"#;
    stage.until("/metrics", lost).await;
}
