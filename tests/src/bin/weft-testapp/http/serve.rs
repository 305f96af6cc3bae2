//! `http serve`: the connections, and how they end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use http::{HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

use super::answer::{Answering, Connection};
use crate::emit;

/// Answers every request with JSON that says what it saw: name, method, path, version, headers in
/// their order, peer, and the length of the body.
///
/// Some paths do more: `/status/503`, `/delay/200` (ms), `/bytes/1000000`, `/echo` (the body as it
/// comes), `/stream?chunks=5&interval=100` (ms), `/trailers`, `/reset`, `/sink?delay=500` (ms before
/// the body is read), and `/configure?delay_ms=200&status=503` for all other answers from then on, or
/// for so many of them: `&times=2`.
///
/// SIGTERM ends it as a good server ends: no new connections, and those that are there are told so
/// and finish what they do.
#[derive(Args)]
pub(crate) struct Serve {
    /// Where to listen; may be given more than once.
    #[arg(long, required = true)]
    listen: Vec<SocketAddr>,
    /// What it is called in its answers.
    #[arg(long, default_value = "")]
    name: String,
    /// What it understands.
    #[arg(long, value_enum, default_value_t = Speaks::Both)]
    speaks: Speaks,
    /// How long it waits before each answer.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// A header of all its answers, as `name: value`; may be given more than once.
    #[arg(long, value_parser = header)]
    header: Vec<(HeaderName, HeaderValue)>,
    /// Says nothing about connections and requests.
    #[arg(long)]
    quiet: bool,
    /// How long connections may take to end after SIGTERM.
    #[arg(long, default_value_t = 10_000)]
    drain_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Speaks {
    /// HTTP/1 only: an HTTP/2 preface is a bad request.
    Http1,
    /// HTTP/2 with prior knowledge only.
    Http2,
    /// Whichever the client begins with.
    Both,
}

impl Serve {
    pub(crate) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(self.serve())
    }

    async fn serve(self) -> Result<()> {
        let server = Arc::new(Server {
            answering: Arc::new(Answering::new(
                self.name,
                self.header,
                self.delay_ms,
                self.quiet,
            )),
            builder: builder(self.speaks),
            graceful: GracefulShutdown::new(),
            quiet: self.quiet,
            connections: AtomicU64::new(0),
        });
        let mut accepting = tokio::task::JoinSet::new();
        for address in self.listen {
            let listener = listen(address).with_context(|| format!("listening on {address}"))?;
            accepting.spawn(accept_all(listener, Arc::clone(&server)));
        }
        let mut told = signal(SignalKind::terminate())?;
        told.recv().await;
        accepting.shutdown().await;
        let server = Arc::into_inner(server).context("nobody accepts any more")?;
        let drained = server.graceful.shutdown();
        let drain = Duration::from_millis(self.drain_ms);
        let how = match tokio::time::timeout(drain, drained).await {
            Ok(()) => "drained",
            Err(_) => "cut",
        };
        emit(&json!({"event": "end", "outcome": how}));
        Ok(())
    }
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':').context("no name: value")?;
    Ok((name.parse()?, value.trim().parse()?))
}

/// What all connections share.
struct Server {
    answering: Arc<Answering>,
    builder: auto::Builder<TokioExecutor>,
    graceful: GracefulShutdown,
    quiet: bool,
    connections: AtomicU64,
}

/// An IPv6 socket is for IPv6 only, so that both families can be listened to.
fn listen(address: SocketAddr) -> Result<TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(TcpListener::from_std(socket.into())?)
}

async fn accept_all(listener: TcpListener, server: Arc<Server>) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => server.connection(stream, peer),
            // Out of descriptors, most likely: others will end.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

impl Server {
    fn connection(&self, stream: TcpStream, peer: SocketAddr) {
        let _ = stream.set_nodelay(true);
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection::new(&stream, peer, number));
        if !self.quiet {
            emit(
                &json!({"event": "accepted", "connection": number, "accepted": peer.to_string(),
                "peer": stream.peer_addr().ok().map(|it| it.to_string()),
                "local": stream.local_addr().ok().map(|it| it.to_string())}),
            );
        }
        let answering = Arc::clone(&self.answering);
        let service = service_fn(move |request| {
            let (answering, connection) = (Arc::clone(&answering), Arc::clone(&connection));
            async move { answering.answer(request, &connection).await }
        });
        let serving = self.builder.serve_connection(TokioIo::new(stream), service);
        let serving = self.graceful.watch(serving.into_owned());
        let quiet = self.quiet;
        tokio::spawn(async move {
            let ended = serving.await;
            if !quiet {
                let error = ended.err().map(|error| error.to_string());
                emit(&json!({"event": "closed", "connection": number, "error": error}));
            }
        });
    }
}

fn builder(speaks: Speaks) -> auto::Builder<TokioExecutor> {
    let builder = auto::Builder::new(TokioExecutor::new());
    let mut builder = match speaks {
        Speaks::Http1 => builder.http1_only(),
        Speaks::Http2 => builder.http2_only(),
        Speaks::Both => builder,
    };
    builder
        .http1()
        .timer(TokioTimer::new())
        // A client that has sent all it has to say may still be answered.
        .half_close(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(1000);
    builder
}
