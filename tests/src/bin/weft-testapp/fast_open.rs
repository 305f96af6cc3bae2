//! `fast-open`: TCP Fast Open, where the connect happens inside of the first send.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use nix::sys::socket::{setsockopt, sockopt::TcpFastOpenConnect};
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::client::outcome;
use crate::emit;

/// Sends a text with the SYN, if the kernel has the server's cookie, and receives its echo.
#[derive(Args)]
pub(crate) struct FastOpen {
    target: SocketAddr,
    text: String,
    /// By `sendto` with `MSG_FASTOPEN`; else by `connect` after `TCP_FASTOPEN_CONNECT`.
    #[arg(long)]
    sendto: bool,
}

impl FastOpen {
    pub(crate) fn run(self) -> Result<()> {
        match self.exchange() {
            Ok((text, peer)) => emit(&json!({"outcome": "ok", "stage": "receive", "text": text,
                "peer": peer, "eof": true, "received": text.len()})),
            Err(error) => emit(
                &json!({"outcome": outcome(&error), "stage": "connect", "text": error.to_string()}),
            ),
        }
        Ok(())
    }

    fn exchange(&self) -> std::io::Result<(String, String)> {
        let socket = Socket::new(Domain::for_address(self.target), Type::STREAM, None)?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        socket.set_write_timeout(Some(Duration::from_secs(5)))?;
        let mut stream: TcpStream = if self.sendto {
            let flags = libc::MSG_FASTOPEN;
            socket.send_to_with_flags(self.text.as_bytes(), &self.target.into(), flags)?;
            socket.into()
        } else {
            setsockopt(&socket, TcpFastOpenConnect, &true)?;
            socket.connect(&self.target.into())?;
            let mut stream: TcpStream = socket.into();
            stream.write_all(self.text.as_bytes())?;
            stream
        };
        // The echo first: before the handshake is done there is nothing to shut down.
        let mut echo = vec![0; self.text.len()];
        stream.read_exact(&mut echo)?;
        let peer = stream.peer_addr()?.to_string();
        stream.shutdown(Shutdown::Write)?;
        Ok((String::from_utf8_lossy(&echo).into_owned(), peer))
    }
}
