//! New connections: as many as possible, or one to each of many servers.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use super::exchanges::Http2;
use super::runtime;

/// Clients that each connect, send a request, read the answer to its end, and begin again. The server closes first
/// and keeps `TIME_WAIT`, so the client's ports are free again; of HTTP/2, where servers don't close, the
/// client resets the connection for that.
#[derive(Args)]
pub(crate) struct Connections {
    target: SocketAddr,
    #[arg(long)]
    seconds: u32,
    #[arg(long, default_value_t = 32)]
    clients: u32,
    /// Speak HTTP/2 with prior knowledge.
    #[arg(long)]
    http2: bool,
    /// Call a method of gRPC.
    #[arg(long)]
    grpc: bool,
}

impl Connections {
    pub(crate) fn run(self) -> Result<()> {
        let local = LocalSet::new();
        let count = Rc::new(Cell::new(0_u64));
        let start = Instant::now();
        let end = start + Duration::from_secs(self.seconds.into());
        let (target, by_http2) = (self.target, self.http2 || self.grpc);
        let is_grpc = self.grpc;
        local.block_on(&runtime()?, async {
            let clients: Vec<_> = (0..self.clients)
                .map(|_| {
                    let count = Rc::clone(&count);
                    tokio::task::spawn_local(async move {
                        while Instant::now() < end {
                            match by_http2 {
                                true => exchange_http2(target, is_grpc).await?,
                                false => exchange(target).await?,
                            }
                            count.set(count.get() + 1);
                        }
                        anyhow::Ok(())
                    })
                })
                .collect();
            for client in clients {
                client.await??;
            }
            anyhow::Ok(())
        })?;
        let seconds = start.elapsed().as_secs_f64();
        println!("{}", json!({"count": count.get(), "seconds": seconds}));
        Ok(())
    }
}

/// One connection with one request.
async fn exchange(target: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(target).await.context("connecting")?;
    stream.set_nodelay(true)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
    let mut buffer = [0; 1024];
    let mut filled = 0;
    loop {
        let read = stream.read(&mut buffer[filled..]);
        match read.await.context("reading the answer")? {
            0 => break,
            count => filled += count,
        }
    }
    ensure!(
        // The mesh answers in the version of the request.
        buffer.starts_with(b"HTTP/1.1 200 ") || buffer.starts_with(b"HTTP/1.0 200 "),
        "the answer was {:?}",
        String::from_utf8_lossy(&buffer[..filled])
    );
    Ok(())
}

/// The same by HTTP/2.
async fn exchange_http2(target: SocketAddr, is_grpc: bool) -> Result<()> {
    let stream = TcpStream::connect(target).await.context("connecting")?;
    stream.set_nodelay(true)?;
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    let (sender, connection) = h2::client::handshake(stream).await?;
    let driver = tokio::task::spawn_local(connection);
    let mut http2 = Http2::new(sender, target, is_grpc);
    http2.exchange().await?;
    driver.abort();
    Ok(())
}

/// Opens one connection to each server when standard input ends, a few at a time, and waits for the
/// echo of a byte on each.
#[derive(Args)]
pub(crate) struct Each {
    targets: Vec<SocketAddr>,
    /// How many are on their way at once.
    #[arg(long, default_value_t = 16)]
    at_once: usize,
}

impl Each {
    pub(crate) fn run(self) -> Result<()> {
        println!("ready");
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
        let start = Instant::now();
        let local = LocalSet::new();
        let opened = local.block_on(&runtime()?, async {
            let mut workers = Vec::new();
            for worker in 0..self.at_once {
                let own: Vec<SocketAddr> = self
                    .targets
                    .iter()
                    .copied()
                    .skip(worker)
                    .step_by(self.at_once)
                    .collect();
                workers.push(tokio::task::spawn_local(echo_each(own)));
            }
            let mut opened = 0;
            for worker in workers {
                opened += worker.await??;
            }
            anyhow::Ok(opened)
        })?;
        let seconds = start.elapsed().as_secs_f64();
        println!("{}", json!({"opened": opened, "seconds": seconds}));
        Ok(())
    }
}

async fn echo_each(targets: Vec<SocketAddr>) -> Result<usize> {
    let mut opened = 0;
    for target in targets {
        let stream = TcpStream::connect(target).await;
        echo_one_byte(&mut stream.with_context(|| format!("connecting to {target}"))?)
            .await
            .with_context(|| format!("waiting for {target}"))?;
        opened += 1;
    }
    Ok(opened)
}

/// Sends a byte and waits for it to come back.
pub(crate) async fn echo_one_byte(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"x").await?;
    let mut echo = [0; 1];
    stream.read_exact(&mut echo).await?;
    ensure!(&echo == b"x", "the echo was another byte");
    Ok(())
}
