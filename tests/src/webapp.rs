//! The typed side of `weft-testapp http`, `grpc` and `websocket`: see their `--help`.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::command::Process;
use crate::http;
use crate::pod::Pod;
use crate::testapp::{command, events};
use crate::wait::{DEADLINE, wait_for};

/// A running `weft-testapp http serve`.
#[derive(Debug)]
pub struct HttpServer {
    process: Process,
    netns: std::path::PathBuf,
    port: u16,
}

/// What a server saw of a request.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Seen {
    /// The server's name.
    pub name: String,
    /// The request's method.
    pub method: String,
    /// Path and query, or the whole URI where the client sent one.
    pub path: String,
    /// `HTTP/1.0`, `HTTP/1.1` or `HTTP/2.0`.
    pub version: String,
    /// All headers in their order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// `getpeername`.
    pub peer: SocketAddr,
    /// Which of the server's connections it came by, from 0.
    pub connection: u64,
    /// How long the body was; in answers only.
    #[serde(default)]
    pub body_bytes: u64,
    /// Whether the body was the pattern; in answers only.
    #[serde(default)]
    pub body_is_pattern: bool,
    /// The request's trailers; in answers only.
    #[serde(default)]
    pub trailers: Vec<(String, String)>,
}

impl Seen {
    /// All values of a header.
    pub fn header(&self, name: &str) -> Vec<&str> {
        let own = self.headers.iter().filter(|(key, _)| key == name);
        own.map(|(_, value)| value.as_str()).collect()
    }
}

impl HttpServer {
    /// Serves on all IPv4 and IPv6 addresses, with the pod's name in the answers.
    pub fn start(pod: &Pod, port: u16, further_args: &[&str]) -> Result<HttpServer> {
        let program = command(pod)?.named("http-serve").args(["http", "serve"]);
        let mut process = program
            .args(["--listen", &format!("0.0.0.0:{port}")])
            .args(["--listen", &format!("[::]:{port}")])
            .args(["--name", pod.name()])
            .args(further_args)
            .spawn()?;
        process.wait_listening(port)?;
        let netns = pod.netns().path();
        Ok(HttpServer {
            process,
            netns,
            port,
        })
    }

    /// All requests so far.
    pub fn requests(&self) -> Result<Vec<Seen>> {
        events(&self.process.stdout(), "request")
    }

    /// How many connections there were so far.
    pub fn connections(&self) -> Result<usize> {
        let accepted: Vec<serde_json::Value> = events(&self.process.stdout(), "accepted")?;
        Ok(accepted.len())
    }

    /// Changes how it answers from now on.
    pub fn configure(&self, pod: &Pod, delay_ms: u64, status: u16) -> Result<()> {
        self.configure_some(pod, delay_ms, status, u64::MAX)
    }

    /// Changes how it gives the next answers, so many of them.
    pub fn configure_some(&self, pod: &Pod, delay_ms: u64, status: u16, times: u64) -> Result<()> {
        ensure!(self.netns == pod.netns().path(), "another pod's server");
        let server = (Ipv4Addr::LOCALHOST, self.port).into();
        let path = format!("/configure?delay_ms={delay_ms}&status={status}&times={times}");
        http::get(pod.netns(), server, &path)?.ok().map(drop)
    }

    /// Ends it as a rolling restart does: no new connections, those that are there finish.
    pub fn stop(mut self) -> Result<()> {
        let status = self.process.stop(DEADLINE)?;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// How many requests went how; see `weft-testapp http load`.
#[derive(Clone, Debug, Deserialize)]
pub struct Report {
    /// Requests with an answer, of whatever status.
    pub answers: u64,
    /// Answers by status code, or by gRPC code.
    pub statuses: BTreeMap<String, u64>,
    /// What had no answer, or none to the end, by what failed.
    pub failures: BTreeMap<String, u64>,
    /// Some of these in words.
    pub first_failures: Vec<String>,
    /// Answers by the name of who gave them.
    pub served_by: BTreeMap<String, u64>,
    /// How often connections had to be opened anew.
    pub reconnects: u64,
    /// The median, in µs.
    pub p50_us: Option<f64>,
    /// The 99th percentile, in µs.
    pub p99_us: Option<f64>,
    /// How long it took.
    pub seconds: f64,
}

impl Report {
    /// Fails unless there were answers, and all of this status.
    pub fn expect_all(&self, status: &str) -> Result<()> {
        ensure!(
            self.answers > 0 && self.statuses.keys().eq([status]) && self.failures.is_empty(),
            "not all were {status}: {self:?}"
        );
        Ok(())
    }

    /// The part of the answers that this server gave, from 0 to 1.
    pub fn share(&self, name: &str) -> f64 {
        let own = self.served_by.get(name).copied().unwrap_or(0);
        own as f64 / (self.answers.max(1)) as f64
    }
}

/// Requests in the background.
#[derive(Debug)]
pub struct HttpLoad {
    process: Process,
}

impl HttpLoad {
    /// Starts HTTP requests, and waits until the first is answered.
    pub fn start(pod: &Pod, target: SocketAddr, further_args: &[&str]) -> Result<HttpLoad> {
        HttpLoad::spawn(pod, "http", target, further_args)
    }

    /// Starts unary gRPC calls, and waits until the first has ended.
    pub fn start_grpc(pod: &Pod, target: SocketAddr, further_args: &[&str]) -> Result<HttpLoad> {
        HttpLoad::spawn(pod, "grpc", target, further_args)
    }

    fn spawn(pod: &Pod, kind: &str, target: SocketAddr, further_args: &[&str]) -> Result<HttpLoad> {
        let mut process = command(pod)?
            .named(&format!("{kind}-load"))
            .args([kind, "load", &target.to_string()])
            .args(further_args)
            .with_stdin()
            .spawn()?;
        process.wait_for_line("begun", DEADLINE)?;
        Ok(HttpLoad { process })
    }

    /// Stops it and says how it went.
    pub fn stop(self) -> Result<Report> {
        let out = self.process.finish(Duration::from_secs(40))?;
        report(&out)
    }
}

/// So many HTTP requests from a pod, to their end.
pub fn http_load(
    pod: &Pod,
    target: SocketAddr,
    requests: u64,
    further_args: &[&str],
) -> Result<Report> {
    load(pod, "http", target, requests, further_args)
}

/// So many unary gRPC calls from a pod, to their end.
pub fn grpc_load(
    pod: &Pod,
    target: SocketAddr,
    requests: u64,
    further_args: &[&str],
) -> Result<Report> {
    load(pod, "grpc", target, requests, further_args)
}

fn load(
    pod: &Pod,
    kind: &str,
    target: SocketAddr,
    requests: u64,
    further_args: &[&str],
) -> Result<Report> {
    let out = command(pod)?
        .args([kind, "load", &target.to_string()])
        .args(["--requests", &requests.to_string()])
        .args(further_args)
        .output(Duration::from_secs(120))?
        .success()?;
    report(&out)
}

fn report(out: &str) -> Result<Report> {
    let mut ended: Vec<Report> = events(out, "end")?;
    ended.pop().context("the load said nothing at its end")
}

/// What came back for bytes that were sent; see `weft-testapp http raw`.
#[derive(Clone, Debug, Deserialize)]
pub struct Raw {
    /// `eof`, `found`, `quiet`, or as in [`crate::testapp::Connected::outcome`].
    pub outcome: String,
    /// All that came, escaped.
    #[serde(default)]
    pub received: String,
    /// The status codes in it.
    #[serde(default)]
    pub statuses: Vec<u16>,
    /// When the first byte came, since before the connect.
    #[serde(default)]
    pub first_byte_ms: Option<f64>,
    /// How long all took.
    pub elapsed_ms: f64,
}

/// Sends (escaped) bytes from a pod, each text in a segment of its own, and gives what came back.
pub fn raw(pod: &Pod, target: SocketAddr, send: &[&str], further_args: &[&str]) -> Result<Raw> {
    let mut program = command(pod)?.args(["http", "raw", &target.to_string()]);
    for text in send {
        program = program.args(["--send", text]);
    }
    parsed(program.args(further_args))
}

/// A running `weft-testapp http transcript`.
#[derive(Debug)]
pub struct Transcript {
    process: Process,
}

impl Transcript {
    /// Starts it.
    pub fn start(pod: &Pod, port: u16, further_args: &[&str]) -> Result<Transcript> {
        let mut process = command(pod)?
            .named("transcript")
            .args(["http", "transcript", "--listen", &format!("0.0.0.0:{port}")])
            .args(further_args)
            .spawn()?;
        process.wait_listening(port)?;
        Ok(Transcript { process })
    }

    /// The heads of what it took for requests so far, escaped.
    pub fn heads(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Head {
            head: String,
        }
        let heads: Vec<Head> = events(&self.process.stdout(), "head")?;
        Ok(heads.into_iter().map(|it| it.head).collect())
    }

    /// Waits until it has read to the end of so many connections.
    pub fn wait_closed(&self, count: usize) -> Result<()> {
        wait_for("the transcript's connections to end", DEADLINE, || {
            let closed: Vec<serde_json::Value> = events(&self.process.stdout(), "closed")?;
            Ok((closed.len() >= count).then_some(()))
        })
    }
}

/// A running `weft-testapp grpc serve`.
#[derive(Debug)]
pub struct GrpcServer {
    process: Process,
}

impl GrpcServer {
    /// Serves on all IPv4 addresses, with the pod's name in the answers.
    pub fn start(pod: &Pod, port: u16) -> Result<GrpcServer> {
        let mut process = command(pod)?
            .named("grpc-serve")
            .args(["grpc", "serve", "--listen", &format!("0.0.0.0:{port}")])
            .args(["--name", pod.name()])
            .spawn()?;
        process.wait_listening(port)?;
        Ok(GrpcServer { process })
    }

    /// Ends it when its calls have ended.
    pub fn stop(mut self) -> Result<()> {
        let status = self.process.stop(DEADLINE)?;
        ensure!(status.success(), "the server ended with {status}");
        Ok(())
    }
}

/// How a gRPC call went; see `weft-testapp grpc call`.
#[derive(Clone, Debug, Deserialize)]
pub struct Called {
    /// The status as a number: 0 is OK.
    pub code: i32,
    /// Its message.
    pub message: String,
    /// Its metadata that is text.
    pub details: Vec<(String, String)>,
    /// The answers.
    pub answers: Vec<Answer>,
    /// How long it took.
    pub elapsed_ms: f64,
}

/// A message of a gRPC server.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    /// The text of the message that it answers.
    pub text: String,
    /// The server's name.
    pub name: String,
    /// The client's address, as the server has it.
    pub peer: String,
    /// How many messages had come.
    pub received: u32,
    /// What of the request's metadata is text.
    pub metadata: BTreeMap<String, String>,
    /// How much payload came with it.
    pub payload_bytes: u64,
}

/// Makes a gRPC call; `args` as in `weft-testapp grpc call --help`.
pub fn grpc_call(pod: &Pod, target: SocketAddr, args: &[&str]) -> Result<Called> {
    let program = command(pod)?.args(["grpc", "call", &target.to_string()]);
    parsed(program.args(args))
}

/// How a WebSocket's messages were echoed.
#[derive(Clone, Debug, Deserialize)]
pub struct Echoed {
    /// `ok` or `error`.
    pub outcome: String,
    /// What went wrong.
    pub error: Option<String>,
    /// How many messages came back as they were sent.
    #[serde(default)]
    pub echoed: usize,
}

/// Starts a WebSocket server that echoes.
pub fn websocket_server(pod: &Pod, port: u16) -> Result<Process> {
    let mut process = command(pod)?
        .named("websocket-serve")
        .args(["websocket", "serve", "--listen", &format!("0.0.0.0:{port}")])
        .spawn()?;
    process.wait_listening(port)?;
    Ok(process)
}

/// Sends messages to a WebSocket server that echoes.
pub fn websocket_echo(pod: &Pod, target: SocketAddr, args: &[&str]) -> Result<Echoed> {
    let program = command(pod)?.args(["websocket", "echo", &target.to_string()]);
    parsed(program.args(args))
}

fn parsed<T: DeserializeOwned>(program: crate::command::Program) -> Result<T> {
    let out = program.output(Duration::from_secs(60))?.success()?;
    serde_json::from_str(&out).with_context(|| format!("reading {out}"))
}
