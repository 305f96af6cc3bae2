//! What the other end of a connection has done that nobody has taken yet.
//!
//! A server may end a connection that waits, and does not take a request that is sent on it then; and of one that may
//! not be made twice, nobody can say whether it did. The runtime asks the kernel now and then, and on a busy pod's
//! threads some time passes between: so the kernel is asked before a connection that is kept is used again. What is on
//! its way still is not seen. Against that helps what servers say of how long they wait.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::FutureExt;
use http::{HeaderMap, HeaderName};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;

use super::answerer::Answerer;
use crate::proxy::tcp::FlowSocket;

/// The other end of a connection.
#[derive(Clone, Debug)]
pub(super) struct FarEnd {
    /// None: it is at another agent, which looks after it.
    socket: Option<Weak<FlowSocket>>,
    /// Says whether somebody of this agent is between.
    answerer: Answerer,
}

/// Its half of a connection, as the runtime knows it.
#[derive(Debug)]
pub(super) struct Half(pub(super) Option<Arc<FlowSocket>>);

/// What it has done that was not taken yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unheard {
    Nothing,
    /// It has sent something.
    Said,
    /// It has ended its side, or all of it.
    Ended,
}

impl FarEnd {
    pub(super) fn new(socket: Option<&Arc<FlowSocket>>, answerer: Answerer) -> Self {
        Self {
            socket: socket.map(Arc::downgrade),
            answerer,
        }
    }

    /// Asks the kernel. Of one that is not there any more, or that somebody else speaks with, nothing is known.
    pub(super) fn unheard(&self) -> Unheard {
        let socket = self.socket.as_ref().and_then(Weak::upgrade);
        let Some(socket) = socket.filter(|_| !self.answerer.is_translated()) else {
            return Unheard::Nothing;
        };
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(socket.socket().as_raw_fd(), &mut [0], flags) {
            Err(Errno::EAGAIN) => Unheard::Nothing,
            Ok(1..) => Unheard::Said,
            Ok(0) | Err(_) => Unheard::Ended,
        }
    }
}

impl Half {
    /// Whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        let ready = self.0.as_ref();
        let ready = ready.and_then(|it| it.socket().ready(Interest::READABLE).now_or_never());
        ready.is_some_and(|it| it.is_ok_and(|it| it.is_read_closed()))
    }
}

/// For how long a server of HTTP/1 lets a connection wait, if it has said so (`Keep-Alive: timeout=5`, RFC 2068, section
/// 19.7.1.1, which Node.js and Apache do): a little less, for what is on its way.
pub(super) fn patience(headers: &HeaderMap) -> Option<Duration> {
    let said = headers.get_all(KEEP_ALIVE).iter();
    let said = said.filter_map(|it| it.to_str().ok());
    let mut seconds = said.flat_map(|it| it.split(',')).filter_map(|it| {
        let (name, value) = it.split_once('=')?;
        let is_it = name.trim().eq_ignore_ascii_case("timeout");
        value.trim().parse::<u32>().ok().filter(|_| is_it)
    });
    // What zero means nobody has written down.
    let time = Duration::from_secs(seconds.next().filter(|it| *it > 0)?.into());
    Some(time - (time / 2).min(MOST_ON_ITS_WAY))
}

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const MOST_ON_ITS_WAY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    use http::HeaderValue;

    use super::*;

    async fn pair() -> (Arc<FlowSocket>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let to = listener.local_addr().expect("its address");
        let near = tokio::net::TcpStream::connect(to).await.expect("connects");
        let (far, _) = listener.accept().expect("a connection");
        (Arc::new(FlowSocket::new(near).expect("takes it")), far)
    }

    /// Without letting the runtime ask the kernel.
    fn expect(end: &FarEnd, expected: Unheard) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while end.unheard() != expected {
            assert!(Instant::now() < deadline, "never {expected:?}");
        }
    }

    #[tokio::test]
    async fn is_seen_before_the_runtime_knows() {
        let (socket, far) = pair().await;
        let end = FarEnd::new(Some(&socket), Answerer::Application);
        // The runtime has seen that there is nothing.
        assert!(socket.socket().try_read(&mut [0]).is_err());
        assert_eq!(end.unheard(), Unheard::Nothing);
        drop(far);
        expect(&end, Unheard::Ended);
        let heard = socket.socket().ready(Interest::READABLE).now_or_never();
        assert!(heard.is_none(), "the runtime knew: {heard:?}");
        let (socket, mut far) = pair().await;
        let end = FarEnd::new(Some(&socket), Answerer::Application);
        far.write_all(b"408").expect("sent");
        expect(&end, Unheard::Said);
        drop(socket);
        assert_eq!(end.unheard(), Unheard::Nothing);
    }

    #[tokio::test]
    async fn what_somebody_else_hears_is_theirs() {
        let (socket, far) = pair().await;
        drop(far);
        let translated = |is: bool| Answerer::Translated(Arc::new(AtomicBool::new(is)));
        expect(
            &FarEnd::new(Some(&socket), translated(false)),
            Unheard::Ended,
        );
        let bridged = FarEnd::new(Some(&socket), translated(true));
        assert_eq!(bridged.unheard(), Unheard::Nothing);
        let elsewhere = FarEnd::new(None, Answerer::Agent);
        assert_eq!(elsewhere.unheard(), Unheard::Nothing);
    }

    /// (lines of `Keep-Alive`) -> milliseconds
    #[test]
    fn servers_say_how_long_they_wait() {
        for (lines, expected) in [
            (&[][..], None),
            (&["timeout=5"], Some(4000)),
            (&["timeout=5, max=100"], Some(4000)),
            (&["max=7", "Timeout = 60"], Some(59_000)),
            (&["timeout=2"], Some(1000)),
            (&["timeout=1"], Some(500)),
            (&["timeout=0"], None),
            (&["timeout=-1"], None),
            (&["timeout=4294967296"], None),
            (&["timeout"], None),
            (&["max=100"], None),
        ] {
            let mut headers = HeaderMap::new();
            for line in lines {
                headers.append(KEEP_ALIVE, HeaderValue::from_static(line));
            }
            let found = patience(&headers).map(|it| it.as_millis());
            assert_eq!(found, expected, "{lines:?}");
        }
    }
}
