//! Small serving of HTTP/1.1, with a bound on everything: how many connections, how long, how large.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Socket;

/// How much an endpoint takes at the same time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections that are open.
    pub connections: usize,
    /// The same from one address.
    pub per_address: usize,
}

/// In an answer's extensions: it comes bit by bit, and its connection has all the time that it takes, until this is
/// cancelled. Then little is left of it.
#[derive(Clone, Debug)]
pub struct Lasting(pub CancellationToken);

/// Where connections come from: a port or a socket.
pub trait Accept {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection, and the address it comes from if that says who it is.
    ///
    /// # Errors
    /// None can be accepted now.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Option<IpAddr>)>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Option<IpAddr>)> {
        let (stream, from) = TcpListener::accept(self).await?;
        Ok((stream, Some(from.ip().to_canonical())))
    }
}

impl Accept for Socket {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<(UnixStream, Option<IpAddr>)> {
        Ok((Socket::accept(self).await?, None))
    }
}

/// A port that only processes of the same pod reach, and what a kubelet forwards to it. All come from one address, so that
/// it says of nobody who it is.
#[derive(Debug)]
pub struct Loopback(pub TcpListener);

impl Accept for Loopback {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Option<IpAddr>)> {
        Ok((self.0.accept().await?.0, None))
    }
}

/// Serves what `listener` accepts until `stop`, each connection for one request. Those that are open then end by themselves,
/// within their time.
pub async fn serve<L, F, R, B>(listener: L, limits: Limits, answer: F, stop: CancellationToken)
where
    L: Accept,
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let mut open = Open::new(limits);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, from)) if open.make_room(from) => {
                let connection = tokio::spawn(serve_one(stream, answer.clone()));
                open.connections.push((from, connection.abort_handle()));
            }
            Ok(_) => debug!("refuses an administrative connection: too many are open"),
            Err(error) => {
                // Out of descriptors, mostly: not to be tried in a loop without pause.
                warn!(%error, "cannot accept on an administrative endpoint");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_one<S, F, R, B>(stream: S, answer: F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Fn(Request<Incoming>) -> R + Send + 'static,
    R: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static,
{
    let lasting = Arc::new(OnceLock::new());
    let lasts = Arc::clone(&lasting);
    let service = service_fn(move |request| {
        let (answered, lasts) = (answer(request), Arc::clone(&lasts));
        async move {
            let answer = answered.await;
            if let Some(lasting) = answer.extensions().get::<Lasting>() {
                // There is one answer only.
                let _ = lasts.set(lasting.clone());
            }
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let mut served = timeout(CONNECTION_TIMEOUT, connection.as_mut()).await;
    if let (Err(_), Some(Lasting(ended))) = (&served, lasting.get()) {
        served = tokio::select! {
            served = connection.as_mut() => Ok(served),
            () = ended.cancelled() => timeout(REST_TIMEOUT, connection.as_mut()).await,
        };
    }
    match served {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "an administrative connection failed"),
        Err(_) => debug!("an administrative connection took too long"),
    }
}

/// Connections that are open, the oldest first.
#[derive(Debug)]
struct Open {
    limits: Limits,
    connections: Vec<(Option<IpAddr>, AbortHandle)>,
}

impl Open {
    fn new(limits: Limits) -> Open {
        let connections = Vec::new();
        Open {
            limits,
            connections,
        }
    }

    /// Makes room for one more: where an address has too many, its oldest goes, and where all have,
    /// the oldest of whom has most. So nobody who holds connections open keeps anybody else away. Those without an address
    /// are of who may open the socket, who is asked in no hurry: none of them ends for another one. False: there is no room.
    fn make_room(&mut self, from: Option<IpAddr>) -> bool {
        self.connections
            .retain(|(_, connection)| !connection.is_finished());
        let addresses = || self.connections.iter().filter_map(|(from, _)| *from);
        let count = |of: IpAddr| addresses().filter(|it| *it == of).count();
        let is_full = self.connections.len() >= self.limits.connections;
        let crowded = match from {
            Some(from) if count(from) >= self.limits.per_address => Some(from),
            _ if !is_full => return true,
            Some(_) => addresses().max_by_key(|it| count(*it)),
            None => None,
        };
        let is_crowded = |(from, _): &(Option<IpAddr>, _)| from.is_some() && *from == crowded;
        let Some(oldest) = self.connections.iter().position(is_crowded) else {
            return false;
        };
        self.connections.remove(oldest).1.abort();
        true
    }
}

const MAX_HEADERS: usize = 64;
/// A request has a path and little else.
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// A request's header has to arrive within this time.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// And its answer has to be taken within this.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// What is left of an answer that has ended is taken within this.
const REST_TIMEOUT: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        connections: 64,
        per_address: 16,
    };

    fn address(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    fn come(open: &mut Open, from: Option<IpAddr>) -> bool {
        let has_room = open.make_room(from);
        if has_room {
            let connection = tokio::spawn(std::future::pending::<()>());
            open.connections.push((from, connection.abort_handle()));
        }
        has_room
    }

    fn left(open: &Open, of: Option<IpAddr>) -> usize {
        let running = open.connections.iter().filter(|(_, it)| !it.is_finished());
        running.filter(|(from, _)| *from == of).count()
    }

    #[tokio::test]
    async fn who_holds_many_makes_room_for_others() {
        let mut open = Open::new(LIMITS);
        assert!(come(&mut open, address(1)));
        for _ in 0..2 * LIMITS.per_address {
            assert!(come(&mut open, address(2)));
        }
        assert_eq!(open.connections.len(), 1 + LIMITS.per_address);
        for last in 3..=60 {
            assert!(come(&mut open, address(last)));
        }
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(open.connections.len(), LIMITS.connections);
        assert_eq!(left(&open, address(1)), 1, "the oldest is not in the way");
        assert_eq!(left(&open, address(2)), LIMITS.connections - 59);
        assert_eq!(left(&open, address(60)), 1);
    }

    #[tokio::test]
    async fn none_without_an_address_ends_for_another() {
        let mut open = Open::new(LIMITS);
        for _ in 0..LIMITS.connections {
            assert!(come(&mut open, None));
        }
        assert!(!come(&mut open, None), "the newest is refused");
        assert!(!come(&mut open, address(1)));
        tokio::task::yield_now().await;
        assert_eq!(left(&open, None), LIMITS.connections);
    }
}
