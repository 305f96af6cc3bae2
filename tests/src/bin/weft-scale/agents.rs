//! Simulated agents. Each has a connection of its own from an address of its own, by TLS, shows the token of its node's
//! agent, says hello, takes in every push and answers it, and asks for addresses. It keeps names and versions of what it
//! was told, to be compared at the end.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::client::Grpc;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic_prost::ProstCodec;
use weft_proto::v1::Kind;
use weft_proto::v1::agent_message::Message as ToController;
use weft_proto::{CONTROLLER_NAME, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, v1};

use crate::board::{Board, Heard};
use crate::wire::{Message, Push, Short};

/// A simulated agent.
pub(crate) struct Agent {
    pub(crate) node: String,
    number: usize,
    token: String,
    /// Services that it asks for.
    asks: Vec<Ipv4Addr>,
    state: Mutex<State>,
    received: AtomicU64,
}

/// What an agent has, and what it went through.
#[derive(Default)]
pub(crate) struct State {
    /// Versions of what it holds of the kinds that are compared.
    pub(crate) held: HashMap<Short, u64>,
    /// Bodies of workloads and endpoints, where they are kept.
    pub(crate) bodies: HashMap<Short, Bytes>,
    /// When it had everything, since it began; the bytes that had come until then.
    pub(crate) complete: Option<(Duration, u64)>,
    pub(crate) heard: Heard,
    pub(crate) pushes: u64,
    /// How long its questions took.
    pub(crate) answers: Vec<Duration>,
    asked: HashMap<Ipv4Addr, Instant>,
    /// Why streams ended before it had everything,
    pub(crate) tried: Vec<String>,
    /// and after that.
    pub(crate) broken: Vec<String>,
}

/// What all of them share.
pub(crate) struct Common {
    pub(crate) controller: SocketAddr,
    pub(crate) roots: String,
    pub(crate) board: Board,
    /// Since when, and for how long, they ask; none: not yet.
    pub(crate) asking: watch::Sender<Option<Duration>>,
}

impl Agent {
    pub(crate) fn new(number: usize, node: &str, token: String, asks: Vec<Ipv4Addr>) -> Arc<Agent> {
        Arc::new(Agent {
            node: node.to_owned(),
            number,
            token,
            asks,
            state: Mutex::default(),
            received: AtomicU64::new(0),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that came by its connections, with those of TLS.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Goes on for ever; a stream that breaks is opened again, as an agent does.
    pub(crate) async fn run(self: Arc<Self>, common: Arc<Common>) {
        let began = Instant::now();
        loop {
            let ended = self.session(&common, began).await;
            let why = ended.err().map(|it| format!("{it:#}"));
            self.broke(why.unwrap_or_else(|| "ended".to_owned()));
            tokio::time::sleep(AGAIN).await;
        }
    }

    fn broke(&self, why: String) {
        let mut state = self.state();
        match state.complete {
            None => state.tried.push(why),
            Some(_) => state.broken.push(why),
        }
        state.held.clear();
        state.bodies.clear();
    }

    async fn session(self: &Arc<Self>, common: &Common, began: Instant) -> Result<()> {
        let channel = self.connect(common).await?;
        let (sender, receiver) = mpsc::channel(64);
        let hello = v1::Hello {
            node: self.node.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION,
            incarnation: self.number as u64 + 1,
            ..v1::Hello::default()
        };
        sender.send(message(ToController::Hello(hello))).await?;
        let mut request = Request::new(ReceiverStream::new(receiver));
        let token = format!("Bearer {}", self.token).parse()?;
        request.metadata_mut().insert("authorization", token);
        let mut client = Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        client.ready().await?;
        let codec = ProstCodec::<v1::AgentMessage, Message>::default();
        let path = PathAndQuery::from_static("/weft.control.v1.Control/Subscribe");
        let response = client.streaming(request, path, codec).await?;
        let mut messages = response.into_inner();
        let asking = self.clone().ask(common.asking.subscribe(), sender.clone());
        let mut asking = std::pin::pin!(asking);
        let mut asked = false;
        loop {
            let received = tokio::select! {
                () = &mut asking, if !asked => {
                    asked = true;
                    continue;
                }
                received = messages.message() => received?,
            };
            let received = received.context("the controller ended the stream")?;
            if let Some(looked) = received.looked {
                self.looked(&looked.address);
            }
            if let Some(push) = received.push {
                let answer = v1::Answer {
                    push: push.id,
                    rejected: vec![],
                };
                self.take(push, &common.board, began);
                sender.send(message(ToController::Answer(answer))).await?;
            }
        }
    }

    /// As agents connect, but for the counting.
    async fn connect(self: &Arc<Self>, common: &Common) -> Result<Channel> {
        let controller = common.controller;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&common.roots))
            .domain_name(CONTROLLER_NAME);
        let endpoint = Endpoint::from_shared(format!("https://{controller}"))?
            .tls_config(tls)?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(10))
            // Agents have 5 s; these have the controller's CPUs.
            .keep_alive_timeout(Duration::from_secs(30))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES * 2);
        let agent = self.clone();
        let connector = tower::service_fn(move |_| {
            let agent = agent.clone();
            async move {
                let socket = TcpSocket::new_v4()?;
                socket.bind((agent.address(), 0).into())?;
                let stream = socket.connect(controller).await?;
                stream.set_nodelay(true)?;
                io::Result::Ok(TokioIo::new(Counted { stream, agent }))
            }
        });
        Ok(endpoint.connect_with_connector(connector).await?)
    }

    /// An address of its own, as nodes have: the controller lets in only so many strangers from one.
    fn address(&self) -> IpAddr {
        let [high, low] = (self.number as u16 + 2).to_be_bytes();
        Ipv4Addr::new(127, 1, high, low).into()
    }

    /// Asks for its Services, evenly over the time in which all do.
    async fn ask(
        self: Arc<Self>,
        mut asking: watch::Receiver<Option<Duration>>,
        sender: mpsc::Sender<v1::AgentMessage>,
    ) {
        let Ok(time) = asking.wait_for(Option::is_some).await.map(|it| *it) else {
            return;
        };
        let pause = time.unwrap_or_default() / self.asks.len().max(1) as u32;
        tokio::time::sleep(pause * (self.number as u32 % 16) / 16).await;
        for address in &self.asks {
            self.state().asked.insert(*address, Instant::now());
            let want = v1::Want {
                address: address.octets().to_vec(),
            };
            if sender
                .send(message(ToController::Want(want)))
                .await
                .is_err()
            {
                return;
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn looked(&self, address: &[u8]) {
        let Ok(address) = <[u8; 4]>::try_from(address) else {
            return;
        };
        let mut state = self.state();
        if let Some(asked) = state.asked.remove(&address.into()) {
            state.answers.push(asked.elapsed());
        }
    }

    fn take(&self, push: Push, board: &Board, began: Instant) {
        let keeps_bodies = self.number == 0;
        let mut state = self.state();
        state.pushes += 1;
        let was_complete = state.complete.is_some();
        for resource in push.changed {
            let Some(key) = resource.key.filter(|it| is_compared(it.kind)) else {
                continue;
            };
            let short = key.short();
            if was_complete && key.kind == Kind::Endpoint as i32 {
                board.hear(&mut state.heard, short, true);
            }
            state.held.insert(short, resource.version);
            if let (true, Some(body)) = (keeps_bodies, resource.workload.or(resource.endpoint)) {
                // A copy: the message that it came in is to go.
                state.bodies.insert(short, Bytes::copy_from_slice(&body));
            }
        }
        for key in push.removed {
            let short = key.short();
            if was_complete && key.kind == Kind::Endpoint as i32 {
                board.hear(&mut state.heard, short, false);
            }
            state.held.remove(&short);
            state.bodies.remove(&short);
        }
        if push.complete && !was_complete {
            state.complete = Some((began.elapsed(), self.received()));
        }
    }
}

/// Kinds of which the objects say what there has to be.
fn is_compared(kind: i32) -> bool {
    [
        Kind::Workload,
        Kind::NodePod,
        Kind::Service,
        Kind::Endpoint,
        Kind::MeshNamespace,
    ]
    .iter()
    .any(|it| *it as i32 == kind)
}

fn message(message: ToController) -> v1::AgentMessage {
    v1::AgentMessage {
        message: Some(message),
    }
}

/// A connection of which what comes is counted.
struct Counted {
    stream: TcpStream,
    agent: Arc<Agent>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let read = buffer.filled().len() - before;
        self.agent
            .received
            .fetch_add(read as u64, Ordering::Relaxed);
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// After a stream that broke.
const AGAIN: Duration = Duration::from_millis(500);
/// As agents have it.
const WINDOW_BYTES: u32 = 1024 * 1024;
