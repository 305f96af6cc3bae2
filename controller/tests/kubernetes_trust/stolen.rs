//! Somebody has a token that is not what an agent on its node would show.

use std::time::{Duration, SystemTime};

use serde_json::json;
use tonic::Code;
use weft_apiserver::tokens::Token;

use crate::stage::{Stage, agent_pod, token_of};

/// A token, and as what its refusal is counted.
type Case = (&'static str, String, &'static str);

fn changed(change: impl FnOnce(&mut Token)) -> String {
    let mut token = token_of("agent-1", "one");
    change(&mut token);
    token.signed()
}

/// What the API server does not accept.
fn not_accepted() -> Vec<Case> {
    let good = token_of("agent-1", "one").signed();
    let (signed, _) = good.rsplit_once('.').expect("a signature");
    let audience = changed(|it| it.audiences = vec!["https://kubernetes.default.svc".to_owned()]);
    let expired = changed(|it| it.expires = SystemTime::now() - Duration::from_secs(1));
    let deleted = token_of("agent-of-yesterday", "one").signed();
    let uid = changed(|it| it.pod = Some(("agent-1".to_owned(), "another".to_owned())));
    vec![
        ("another audience", audience, "not_authenticated"),
        ("expired", expired, "not_authenticated"),
        ("a pod that was deleted", deleted, "not_authenticated"),
        ("another uid", uid, "not_authenticated"),
        (
            "signed by nobody",
            format!("{signed}.c2lnbmVk"),
            "not_authenticated",
        ),
    ]
}

/// What it accepts, and is no agent's all the same.
fn not_an_agents() -> Vec<Case> {
    let account = changed(|it| it.service_account = "weft-controller".to_owned());
    let namespace = changed(|it| {
        it.namespace = "shop".to_owned();
        it.pod = Some(("web".to_owned(), "uid-web".to_owned()));
    });
    let unbound = changed(|it| {
        it.pod = None;
        it.node = None;
    });
    let disagrees = changed(|it| it.node = Some("two".to_owned()));
    let ended = token_of("agent-failed", "one").signed();
    vec![
        ("another service account", account, "account"),
        ("the name in another namespace", namespace, "account"),
        ("bound to nothing", unbound, "unbound"),
        ("another node than its pod's", disagrees, "disagrees"),
        ("a pod that failed", ended, "pod_ended"),
    ]
}

/// What nobody needs to be asked about.
fn no_tokens() -> Vec<Case> {
    let good = token_of("agent-1", "one").signed();
    let cases = [
        ("nothing", String::new()),
        ("a join token", "token-of-node-one-0123".to_owned()),
        ("two parts", "e30.e30".to_owned()),
        ("four parts", format!("{good}.e30")),
        ("an empty part", "e30..c2ln".to_owned()),
        ("other letters", format!("{good}+/=")),
        ("a blank", format!("{good} x")),
        ("oversized", format!("{}{good}", "e".repeat(8 * 1024))),
    ];
    cases.map(|(what, token)| (what, token, "malformed")).into()
}

#[tokio::test]
async fn stolen_tokens_are_refused_counted_and_nothing_is_signed() {
    let stage = Stage::start().await;
    let mut failed = agent_pod("agent-failed", "one");
    failed["status"]["phase"] = json!("Failed");
    let web = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "namespace": "shop", "uid": "uid-web"},
        "spec": {"nodeName": "one", "serviceAccountName": "web", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.1"}]}});
    for pod in [&failed, &web] {
        stage.store.apply(pod).expect("applied");
    }
    // The source has them when it knows this one, which came after.
    let marker = agent_pod("agent-marker", "one");
    stage.store.apply(&marker).expect("applied");
    let mut unclaimed = token_of("agent-marker", "one");
    unclaimed.node = None;
    let known = async {
        while stage.sign(&unclaimed.signed(), "web").await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let known = tokio::time::timeout(crate::stage::DEADLINE, known);
    known.await.expect("the marker is known");
    let signed = stage.counted(SIGNED).await;

    for (what, token, label) in [not_accepted(), not_an_agents()].concat() {
        refuse(&stage, what, &token, label).await;
    }
    let reviews = stage.reviews();
    for (what, token, label) in no_tokens() {
        refuse(&stage, what, &token, label).await;
    }
    assert_eq!(stage.reviews(), reviews, "the API server was asked");

    // A server that looks at no audience cannot say whom a token is for.
    stage.server().behave(|it| it.ignores_audiences = true);
    let other = changed(|it| it.audiences = vec!["another-controller".to_owned()]);
    refuse(
        &stage,
        "an audience that nobody looked at",
        &other,
        "audience",
    )
    .await;
    stage.server().behave(|it| it.ignores_audiences = false);
    assert_eq!(stage.counted(SIGNED).await, signed, "something was signed");

    // Nor does it harm whoever is in order.
    let good = token_of("agent-1", "one").signed();
    assert_eq!(stage.refused(&good).await, [None, None]);
}

/// Nothing but its pod could say where it is, and nobody knows its pod.
#[tokio::test]
async fn a_token_of_an_unknown_pod_proves_no_node() {
    let stage = Stage::start().await;
    // From now on the controller hears nothing of pods.
    stage.server().behave(|it| {
        it.refused.insert("pods".to_owned(), 500);
    });
    stage.server().disconnect();
    stage.until("/problems", "Pod: ").await;
    stage
        .store
        .apply(&agent_pod("agent-new", "one"))
        .expect("applied");
    let mut token = token_of("agent-new", "one");
    token.node = None;
    refuse(&stage, "an unknown pod", &token.signed(), "unknown_pod").await;
    // Where the token itself says it, the API server vouches for that.
    let token = token_of("agent-new", "one").signed();
    assert_eq!(stage.refused(&token).await, [None, None]);
}

const SIGNED: &str = "weft_controller_signs_total{result=\"signed\"}";

async fn refuse(stage: &Stage, what: &str, token: &str, label: &str) {
    let series = format!("weft_controller_agent_authentications_total{{result=\"{label}\"}}");
    let before = stage.counted(&series).await;
    let wrong = "weft_controller_refused_total{reason=\"wrong_token\"}";
    let wrong_before = stage.counted(wrong).await;
    let codes = stage.refused(token).await;
    assert_eq!(codes, [Some(Code::Unauthenticated); 2], "{what}");
    assert_eq!(stage.counted(&series).await, before + 2, "{what}: {label}");
    assert_eq!(stage.counted(wrong).await, wrong_before + 2, "{what}");
}
