//! `grpc`: a server with one method for each kind of call, and a client for it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use futures::{Stream, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::{KeyAndValueRef, MetadataKey, MetadataMap};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::emit;
use crate::http::Tally;
use v1::echo_client::EchoClient;
use v1::echo_server::{Echo, EchoServer};
use v1::{Answer, Ask};

/// Generated from `proto/weft/test/v1/echo.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
mod v1 {
    tonic::include_proto!("weft.test.v1");
}

/// gRPC.
#[derive(Subcommand)]
pub(crate) enum Grpc {
    /// Answers calls until told to end.
    Serve(Serve),
    /// Makes one call and says how it went.
    Call(Call),
    /// Makes unary calls until standard input ends or there were enough, and counts how they went.
    Load(Load),
}

/// `weft.test.v1.Echo`; SIGTERM ends it when the calls in flight have ended.
#[derive(Args)]
pub(crate) struct Serve {
    #[arg(long)]
    listen: SocketAddr,
    /// What it is called in its answers.
    #[arg(long, default_value = "")]
    name: String,
}

/// One call; the answers, the status and its details are printed.
#[derive(Args)]
pub(crate) struct Call {
    target: SocketAddr,
    #[arg(long, value_enum, default_value_t = Kind::Unary)]
    kind: Kind,
    #[arg(long, default_value = "hello")]
    text: String,
    /// How many messages are sent (collect, chat) or asked for (expand).
    #[arg(long, default_value_t = 3)]
    count: u32,
    /// The status that the server shall end with; with a text of `first 2: ...` the first two times only.
    #[arg(long, default_value_t = 0)]
    code: i32,
    /// How long the server shall wait before each answer.
    #[arg(long, default_value_t = 0)]
    delay_ms: u32,
    /// How many bytes of payload each answer shall have.
    #[arg(long, default_value_t = 0)]
    bytes: u32,
    /// The deadline, sent as `grpc-timeout`.
    #[arg(long)]
    deadline_ms: Option<u64>,
    /// Metadata, `name: value`; may be given more than once.
    #[arg(long, value_name = "METADATA")]
    metadata: Vec<String>,
    /// The authority, if it is not the target.
    #[arg(long)]
    authority: Option<String>,
}

/// Calls in a row on each of some connections.
#[derive(Args)]
pub(crate) struct Load {
    target: SocketAddr,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    #[arg(long)]
    requests: Option<u64>,
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Unary,
    /// The client streams.
    Collect,
    /// The server streams.
    Expand,
    /// Both do, in turns.
    Chat,
}

impl Grpc {
    pub(crate) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        match self {
            Grpc::Serve(serve) => runtime.block_on(serve.serve()),
            Grpc::Call(call) => runtime.block_on(call.call()),
            Grpc::Load(load) => runtime.block_on(load.load()),
        }
    }
}

impl Serve {
    async fn serve(self) -> Result<()> {
        let listener = TcpListener::bind(self.listen).await?;
        let mut told = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .add_service(EchoServer::new(Service {
                name: self.name,
                asked: Arc::default(),
            }))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async move {
                told.recv().await;
            })
            .await?;
        emit(&json!({"event": "end", "outcome": "drained"}));
        Ok(())
    }
}

/// What the methods share.
#[derive(Clone)]
struct Service {
    name: String,
    /// How often each text was asked.
    asked: Arc<Mutex<HashMap<String, u32>>>,
}

/// Who asks, and what they sent along.
#[derive(Clone)]
struct Caller {
    name: String,
    peer: String,
    metadata: HashMap<String, String>,
}

impl Service {
    /// The status to end with: of a text `first 2: ...` only the first two times are asked to fail.
    fn code(&self, ask: &Ask) -> i32 {
        let times = ask
            .text
            .strip_prefix("first ")
            .and_then(|it| it.split_once(':'));
        let Some(times) = times.and_then(|(it, _)| it.parse::<u32>().ok()) else {
            return ask.code;
        };
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let before = asked.entry(ask.text.clone()).or_default();
        *before += 1;
        if *before <= times { ask.code } else { 0 }
    }

    fn caller<T>(&self, request: &Request<T>) -> Caller {
        let peer = request.remote_addr();
        Caller {
            name: self.name.clone(),
            peer: peer.map(|peer| peer.to_string()).unwrap_or_default(),
            metadata: text_metadata(request.metadata()).collect(),
        }
    }
}

impl Caller {
    async fn answer(&self, ask: &Ask, received: u32) -> Result<Answer, Status> {
        if ask.delay_ms > 0 {
            tokio::time::sleep(Duration::from_millis(ask.delay_ms.into())).await;
        }
        Ok(Answer {
            text: ask.text.clone(),
            name: self.name.clone(),
            peer: self.peer.clone(),
            metadata: self.metadata.clone(),
            received,
            payload: vec![b'x'; ask.bytes as usize],
        })
    }
}

/// The status that was asked for, with something in its details.
fn end(code: i32) -> Result<(), Status> {
    if code == 0 {
        return Ok(());
    }
    let mut status = Status::new(Code::from_i32(code), "as you asked");
    let value = tonic::metadata::MetadataValue::from(code);
    status.metadata_mut().insert("x-asked-code", value);
    Err(status)
}

type Answers = Pin<Box<dyn Stream<Item = Result<Answer, Status>> + Send>>;

#[tonic::async_trait]
impl Echo for Service {
    async fn unary(&self, request: Request<Ask>) -> Result<Response<Answer>, Status> {
        let caller = self.caller(&request);
        let ask = request.into_inner();
        let code = self.code(&ask);
        let answer = caller.answer(&ask, 1).await?;
        end(code)?;
        Ok(Response::new(answer))
    }

    async fn collect(&self, request: Request<Streaming<Ask>>) -> Result<Response<Answer>, Status> {
        let caller = self.caller(&request);
        let mut asks = request.into_inner();
        let (mut last, mut received) = (Ask::default(), 0);
        while let Some(ask) = asks.message().await? {
            (last, received) = (ask, received + 1);
        }
        let answer = caller.answer(&last, received).await?;
        end(last.code)?;
        Ok(Response::new(answer))
    }

    type ExpandStream = Answers;

    async fn expand(&self, request: Request<Ask>) -> Result<Response<Answers>, Status> {
        let caller = self.caller(&request);
        let mut ask = request.into_inner();
        ask.code = self.code(&ask);
        let answers = futures::stream::unfold(0, move |number| {
            let (caller, ask) = (caller.clone(), ask.clone());
            async move {
                match number.cmp(&ask.count) {
                    std::cmp::Ordering::Less => {
                        Some((caller.answer(&ask, number + 1).await, number + 1))
                    }
                    std::cmp::Ordering::Equal => {
                        end(ask.code).err().map(|status| (Err(status), number + 1))
                    }
                    std::cmp::Ordering::Greater => None,
                }
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    type ChatStream = Answers;

    async fn chat(&self, request: Request<Streaming<Ask>>) -> Result<Response<Answers>, Status> {
        let caller = self.caller(&request);
        let asks = request.into_inner();
        let answers = asks.enumerate().then(move |(number, ask)| {
            let caller = caller.clone();
            async move {
                let ask = ask?;
                let answer = caller.answer(&ask, number as u32 + 1).await?;
                end(ask.code)?;
                Ok(answer)
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

impl Call {
    async fn call(self) -> Result<()> {
        let start = Instant::now();
        let mut answers = Vec::new();
        let ended = self.exchange(&mut answers).await;
        let status = ended.err().unwrap_or_else(|| Status::ok(""));
        emit(&json!({
            "code": status.code() as i32,
            "message": status.message(),
            "details": text_metadata(status.metadata()).collect::<Vec<_>>(),
            "answers": answers.iter().map(seen).collect::<Vec<_>>(),
            "elapsed_ms": start.elapsed().as_secs_f64() * 1e3,
        }));
        Ok(())
    }

    async fn exchange(&self, answers: &mut Vec<Answer>) -> Result<(), Status> {
        let mut endpoint = endpoint(self.target)?;
        if let Some(authority) = &self.authority {
            let origin = format!("http://{authority}").parse();
            endpoint = endpoint.origin(origin.map_err(|_| Status::internal("the authority"))?);
        }
        let mut client = EchoClient::new(connect(&endpoint).await?);
        let ask = self.ask();
        let asks = futures::stream::iter(vec![ask.clone(); self.count as usize]);
        match self.kind {
            Kind::Unary => answers.push(client.unary(self.request(ask)?).await?.into_inner()),
            Kind::Collect => answers.push(client.collect(self.request(asks)?).await?.into_inner()),
            Kind::Expand => {
                let stream = client.expand(self.request(ask)?).await?.into_inner();
                receive_all(stream, answers).await?;
            }
            Kind::Chat => self.chat(client, answers).await?,
        }
        Ok(())
    }

    /// Each message is sent when the one before it has been answered, so that nothing on the way can
    /// hold messages back until there are more.
    async fn chat(
        &self,
        mut client: EchoClient<Channel>,
        answers: &mut Vec<Answer>,
    ) -> Result<(), Status> {
        let (send, asks) = tokio::sync::mpsc::channel(1);
        let closed = |_| Status::cancelled("the call has ended");
        send.send(self.ask()).await.map_err(closed)?;
        let asks = tokio_stream::wrappers::ReceiverStream::new(asks);
        let mut stream = client.chat(self.request(asks)?).await?.into_inner();
        let mut sent = 1;
        let mut send = Some(send);
        while let Some(answer) = stream.message().await? {
            answers.push(answer);
            if sent == self.count {
                send = None;
            }
            if let Some(send) = &send {
                send.send(self.ask()).await.map_err(closed)?;
                sent += 1;
            }
        }
        Ok(())
    }

    fn ask(&self) -> Ask {
        Ask {
            text: self.text.clone(),
            code: self.code,
            delay_ms: self.delay_ms,
            count: self.count,
            bytes: self.bytes,
        }
    }

    fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        let mut request = Request::new(message);
        if let Some(deadline) = self.deadline_ms {
            request.set_timeout(Duration::from_millis(deadline));
        }
        for text in &self.metadata {
            let invalid = || Status::internal(format!("not metadata: {text}"));
            let (key, value) = text.split_once(':').ok_or_else(invalid)?;
            let key: MetadataKey<_> = key.trim().parse().map_err(|_| invalid())?;
            let value = value.trim().parse().map_err(|_| invalid())?;
            request.metadata_mut().append(key, value);
        }
        Ok(request)
    }
}

impl Load {
    async fn load(self) -> Result<()> {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        if self.requests.is_none() {
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                stop.send(true)
            });
        }
        let start = Instant::now();
        let share = self
            .requests
            .map(|all| all.div_ceil(self.connections as u64));
        let pause = Duration::from_millis(self.pause_ms);
        let mut workers = tokio::task::JoinSet::new();
        for _ in 0..self.connections {
            workers.spawn(calls(self.target, share, pause, stopped.clone()));
        }
        let mut all = Tally::default();
        while let Some(tally) = workers.join_next().await {
            all.merge(tally?);
        }
        let mut report = all.report();
        report["event"] = "end".into();
        report["seconds"] = start.elapsed().as_secs_f64().into();
        emit(&report);
        Ok(())
    }
}

async fn calls(
    target: SocketAddr,
    most: Option<u64>,
    pause: Duration,
    stopped: tokio::sync::watch::Receiver<bool>,
) -> Tally {
    let mut tally = Tally::default();
    let mut made = 0;
    let mut client = None;
    while most.map_or(!*stopped.borrow(), |most| made < most) {
        made += 1;
        let start = Instant::now();
        let called = async {
            let client = match &mut client {
                Some(client) => client,
                none => none.insert(EchoClient::new(connect(&endpoint(target)?).await?)),
            };
            client.unary(Ask::default()).await
        };
        match called.await {
            Ok(answer) => {
                tally.answer("0".into(), answer.into_inner().name, start.elapsed());
            }
            Err(status) => tally.failure(&format!("{:?}", status.code()), &format!("{status:?}")),
        }
        if made == 1 {
            emit(&json!({"event": "begun"}));
        }
        tokio::time::sleep(pause).await;
    }
    tally
}

fn endpoint(target: SocketAddr) -> Result<Endpoint, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{target}"));
    let endpoint = endpoint.map_err(|error| Status::internal(error.to_string()))?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(10))
        .tcp_nodelay(true))
}

async fn connect(endpoint: &Endpoint) -> Result<Channel, Status> {
    let connected = endpoint.connect().await;
    connected.map_err(|error| Status::unavailable(format!("connecting: {error:?}")))
}

async fn receive_all(
    mut stream: Streaming<Answer>,
    answers: &mut Vec<Answer>,
) -> Result<(), Status> {
    while let Some(answer) = stream.message().await? {
        answers.push(answer);
    }
    Ok(())
}

fn text_metadata(metadata: &MetadataMap) -> impl Iterator<Item = (String, String)> + '_ {
    metadata.iter().filter_map(|pair| match pair {
        KeyAndValueRef::Ascii(key, value) => {
            Some((key.as_str().to_owned(), value.to_str().ok()?.to_owned()))
        }
        KeyAndValueRef::Binary(..) => None,
    })
}

fn seen(answer: &Answer) -> Value {
    json!({"text": answer.text, "name": answer.name, "peer": answer.peer, "received": answer.received,
        "metadata": answer.metadata, "payload_bytes": answer.payload.len()})
}
