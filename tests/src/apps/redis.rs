//! redis-server and redis-cli.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;

use crate::command::{Finished, Process};
use crate::pod::Pod;

/// A running redis-server, on all addresses.
#[derive(Debug)]
pub struct Redis {
    process: Process,
}

impl Redis {
    /// Starts it, without persistence.
    pub fn start(pod: &Pod, port: u16) -> Result<Redis> {
        let mut process = pod
            .command("redis-server")?
            .args(["--port", &port.to_string(), "--bind", "0.0.0.0", "::"])
            .args(["--protected-mode", "no", "--save", "", "--appendonly", "no"])
            .args(["--dir", &pod.dir().display().to_string()])
            .spawn()?;
        process.wait_listening(port)?;
        Ok(Redis { process })
    }

    /// Runs `redis-cli` with a command in a pod.
    pub fn command(client: &Pod, server: IpAddr, port: u16, words: &[&str]) -> Result<Finished> {
        client
            .command("redis-cli")?
            .args(["-h", &server.to_string(), "-p", &port.to_string()])
            .args(words)
            .output(Duration::from_secs(15))
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
