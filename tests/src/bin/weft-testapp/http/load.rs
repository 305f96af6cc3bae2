//! `http load`: connections that are kept busy while something else happens.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use clap::Args;
use http::{HeaderName, HeaderValue, Method, Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::SERVED_BY;
use crate::emit;

/// Sends requests one after the other on each connection until standard input ends or there were
/// enough, and says how they went: by status, by what failed, by who answered, and how long they
/// took. A connection that the server ended in order between two requests is opened anew and is no
/// failure.
#[derive(Args)]
pub(crate) struct Load {
    target: SocketAddr,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// How many requests are open at once on a connection; more than one takes HTTP/2.
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// HTTP/2 with prior knowledge.
    #[arg(long)]
    http2: bool,
    #[arg(long, default_value = "/")]
    path: String,
    #[arg(long, default_value = "GET")]
    method: Method,
    /// The authority, if it is not the target.
    #[arg(long)]
    host: Option<String>,
    /// A header, `name: value`; may be given more than once.
    #[arg(long, value_name = "HEADER")]
    header: Vec<String>,
    /// How long each request's body is.
    #[arg(long, default_value_t = 0)]
    body_bytes: usize,
    /// How many requests there are in all; else until standard input ends.
    #[arg(long)]
    requests: Option<u64>,
    /// The pause between two requests.
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
    /// A request or a connect that takes longer has failed.
    #[arg(long, default_value_t = 10_000)]
    timeout_ms: u64,
}

impl Load {
    pub(crate) fn run(self) -> Result<()> {
        if self.streams > 1 && !self.http2 {
            bail!("only HTTP/2 has more than one request on a connection at once");
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let work = Arc::new(self.work()?);
        let stopper = Arc::clone(&work);
        if self.requests.is_none() {
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                stopper.stop.store(true, Ordering::Relaxed);
            });
        }
        let start = Instant::now();
        let tally = runtime.block_on(async {
            let mut workers = JoinSet::new();
            for _ in 0..self.connections {
                workers.spawn(connection(Arc::clone(&work), self.streams));
            }
            let mut all = Tally::default();
            while let Some(tally) = workers.join_next().await {
                all.merge(tally?);
            }
            anyhow::Ok(all)
        })?;
        let mut report = tally.report();
        report["event"] = "end".into();
        report["seconds"] = start.elapsed().as_secs_f64().into();
        emit(&report);
        Ok(())
    }

    fn work(&self) -> Result<Work> {
        let authority = self.host.clone().unwrap_or_else(|| self.target.to_string());
        let mut headers = Vec::new();
        for header in &self.header {
            let (name, value) = header
                .split_once(':')
                .context("a header is `name: value`")?;
            headers.push((name.trim().parse()?, value.trim().parse()?));
        }
        let uri = match self.http2 {
            true => format!("http://{authority}{}", self.path).parse()?,
            false => self.path.parse()?,
        };
        Ok(Work {
            target: self.target,
            http2: self.http2,
            method: self.method.clone(),
            uri,
            authority: authority.parse()?,
            headers,
            body: vec![b'x'; self.body_bytes].into(),
            left: self.requests.map(Into::into),
            pause: Duration::from_millis(self.pause_ms),
            timeout: Duration::from_millis(self.timeout_ms),
            stop: AtomicBool::new(false),
            begun: AtomicBool::new(false),
        })
    }
}

/// How requests went.
#[derive(Default)]
pub(crate) struct Tally {
    statuses: BTreeMap<String, u64>,
    failures: BTreeMap<String, u64>,
    served_by: BTreeMap<String, u64>,
    first_failures: Vec<String>,
    taken: Vec<Duration>,
    reconnects: u64,
}

impl Tally {
    /// Counts an answer.
    pub(crate) fn answer(&mut self, status: String, served_by: String, taken: Duration) {
        *self.statuses.entry(status).or_default() += 1;
        *self.served_by.entry(served_by).or_default() += 1;
        self.taken.push(taken);
    }

    /// Counts what was not answered, or not to the end.
    pub(crate) fn failure(&mut self, kind: &str, error: &str) {
        *self.failures.entry(kind.to_owned()).or_default() += 1;
        if self.first_failures.len() < 5 {
            self.first_failures.push(format!("{kind}: {error}"));
        }
    }

    /// Adds what another worker counted.
    pub(crate) fn merge(&mut self, other: Tally) {
        let add = |to: &mut BTreeMap<String, u64>, from: BTreeMap<String, u64>| {
            for (key, count) in from {
                *to.entry(key).or_default() += count;
            }
        };
        add(&mut self.statuses, other.statuses);
        add(&mut self.failures, other.failures);
        add(&mut self.served_by, other.served_by);
        self.first_failures.extend(other.first_failures);
        self.first_failures.truncate(5);
        self.taken.extend(other.taken);
        self.reconnects += other.reconnects;
    }

    /// All of it.
    pub(crate) fn report(mut self) -> Value {
        self.taken.sort_unstable();
        let at = |part: f64| {
            let index = (self.taken.len() as f64 * part) as usize;
            let taken = self.taken.get(index);
            taken.map(|taken| taken.as_secs_f64() * 1e6)
        };
        json!({
            "answers": self.taken.len(),
            "statuses": self.statuses,
            "failures": self.failures,
            "first_failures": self.first_failures,
            "served_by": self.served_by,
            "reconnects": self.reconnects,
            "p50_us": at(0.5),
            "p99_us": at(0.99),
        })
    }
}

/// What all connections do.
struct Work {
    target: SocketAddr,
    http2: bool,
    method: Method,
    uri: Uri,
    authority: HeaderValue,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: Bytes,
    left: Option<std::sync::atomic::AtomicU64>,
    pause: Duration,
    timeout: Duration,
    stop: AtomicBool,
    begun: AtomicBool,
}

impl Work {
    /// Whether there is another request to send; takes it if so.
    fn take(&self) -> bool {
        let Some(left) = &self.left else {
            return !self.stop.load(Ordering::Relaxed);
        };
        left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1)
        })
        .is_ok()
    }

    fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        let headers = request.headers_mut();
        if !self.http2 {
            headers.insert(http::header::HOST, self.authority.clone());
        }
        for (name, value) in &self.headers {
            headers.append(name, value.clone());
        }
        request
    }

    /// Says once that it goes on.
    fn begin(&self) {
        if !self.begun.swap(true, Ordering::Relaxed) {
            emit(&json!({"event": "begun"}));
        }
    }
}

async fn connection(work: Arc<Work>, streams: usize) -> Tally {
    let mut all = Tally::default();
    let mut connects = 0_u64;
    let mut workers = JoinSet::new();
    while !work.stop.load(Ordering::Relaxed) {
        let opened = tokio::time::timeout(work.timeout, Sender::open(&work)).await;
        let sender = match opened.unwrap_or_else(|_| Err(anyhow!("timed out"))) {
            Ok(sender) => sender,
            Err(error) => {
                all.failure("connect", &format!("{error:#}"));
                if !work.take() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        connects += 1;
        let (first, others) = sender.share(streams);
        for sender in others {
            workers.spawn(exchanges(Arc::clone(&work), sender));
        }
        let (tally, mut done) = exchanges(Arc::clone(&work), first).await;
        all.merge(tally);
        while let Some(Ok((tally, also_done))) = workers.join_next().await {
            all.merge(tally);
            done &= also_done;
        }
        if done {
            break;
        }
    }
    all.reconnects = connects.saturating_sub(1);
    all
}

/// Requests in a row until the connection ends, or there are no more: then true.
async fn exchanges(work: Arc<Work>, mut sender: Sender) -> (Tally, bool) {
    let mut tally = Tally::default();
    loop {
        if !sender.is_ready().await {
            return (tally, false);
        }
        if !work.take() {
            return (tally, true);
        }
        let start = Instant::now();
        let exchange = tokio::time::timeout(work.timeout, sender.exchange(&work)).await;
        let failed = match exchange {
            Ok(Ok((status, served_by))) => {
                tally.answer(status, served_by, start.elapsed());
                false
            }
            Ok(Err(Failed { kind, error })) => {
                tally.failure(kind, &error);
                true
            }
            Err(_) => {
                tally.failure("timeout", "no answer in time");
                true
            }
        };
        work.begin();
        if failed {
            return (tally, false);
        }
        if !work.pause.is_zero() {
            tokio::time::sleep(work.pause).await;
        }
    }
}

struct Failed {
    kind: &'static str,
    error: String,
}

/// Where requests go.
enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Sender {
    async fn open(work: &Work) -> Result<Sender> {
        let stream = TcpStream::connect(work.target).await?;
        stream.set_nodelay(true)?;
        let stream = TokioIo::new(stream);
        if work.http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
            tokio::spawn(connection);
            Ok(Sender::Http2(sender))
        } else {
            let (sender, connection) = http1::handshake(stream).await?;
            tokio::spawn(connection);
            Ok(Sender::Http1(sender))
        }
    }

    /// This one, and others for the same connection.
    fn share(self, streams: usize) -> (Sender, Vec<Sender>) {
        let others = match &self {
            Sender::Http1(_) => Vec::new(),
            Sender::Http2(sender) => (1..streams)
                .map(|_| Sender::Http2(sender.clone()))
                .collect(),
        };
        (self, others)
    }

    /// Whether another request can be sent; false when the server has ended the connection.
    async fn is_ready(&mut self) -> bool {
        match self {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    /// Status and who answered, once the body is there.
    async fn exchange(&mut self, work: &Work) -> Result<(String, String), Failed> {
        let sent = match self {
            Sender::Http1(sender) => sender.send_request(work.request()).await,
            Sender::Http2(sender) => sender.send_request(work.request()).await,
        };
        let response: Response<Incoming> = sent.map_err(|error| failed("request", &error))?;
        let status = response.status().as_str().to_owned();
        let served_by = response.headers().get(SERVED_BY);
        let served_by = served_by.and_then(|name| name.to_str().ok());
        let served_by = served_by.unwrap_or_default().to_owned();
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            frame.map_err(|error| failed("body", &error))?;
        }
        Ok((status, served_by))
    }
}

fn failed(kind: &'static str, error: &hyper::Error) -> Failed {
    Failed {
        kind,
        error: chain(error),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
