//! Small HTTP/1.1 serving, with a bound on everything: connections, header, body and time.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
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
use weft_admin_socket::Socket;

use super::Admin;
use super::routes::{Surface, answer};

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

/// Serves what `listener` accepts until `stop`.
pub(super) async fn serve<A: Accept>(
    listener: A,
    surface: Surface,
    admin: Arc<Admin>,
    stop: CancellationToken,
) {
    let mut open = Open::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, from)) => {
                open.make_room(from);
                let connection = tokio::spawn(serve_one(stream, surface, Arc::clone(&admin)));
                open.0.push((from, connection.abort_handle()));
            }
            Err(error) => {
                // Out of descriptors, mostly: not to be tried in a loop without pause.
                warn!(%error, "accepting on an admin endpoint");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_one<S>(stream: S, surface: Surface, admin: Arc<Admin>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request: Request<Incoming>| {
        let admin = Arc::clone(&admin);
        async move {
            let response = answer(&admin, surface, request).await;
            Ok::<Response<Full<Bytes>>, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "admin connection"),
        Err(_) => debug!("admin connection took too long"),
    }
}

/// Connections that are open, the oldest first.
#[derive(Debug, Default)]
struct Open(Vec<(Option<IpAddr>, AbortHandle)>);

impl Open {
    /// Makes room for one more: where an address has too many, its oldest goes, and where all have,
    /// the oldest of whom has most. So nobody who holds connections open keeps anybody else away.
    fn make_room(&mut self, from: Option<IpAddr>) {
        self.0.retain(|(_, connection)| !connection.is_finished());
        let count = |of: Option<IpAddr>| self.0.iter().filter(|(it, _)| *it == of).count();
        let crowded = if count(from) >= MAX_PER_ADDRESS {
            from
        } else if self.0.len() >= MAX_CONNECTIONS {
            let most = self.0.iter().map(|(it, _)| *it).max_by_key(|it| count(*it));
            most.flatten()
        } else {
            return;
        };
        if let Some(oldest) = self.0.iter().position(|(it, _)| *it == crowded) {
            self.0.remove(oldest).1.abort();
        }
    }
}

const MAX_CONNECTIONS: usize = 256;
const MAX_PER_ADDRESS: usize = 64;
const MAX_HEADERS: usize = 64;
const MAX_HEADER_BYTES: usize = 16 * 1024;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_holds_many_makes_room_for_others() {
        let mut open = Open::default();
        let address = |last: u8| Some(IpAddr::from([10, 0, 0, last]));
        let mut come = |from| {
            open.make_room(from);
            let waits = tokio::spawn(std::future::pending::<()>());
            open.0.push((from, waits.abort_handle()));
        };
        come(address(1));
        for _ in 0..MAX_PER_ADDRESS + 10 {
            come(address(2));
        }
        for last in 3..=200 {
            come(address(last));
        }
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        let left = |of| {
            let all = open.0.iter().filter(|(_, it)| !it.is_finished());
            all.filter(|(it, _)| *it == of).count()
        };
        assert_eq!(left(address(1)), 1, "the oldest of all is not in the way");
        assert_eq!(left(address(2)), MAX_CONNECTIONS - 199);
        assert_eq!(left(address(200)), 1);
    }
}
