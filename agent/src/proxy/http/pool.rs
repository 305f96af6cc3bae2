//! The connections that a pod's exchanges leave by, kept between them. They belong to one pod: what
//! another pod sends is never mixed with it, whatever it speaks to.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::connection::{Http1, Http2, Route};

/// A pod's connections that wait, and those of HTTP/2, which wait and work at once.
pub struct Pool {
    kept: Mutex<Kept>,
    mirrors: Arc<Semaphore>,
}

#[derive(Default)]
struct Kept {
    #[expect(clippy::vec_box, reason = "whoever uses one has it boxed")]
    http1: HashMap<SocketAddr, Vec<Box<Http1>>>,
    http2: HashMap<SocketAddr, Vec<Http2>>,
    /// The task that looks after them is there.
    swept: bool,
    closed: bool,
}

/// Takes a connection of HTTP/1 back after an exchange.
#[derive(Clone)]
pub(super) enum Home {
    /// The pool of a pod.
    Pool(Arc<Pool>, CancellationToken),
    /// The one place that a client's connection has for it.
    Place(Arc<Mutex<Option<Box<Http1>>>>),
}

impl Home {
    /// Keeps it.
    pub(super) fn give(&self, mut connection: Box<Http1>) {
        connection.is_reused = true;
        connection.idle_since = Instant::now();
        match self {
            Self::Pool(pool, stopping) => pool.put(connection, stopping),
            Self::Place(place) => {
                let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
                *place = Some(connection);
            }
        }
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            mirrors: Arc::new(Semaphore::new(MOST_MIRRORS)),
        }
    }
}

impl Pool {
    /// A place for a request that is sent elsewhere too, if there is one.
    pub(super) fn mirror(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.mirrors).try_acquire_owned().ok()
    }

    /// A connection of HTTP/1 that leads this way and is free.
    pub(super) fn take_http1(&self, route: &Route) -> Option<Box<Http1>> {
        loop {
            // Looked at without the lock: that is a system call.
            let mut connection = {
                let mut kept = self.kept();
                let waiting = kept.http1.get_mut(&route.endpoint)?;
                waiting.pop()?
            };
            if connection.route.is_same(route) && connection.is_free() {
                return Some(connection);
            }
            connection.close();
        }
    }

    /// A connection of HTTP/2 that leads this way and takes another exchange.
    pub(super) fn take_http2(&self, route: &Route) -> Option<Http2> {
        loop {
            let connection = {
                let mut kept = self.kept();
                let all = kept.http2.get_mut(&route.endpoint)?;
                // One that leads elsewhere ends when the last who uses it has let it go.
                all.retain(|it| !it.is_closed() && it.route.is_same(route));
                all.iter().find(|it| it.has_room())?.clone()
            };
            // Asked without the lock: that is a system call.
            if !connection.has_ended() {
                return Some(connection);
            }
            if let Some(all) = self.kept().http2.get_mut(&route.endpoint) {
                all.retain(|it| !it.is(&connection));
            }
        }
    }

    /// Whether an exchange with one of these could begin at once.
    pub(in crate::proxy) fn has_any(
        &self,
        mut endpoints: impl Iterator<Item = SocketAddr>,
    ) -> bool {
        let kept = self.kept();
        if kept.http1.is_empty() && kept.http2.is_empty() {
            return false;
        }
        endpoints.any(|it| {
            let http1 = kept.http1.get(&it).is_some_and(|it| !it.is_empty());
            http1 || kept.http2.get(&it).is_some_and(|it| !it.is_empty())
        })
    }

    /// Shares a connection of HTTP/2. If somebody else was faster, theirs is to be used, so that many who
    /// begin at once do not keep one each.
    pub(super) fn share(
        self: &Arc<Self>,
        connection: Http2,
        stopping: &CancellationToken,
    ) -> Http2 {
        let mut kept = self.kept();
        if kept.closed {
            return connection;
        }
        let all = kept.http2.entry(connection.route.endpoint).or_default();
        let same =
            |it: &&Http2| it.has_room() && it.route.is_same(&connection.route) && !it.has_ended();
        if let Some(theirs) = all.iter().find(same) {
            return theirs.clone();
        }
        all.push(connection.clone());
        self.look_after(&mut kept, stopping);
        connection
    }

    fn put(self: &Arc<Self>, connection: Box<Http1>, stopping: &CancellationToken) {
        let mut kept = self.kept();
        let closed = kept.closed;
        let waiting = kept.http1.entry(connection.route.endpoint).or_default();
        if closed || waiting.len() >= MOST_IDLE {
            drop(kept);
            return connection.close();
        }
        waiting.push(connection);
        self.look_after(&mut kept, stopping);
    }

    fn look_after(self: &Arc<Self>, kept: &mut Kept, stopping: &CancellationToken) {
        if !std::mem::replace(&mut kept.swept, true) {
            tokio::spawn(sweep(Arc::downgrade(self), stopping.clone()));
        }
    }

    /// Lets go what is old or was closed at the other end. Says whether anything is left.
    fn sweep(&self, all: bool) -> bool {
        let mut looked_at: Vec<Box<Http1>> = Vec::new();
        {
            let mut kept = self.kept();
            kept.closed |= all;
            for (_, waiting) in kept.http1.drain() {
                looked_at.extend(waiting);
            }
            kept.http2.retain(|_, connections| {
                let is_good =
                    |it: &Http2| !it.is_closed() && !it.is_idle_for(IDLE) && !it.route.is_leaving();
                connections.retain(|it| !all && is_good(it));
                !connections.is_empty()
            });
        }
        let is_good = |it: &mut Box<Http1>| {
            let is_fresh = it.idle_since.elapsed() < IDLE;
            !all && is_fresh && !it.route.is_leaving() && it.is_free()
        };
        let mut out: Vec<_> = looked_at.extract_if(.., |it| !is_good(it)).collect();
        let mut kept = self.kept();
        for connection in looked_at {
            let waiting = kept.http1.entry(connection.route.endpoint).or_default();
            // In front of what was put back meanwhile, which is fresher.
            if waiting.len() < MOST_IDLE {
                waiting.insert(0, connection);
            } else {
                out.push(connection);
            }
        }
        let left = !kept.http1.is_empty() || !kept.http2.is_empty();
        kept.swept = left;
        drop(kept);
        for connection in out {
            connection.close();
        }
        left
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Every change under the lock is complete in itself.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks after a pool until it is empty, or its pod takes no new connections.
async fn sweep(pool: Weak<Pool>, stopping: CancellationToken) {
    loop {
        let stop = tokio::select! {
            () = stopping.cancelled() => true,
            () = tokio::time::sleep(SWEEP_INTERVAL) => false,
        };
        let Some(pool) = pool.upgrade() else { return };
        if !pool.sweep(stop) || stop {
            return;
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.kept();
        formatter
            .debug_struct("Pool")
            .field("http1", &kept.http1.values().map(Vec::len).sum::<usize>())
            .field("http2", &kept.http2.values().map(Vec::len).sum::<usize>())
            .finish()
    }
}

impl fmt::Debug for Home {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Pool(..) => "Pool",
            Self::Place(_) => "Place",
        })
    }
}

/// Shorter than servers usually wait for the next request (nginx 75 s, Go's are set to 60 s and more), so
/// that few are closed at the moment they are used.
const IDLE: Duration = Duration::from_secs(50);
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Requests of a pod that are on their way elsewhere too.
const MOST_MIRRORS: usize = 64;
/// Connections that wait for the next exchange with one endpoint.
const MOST_IDLE: usize = 128;

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::proxy::http::connection::testing;
    use crate::proxy::tcp::FlowSocket;

    /// Two connections to one endpoint, and their other ends.
    async fn two() -> [(Http2, Arc<FlowSocket>, TcpStream); 2] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let to = listener.local_addr().expect("its address");
        let made = async || {
            let near = TcpStream::connect(to).await.expect("connects");
            let (far, _) = listener.accept().await.expect("a connection");
            let socket = Arc::new(FlowSocket::new(near).expect("takes it"));
            (testing::http2(to, &socket).await, socket, far)
        };
        [made().await, made().await]
    }

    async fn ended(connection: &Http2) {
        let ending = async {
            while !connection.has_ended() {
                tokio::task::yield_now().await;
            }
        };
        let ending = tokio::time::timeout(Duration::from_secs(30), ending);
        ending.await.expect("the kernel knows of the end");
    }

    #[tokio::test]
    async fn who_was_faster_is_joined_unless_that_has_ended() {
        let (pool, stopping) = (Arc::new(Pool::default()), CancellationToken::new());
        let [(first, _socket, far), (second, _other, _far)] = two().await;
        assert!(pool.share(first.clone(), &stopping).is(&first));
        assert!(pool.share(second.clone(), &stopping).is(&first));
        drop(far);
        ended(&first).await;
        assert!(pool.share(second.clone(), &stopping).is(&second));
        let taken = pool.take_http2(&second.route).expect("one of two");
        assert!(taken.is(&second));
    }

    #[tokio::test]
    async fn one_that_has_ended_is_let_go_once_seen() {
        let (pool, stopping) = (Arc::new(Pool::default()), CancellationToken::new());
        let [(only, _socket, far), _] = two().await;
        pool.share(only.clone(), &stopping);
        let endpoint = only.route.endpoint;
        assert!(pool.take_http2(&only.route).is_some_and(|it| it.is(&only)));
        drop(far);
        ended(&only).await;
        assert!(pool.take_http2(&only.route).is_none());
        assert!(!pool.has_any([endpoint].into_iter()));
    }
}
