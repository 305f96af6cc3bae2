//! What an agent says of itself, asked for at the controller's Unix socket: a real server, and an agent that the test
//! plays, well and badly.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use weft_proto::v1::{self, Page, inspect_answer::Message};

use served::{Served, with_token};

#[allow(dead_code, reason = "what else others need of it")]
mod served;

const TOKEN: &str = "token-of-node-one-0123";
/// Nothing here may take longer.
const DEADLINE: Duration = Duration::from_secs(10);

struct Stage {
    served: Served,
    folder: TempDir,
}

/// The agent's side of a stream.
struct Agent {
    sender: mpsc::Sender<v1::InspectAnswer>,
    questions: Streaming<v1::InspectQuestion>,
}

impl Stage {
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::create_dir(path("source")).expect("made");
        let pods = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";
        fs::write(folder.path().join("source/all.yaml"), pods).expect("written");
        fs::write(path("tokens"), format!("one {TOKEN}\n")).expect("written");
        set_private(Path::new(&path("tokens")));
        let arguments = [
            "--source",
            &path("source"),
            "--ca",
            &path("ca"),
            "--join-tokens",
            &path("tokens"),
            "--admin-socket",
            &path("socket"),
        ];
        let served = Served::start(&arguments, DEADLINE).await;
        served.until("/ready", "200 OK").await;
        Self { served, folder }
    }

    async fn agent(&self, token: &str, node: &str, incarnation: u64) -> Result<Agent, Status> {
        let roots = fs::read_to_string(self.folder.path().join("ca/ca.crt")).expect("read");
        let mut client = self.served.client(&roots).await;
        let (sender, receiver) = mpsc::channel(64);
        let inspectable = v1::Inspectable {
            node: node.to_owned(),
            incarnation,
        };
        send(&sender, Message::Inspectable(inspectable)).await;
        let request = with_token(ReceiverStream::new(receiver), token);
        let questions = client.inspect(request).await?.into_inner();
        Ok(Agent { sender, questions })
    }

    /// What the socket answers.
    async fn get(&self, path: &str) -> String {
        let stream = UnixStream::connect(self.folder.path().join("socket")).await;
        let mut stream = stream.expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut response = String::new();
        stream.read_to_string(&mut response).await.expect("read");
        response
    }

    /// Waits until an agent can be asked, or not.
    async fn until_known(&self, incarnation: u64, is_known: bool) {
        let waiting = async {
            loop {
                let path = format!("/agents/one/{incarnation:016x}/ready");
                let asked = self.get(&path);
                // One that is there does not answer here: it is waited for.
                let is_there = timeout(Duration::from_millis(200), asked).await;
                let is_there = is_there.is_err() || !is_there.is_ok_and(|it| it.contains("404"));
                if is_there == is_known {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(DEADLINE, waiting).await.expect("in time");
    }
}

impl Agent {
    async fn question(&mut self) -> Result<v1::InspectQuestion, Status> {
        let question = timeout(DEADLINE, self.questions.message()).await;
        let question = question.expect("in time")?;
        question.ok_or_else(|| Status::unavailable("ended"))
    }

    async fn part(&self, question: u64, content: &str, last: bool, refused: &str) {
        let part = v1::AnswerPart {
            question,
            content: content.as_bytes().to_vec(),
            last,
            refused: refused.to_owned(),
        };
        send(&self.sender, Message::Part(part)).await;
    }
}

async fn send(sender: &mpsc::Sender<v1::InspectAnswer>, message: Message) {
    let message = Some(message);
    let sent = sender.send(v1::InspectAnswer { message }).await;
    sent.expect("open");
}

fn set_private(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("set");
}

#[tokio::test]
async fn pages_come_from_the_agent_that_is_asked() {
    let stage = Stage::new().await;
    let mut agent = stage.agent(TOKEN, "one", 0xff).await.expect("let in");
    let playing = tokio::spawn(async move {
        let mut asked = vec![];
        // Those that only see whether it is there, too.
        while let Ok(question) = agent.question().await {
            let page = question.page();
            asked.push(page);
            match page {
                Page::Metrics => {
                    agent.part(question.id, "up ", false, "").await;
                    agent.part(question.id, "1\n", true, "").await;
                }
                Page::State => agent.part(question.id, "", true, "not now").await,
                _ => agent.part(question.id, "{}", true, "").await,
            }
        }
        asked
    });
    let page = |name: &str| {
        let path = format!("/agents/one/00000000000000ff/{name}");
        let stage = &stage;
        async move { stage.get(&path).await }
    };
    let known = async {
        while !page("ready").await.contains("200 OK") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, known).await.expect("in time");
    let metrics = page("metrics").await;
    assert!(metrics.ends_with("\r\n\r\nup 1\n"), "{metrics}");
    let state = page("config_dump").await;
    assert!(
        state.contains("502") && state.contains("not now"),
        "{state}"
    );
    let other = stage.get("/agents/one/00000000000000fe/metrics").await;
    assert!(
        other.contains("404") && other.contains("can be asked"),
        "{other}"
    );
    let status = stage.get("/status").await;
    for part in [
        "\"lacks\": null",
        "\"trust_domain\": \"cluster.local\"",
        "\"not_after_ms\"",
    ] {
        assert!(status.contains(part), "no {part} in {status}");
    }
    // What only the socket has, the port has not.
    for path in ["/status", "/agents", "/agents/one/00000000000000ff/metrics"] {
        let answer = stage.served.get(path).await;
        assert!(answer.contains("404"), "{path}: {answer}");
    }
    stage.served.stop.cancel();
    let asked = timeout(DEADLINE, playing)
        .await
        .expect("in time")
        .expect("no panic");
    assert!(asked.contains(&Page::Metrics) && asked.contains(&Page::State));
}

#[tokio::test]
async fn an_agent_answers_for_its_own_node_only() {
    let stage = Stage::new().await;
    let unknown = stage.agent("another-token-000000000", "one", 1).await;
    assert_eq!(
        unknown.err().expect("refused").code(),
        Code::Unauthenticated
    );
    let mut other = stage.agent(TOKEN, "two", 1).await.expect("a stream");
    let ended = other.question().await.expect_err("not for another node");
    assert_eq!(ended.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn one_that_misbehaves_is_asked_no_more() {
    let stage = Stage::new().await;
    let mut agent = stage.agent(TOKEN, "one", 5).await.expect("let in");
    // An answer to no question.
    agent.part(9, "x", true, "").await;
    let ended = agent.question().await.expect_err("ended");
    assert_eq!(ended.code(), Code::InvalidArgument);
    stage.until_known(5, false).await;
    // One that never comes to an end takes no more than there is room for.
    let mut agent = stage.agent(TOKEN, "one", 6).await.expect("let in");
    stage.until_known(6, true).await;
    let flood = tokio::spawn(async move {
        // Whoever looked whether it is there has given up.
        let question = agent.question().await.expect("asked");
        let content = "x".repeat(32 * 1024);
        let mut parts = 0;
        loop {
            let part = v1::AnswerPart {
                question: question.id,
                content: content.clone().into_bytes(),
                last: false,
                refused: String::new(),
            };
            let message = Some(Message::Part(part));
            if agent
                .sender
                .send(v1::InspectAnswer { message })
                .await
                .is_err()
                || parts > 4096
            {
                return (parts, agent.question().await);
            }
            parts += 1;
        }
    });
    let (parts, ended) = timeout(DEADLINE, flood)
        .await
        .expect("in time")
        .expect("no panic");
    assert!(parts < 2048, "{parts} parts were taken");
    assert_eq!(ended.expect_err("ended").code(), Code::ResourceExhausted);
}
