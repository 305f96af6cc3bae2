//! Agents in order: what their tokens let them do, for how long, and while the API server is away.

use futures::future::join_all;
use serde_json::json;
use tonic::Code;

use crate::stage::{Stage, agent_pod, sign, token_of};

#[tokio::test]
async fn agents_are_known_by_their_tokens() {
    let stage = Stage::start().await;
    let claimed = token_of("agent-1", "one").signed();
    // As of servers before 1.30.
    let mut unclaimed = token_of("agent-1", "one");
    unclaimed.node = None;
    for token in [claimed.clone(), unclaimed.signed()] {
        stage.subscribe(&token, "one").await.expect("served");
        let foreign = stage.subscribe(&token, "two").await;
        assert_eq!(foreign.expect_err("refused").code(), Code::PermissionDenied);
        stage.sign(&token, "web").await.expect("signed");
        // On another node, completed, and of nobody.
        for account in ["cart", "job", "default"] {
            let refused = stage.sign(&token, account).await.expect_err("refused");
            assert_eq!(refused.code(), Code::PermissionDenied, "{account}");
        }
    }
    let told = stage.get("/metrics").await;
    for counted in [
        "signs_total{result=\"denied\"} 6",
        "refused_total{reason=\"other_node\"} 2",
    ] {
        assert!(told.contains(counted), "{told}");
    }
}

#[tokio::test]
async fn one_token_is_asked_about_once() {
    let stage = Stage::start().await;
    let token = token_of("agent-1", "one").signed();
    let before = stage.reviews();
    let client = stage.client().await;
    let signing = (0..50).map(|_| {
        let (mut client, token) = (client.clone(), token.clone());
        async move { sign(&mut client, &token, "web").await }
    });
    for signed in join_all(signing).await {
        signed.expect("signed");
    }
    stage.subscribe(&token, "one").await.expect("served");
    assert_eq!(stage.reviews(), before + 1);
}

#[tokio::test]
async fn a_pod_that_is_gone_takes_its_token_with_it() {
    let stage = Stage::start().await;
    let token = token_of("agent-1", "one").signed();
    let neighbour = token_of("agent-2", "two").signed();
    let agent = stage.subscribe(&token, "one").await.expect("served");
    let mut other = stage.subscribe(&neighbour, "two").await.expect("served");
    let pod = agent_pod("agent-1", "one");
    stage.store.delete(&pod).expect("it was there");
    let ended = agent.ended().await;
    assert_eq!(ended.code(), Code::Unauthenticated);
    assert!(ended.message().contains("gone"), "{ended:?}");
    // Not even what was remembered helps.
    let refused = stage.sign(&token, "web").await.expect_err("refused");
    assert_eq!(refused.code(), Code::Unauthenticated);
    // Its successor is another pod, and the other node's agent is not concerned.
    stage
        .store
        .apply(&agent_pod("agent-3", "one"))
        .expect("applied");
    let successor = token_of("agent-3", "one").signed();
    stage.subscribe(&successor, "one").await.expect("served");
    let mut change = agent_pod("cart-2", "two");
    change["metadata"]["namespace"] = json!("shop");
    change["spec"]["hostNetwork"] = json!(false);
    change["status"]["podIPs"] = json!([{"ip": "10.1.0.3"}]);
    stage.store.apply(&change).expect("applied");
    other.pushed().await.expect("still served");
}

/// Who is known stays, and can come back; who is not is not refused, but has to wait.
#[tokio::test]
async fn an_outage_of_the_api_server_is_no_refusal() {
    let mut stage = Stage::start().await;
    let token = token_of("agent-1", "one").signed();
    let agent = stage.subscribe(&token, "one").await.expect("served");
    stage.stop_server().await;
    let again = stage.subscribe(&token, "one").await.expect("served");
    stage.sign(&token, "web").await.expect("signed");
    let unknown = token_of("agent-2", "two").signed();
    let codes = stage.refused(&unknown).await;
    assert_eq!(codes, [Some(Code::Unavailable); 2]);
    stage
        .until("/problems", "tokens of agents cannot be reviewed")
        .await;
    let unclear = "weft_controller_agent_authentications_total{result=\"unavailable\"}";
    assert_eq!(stage.counted(unclear).await, 2);
    stage.start_server().await;
    stage.subscribe(&unknown, "two").await.expect("served");
    let problems = stage.get("/problems").await;
    assert!(!problems.contains("reviewed"), "{problems}");
    drop((agent, again));
}

/// A missing right is told, and is no reason to believe or to refuse anybody.
#[tokio::test]
async fn a_missing_right_is_a_problem() {
    let stage = Stage::start().await;
    stage.server().behave(|it| {
        it.refused.insert("tokenreviews".to_owned(), 403);
    });
    let token = token_of("agent-1", "one").signed();
    assert_eq!(stage.refused(&token).await, [Some(Code::Unavailable); 2]);
    stage.until("/problems", "ClusterRole").await;
    stage.server().behave(|it| {
        it.refused.insert("services".to_owned(), 403);
    });
    stage.server().disconnect();
    let right = "the right to watch the resource services";
    stage.until("/problems", right).await;
    let labels = "{verb=\"watch\",group=\"\",resource=\"services\",code=\"403\"}";
    let counted = format!("weft_controller_source_failures_total{labels}");
    stage.until("/metrics", &counted).await;
}
