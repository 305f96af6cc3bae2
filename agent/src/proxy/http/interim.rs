//! Interim answers (RFC 9110, section 15.2), such as 103 Early Hints, on their way to a client of HTTP/1. hyper takes them from
//! servers and writes none, so they are written beside it: by the stream that hyper writes to, at a moment at
//! which all that hyper has written has left it. An answer waits until those that came before it have been.
//!
//! 100 (Continue) and 101 (Switching Protocols) are other matters: they say what becomes of the request. Of HTTP/2 hyper
//! tells no interim answers, and none can be written beside it.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use http::header::{CONTENT_LENGTH, TRAILER};
use http::{HeaderMap, StatusCode};

use super::answer;
use super::head::{Purpose, strip_hop};

/// Those of one exchange. What comes for one that is over goes nowhere.
#[derive(Clone, Debug)]
pub(super) struct Interim {
    outbox: Outbox,
    exchange: u64,
}

/// Those of a client's connection, which has one exchange at a time.
#[derive(Clone, Debug, Default)]
pub(super) struct Outbox(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    /// Which exchange they may be of; 0: none.
    exchange: u64,
    begun: u64,
    /// How many more it may have.
    left: usize,
    /// Heads that are to be written.
    heads: Vec<u8>,
    /// The answer that waits for it.
    answer: Option<Waker>,
}

impl Outbox {
    /// Of a new exchange.
    pub(super) fn begin(&self) -> Interim {
        let mut waiting = self.waiting();
        waiting.begun += 1;
        waiting.exchange = waiting.begun;
        waiting.left = MOST_PER_EXCHANGE;
        Interim {
            outbox: self.clone(),
            exchange: waiting.exchange,
        }
    }

    /// What is to be written now.
    pub(super) fn take(&self) -> Option<Vec<u8>> {
        let mut waiting = self.waiting();
        if waiting.heads.is_empty() {
            return None;
        }
        if let Some(answer) = waiting.answer.take() {
            answer.wake();
        }
        Some(std::mem::take(&mut waiting.heads))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Every change under the lock is complete in itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interim {
    /// Passes one on, if there is room for it.
    pub(super) fn pass(&self, status: StatusCode, headers: &HeaderMap) {
        if matches!(
            status,
            StatusCode::CONTINUE | StatusCode::SWITCHING_PROTOCOLS
        ) {
            return;
        }
        let mut waiting = self.outbox.waiting();
        if waiting.exchange != self.exchange || waiting.left == 0 {
            return;
        }
        let head = written(status, headers);
        if waiting.heads.len() + head.len() > MOST_WAITING_BYTES {
            return;
        }
        waiting.left -= 1;
        waiting.heads.extend_from_slice(&head);
    }

    /// Ends when all of them have left, and there will be no more.
    pub(super) async fn over(self) {
        self.outbox.waiting().exchange = 0;
        poll_fn(|context| {
            let mut waiting = self.outbox.waiting();
            if waiting.heads.is_empty() {
                return Poll::Ready(());
            }
            waiting.answer = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// The head as HTTP/1 writes it (RFC 9112, section 4). It has no body, and nothing that speaks of one.
fn written(status: StatusCode, headers: &HeaderMap) -> Vec<u8> {
    let mut headers = headers.clone();
    strip_hop(&mut headers, Purpose::Exchange);
    for name in [CONTENT_LENGTH, TRAILER, answer::ERROR] {
        headers.remove(name);
    }
    let reason = status.canonical_reason().unwrap_or_default();
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).into_bytes();
    for (name, value) in &headers {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    head
}

/// What is more is left out: servers send one or two.
const MOST_PER_EXCHANGE: usize = 16;
/// The same of what a client has not read yet.
const MOST_WAITING_BYTES: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use http::HeaderValue;

    use super::*;

    fn hints() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("link", HeaderValue::from_static("</a.css>; rel=preload"));
        headers
    }

    #[test]
    fn what_is_of_the_hop_is_left_out() {
        let mut headers = hints();
        for name in ["connection", "x-private", "weft-error", "content-length"] {
            headers.insert(name, HeaderValue::from_static("x-private"));
        }
        let head = written(StatusCode::EARLY_HINTS, &headers);
        let is = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&head), is);
    }

    #[test]
    fn no_more_than_there_is_room_for() {
        let outbox = Outbox::default();
        let interim = outbox.begin();
        for _ in 0..MOST_PER_EXCHANGE + 5 {
            interim.pass(StatusCode::PROCESSING, &HeaderMap::new());
        }
        let all = outbox.take().expect("some");
        let one = written(StatusCode::PROCESSING, &HeaderMap::new());
        assert_eq!(all, one.repeat(MOST_PER_EXCHANGE));
        let interim = outbox.begin();
        let mut large = HeaderMap::new();
        let value = "x".repeat(MOST_WAITING_BYTES);
        large.insert("link", HeaderValue::try_from(value).expect("valid"));
        interim.pass(StatusCode::EARLY_HINTS, &large);
        assert!(outbox.take().is_none());
    }

    #[test]
    fn an_answer_waits_for_those_before_it() {
        let outbox = Outbox::default();
        let interim = outbox.begin();
        interim.pass(StatusCode::EARLY_HINTS, &hints());
        let late = interim.clone();
        let mut over = Box::pin(interim.over());
        assert!(over.as_mut().now_or_never().is_none());
        assert!(outbox.take().is_some());
        assert!(over.as_mut().now_or_never().is_some());
        // What comes now would be the next exchange's.
        late.pass(StatusCode::EARLY_HINTS, &hints());
        let _next = outbox.begin();
        late.pass(StatusCode::EARLY_HINTS, &hints());
        assert!(outbox.take().is_none());
    }

    #[test]
    fn what_decides_on_the_request_is_not_passed_on() {
        let outbox = Outbox::default();
        let interim = outbox.begin();
        for status in [StatusCode::CONTINUE, StatusCode::SWITCHING_PROTOCOLS] {
            interim.pass(status, &HeaderMap::new());
        }
        assert!(outbox.take().is_none());
    }
}
