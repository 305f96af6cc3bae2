//! Of several controllers one may be behind: an agent that comes from another is told nothing older than it knows.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;
use tokio::time::timeout;
use tonic::Streaming;
use weft_proto::v1;
use weft_proto::v1::controller_message::Message;

use crate::served;
use crate::stage::{DEADLINE, Stage, token_of};

/// Opens the stream of an agent that knows so much.
async fn open(stage: &Stage, position: HashMap<String, u64>) -> served::Both {
    let token = token_of("agent-1", "one").signed();
    let hello = v1::Hello {
        position,
        ..served::hello("one", vec![])
    };
    let opened = served::subscribe(&mut stage.client().await, &token, hello).await;
    opened.expect("let in")
}

type Receiver = Streaming<v1::ControllerMessage>;

async fn pushed(receiver: &mut Receiver) -> v1::Push {
    let message = timeout(DEADLINE, receiver.message()).await;
    let message = message.expect("in time").expect("open").expect("open");
    match message.message {
        Some(Message::Push(push)) => push,
        other => panic!("not a push: {other:?}"),
    }
}

#[tokio::test]
async fn an_agent_that_knows_more_is_told_nothing_older() {
    let stage = Stage::start().await;
    let (_first, mut receiver) = open(&stage, HashMap::new()).await;
    let mut later = pushed(&mut receiver).await.position;
    // As another controller told it, that heard of it earlier.
    *later.get_mut("Pod").expect("there are pods") += 1;
    let (_second, mut waiting) = open(&stage, later.clone()).await;
    let early = timeout(Duration::from_secs(2), waiting.message()).await;
    assert!(early.is_err(), "{early:?}");
    // What happened is nothing that is looked at: the more so nobody else would tell that it was heard of.
    let web = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "namespace": "shop", "annotations": {"example.com/a": "b"}},
        "spec": {"nodeName": "one", "serviceAccountName": "web", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.1"}]}});
    stage.store.apply(&web).expect("applied");
    let push = pushed(&mut waiting).await;
    assert!(push.complete && push.position["Pod"] >= later["Pod"]);
}

/// A cluster that was restored from a backup counts from there.
#[tokio::test]
async fn an_agent_that_knows_what_never_was_is_told_in_the_end() {
    let stage = Stage::start().await;
    let never = HashMap::from([("Pod".to_owned(), u64::MAX)]);
    let (_sender, mut receiver) = open(&stage, never).await;
    let push = pushed(&mut receiver).await;
    assert!(push.complete && push.position["Pod"] < u64::MAX);
}
