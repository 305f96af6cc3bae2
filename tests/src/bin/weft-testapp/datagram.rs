//! UDP, which the mesh must leave alone.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::emit;

/// Sends back each datagram.
#[derive(Args)]
pub(crate) struct UdpEcho {
    #[arg(long)]
    listen: SocketAddr,
}

impl UdpEcho {
    pub(crate) fn run(self) -> Result<()> {
        let socket = UdpSocket::bind(self.listen)?;
        emit(&json!({"event": "listening"}));
        let mut buffer = [0; 2048];
        loop {
            let (length, client) = socket.recv_from(&mut buffer)?;
            socket.send_to(&buffer[..length], client)?;
        }
    }
}

/// Sends a text and waits a second for its echo.
#[derive(Args)]
pub(crate) struct UdpPing {
    target: SocketAddr,
    text: String,
}

impl UdpPing {
    pub(crate) fn run(self) -> Result<()> {
        let any = if self.target.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let socket = UdpSocket::bind(any)?;
        socket.connect(self.target)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut buffer = [0; 2048];
        let reply = socket
            .send(self.text.as_bytes())
            .and_then(|_| socket.recv(&mut buffer));
        match reply {
            Ok(length) => {
                emit(&json!({"outcome": "ok", "text": String::from_utf8_lossy(&buffer[..length])}));
            }
            Err(error) => emit(&json!({"outcome": "error", "error": error.to_string()})),
        }
        Ok(())
    }
}
