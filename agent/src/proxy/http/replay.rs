//! The body of a request that may be sent more than once, or has to be given up: what has passed is kept as long
//! as it is small, and only the newest try gets anything.
//!
//! It is copied: a piece that is only shared would keep all of the buffer that it was read into.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Bytes, BytesMut};
use futures::task::AtomicWaker;
use http::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use std::pin::Pin;
use tokio::time::Instant;

use super::body::RequestBody;
use crate::proxy::usage::{Hold, Piece};

/// A request's body, and what of it has passed.
#[derive(Debug)]
pub(super) struct Replay {
    state: Mutex<State>,
    /// Waits for the request's end.
    watcher: AtomicWaker,
}

/// The body of one try.
#[derive(Debug)]
pub(super) struct Attempt {
    replay: Arc<Replay>,
    turn: u32,
    hint: SizeHint,
}

#[derive(Debug)]
struct State {
    source: RequestBody,
    hint: SizeHint,
    kept: BytesMut,
    /// What that counts as.
    charged: Hold,
    trailers: Option<HeaderMap>,
    /// How much may be kept.
    room: usize,
    /// Something has passed that is not kept.
    is_lost: bool,
    /// When all of it had come from the client.
    ended: Option<Instant>,
    /// When a part of it came last.
    moved: Instant,
    /// Which try gets it now.
    turn: u32,
    /// How much of what is kept that one was given.
    given: usize,
    gave_trailers: bool,
    waker: Option<Waker>,
}

/// What the body of a try that was given up ends with: the stream is reset as one that nobody wants.
type Cancelled = Box<dyn std::error::Error + Send + Sync>;

impl Replay {
    /// Keeps what passes of a body, up to so many bytes.
    pub(super) fn new(source: RequestBody, room: usize) -> Arc<Self> {
        let now = Instant::now();
        let is_empty = source.is_end_stream();
        Arc::new(Self {
            state: Mutex::new(State {
                hint: source.size_hint(),
                kept: BytesMut::new(),
                charged: source.hold(),
                trailers: None,
                room,
                is_lost: false,
                ended: is_empty.then_some(now),
                moved: now,
                turn: 0,
                given: 0,
                gave_trailers: false,
                waker: None,
                source,
            }),
            watcher: AtomicWaker::new(),
        })
    }

    /// The body for the next try; the one before gets nothing more.
    pub(super) fn attempt(self: &Arc<Self>) -> Attempt {
        let mut state = self.state();
        state.next_turn();
        Attempt {
            replay: Arc::clone(self),
            turn: state.turn,
            hint: state.hint,
        }
    }

    /// Whether all that has passed can be sent again.
    pub(super) fn is_whole(&self) -> bool {
        !self.state().is_lost
    }

    /// Takes the body from the newest try for another one, if all that has passed can be sent again: from
    /// now on nothing passes that would be missing then.
    pub(super) fn reserve(&self) -> bool {
        let mut state = self.state();
        if !state.is_lost {
            state.next_turn();
        }
        !state.is_lost
    }

    /// Gives the newest try up.
    pub(super) fn cancel(&self) {
        self.state().next_turn();
    }

    /// There will be no other try.
    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.room = 0;
        state.forget_given();
    }

    /// When all of it had come from the client; if it has not, whoever asks is told then.
    pub(super) fn ended(&self, context: &Context<'_>) -> Option<Instant> {
        self.watcher.register(context.waker());
        self.state().ended
    }

    /// When a part of it came last.
    pub(super) fn moved(&self) -> Instant {
        self.state().moved
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next_turn(&mut self) {
        self.turn = self.turn.wrapping_add(1);
        self.given = 0;
        self.gave_trailers = false;
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Piece>, Cancelled>>> {
        if self.given < self.kept.len() {
            let again = Bytes::copy_from_slice(&self.kept[self.given..]);
            self.given = self.kept.len();
            self.forget_given();
            return Poll::Ready(Some(Ok(Frame::data(Piece::free(again)))));
        }
        if let Some(trailers) = self.trailers.as_ref().filter(|_| !self.gave_trailers) {
            self.gave_trailers = true;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers.clone()))));
        }
        if self.ended.is_some() {
            return Poll::Ready(None);
        }
        let Poll::Ready(frame) = Pin::new(&mut self.source).poll_frame(context) else {
            self.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        self.moved = Instant::now();
        match &frame {
            Some(Ok(frame)) => self.keep(frame),
            Some(Err(_)) => self.is_lost = true,
            None => self.ended = Some(self.moved),
        }
        if self.source.is_end_stream() {
            self.ended = Some(self.moved);
        }
        Poll::Ready(frame)
    }

    fn keep(&mut self, frame: &Frame<Piece>) {
        if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
            self.gave_trailers = true;
            self.ended = Some(self.moved);
        }
        let Some(data) = frame.data_ref().map(Piece::bytes) else {
            return;
        };
        if self.is_lost || self.kept.len() + data.len() > self.room {
            self.is_lost = true;
            self.kept = BytesMut::new();
            self.given = 0;
        } else {
            self.kept.extend_from_slice(data);
            self.given = self.kept.len();
        }
        self.charged.set(self.kept.len());
    }

    /// Lets go what nobody needs again.
    fn forget_given(&mut self) {
        if self.room == 0 && self.given >= self.kept.len() && !self.kept.is_empty() {
            self.is_lost = true;
            self.kept = BytesMut::new();
            self.charged.set(0);
            self.given = 0;
        }
    }

    fn has_more(&self) -> bool {
        let trailers = self.trailers.is_some() && !self.gave_trailers;
        self.ended.is_none() || self.given < self.kept.len() || trailers
    }
}

impl Attempt {
    /// The next part.
    pub(super) fn poll_frame(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, Cancelled>>> {
        let mut state = self.replay.state();
        if state.turn != self.turn {
            return Poll::Ready(Some(Err(h2::Error::from(h2::Reason::CANCEL).into())));
        }
        let frame = ready!(state.poll(context));
        let has_ended = state.ended.is_some();
        drop(state);
        if has_ended {
            self.replay.watcher.wake();
        }
        Poll::Ready(frame)
    }

    /// The same for another try in its place, if all that has passed can be sent again.
    pub(super) fn again(&self) -> Option<Self> {
        let is_newest = !self.is_given_up();
        (is_newest && self.replay.reserve()).then(|| self.replay.attempt())
    }

    /// Another view of it.
    pub(super) fn view(&self) -> Self {
        Self {
            replay: Arc::clone(&self.replay),
            turn: self.turn,
            hint: self.hint,
        }
    }

    /// Whether it is the newest try's no more.
    pub(super) fn is_given_up(&self) -> bool {
        self.replay.state().turn != self.turn
    }

    /// Whether all of it was given.
    pub(super) fn is_end_stream(&self) -> bool {
        let state = self.replay.state();
        state.turn == self.turn && !state.has_more()
    }

    /// How long the whole body is.
    pub(super) fn size_hint(&self) -> SizeHint {
        self.hint
    }
}

/// How much of a request's body is kept, so that it can be sent again.
pub(super) const MOST_REPLAYED_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn next(attempt: &mut Attempt) -> Option<Result<Vec<u8>, Cancelled>> {
        let frame = poll_fn(|context| attempt.poll_frame(context)).await?;
        Some(frame.map(|it| match it.into_data() {
            Ok(data) => data.bytes().to_vec(),
            Err(_) => b"trailers".to_vec(),
        }))
    }

    async fn text(attempt: &mut Attempt) -> String {
        let mut all = vec![];
        while let Some(part) = next(attempt).await {
            all.extend(part.expect("not given up"));
        }
        String::from_utf8(all).expect("text")
    }

    fn body(parts: &[&'static str], trailers: bool) -> RequestBody {
        let mut frames: Vec<Frame<Bytes>> = vec![];
        for part in parts {
            frames.push(Frame::data(Bytes::from_static(part.as_bytes())));
        }
        if trailers {
            frames.push(Frame::trailers(HeaderMap::new()));
        }
        RequestBody::of_frames(frames)
    }

    #[tokio::test]
    async fn what_has_passed_is_sent_again_with_the_rest() {
        for trailers in [false, true] {
            let replay = Replay::new(body(&["one ", "two ", "three"], trailers), 1024);
            let mut first = replay.attempt();
            assert_eq!(
                next(&mut first).await.expect("a part").expect("good"),
                b"one "
            );
            let mut second = replay.attempt();
            let error = next(&mut first)
                .await
                .expect("an end")
                .expect_err("given up");
            let error = error.downcast::<h2::Error>().expect("an error of HTTP/2");
            assert_eq!(error.reason(), Some(h2::Reason::CANCEL));
            let end = if trailers { "trailers" } else { "" };
            assert_eq!(text(&mut second).await, format!("one two three{end}"));
            assert!(second.is_end_stream() && !first.is_end_stream());
            let mut third = replay.attempt();
            assert!(replay.is_whole() && !third.is_end_stream());
            assert_eq!(text(&mut third).await, format!("one two three{end}"));
        }
    }

    #[tokio::test]
    async fn nothing_passes_between_two_tries() {
        let replay = Replay::new(body(&["one ", "two ", "three"], false), 8);
        let mut first = replay.attempt();
        next(&mut first).await.expect("a part").expect("good");
        assert!(replay.reserve());
        // It would have gone on until too much had passed.
        next(&mut first).await.expect("an end").expect_err("taken");
        assert_eq!(text(&mut replay.attempt()).await, "one two three");
        assert!(!replay.reserve(), "the last one had too much");
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_is_sent_once() {
        for (room, whole) in [(0, false), (6, false), (7, true), (8, true)] {
            let replay = Replay::new(body(&["four", "six"], false), room);
            let mut attempt = replay.attempt();
            assert!(replay.is_whole());
            assert_eq!(text(&mut attempt).await, "foursix");
            assert_eq!(replay.is_whole(), whole, "{room}");
        }
    }

    #[tokio::test]
    async fn what_is_forgotten_is_still_given_to_the_last_try() {
        let replay = Replay::new(body(&["one ", "two"], false), 1024);
        text(&mut replay.attempt()).await;
        let mut last = replay.attempt();
        replay.forget();
        assert!(replay.is_whole());
        assert_eq!(text(&mut last).await, "one two");
        assert!(!replay.is_whole() && replay.state().kept.is_empty());
    }

    #[tokio::test]
    async fn nothing_is_kept_of_an_empty_body() {
        let replay = Replay::new(RequestBody::empty(), 1024);
        let attempt = replay.attempt();
        assert!(attempt.is_end_stream() && replay.is_whole());
        assert_eq!(attempt.size_hint().exact(), Some(0));
    }
}
