//! People who ask at the loopback port: who is let in, by the manifests' own roles, and who is not.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use weft_apiserver::Store;
use weft_apiserver::tokens::Token;

use crate::stage::{DEADLINE, Stage, roles, token_of};

const PORT: [&str; 2] = ["--inspect", "127.0.0.1:0"];

/// Puts the manifests' accounts, roles and bindings into a store.
pub(crate) fn allow_viewers(store: &Store) {
    for object in roles() {
        // The webhook's own kinds are of no interest here.
        let _ = store.apply(&object);
    }
}

/// What the command-line tool shows.
pub(crate) fn viewer() -> String {
    Token {
        pod: None,
        node: None,
        ..of("weft-viewer", "weft-inspection")
    }
    .signed()
}

fn of(account: &str, audience: &str) -> Token {
    Token {
        service_account: account.to_owned(),
        audiences: vec![audience.to_owned()],
        pod: None,
        node: None,
        ..token_of("agent-1", "one")
    }
}

/// What the port answers to a request with these tokens.
pub(crate) async fn get(stage: &Stage, path: &str, tokens: &[&str]) -> (u16, String) {
    let address = stage.inspection.expect("there is a port");
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let tokens = tokens.iter();
    let tokens = tokens.map(|it| format!("Authorization: Bearer {it}\r\n"));
    let tokens: String = tokens.collect();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n{tokens}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut response = String::new();
    stream.read_to_string(&mut response).await.expect("read");
    let status = response.split(' ').nth(1).and_then(|it| it.parse().ok());
    (status.expect("a status"), response)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_look_is_what_roles_say() {
    let stage = Stage::with(Store::of_mesh(), &PORT).await;
    stage.until("/ready", "ready\n").await;
    allow_viewers(&stage.store);
    let viewer = viewer();
    let (status, answer) = get(&stage, "/status", &[&viewer]).await;
    assert!(
        status == 200 && answer.contains("\"trust_domain\""),
        "{answer}"
    );
    let (status, answer) = get(&stage, "/agents", &[&viewer]).await;
    assert!(status == 200 && answer.contains("\"agents\""), "{answer}");
    // Neither those who show nothing, nor what others have, nor two at once.
    let ended = Token {
        expires: SystemTime::now() - Duration::from_secs(10),
        ..of("weft-viewer", "weft-inspection")
    };
    let for_agents = token_of("agent-1", "one").signed();
    let for_the_server = of("weft-viewer", "https://kubernetes.default.svc").signed();
    let (said, signature) = viewer.rsplit_once('.').expect("a signature");
    let first = if signature.starts_with('A') { "B" } else { "A" };
    let not_signed = format!("{said}.{first}{}", &signature[1..]);
    let ended = ended.signed();
    for (tokens, says) in [
        (&[][..], "a token is needed"),
        (&[viewer.as_str(), viewer.as_str()], "a token is needed"),
        (&["password"], "no token of a service account"),
        (&[for_agents.as_str()], "does not accept the token"),
        (&[for_the_server.as_str()], "does not accept the token"),
        (&[not_signed.as_str()], "does not accept the token"),
        (&[ended.as_str()], "does not accept the token"),
    ] {
        for path in ["/status", "/live", "/metrics", "/agents/one/ff/pods"] {
            let (status, answer) = get(&stage, path, tokens).await;
            assert!(status == 401 && answer.contains(says), "{path}: {answer}");
            assert!(!answer.contains("trust_domain"), "{answer}");
        }
    }
    // Somebody whom the API server knows, and who has no such right, is told so by name.
    let stranger = of("stranger", "weft-inspection").signed();
    let (status, answer) = get(&stage, "/status", &[&stranger]).await;
    let name = "system:serviceaccount:weft-system:stranger may not look";
    assert!(status == 403 && answer.contains(name), "{answer}");
    for (result, least) in [
        ("accepted", 2),
        ("no_token", 8),
        ("malformed", 4),
        ("not_authenticated", 16),
        ("forbidden", 1),
    ] {
        let series = format!("weft_controller_inspections_total{{result=\"{result}\"}}");
        assert_eq!(stage.counted(&series).await, least, "{result}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn to_watch_is_another_right_than_to_look() {
    let stage = Stage::with(Store::of_mesh(), &PORT).await;
    stage.until("/ready", "ready\n").await;
    allow_viewers(&stage.store);
    let tap = "/tap?namespace=shop&kind=deployment&name=web";
    let account = |account: &str, audience: &str| {
        Token {
            pod: None,
            node: None,
            ..of(account, audience)
        }
        .signed()
    };
    let watcher = account("weft-tap", "weft-tap");
    for (path, token) in [(tap, &viewer()), ("/status", &watcher)] {
        let (status, answer) = get(&stage, path, &[token]).await;
        let says = answer.contains("does not accept the token");
        assert!(status == 401 && says, "{path}: {answer}");
    }
    // Who may look may not watch, whatever the token is for.
    let other = account("weft-viewer", "weft-tap");
    let (status, answer) = get(&stage, tap, &[&other]).await;
    let why = "weft-viewer may not watch deployments/web in the namespace shop";
    assert!(status == 403 && answer.contains(why), "{answer}");
    let (status, answer) = get(&stage, "/tap?kind=secret", &[&watcher]).await;
    assert!(status == 400, "{answer}");
    let (status, _) = get(&stage, tap, &[]).await;
    assert_eq!(status, 401);
    let series = "weft_controller_taps_total{result=\"forbidden\"}";
    assert_eq!(stage.counted(series).await, 1);
}

/// A right in one namespace, and one to a single workload of another.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_to_watch_is_one_to_what_it_names() {
    let stage = Stage::with(Store::of_mesh(), &PORT).await;
    stage.until("/ready", "ready\n").await;
    allow_viewers(&stage.store);
    let group = "rbac.authorization.k8s.io";
    let bound = |namespace: &str, kind: &str, name: &str| {
        json!({"apiVersion": format!("{group}/v1"), "kind": "RoleBinding",
            "metadata": {"name": "tapper", "namespace": namespace},
            "roleRef": {"apiGroup": group, "kind": kind, "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": "tapper", "namespace": "weft-system"}]})
    };
    let one = json!({"apiVersion": format!("{group}/v1"), "kind": "Role",
        "metadata": {"name": "tap-web", "namespace": "bank"},
        "rules": [{"apiGroups": ["tap.weft.dev"], "resources": ["deployments/tap"],
            "resourceNames": ["web"], "verbs": ["watch"]}]});
    for object in [
        bound("shop", "ClusterRole", "weft-tap"),
        one,
        bound("bank", "Role", "tap-web"),
    ] {
        stage
            .store
            .apply(&object)
            .expect("of a kind that is served");
    }
    let tapper = of("tapper", "weft-tap").signed();
    for (query, expected) in [
        ("namespace=shop", 200),
        ("namespace=shop&kind=deployment&name=api", 200),
        ("namespace=shop&kind=pod", 200),
        ("namespace=bank&kind=deployment&name=web", 200),
        ("namespace=bank&kind=deployment&name=vault", 403),
        ("namespace=bank&kind=deployment", 403),
        ("namespace=bank&kind=pod&name=web", 403),
        ("namespace=bank", 403),
        ("namespace=other", 403),
        ("kind=deployment", 403),
        ("", 403),
        // What is asked last is what is looked at, in both places.
        ("namespace=shop&namespace=bank", 403),
    ] {
        let path = format!("/tap?{query}");
        let status = status_of(&stage, &path, &tapper).await;
        assert_eq!(status, expected, "{query}");
    }
}

/// As [`get`], of an answer that does not end.
async fn status_of(stage: &Stage, path: &str, token: &str) -> u16 {
    let address = stage.inspection.expect("there is a port");
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut head = vec![0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut head).await.expect("read");
    let head = String::from_utf8(head).expect("text");
    head["HTTP/1.1 ".len()..].parse().expect("a status")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_away_is_gone_soon() {
    let stage = Stage::with(Store::of_mesh(), &PORT).await;
    stage.until("/ready", "ready\n").await;
    let viewer = viewer();
    let (status, _) = get(&stage, "/status", &[&viewer]).await;
    assert_eq!(status, 403, "nothing is bound yet");
    allow_viewers(&stage.store);
    // A refusal is not remembered.
    let (status, answer) = get(&stage, "/status", &[&viewer]).await;
    assert_eq!(status, 200, "{answer}");
    let before = stage.reviews();
    let (status, _) = get(&stage, "/agents", &[&viewer]).await;
    assert_eq!(status, 200);
    assert_eq!(stage.reviews(), before, "asked again for each request");
    let binding = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "weft-viewer"}});
    stage
        .store
        .delete(&binding)
        .expect("of a kind that is served");
    let gone = async {
        while get(&stage, "/status", &[&viewer]).await.0 != 403 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let gone = tokio::time::timeout(DEADLINE, gone).await;
    gone.expect("taken away in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_let_in_while_nobody_can_be_asked() {
    let mut stage = Stage::with(Store::of_mesh(), &PORT).await;
    stage.until("/ready", "ready\n").await;
    allow_viewers(&stage.store);
    for kind in ["tokenreviews", "subjectaccessreviews"] {
        stage.server().behave(|it| {
            it.refused.clear();
            it.refused.insert(kind.to_owned(), 403);
        });
        let (status, answer) = get(&stage, "/status", &[&viewer()]).await;
        assert!(
            status == 503 && answer.contains("cannot be asked"),
            "{kind}: {answer}"
        );
    }
    stage.stop_server().await;
    let (status, answer) = get(&stage, "/status", &[&viewer()]).await;
    assert_eq!(status, 503, "{answer}");
}

/// Not even its own rights make the viewers' account of use for anything but to look.
#[test]
fn the_viewers_account_may_do_nothing_else() {
    let rights = weft_apiserver::Rights::of(&roles(), "weft-system", "weft-viewer");
    let all = rights.all().into_iter().map(|it| it.to_string());
    assert_eq!(all.collect::<Vec<_>>(), ["get policy.weft.dev/inspections"]);
    let people = roles()
        .into_iter()
        .find(|it| it["kind"] == "Role" && it["metadata"]["name"] == "weft-viewer");
    let people = people.expect("a role for people");
    let rules = people["rules"].as_array().expect("rules");
    let token = rules
        .iter()
        .find(|it| it["resources"] == json!(["serviceaccounts/token"]));
    let named: &Value = &token.expect("a rule")["resourceNames"];
    assert_eq!(*named, json!(["weft-viewer"]), "tokens of others, too");
}
