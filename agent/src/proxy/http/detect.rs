//! Which protocol a client speaks, found out at its own node without anybody waiting for it: the connection to
//! the server is made meanwhile, and a server that speaks first ends the question. What arrives at a
//! server's node is another matter: see `first`.
//!
//! Nothing is taken from the client's socket: whoever serves the flow reads it from its beginning. Errors are
//! another matter: the kernel tells each of them once, even to who only peeks, and shows an orderly end
//! afterwards. So none may be dropped here.

use std::io;
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;
use weft_core::PortProtocol;

use super::sniff::{MOST_BYTES, Sniffed, sniff};
use crate::proxy::tcp::FlowSocket;
use crate::telemetry::{DetectedBy, ProtocolLabel, Telemetry};

/// What a client speaks, and how that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::proxy) struct Detected {
    /// Never [`Sniffed::More`].
    pub(in crate::proxy) protocol: Sniffed,
    /// How.
    pub(in crate::proxy) how: DetectedBy,
}

impl Detected {
    /// From the client's first bytes.
    pub(super) fn seen(protocol: Sniffed) -> Self {
        Self {
            protocol,
            how: DetectedBy::Detected,
        }
    }

    /// Whether the server has spoken before the client.
    pub(in crate::proxy) fn is_server_first(&self) -> bool {
        self.how == DetectedBy::ServerFirst
    }

    /// Counts it. HTTP at a port that is declared to be its is no discovery, but for its version.
    pub(in crate::proxy) fn count(&self, declared: PortProtocol, telemetry: &Telemetry) {
        let is_declared =
            super::takes_nothing_else(declared) && matches!(self.protocol, Sniffed::Http(_));
        let how = match is_declared {
            true => DetectedBy::Declared,
            false => self.how,
        };
        let protocol = match self.protocol {
            Sniffed::Http(super::Version::Http1) => ProtocolLabel::Http1,
            Sniffed::Http(super::Version::Http2) => ProtocolLabel::Http2,
            Sniffed::Tls { .. } => ProtocolLabel::Tls,
            Sniffed::More | Sniffed::Doubtful | Sniffed::Strange | Sniffed::Opaque => {
                ProtocolLabel::Opaque
            }
        };
        telemetry.detection(protocol, how);
    }

    /// The server has spoken first.
    pub(in crate::proxy) const SERVER_FIRST: Self = Self {
        protocol: Sniffed::Opaque,
        how: DetectedBy::ServerFirst,
    };
}

/// What the client has said so far, if that is enough.
///
/// # Errors
/// The connection failed.
pub(in crate::proxy) fn at_once(socket: &TcpStream) -> io::Result<Option<Detected>> {
    let mut bytes = [0; AT_ONCE_BYTES];
    let count = match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK) {
        Ok(count) => count,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(match sniff(&bytes[..count]) {
        Sniffed::More => None,
        // A client hello may be longer.
        Sniffed::Tls { .. } if count == bytes.len() => None,
        protocol => Some(Detected::seen(protocol)),
    })
}

/// Whether the client has not said a single byte.
///
/// # Errors
/// The connection failed: nobody else is told of it.
pub(in crate::proxy) fn is_silent(socket: &TcpStream) -> io::Result<bool> {
    match recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK) {
        Ok(count) => Ok(count == 0),
        Err(Errno::EAGAIN) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Waits until the client has said enough. If it leaves before, it is nothing that is known; and so it is if it
/// has begun and says no more within `patience`: somebody may be waiting for what it has said. One that has
/// said nothing is waited for as long as it likes: its first bytes say what it is, whenever they come.
///
/// # Errors
/// The connection failed.
pub(in crate::proxy) async fn from_client(
    socket: &TcpStream,
    patience: Duration,
    telemetry: &Telemetry,
) -> io::Result<Detected> {
    let mut seen = 0;
    let mut deadline = pin!(tokio::time::sleep(patience));
    let mut is_late = false;
    loop {
        let ready = tokio::select! {
            ready = socket.ready(Interest::READABLE) => ready?,
            () = &mut deadline, if !is_late => {
                telemetry.detection(ProtocolLabel::Unknown, DetectedBy::Timeout);
                is_late = true;
                if seen > 0 {
                    return Ok(Detected::seen(Sniffed::Opaque));
                }
                continue;
            }
        };
        let before = seen;
        let mut bytes = vec![0; MOST_BYTES];
        let peek = || match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK) {
            // Nothing new: wait for more instead of turning round and round.
            Ok(count) if count == before && count > 0 => Err(io::ErrorKind::WouldBlock.into()),
            other => other.map_err(io::Error::from),
        };
        match socket.try_io(Interest::READABLE, peek) {
            // It has closed without a word.
            Ok(0) => return Ok(Detected::seen(Sniffed::Opaque)),
            Ok(count) => seen = count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // A client that has ended keeps its socket ready for ever, and nothing more will come.
                if ready.is_read_closed() {
                    return Ok(Detected::seen(Sniffed::Opaque));
                }
                continue;
            }
            Err(error) => return Err(error),
        }
        if is_late {
            // It has begun at last, and has as long for the rest.
            deadline.as_mut().reset(Instant::now() + patience);
            is_late = false;
        }
        match sniff(&bytes[..seen]) {
            Sniffed::More if seen < MOST_BYTES => {}
            Sniffed::More => return Ok(Detected::seen(Sniffed::Opaque)),
            protocol => return Ok(Detected::seen(protocol)),
        }
    }
}

/// Ends when the server has said something that tells what it speaks, or has ended: that is nothing. Servers of
/// HTTP/2 may send their settings before the client has said anything (RFC 9113, section 3.4): then it is for
/// the client to say what this is, and only the server's end is waited for.
///
/// # Errors
/// The connection failed.
pub(in crate::proxy) async fn server_speaks(server: &FlowSocket) -> io::Result<usize> {
    let server = server.socket();
    let mut head = [0; HTTP2_HEAD_BYTES];
    loop {
        server.readable().await?;
        let peek = || recv(server.as_raw_fd(), &mut head, MsgFlags::MSG_PEEK).map_err(Into::into);
        match server.try_io(Interest::READABLE, peek) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            peeked => {
                let peeked = peeked?;
                if is_for_client_to_say(&head[..peeked]) {
                    ended(server).await?;
                    return Ok(0);
                }
                return Ok(peeked);
            }
        }
    }
}

/// Ends when the peer has ended, with bytes of it unread.
async fn ended(socket: &TcpStream) -> io::Result<()> {
    while !socket.ready(Interest::READABLE).await?.is_read_closed() {
        // What it has said keeps the socket ready, and whoever reads it is to find it so.
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// Whether what a server says first leaves it to its client to say what they speak.
pub(in crate::proxy) fn is_for_client_to_say(first: &[u8]) -> bool {
    first.first_chunk().is_some_and(is_http2_settings)
}

/// The head of a frame: length, type, flags, stream (RFC 9113, section 4.1).
fn is_http2_settings(head: &[u8; HTTP2_HEAD_BYTES]) -> bool {
    let [0, high, low, 4, 0, 0, 0, 0, 0] = *head else {
        return false;
    };
    // Settings of six bytes each, some dozen at most.
    let length = u16::from_be_bytes([high, low]);
    length % 6 == 0 && length <= 6 * 64
}

const HTTP2_HEAD_BYTES: usize = 9;
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Enough for most request lines.
const AT_ONCE_BYTES: usize = 2048;
#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::super::Version;
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    async fn look(socket: &TcpStream, patience: Duration) -> io::Result<Detected> {
        from_client(socket, patience, &Telemetry::new()).await
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let address = listener.local_addr().expect("has one");
        let client = TcpStream::connect(address).await.expect("connects");
        let (server, _) = listener.accept().await.expect("accepts");
        (client, server)
    }

    #[tokio::test]
    async fn a_request_line_in_pieces() {
        let (mut client, server) = pair().await;
        let looking = tokio::spawn(async move { look(&server, PATIENCE).await });
        for piece in ["G", "ET /", " HTTP/1.1", "\r\n"] {
            client.write_all(piece.as_bytes()).await.expect("writes");
            tokio::task::yield_now().await;
        }
        let found = looking.await.expect("no panic").expect("works");
        assert_eq!(found, Detected::seen(Sniffed::Http(Version::Http1)));
    }

    #[tokio::test]
    async fn a_client_that_leaves_in_the_middle() {
        for piece in ["", "GET /"] {
            let (mut client, server) = pair().await;
            client.write_all(piece.as_bytes()).await.expect("writes");
            client.shutdown().await.expect("shuts down");
            let looking = tokio::time::timeout(Duration::from_secs(5), look(&server, PATIENCE));
            let found = looking.await.expect("does not wait").expect("works");
            assert_eq!(found.protocol, Sniffed::Opaque, "{piece:?}");
        }
    }

    #[tokio::test]
    async fn a_client_that_is_silent_for_long() {
        let (mut client, server) = pair().await;
        let looking = tokio::spawn(async move { look(&server, Duration::from_millis(20)).await });
        tokio::time::sleep(Duration::from_millis(100)).await;
        client
            .write_all(b"GET / HTTP/1.1\r\n")
            .await
            .expect("writes");
        let found = looking.await.expect("no panic").expect("works");
        assert_eq!(found, Detected::seen(Sniffed::Http(Version::Http1)));
    }

    #[tokio::test]
    async fn a_client_that_has_begun_and_says_no_more() {
        let (mut client, server) = pair().await;
        client.write_all(b"GET").await.expect("writes");
        let looking = look(&server, Duration::from_millis(20));
        let looking = tokio::time::timeout(Duration::from_secs(5), looking);
        let found = looking.await.expect("does not wait").expect("works");
        assert_eq!(found.protocol, Sniffed::Opaque);
    }

    #[test]
    fn settings_of_http2() {
        for (head, is) in [
            ([0, 0, 24, 4, 0, 0, 0, 0, 0], true),
            ([0, 0, 0, 4, 0, 0, 0, 0, 0], true),
            ([0, 0, 25, 4, 0, 0, 0, 0, 0], false),
            ([0, 0, 24, 4, 1, 0, 0, 0, 0], false),
            ([0, 0, 24, 3, 0, 0, 0, 0, 0], false),
            (*b"220 ready", false),
        ] {
            assert_eq!(is_http2_settings(&head), is, "{head:?}");
        }
    }

    #[tokio::test]
    async fn a_server_of_http2_that_leaves() {
        let (mut server, seen) = pair().await;
        let seen = FlowSocket::accepted(seen);
        let mut watching = tokio::spawn(async move { server_speaks(&seen).await });
        for settings in [[0, 0, 0, 4, 0, 0, 0, 0, 0], [0, 0, 0, 4, 1, 0, 0, 0, 0]] {
            server.write_all(&settings).await.expect("writes");
            let soon = Duration::from_millis(50);
            let watched = tokio::time::timeout(soon, &mut watching).await;
            assert!(watched.is_err(), "it is the client's to say");
        }
        drop(server);
        let watched = tokio::time::timeout(PATIENCE, watching).await;
        let spoken = watched.expect("ends").expect("no panic").expect("no error");
        assert_eq!(spoken, 0);
    }

    #[tokio::test]
    async fn what_is_there_is_seen_at_once() {
        let (mut client, server) = pair().await;
        assert_eq!(at_once(&server).expect("works"), None);
        client.write_all(b"*1\r\n").await.expect("writes");
        server.readable().await.expect("comes");
        let seen = at_once(&server).expect("works");
        assert_eq!(seen, Some(Detected::seen(Sniffed::Opaque)));
    }
}
