//! The end of a request's body before its time, while a connection to a server sends it: nobody wants the rest, or the
//! client has broken it off.
//!
//! In HTTP/2 hyper sends a body in a task of its own, which waits for the server's window with a part of it in its
//! hands, and looks at the body no more until it is rid of that: a body that ends with an error would not be heard, and
//! the stream be open for as long as the server likes. So that task is ended from outside: [`Sends`] spawns it, and
//! knows whose it is because hyper looks at a body once before it has a task made for it, within the same poll of its
//! connection ([`dispatch`]). What is left of the stream is reset with the last who holds it.

use std::cell::Cell;
use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hyper::rt::Executor;
use tokio_util::sync::CancellationToken;

use super::connection::OpenStream;
use crate::proxy::live_requests::RequestEntry;

/// A request's body that is being sent.
#[derive(Debug)]
pub(super) struct Upload {
    stop: CancellationToken,
    is_broken: AtomicBool,
    /// Policy ends it, too, also after the response has ended.
    _entry: Option<Arc<RequestEntry>>,
    /// Its place in a connection of HTTP/2.
    _stream: Option<OpenStream>,
}

/// Held by who waits for the response. Dropped before all of that has come, it stops the request's body.
#[derive(Debug, Default)]
pub(super) struct Watch(Option<Arc<Upload>>);

impl Upload {
    /// One that policy, too, may stop, and that has a place in a connection until it has ended.
    pub(super) fn new(entry: Option<&Arc<RequestEntry>>, stream: Option<OpenStream>) -> Arc<Self> {
        let stop = entry.map_or_else(CancellationToken::new, |it| it.end().child_token());
        Arc::new(Self {
            stop,
            is_broken: AtomicBool::new(false),
            _entry: entry.cloned(),
            _stream: stream,
        })
    }

    /// It is about to be looked at. Says whether it still is to be sent.
    pub(super) fn goes_on(self: &Arc<Self>) -> bool {
        if let Some(_nobody) = BEGUN.take() {
            BEGUN.set(Some(Some(Arc::clone(self))));
        }
        !self.stop.is_cancelled()
    }

    /// The client has broken it off.
    pub(super) fn breaks(&self) {
        self.is_broken.store(true, Ordering::Release);
    }
}

impl Watch {
    /// Of a request's body; none: there is none.
    pub(super) fn new(upload: Option<Arc<Upload>>) -> Self {
        Self(upload)
    }

    /// Whether the client has broken it off: what fails then fails because of that. HTTP/2 does not tell it from
    /// failures of the server.
    pub(super) fn is_broken(&self) -> bool {
        let upload = self.0.as_ref();
        upload.is_some_and(|it| it.is_broken.load(Ordering::Acquire))
    }

    /// All of the response has come: the server may take the rest of the request still.
    pub(super) fn leave(mut self) {
        self.0 = None;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(upload) = self.0.take() {
            upload.stop.cancel();
        }
    }
}

/// Spawns what a connection of HTTP/2 to a server is made of.
#[derive(Clone, Debug, Default)]
pub(super) struct Sends {
    /// Ends the connection, whatever goes on in it.
    pub(super) over: CancellationToken,
}

impl<F> Executor<F> for Sends
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, part: F) {
        let end = match BEGUN.take() {
            // The connection itself, before it is polled for the first time.
            None => self.over.clone(),
            Some(begun) => {
                BEGUN.set(Some(None));
                let Some(upload) = begun else {
                    // A response that is waited for ends with its connection.
                    tokio::spawn(part);
                    return;
                };
                upload.stop.clone()
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = end.cancelled() => {}
                () = part => {}
            }
        });
    }
}

/// Drives a connection whose bodies are spawned by [`Sends`].
pub(super) async fn dispatch<T>(connection: impl Future<Output = T>) -> T {
    let mut connection = pin!(connection);
    poll_fn(|context| {
        let _scope = Scope::begin();
        connection.as_mut().poll(context)
    })
    .await
}

/// While a connection is polled. Not to be sent to another thread.
struct Scope(PhantomData<*const ()>);

impl Scope {
    fn begin() -> Self {
        BEGUN.set(Some(None));
        Self(PhantomData)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        BEGUN.set(None);
    }
}

thread_local! {
    /// While a connection is polled: the body that was looked at, and has no task yet.
    static BEGUN: Cell<Option<Option<Arc<Upload>>>> = const { Cell::new(None) };
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use http::{Request, Response};
    use hyper::body::Frame;
    use hyper::client::conn::http2;
    use hyper_util::rt::TokioIo;
    use tokio::time::timeout;

    use super::*;
    use crate::proxy::http::answer::ExchangeError;
    use crate::proxy::http::body::RequestBody;

    /// What becomes of the rest of a request whose server takes no more of it.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Way {
        /// The response was given up.
        GivenUp,
        /// All of the response has come, and nobody forbids the rest.
        Answered,
        /// The same, and then it is stopped.
        Stopped,
    }

    #[tokio::test]
    async fn what_waits_for_a_window_is_reset() {
        for (way, is_reset) in [
            (Way::GivenUp, true),
            (Way::Answered, false),
            (Way::Stopped, true),
        ] {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let server = tokio::spawn(async move {
                let mut builder = h2::server::Builder::new();
                let builder = builder.initial_window_size(WINDOW);
                let mut connection = builder.handshake::<_, Bytes>(far).await.expect("HTTP/2");
                let accepted = connection.accept().await.expect("one").expect("a request");
                let (request, mut respond) = accepted;
                let ends = way != Way::GivenUp;
                let mut stream = respond
                    .send_response(Response::new(()), ends)
                    .expect("room");
                let mut body = request.into_body();
                let first = tokio::select! {
                    first = body.data() => first.expect("a part").expect("good"),
                    _ = connection.accept() => panic!("nothing more comes"),
                };
                assert_eq!(first.len(), WINDOW as usize);
                // Not released: the window stays closed.
                let reason = tokio::select! {
                    next = body.data() => {
                        next.expect("a reset").expect_err("a reset").reason()
                    }
                    reason = poll_fn(|context| stream.poll_reset(context)) => reason.ok(),
                    _ = connection.accept() => panic!("nothing more comes"),
                };
                assert_eq!(reason, Some(h2::Reason::CANCEL));
            });
            let sends = Sends::default();
            let (mut sender, connection) = http2::Builder::new(sends)
                .handshake(TokioIo::new(near))
                .await
                .expect("HTTP/2");
            let driver = tokio::spawn(dispatch(connection));
            let part = Bytes::from(vec![b'x'; 10 * WINDOW as usize]);
            // HTTP/2 itself keeps the first one, and the task waits with the next.
            let mut body = RequestBody::of_frames([0; 3].map(|_| Frame::data(part.clone())));
            let stop = Upload::new(None, None);
            let watch = body.watched_by(&stop);
            let request = Request::post("http://shop/").body(body).expect("valid");
            let response = sender.send_request(request).await.expect("an answer");
            drop(response);
            match way {
                Way::GivenUp => drop(watch),
                Way::Answered => watch.leave(),
                Way::Stopped => {
                    watch.leave();
                    stop.stop.cancel();
                }
            }
            let patience = match is_reset {
                true => Duration::from_secs(20),
                false => Duration::from_millis(300),
            };
            let ended = timeout(patience, server).await;
            assert_eq!(ended.is_ok(), is_reset, "{way:?}");
            if let Ok(ended) = ended {
                ended.expect("as expected");
            }
            driver.abort();
        }
    }

    /// In HTTP/2 it looks like a failure of the server's stream, for it is reset.
    #[tokio::test]
    async fn what_the_client_breaks_off_is_not_the_servers_failure() {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let server = tokio::spawn(async move {
            let mut connection = h2::server::handshake(far).await.expect("HTTP/2");
            let accepted = connection.accept().await.expect("one");
            let _unanswered: (_, h2::server::SendResponse<Bytes>) = accepted.expect("a request");
            let _ = connection.accept().await;
        });
        let (mut sender, connection) = http2::Builder::new(Sends::default())
            .handshake(TokioIo::new(near))
            .await
            .expect("HTTP/2");
        let driver = tokio::spawn(dispatch(connection));
        let mut body = RequestBody::broken_after(Frame::data(Bytes::from_static(b"half")));
        let watch = body.watch(None, None);
        let request = Request::post("http://shop/").body(body).expect("valid");
        let error = sender.send_request(request).await.expect_err("no answer");
        assert!(!error.is_user(), "hyper knows: {error:?}");
        let error = ExchangeError::of_sent(error, &watch);
        assert!(matches!(error, ExchangeError::BrokenOff(_)), "{error:?}");
        server.abort();
        driver.abort();
    }

    const WINDOW: u32 = 10;
}
