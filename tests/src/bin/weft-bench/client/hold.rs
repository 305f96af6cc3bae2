//! Connections that are opened, used once, and kept.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use super::connections::echo_one_byte;
use super::http::response_length;
use super::{raise_descriptor_limit, runtime};

/// Opens connections, uses each once, and keeps them until standard input ends.
#[derive(Args)]
pub(crate) struct Hold {
    target: SocketAddr,
    #[arg(long)]
    count: usize,
    /// How many are on their way at once.
    #[arg(long, default_value_t = 32)]
    at_once: usize,
    /// How often each is tried: on a machine that does much else, one of thousands may take too long.
    #[arg(long, default_value_t = 1)]
    tries: usize,
    /// A request and its answer by HTTP/1 on each, rather than an echo.
    #[arg(long)]
    http: bool,
}

impl Hold {
    pub(crate) fn run(self) -> Result<()> {
        raise_descriptor_limit()?;
        let local = LocalSet::new();
        let mut kept = Vec::with_capacity(self.count);
        local.block_on(&runtime()?, async {
            let mut workers = Vec::new();
            for worker in 0..self.at_once {
                let own = (self.count + self.at_once - 1 - worker) / self.at_once;
                workers.push(tokio::task::spawn_local(open_all(
                    self.target,
                    own,
                    self.tries,
                    self.http,
                )));
            }
            for worker in workers {
                kept.extend(worker.await??);
            }
            anyhow::Ok(())
        })?;
        println!("{}", json!({"held": kept.len()}));
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
        Ok(())
    }
}

async fn open_all(
    target: SocketAddr,
    count: usize,
    tries: usize,
    http: bool,
) -> Result<Vec<TcpStream>> {
    let mut opened = Vec::new();
    for number in 0..count {
        let mut tried = 1;
        let stream = loop {
            match open(target, http).await {
                Err(_) if tried < tries => tried += 1,
                result => break result.with_context(|| format!("after {number}"))?,
            }
        };
        opened.push(stream);
    }
    Ok(opened)
}

async fn open(target: SocketAddr, http: bool) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(target).await.context("connecting")?;
    if http {
        let asked = ask(&mut stream, target).await;
        asked.context("waiting for the answer")?;
        return Ok(stream);
    }
    echo_one_byte(&mut stream)
        .await
        .context("waiting for the echo")?;
    Ok(stream)
}

/// One request and its answer; the connection stays.
async fn ask(stream: &mut TcpStream, target: SocketAddr) -> Result<()> {
    let request = format!("GET / HTTP/1.1\r\nHost: {target}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut buffer = [0; 1024];
    let mut filled = 0;
    loop {
        let count = stream.read(&mut buffer[filled..]).await?;
        ensure!(count > 0, "the connection ended");
        filled += count;
        if let Some(length) = response_length(&buffer[..filled])?
            && filled >= length
        {
            return Ok(());
        }
    }
}
