//! `heir`: one process, and so one process id, that connects whenever it is told to.

use std::io::{BufRead, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::client::outcome;
use crate::emit;

/// Reads addresses of echo servers from standard input, one a line, says something to each, and tells what
/// came back.
#[derive(Args)]
pub(crate) struct Heir {
    /// The longest wait of each step.
    #[arg(long, default_value_t = 2000)]
    timeout_ms: u64,
}

impl Heir {
    pub(crate) fn run(self) -> Result<()> {
        for line in std::io::stdin().lock().lines() {
            let target: SocketAddr = line?.trim().parse()?;
            match self.say(target) {
                Ok(text) => emit(&json!({"outcome": "ok", "stage": "receive", "text": text,
                    "received": text.len(), "eof": true})),
                Err(error) => emit(&json!({"outcome": outcome(&error), "stage": "exchange"})),
            }
        }
        Ok(())
    }

    fn say(&self, target: SocketAddr) -> std::io::Result<String> {
        let limit = Duration::from_millis(self.timeout_ms);
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        socket.connect_timeout(&target.into(), limit)?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"inherited")?;
        stream.shutdown(Shutdown::Write)?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }
}
