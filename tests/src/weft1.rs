//! An independent client of `weft/1`, written from `docs/wire.md`: TLS of an ordinary library, frames
//! made by hand, nothing of Weft's own. It sends what a test tells it to, right or wrong, and says what
//! it got.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};

use crate::capture::TUNNEL_PORT;
use crate::hbone::any_server;
use crate::netns::Netns;
use crate::pki::Identity;

/// A connection to a pod's tunnel listener.
#[derive(Debug)]
pub struct Tunnel {
    tls: StreamOwned<ClientConnection, TcpStream>,
}

/// A frame that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its kind.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// In order: close_notify, or FIN.
    Closed,
    /// RST.
    Reset,
}

impl Tunnel {
    /// Connects from a namespace, and agrees on `weft/1`.
    pub fn connect(from: &Netns, target: SocketAddr, identity: &Identity) -> Result<Tunnel> {
        Tunnel::connect_by(from, target, identity, "weft/1")
    }

    /// Connects and agrees on another protocol, for whoever sends bytes of it.
    pub fn connect_by(
        from: &Netns,
        target: SocketAddr,
        identity: &Identity,
        alpn: &str,
    ) -> Result<Tunnel> {
        let server = SocketAddr::new(target.ip(), TUNNEL_PORT);
        let socket = from.run(move || TcpStream::connect_timeout(&server, PATIENCE))??;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.set_nodelay(true)?;
        let config = any_server(&[alpn.as_bytes().to_vec()], Some(identity))?;
        let name = ServerName::IpAddress(target.ip().into());
        let mut connection = ClientConnection::new(Arc::new(config), name)?;
        let mut socket = socket;
        while connection.is_handshaking() {
            connection
                .complete_io(&mut socket)
                .context("the handshake")?;
        }
        ensure!(
            connection.alpn_protocol() == Some(alpn.as_bytes()),
            "agreed on {:?}",
            connection.alpn_protocol()
        );
        Ok(Tunnel {
            tls: StreamOwned::new(connection, socket),
        })
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.tls.write_all(bytes)?;
        self.tls.flush()?;
        Ok(())
    }

    /// Asks for a flow and sends bytes with it.
    pub fn open(&mut self, port: u16, source_port: u16, early: &[u8]) -> Result<()> {
        let mut bytes = open(port, source_port);
        if !early.is_empty() {
            bytes.extend(data(early));
        }
        self.send(&bytes)
    }

    /// The next frame. An error if the connection ends instead.
    pub fn frame(&mut self) -> Result<Frame> {
        let mut head = [0; 4];
        self.tls.read_exact(&mut head).context("a frame's head")?;
        let [kind, flags, high, low] = head;
        let mut payload = vec![0; usize::from(u16::from_be_bytes([high, low]))];
        self.tls.read_exact(&mut payload).context("a payload")?;
        Ok(Frame {
            kind,
            flags,
            payload,
        })
    }

    /// Fails unless the flow is accepted.
    pub fn accepted(&mut self) -> Result<()> {
        let frame = self.frame()?;
        ensure!(frame.kind == ACCEPT, "{frame:?}");
        Ok(())
    }

    /// The status and the reason of a refusal.
    pub fn refused(&mut self) -> Result<(u16, String)> {
        let frame = self.frame()?;
        ensure!(frame.kind == REFUSE, "{frame:?}");
        let [high, low, length, rest @ ..] = &frame.payload[..] else {
            bail!("{frame:?}");
        };
        let reason = rest.get(..usize::from(*length)).context("the reason")?;
        let status = u16::from_be_bytes([*high, *low]);
        Ok((status, String::from_utf8(reason.to_vec())?))
    }

    /// Some bytes, of whatever is spoken. An error if the connection ends instead.
    pub fn some(&mut self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; 4096];
        let count = self.tls.read(&mut bytes)?;
        ensure!(count > 0, "the connection ended");
        bytes.truncate(count);
        Ok(bytes)
    }

    /// Exactly so many bytes of the flow.
    pub fn receive(&mut self, count: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let frame = self.frame()?;
            ensure!(frame.kind == DATA && frame.flags == 0, "{frame:?}");
            bytes.extend(frame.payload);
        }
        Ok(bytes)
    }

    /// All bytes of the flow up to its end.
    pub fn receive_all(&mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        loop {
            let frame = self.frame()?;
            ensure!(frame.kind == DATA, "{frame:?}");
            bytes.extend(frame.payload);
            if frame.flags == 1 {
                return Ok(bytes);
            }
        }
    }

    /// Asks for new keys, as TLS may at any time.
    pub fn change_keys(&mut self) -> Result<()> {
        Ok(self.tls.conn.refresh_traffic_keys()?)
    }

    /// Whether nothing comes for a while and the connection stays.
    pub fn stays_silent(&mut self, time: Duration) -> Result<()> {
        self.tls.sock.set_read_timeout(Some(time))?;
        let read = self.tls.read(&mut [0; 1]);
        self.tls.sock.set_read_timeout(Some(PATIENCE))?;
        match read {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            other => bail!("not silent: {other:?}"),
        }
    }

    /// Gives up sending what is not taken within this time.
    pub fn impatient(&mut self, time: Duration) -> Result<()> {
        Ok(self.tls.sock.set_write_timeout(Some(time))?)
    }

    /// Waits until the connection ends, whatever comes before.
    pub fn ended(&mut self) -> Result<End> {
        let start = Instant::now();
        let mut trash = [0; 4096];
        while start.elapsed() < PATIENCE {
            match self.tls.read(&mut trash) {
                Ok(0) => return Ok(End::Closed),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(End::Closed),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
                    ) =>
                {
                    return Ok(End::Reset);
                }
                Err(error) => return Err(error).context("waiting for the end"),
            }
        }
        bail!("the connection does not end")
    }

    /// Ends the connection with FIN, and nothing said in TLS.
    pub fn cut(self) -> Result<()> {
        Ok(self.tls.sock.shutdown(Shutdown::Both)?)
    }
}

/// An OPEN frame.
pub fn open(port: u16, source_port: u16) -> Vec<u8> {
    let mut frame = vec![OPEN, 0, 0, 4];
    frame.extend(port.to_be_bytes());
    frame.extend(source_port.to_be_bytes());
    frame
}

/// DATA frames.
pub fn data(bytes: &[u8]) -> Vec<u8> {
    let frame = |bytes: &[u8]| {
        let [high, low] = (bytes.len() as u16).to_be_bytes();
        [&[DATA, 0, high, low], bytes].concat()
    };
    bytes.chunks(MOST_DATA_BYTES).flat_map(frame).collect()
}

/// The frame that ends a direction.
pub const END: [u8; 4] = [DATA, 1, 0, 0];

const PATIENCE: Duration = Duration::from_secs(10);
const MOST_DATA_BYTES: usize = 16380;
const OPEN: u8 = 1;
const ACCEPT: u8 = 2;
const REFUSE: u8 = 3;
const DATA: u8 = 4;
