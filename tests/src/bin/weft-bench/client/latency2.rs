//! The same as [`super::Latency`] by HTTP/2, with prior knowledge, and by gRPC.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use bytes::Bytes;
use clap::Args;
use h2::client::SendRequest;
use http::{Method, Request};
use tokio::net::TcpStream;

use super::latency::{print_latencies, wait_until};
use crate::load::UNARY;

/// Open loop, one request at once on each connection; counted as `latency` counts.
#[derive(Args)]
pub(crate) struct Latency2 {
    target: SocketAddr,
    #[arg(long)]
    seconds: u32,
    /// Requests a second, over all connections.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    #[arg(long, default_value_t = 8)]
    connections: u32,
    /// Unary calls of gRPC.
    #[arg(long)]
    grpc: bool,
}

impl Latency2 {
    pub(crate) fn run(self) -> Result<()> {
        let client = &self;
        let interval = Duration::from_secs(1) / self.rate;
        let start = Instant::now() + WARM_UP;
        let taken = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.connections)
                .map(|number| {
                    let first = start + interval * number;
                    let interval = interval * client.connections;
                    scope.spawn(move || {
                        super::runtime()?.block_on(client.connection(first, interval))
                    })
                })
                .collect();
            let mut taken = Vec::new();
            for worker in workers {
                let result = worker.join().map_err(|_| anyhow!("a worker panicked"))?;
                taken.extend(result?);
            }
            anyhow::Ok(taken)
        })?;
        print_latencies(taken)
    }

    async fn connection(&self, first: Instant, interval: Duration) -> Result<Vec<Duration>> {
        nix::sys::prctl::set_timerslack(1)?;
        let stream = TcpStream::connect(self.target).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = h2::client::handshake(stream).await?;
        let connection = tokio::spawn(connection);
        for _ in 0..WARM_UP_REQUESTS {
            sender = self.exchange(sender).await?;
        }
        let end = first + Duration::from_secs(self.seconds.into());
        let mut taken = Vec::new();
        let mut due = first;
        while due < end {
            // Blocks the thread, which is this connection's own: a timer of the runtime counts in ms.
            let from = wait_until(due);
            sender = self.exchange(sender).await?;
            taken.push(from.elapsed());
            due += interval;
        }
        drop(sender);
        connection.abort();
        Ok(taken)
    }

    async fn exchange(&self, sender: SendRequest<Bytes>) -> Result<SendRequest<Bytes>> {
        let mut sender = sender.ready().await?;
        let path = if self.grpc { UNARY } else { "/" };
        let mut request = Request::new(());
        *request.uri_mut() = format!("http://{}{path}", self.target).parse()?;
        if self.grpc {
            *request.method_mut() = Method::POST;
            let headers = request.headers_mut();
            headers.insert("content-type", "application/grpc".parse()?);
            headers.insert("te", "trailers".parse()?);
        }
        let (response, mut body) = sender.send_request(request, !self.grpc)?;
        if self.grpc {
            body.send_data(Bytes::from_static(&[0; 5]), true)?;
        }
        let response = response.await?;
        ensure!(
            response.status() == 200,
            "the answer is {}",
            response.status()
        );
        let mut body = response.into_body();
        while let Some(data) = body.data().await {
            let _ = body.flow_control().release_capacity(data?.len());
        }
        let trailers = body.trailers().await?;
        if self.grpc {
            let status = trailers.and_then(|it| it.get("grpc-status").cloned());
            ensure!(status.is_some_and(|it| it == "0"), "the call failed");
        }
        Ok(sender)
    }
}

const WARM_UP: Duration = Duration::from_millis(300);
const WARM_UP_REQUESTS: u32 = 5;
