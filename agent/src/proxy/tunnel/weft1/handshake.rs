//! Handshakes whose keys can be taken over by [`super::record`].
//!
//! rustls is shown one record at a time, so that it never opens what comes behind the handshake.

use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, recv};
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{Acceptor, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;

use super::record::Records;

/// A connection whose handshake is done. Who the peer is has not been looked at.
#[derive(Debug)]
pub struct Greeted {
    /// What the peer presented.
    pub chain: Vec<CertificateDer<'static>>,
    /// What was agreed to be spoken.
    pub alpn: Option<Vec<u8>>,
    /// The records from now on.
    pub records: Records,
    /// What has been read of them already.
    pub early: Vec<u8>,
}

/// Shakes hands as the client. The caller bounds the time.
///
/// # Errors
/// The connection or TLS failed.
pub async fn connect(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    socket: &mut TcpStream,
) -> io::Result<Greeted> {
    let mut tls = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    let mut wire = Wire::new(socket);
    let next = |shown: &mut [u8], out: &mut Vec<u8>| {
        let turn = step(tls.process_tls_records(shown), out);
        (turn, !tls.is_handshaking())
    };
    wire.run(next).await?;
    let (chain, alpn) = agreed(&tls);
    let early = wire.incoming;
    let (secrets, keys) = tls.dangerous_into_kernel_connection().map_err(invalid)?;
    Ok(Greeted {
        chain,
        alpn,
        records: Records::new(secrets, keys).map_err(invalid)?,
        early,
    })
}

/// Shakes hands as the server. The caller bounds the time.
///
/// # Errors
/// The connection or TLS failed.
pub async fn accept(config: Arc<ServerConfig>, socket: &mut TcpStream) -> io::Result<Greeted> {
    let mut tls = UnbufferedServerConnection::new(config).map_err(invalid)?;
    let mut wire = Wire::new(socket);
    let next = |shown: &mut [u8], out: &mut Vec<u8>| {
        let turn = step(tls.process_tls_records(shown), out);
        (turn, !tls.is_handshaking())
    };
    wire.run(next).await?;
    let (chain, alpn) = agreed(&tls);
    let early = wire.incoming;
    let (secrets, keys) = tls.dangerous_into_kernel_connection().map_err(invalid)?;
    Ok(Greeted {
        chain,
        alpn,
        records: Records::new(secrets, keys).map_err(invalid)?,
        early,
    })
}

/// Whether the client that has just connected offers `alpn`. Nothing is taken from the socket. What is
/// no client hello offers nothing: the handshake will say what it is. The caller bounds the time.
///
/// # Errors
/// The connection failed.
pub async fn offers(socket: &TcpStream, alpn: &[u8]) -> io::Result<bool> {
    let mut hello = vec![0; MOST_HELLO_BYTES];
    let mut seen = 0;
    loop {
        let ready = socket.ready(Interest::READABLE).await?;
        let before = seen;
        let peek = || match recv(socket.as_raw_fd(), &mut hello, MsgFlags::MSG_PEEK) {
            // Nothing new: wait for more instead of turning round and round.
            Ok(count) if count == before && count > 0 => Err(io::ErrorKind::WouldBlock.into()),
            other => other.map_err(io::Error::from),
        };
        match socket.try_io(Interest::READABLE, peek) {
            Ok(0) => return Ok(false),
            Ok(count) => seen = count,
            // A peer that has ended keeps the socket ready for ever, and nothing more will come.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && ready.is_read_closed() => {
                return Ok(false);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        let mut acceptor = Acceptor::default();
        let mut rest = &hello[..seen];
        while !rest.is_empty() && acceptor.read_tls(&mut rest)? > 0 {}
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let offered = accepted.client_hello().alpn();
                return Ok(offered.is_some_and(|mut offered| offered.any(|it| it == alpn)));
            }
            Ok(None) if seen < MOST_HELLO_BYTES => {}
            Ok(None) | Err(_) => return Ok(false),
        }
    }
}

/// What rustls wants next.
enum Want {
    /// Nothing: go on.
    Nothing,
    /// What was encoded is to be sent.
    Send,
    /// The next record.
    Read,
    /// It gives up; an alert may have been encoded.
    Fail(rustls::Error),
}

struct Turn {
    discard: usize,
    want: Want,
}

fn step<D>(status: UnbufferedStatus<'_, '_, D>, outgoing: &mut Vec<u8>) -> Turn {
    let UnbufferedStatus { discard, state } = status;
    let want = match state {
        Err(error) => Want::Fail(error),
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            let start = outgoing.len();
            outgoing.resize(start + ENCODE_BYTES, 0);
            let mut encoded = data.encode(&mut outgoing[start..]);
            if let Err(EncodeError::InsufficientSize(error)) = &encoded {
                outgoing.resize(start + error.required_size, 0);
                encoded = data.encode(&mut outgoing[start..]);
            }
            outgoing.truncate(start + encoded.unwrap_or(0));
            Want::Nothing
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // It is sent before anything else is read or written.
            data.done();
            Want::Send
        }
        Ok(ConnectionState::BlockedHandshake) => Want::Read,
        Ok(ConnectionState::WriteTraffic(_)) => Want::Read,
        Ok(_) => Want::Fail(rustls::Error::HandshakeNotComplete),
    };
    Turn { discard, want }
}

/// The socket and what is on its way.
struct Wire<'a> {
    socket: &'a mut TcpStream,
    incoming: Vec<u8>,
    /// So much of `incoming` may be looked at: whole records.
    shown: usize,
    outgoing: Vec<u8>,
}

impl<'a> Wire<'a> {
    fn new(socket: &'a mut TcpStream) -> Self {
        Self {
            socket,
            incoming: Vec::new(),
            shown: 0,
            outgoing: Vec::new(),
        }
    }

    /// Lets both sides talk until the handshake is done.
    async fn run(
        &mut self,
        mut next: impl FnMut(&mut [u8], &mut Vec<u8>) -> (Turn, bool),
    ) -> io::Result<()> {
        loop {
            let (turn, done) = next(&mut self.incoming[..self.shown], &mut self.outgoing);
            self.incoming.drain(..turn.discard);
            self.shown = self.shown.saturating_sub(turn.discard);
            match turn.want {
                Want::Nothing => {}
                Want::Send => self.send().await?,
                Want::Read if done => return Ok(()),
                Want::Read => self.show_next().await?,
                Want::Fail(error) => {
                    // The alert that says why, if there is one. What was shown must be shown again, as
                    // rustls knows places in it; and only once more, as it would look at it anew.
                    let shown = &mut self.incoming[..self.shown];
                    let _ = next(shown, &mut self.outgoing);
                    let _ = self.send().await;
                    return Err(invalid(error));
                }
            }
        }
    }

    async fn send(&mut self) -> io::Result<()> {
        self.socket.write_all(&self.outgoing).await?;
        self.outgoing.clear();
        Ok(())
    }

    /// Lets one more record be looked at.
    async fn show_next(&mut self) -> io::Result<()> {
        loop {
            if let Some(&[_, _, _, high, low]) = self.incoming[self.shown..].first_chunk::<5>() {
                let length = 5 + usize::from(u16::from_be_bytes([high, low]));
                if length > MOST_RECORD_BYTES || self.shown + length > MOST_FLIGHT_BYTES {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                if self.incoming.len() - self.shown >= length {
                    self.shown += length;
                    return Ok(());
                }
            }
            self.incoming.reserve(READ_BYTES);
            if self.socket.read_buf(&mut self.incoming).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

fn agreed<D>(
    tls: &(impl Deref<Target = D> + ?Sized),
) -> (Vec<CertificateDer<'static>>, Option<Vec<u8>>)
where
    D: Deref<Target = CommonState>,
{
    let chain = tls.peer_certificates().unwrap_or_default();
    let chain = chain.iter().map(|it| it.clone().into_owned()).collect();
    (chain, tls.alpn_protocol().map(<[u8]>::to_vec))
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A client hello with a post-quantum key share has less than two kilobytes.
const MOST_HELLO_BYTES: usize = 16 * 1024;
const ENCODE_BYTES: usize = 4 * 1024;
const READ_BYTES: usize = 4 * 1024;
const MOST_RECORD_BYTES: usize = 5 + 16 * 1024 + 256;
/// A message of the handshake may go over several records, but chains of certificates are short.
const MOST_FLIGHT_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::TcpListener;

    use super::*;
    use crate::identity::testing::{Authority, WEB, weft_configs};

    /// Found by fuzzing: of a hello that says to be longer than any, rustls looked for the rest where it
    /// was shown nothing any more, and panicked.
    #[tokio::test]
    async fn bad_hellos_fail_in_order() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_, config) = weft_configs(&Authority::new(), WEB);
        let too_long = [22, 3, 1, 0, 6, 1, 4, 0, 0xe5, 3, 3];
        let too_short = [22, 3, 1, 0, 6, 1, 0, 0, 2, 3, 3];
        for (record, alerts) in [(too_long, 0), (too_short, 1)] {
            let mut peer = TcpStream::connect(address).await.unwrap();
            let (mut socket, _) = listener.accept().await.unwrap();
            peer.write_all(&record).await.unwrap();
            assert!(accept(config.clone(), &mut socket).await.is_err());
            drop(socket);
            let mut told = Vec::new();
            peer.read_to_end(&mut told).await.unwrap();
            assert_eq!(told.len(), 7 * alerts, "{told:?}");
            assert!(told.is_empty() || told.starts_with(&[21, 3, 3, 0, 2, 2]));
        }
    }

    /// Whoever ends in the middle of a hello once kept a worker turning round until the handshake's limit.
    #[tokio::test]
    async fn half_a_hello_and_an_end_offer_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        for start in [&[][..], &[22, 3, 1, 2, 0], &[22, 3, 1, 2, 0, 1, 0, 1, 0xfc]] {
            let mut peer = TcpStream::connect(address).await.unwrap();
            let (socket, _) = listener.accept().await.unwrap();
            peer.write_all(start).await.unwrap();
            // So that the start is looked at before the end comes.
            let looking = offers(&socket, b"weft/1");
            let ending = async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                peer.shutdown().await.unwrap();
            };
            let both = async { tokio::join!(looking, ending) };
            let (offered, ()) = tokio::time::timeout(Duration::from_secs(2), both)
                .await
                .expect("it waits for what cannot come");
            assert!(!offered.unwrap());
        }
    }
}
