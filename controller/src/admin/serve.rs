//! The loop that accepts connections, with a bound on everything: how many, how long, how large.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use weft_admin_socket::Socket;

use super::{Admin, Surface};

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 64;
/// The same from one address.
const MAX_PER_ADDRESS: usize = 16;
/// A request has a path and little else.
const MAX_HEADER_BYTES: usize = 16 * 1024;
/// A request's header has to arrive within this time.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// And its answer has to be taken within this.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// Where connections come from: the port or the socket.
pub(super) trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The next connection, and the address it comes from if it has one.
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
pub(super) struct Loopback(pub(super) TcpListener);

impl Accept for Loopback {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, Option<IpAddr>)> {
        Ok((self.0.accept().await?.0, None))
    }
}

/// Serves until it is stopped.
pub(super) async fn serve<A: Accept>(
    listener: A,
    surface: Surface,
    admin: Arc<Admin>,
    stop: CancellationToken,
) {
    let mut open = Open::default();
    loop {
        let (stream, from) = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, ?surface, "cannot accept on the administrative endpoint");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        if !open.make_room(from) {
            tracing::debug!("refuses an administrative connection: too many are open");
            continue;
        }
        let connection = tokio::spawn(serve_one(stream, surface, admin.clone()));
        open.0.push((from, connection.abort_handle()));
    }
}

async fn serve_one<S>(stream: S, surface: Surface, admin: Arc<Admin>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answer = service_fn(|request| {
        let admin = admin.clone();
        async move { Ok::<_, Infallible>(admin.answer(surface, &request).await) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match tokio::time::timeout(CONNECTION_TIMEOUT, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::debug!(%error, "an administrative connection failed");
        }
        Err(_) => tracing::debug!("an administrative connection took too long"),
    }
}

/// Connections that are open, the oldest first.
#[derive(Debug, Default)]
struct Open(Vec<(Option<IpAddr>, AbortHandle)>);

impl Open {
    /// Makes room for one more: where an address has too many, its oldest goes, and where all have,
    /// the oldest of whom has most. So nobody who holds connections open keeps anybody else away. Those without an address
    /// are of who may open the socket, who is asked in no hurry: none of them ends for another one. False: there is no room.
    fn make_room(&mut self, from: Option<IpAddr>) -> bool {
        self.0.retain(|(_, connection)| !connection.is_finished());
        let count = |of: IpAddr| self.0.iter().filter(|(it, _)| *it == Some(of)).count();
        let is_full = self.0.len() >= MAX_CONNECTIONS;
        let crowded = match from {
            Some(from) if count(from) >= MAX_PER_ADDRESS => Some(from),
            _ if !is_full => return true,
            Some(_) => {
                let addresses = self.0.iter().filter_map(|(it, _)| *it);
                addresses.max_by_key(|it| count(*it))
            }
            None => None,
        };
        let oldest = crowded.and_then(|it| self.0.iter().position(|(from, _)| *from == Some(it)));
        let Some(oldest) = oldest else {
            return false;
        };
        self.0.remove(oldest).1.abort();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_keeps_others_away_and_the_socket_ends_none() {
        let address = |last: u8| Some(IpAddr::from([10, 0, 0, last]));
        let connect = |open: &mut Open, from: Option<IpAddr>| {
            let has_room = open.make_room(from);
            if has_room {
                let connection = tokio::spawn(std::future::pending::<()>());
                open.0.push((from, connection.abort_handle()));
            }
            has_room
        };
        let mut open = Open::default();
        for _ in 0..MAX_CONNECTIONS {
            assert!(connect(&mut open, None));
        }
        let oldest = open.0[0].1.clone();
        assert!(!connect(&mut open, None), "the newest is refused");
        tokio::task::yield_now().await;
        assert!(!oldest.is_finished());
        let mut open = Open::default();
        for _ in 0..2 * MAX_PER_ADDRESS {
            assert!(connect(&mut open, address(1)));
        }
        assert_eq!(open.0.len(), MAX_PER_ADDRESS);
        for last in 2..=60 {
            assert!(connect(&mut open, address(last)));
        }
        assert_eq!(open.0.len(), MAX_CONNECTIONS);
        let of_first = open.0.iter().filter(|(it, _)| *it == address(1)).count();
        assert_eq!(of_first, MAX_CONNECTIONS - 59);
    }
}
