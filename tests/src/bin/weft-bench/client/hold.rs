//! Connections that are opened, used once, and kept.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use super::connections::echo_one_byte;
use super::{raise_descriptor_limit, runtime};

/// Opens connections, has a byte echoed on each, and keeps them until standard input ends.
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

async fn open_all(target: SocketAddr, count: usize, tries: usize) -> Result<Vec<TcpStream>> {
    let mut opened = Vec::new();
    for number in 0..count {
        let mut tried = 1;
        let stream = loop {
            match open(target).await {
                Err(_) if tried < tries => tried += 1,
                result => break result.with_context(|| format!("after {number}"))?,
            }
        };
        opened.push(stream);
    }
    Ok(opened)
}

async fn open(target: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(target).await.context("connecting")?;
    echo_one_byte(&mut stream)
        .await
        .context("waiting for the echo")?;
    Ok(stream)
}
