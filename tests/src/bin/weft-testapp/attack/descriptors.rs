//! `lend` and `borrow`: sockets that go from one pod to another over a Unix socket, in a folder that both
//! have mounted.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::client::outcome;
use crate::emit;

/// Gives each who comes a new TCP socket of this pod.
#[derive(Args)]
pub(crate) struct Lend {
    path: PathBuf,
    /// Of IPv6.
    #[arg(long)]
    v6: bool,
    /// A socket that listens at this port of the pod, instead of one that is not connected.
    #[arg(long)]
    listen: Option<u16>,
}

impl Lend {
    pub(crate) fn run(self) -> Result<()> {
        let waiting = UnixListener::bind(&self.path)?;
        emit(&json!({"event": "lending"}));
        loop {
            let (borrower, _) = waiting.accept()?;
            let socket = self.socket()?;
            let descriptors = [socket.as_raw_fd()];
            let lent = [ControlMessage::ScmRights(&descriptors)];
            let flags = MsgFlags::empty();
            sendmsg::<()>(
                borrower.as_raw_fd(),
                &[IoSlice::new(b"x")],
                &lent,
                flags,
                None,
            )?;
        }
    }

    fn socket(&self) -> Result<Socket> {
        let domain = if self.v6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        if let Some(port) = self.listen {
            let any = if self.v6 { "[::]" } else { "0.0.0.0" };
            let any: SocketAddr = format!("{any}:{port}").parse()?;
            socket.set_reuse_address(true)?;
            socket.bind(&any.into())?;
            socket.listen(16)?;
        }
        Ok(socket)
    }
}

/// Uses a socket that another pod made.
#[derive(Args)]
pub(crate) struct Borrow {
    path: PathBuf,
    /// Connects it and exchanges a text, as an echo's client.
    #[arg(long)]
    connect: Option<SocketAddr>,
    /// What to say.
    #[arg(long, default_value = "borrowed")]
    send: String,
    /// Accepts a connection of it and says who came; otherwise.
    #[arg(long)]
    accept: bool,
}

impl Borrow {
    pub(crate) fn run(self) -> Result<()> {
        let socket = Socket::from(self.take()?);
        match self.connect {
            Some(target) => match self.exchange(socket, target) {
                Ok((text, local)) => emit(&json!({"outcome": "ok", "stage": "receive",
                    "text": text, "local": local, "received": text.len(), "eof": true})),
                Err(error) => emit(&json!({"outcome": outcome(&error), "stage": "connect"})),
            },
            None => {
                emit(&json!({"event": "waiting"}));
                let (client, peer) = socket.accept()?;
                let peer = peer.as_socket().map(|it| it.to_string());
                emit(&json!({"event": "accepted", "accepted": peer, "peer": peer, "local": null}));
                let mut stream = TcpStream::from(client);
                let mut text = Vec::new();
                stream.read_to_end(&mut text)?;
                stream.write_all(&text)?;
            }
        }
        Ok(())
    }

    fn exchange(&self, socket: Socket, target: SocketAddr) -> std::io::Result<(String, String)> {
        let limit = Some(Duration::from_secs(5));
        socket.set_read_timeout(limit)?;
        socket.set_write_timeout(limit)?;
        socket.connect(&target.into())?;
        let mut stream = TcpStream::from(socket);
        stream.write_all(self.send.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok((text, stream.local_addr()?.to_string()))
    }

    fn take(&self) -> Result<OwnedFd> {
        let lender = UnixStream::connect(&self.path)?;
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(lender.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = part {
                let first = descriptors.first().context("none was passed")?;
                return Ok(owned(*first));
            }
        }
        bail!("nothing was passed")
    }
}

/// The kernel has just given it to this process.
#[allow(unsafe_code)]
fn owned(descriptor: RawFd) -> OwnedFd {
    // SAFETY: it comes from SCM_RIGHTS: it is open, and nobody else in this process has it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}
