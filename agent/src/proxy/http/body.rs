//! Bodies on their way: never collected, driven by whoever takes them. An exchange ends with its
//! response's body: then its connection is free for the next one, or gone.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::task::AtomicWaker;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::ext::on_informational;
use hyper::{Request, StatusCode};
use tokio::sync::mpsc;
use tokio::task::unconstrained;
use tokio::time::{Sleep, sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::answer;
use super::answerer::check_rest;
use super::connection::{Http1, OpenStream};
use super::deadlines::Deadlines;
use super::head;
use super::interim::Interim;
use super::replay::Attempt;
use super::serve::Progress;
use super::upload::{Upload, Watch};
use crate::proxy::live_requests::RequestEntry;
use crate::proxy::usage::{Charger, Hold, Party, Piece};
use crate::telemetry::exchange::RequestEnd;

/// What a request has behind its head.
#[derive(Debug)]
pub(in crate::proxy) struct RequestBody {
    source: Source,
    /// The client waits to be told to send it.
    expects: Option<Waiting>,
    /// Others who get it too.
    copies: Vec<mpsc::Sender<Copied>>,
    /// Told when it has ended.
    end: Option<Arc<OnceLock<Instant>>>,
    /// Bytes that have passed are counted there, if somebody wants to know.
    bytes: Option<Arc<AtomicU64>>,
    /// What others know of it, and may end it.
    upload: Option<Arc<Upload>>,
    /// For what is on its way, and for the copies of it.
    charger: Charger,
    of_copies: Charger,
}

/// Where a request's body comes from.
#[derive(Debug)]
enum Source {
    Nothing,
    /// The client.
    Client(Incoming),
    /// What passes by on its way elsewhere.
    Copy(mpsc::Receiver<Copied>, SizeHint),
    /// One try of several, or one that may be given up.
    Attempt(Attempt),
    #[cfg(test)]
    Frames(std::collections::VecDeque<Result<Frame<Bytes>, CutOff>>),
}

/// What a body can be made again from; none: there is nothing.
#[derive(Debug)]
pub(super) struct Repeat(Option<Attempt>);

/// A part of a body that is sent elsewhere too.
#[derive(Debug)]
enum Copied {
    Data(Piece),
    End,
}

/// A body that could not be copied to its end: it must not look complete.
#[derive(Debug, thiserror::Error)]
#[error("the body that this is a copy of was cut off, or was faster")]
struct CutOff;

#[derive(Debug)]
struct Waiting {
    told: Arc<Told>,
    patience: Pin<Box<Sleep>>,
}

/// Whether the server wants the body of a request that asked (`Expect: 100-continue`, RFC 9110, section
/// 10.1.1).
#[derive(Debug, Default)]
struct Told {
    wanted: AtomicBool,
    waits: AtomicWaker,
}

/// What a response has behind its head.
#[derive(Debug)]
pub(in crate::proxy) struct ResponseBody {
    incoming: Option<Incoming>,
    /// The connection that it comes from, if nobody else drives it.
    connection: Option<Used>,
    ending: Option<Ending>,
    /// Told when it has ended.
    progress: Option<Arc<Progress>>,
    held: Option<Box<Held>>,
    /// Ends it before.
    revocation: Option<Revocation>,
    /// Stops the request's body with it.
    upload: Option<Watch>,
    charger: Charger,
}

/// What policy has to do with a response.
struct Revocation {
    _entry: Arc<RequestEntry>,
    revoked: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// What bounds a response's body, and what was looked at before it was passed on.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// When it must have ended.
    pub(super) deadlines: Option<Deadlines>,
    /// Its first part.
    pub(super) first: Option<Frame<Bytes>>,
    /// If it is cut off, the client hears why by trailers.
    pub(super) is_told: bool,
}

/// A connection in use, and where it goes when it is free.
#[derive(Debug)]
pub(super) struct Used {
    /// The connection.
    pub(super) connection: Box<Http1>,
    /// Takes it back.
    pub(super) home: Home,
}

pub(super) use super::outbound::Ending;
pub(super) use super::pool::Home;

impl fmt::Debug for Revocation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Revocation").finish_non_exhaustive()
    }
}

impl RequestBody {
    /// What the client sends; a party is charged for it.
    pub(super) fn of(incoming: Incoming, party: &Party) -> Self {
        let mut body = Self::from(Source::Client(incoming));
        body.charger = Charger::new(party);
        body.of_copies = Charger::new(party);
        body
    }

    /// Charges whoever is charged for it for what else is kept of it.
    pub(super) fn hold(&self) -> Hold {
        self.charger.hold()
    }

    /// Nothing.
    pub(super) fn empty() -> Self {
        Self::from(Source::Nothing)
    }

    /// What a try is given of it.
    pub(super) fn of_try(attempt: Attempt) -> Self {
        Self::from(Source::Attempt(attempt))
    }

    #[cfg(test)]
    pub(super) fn watched_by(&mut self, upload: &Arc<Upload>) -> Watch {
        self.upload = Some(Arc::clone(upload));
        Watch::new(self.upload.clone())
    }

    #[cfg(test)]
    pub(super) fn of_frames(frames: impl IntoIterator<Item = Frame<Bytes>>) -> Self {
        Self::from(Source::Frames(frames.into_iter().map(Ok).collect()))
    }

    /// One that its client breaks off.
    #[cfg(test)]
    pub(super) fn broken_after(frame: Frame<Bytes>) -> Self {
        Self::from(Source::Frames([Ok(frame), Err(CutOff)].into()))
    }

    fn from(source: Source) -> Self {
        Self {
            source,
            expects: None,
            copies: Vec::new(),
            end: None,
            bytes: None,
            upload: None,
            charger: Charger::default(),
            of_copies: Charger::default(),
        }
    }

    /// When all of it has been read.
    pub(super) fn end(&mut self) -> RequestEnd {
        if self.is_end_stream() {
            return RequestEnd::At(Instant::now());
        }
        RequestEnd::Told(Arc::clone(self.end.get_or_insert_default()))
    }

    /// Counts what passes.
    pub(super) fn count_in(&mut self, bytes: Option<Arc<AtomicU64>>) {
        self.bytes = bytes;
    }

    /// Watches over it while it is sent: for a request that policy may end, and that has a place in a connection.
    pub(super) fn watch(
        &mut self,
        entry: Option<&Arc<RequestEntry>>,
        stream: Option<&OpenStream>,
    ) -> Watch {
        if !self.is_end_stream() {
            self.upload = Some(Upload::new(entry, stream.cloned()));
        }
        Watch::new(self.upload.clone())
    }

    /// What makes the same again, once this one is with a server that has seen nothing of it. None: nothing does.
    pub(super) fn repeat(&self) -> Option<Repeat> {
        match &self.source {
            Source::Attempt(attempt) => Some(Repeat(Some(attempt.view()))),
            _ if self.is_end_stream() => Some(Repeat(None)),
            _ => None,
        }
    }

    /// The same once more, as it passes by.
    pub(super) fn copied(&mut self) -> Self {
        if self.is_end_stream() {
            return Self::empty();
        }
        let (sender, receiver) = mpsc::channel(MOST_COPIED);
        self.copies.push(sender);
        Self::from(Source::Copy(receiver, self.size_hint()))
    }

    /// Waits until the server wants it, for a moment: servers that do not know of this never say so.
    fn when_wanted(&mut self) -> Arc<Told> {
        let told = Arc::new(Told::default());
        self.expects = Some(Waiting {
            told: Arc::clone(&told),
            patience: Box::pin(sleep(EXPECT_PATIENCE)),
        });
        told
    }
}

/// Holds the body back until the server wants it, where the client waits for that, and passes on what else the server says
/// before its answer.
pub(super) fn heed_interim(request: &mut Request<RequestBody>) {
    let told = head::expects(request).then(|| request.body_mut().when_wanted());
    let interim = request.extensions().get::<Interim>().cloned();
    if told.is_none() && interim.is_none() {
        return;
    }
    on_informational(request, move |response| {
        if response.status() == StatusCode::CONTINUE {
            if let Some(told) = &told {
                told.want();
            }
        } else if let Some(interim) = &interim {
            interim.pass(response.status(), response.headers());
        }
    });
}

impl Told {
    /// The server wants it.
    fn want(&self) {
        self.wanted.store(true, Ordering::Release);
        self.waits.wake();
    }
}

impl Body for RequestBody {
    type Data = Piece;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, Self::Error>>> {
        if let Some(waiting) = &mut self.expects {
            waiting.told.waits.register(context.waker());
            if !waiting.told.wanted.load(Ordering::Acquire) {
                ready!(waiting.patience.as_mut().poll(context));
            }
            self.expects = None;
        }
        let this = &mut *self;
        if let Some(upload) = &this.upload
            && !upload.goes_on()
        {
            return Poll::Ready(Some(Err(cancelled())));
        }
        let frame = match &mut this.source {
            Source::Nothing => return Poll::Ready(None),
            Source::Client(incoming) => {
                ready!(this.charger.poll_room(context));
                let frame = ready!(Pin::new(&mut *incoming).poll_frame(context));
                let (charger, all) = (&mut this.charger, incoming.is_end_stream());
                let charge = |it: Frame<_>| it.map_data(|data| charger.piece(data, all));
                frame.map(|it| it.map(charge).map_err(Self::Error::from))
            }
            // Charged as what it is a try of.
            Source::Attempt(attempt) => ready!(attempt.poll_frame(context)),
            #[cfg(test)]
            Source::Frames(frames) => {
                let frame = frames.pop_front();
                let charge = |it: Frame<_>| it.map_data(Piece::free);
                frame.map(|it| it.map(charge).map_err(Self::Error::from))
            }
            Source::Copy(receiver, _) => {
                return Poll::Ready(match ready!(receiver.poll_recv(context)) {
                    Some(Copied::Data(data)) => Some(Ok(Frame::data(data))),
                    Some(Copied::End) => None,
                    None => Some(Err(CutOff.into())),
                });
            }
        };
        if let (Some(bytes), Some(Ok(frame))) = (&this.bytes, &frame)
            && let Some(data) = frame.data_ref()
        {
            bytes.fetch_add(data.bytes().len() as u64, Ordering::Relaxed);
        }
        // Who does not keep up loses the rest, and so its request; where much is kept, everybody does.
        match &frame {
            Some(Ok(_)) if !this.copies.is_empty() && this.of_copies.is_tight() => {
                this.copies.clear();
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    let charger = &mut this.of_copies;
                    let mut copy = || Copied::Data(charger.piece(data.bytes().clone(), false));
                    this.copies.retain(|it| it.try_send(copy()).is_ok());
                }
            }
            None => this.copies.retain(|it| it.try_send(Copied::End).is_ok()),
            Some(Err(_)) => {
                this.copies.clear();
                if let Some(upload) = &this.upload
                    && !this.source.is_given_up()
                {
                    upload.breaks();
                }
            }
        }
        let ended = this.is_end_stream();
        let has_ended = frame.is_none() || ended;
        if let Some(end) = this.end.take_if(|_| has_ended) {
            let _ = end.set(Instant::now());
        }
        if ended {
            // Nobody asks for the end of a body whose length is known.
            for copy in this.copies.drain(..) {
                let _ = copy.try_send(Copied::End);
            }
        }
        Poll::Ready(frame.map(|it| it.map(without_own)))
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Nothing => true,
            Source::Client(incoming) => incoming.is_end_stream(),
            Source::Copy(..) => false,
            Source::Attempt(attempt) => attempt.is_end_stream(),
            #[cfg(test)]
            Source::Frames(frames) => frames.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Nothing => SizeHint::with_exact(0),
            Source::Client(incoming) => incoming.size_hint(),
            Source::Copy(_, hint) => *hint,
            Source::Attempt(attempt) => attempt.size_hint(),
            #[cfg(test)]
            Source::Frames(_) => SizeHint::default(),
        }
    }
}

impl Repeat {
    /// The body for another server. None: too much of it has passed, or somebody else has got it.
    pub(super) fn body(&self) -> Option<RequestBody> {
        match &self.0 {
            None => Some(RequestBody::empty()),
            Some(attempt) => attempt.again().map(RequestBody::of_try),
        }
    }
}

impl Source {
    /// Whether it ends because another try has taken its place, or none has.
    fn is_given_up(&self) -> bool {
        matches!(self, Self::Attempt(attempt) if attempt.is_given_up())
    }
}

/// Trailers are no place to say who the client is either.
fn without_own(frame: Frame<Piece>) -> Frame<Piece> {
    match frame.into_trailers() {
        Ok(mut trailers) => {
            head::remove_own(&mut trailers);
            Frame::trailers(trailers)
        }
        Err(frame) => frame,
    }
}

impl ResponseBody {
    /// Nothing.
    pub(super) fn empty() -> Self {
        Self {
            incoming: None,
            connection: None,
            ending: None,
            progress: None,
            held: None,
            revocation: None,
            upload: None,
            charger: Charger::default(),
        }
    }

    /// What a server sends.
    pub(super) fn of(incoming: Incoming, connection: Option<Used>, ending: Ending) -> Self {
        Self::of_held(incoming, connection, ending, None)
    }

    /// What a server sends, within bounds.
    pub(super) fn of_held(
        incoming: Incoming,
        connection: Option<Used>,
        ending: Ending,
        held: Option<Box<Held>>,
    ) -> Self {
        let mut body = Self {
            incoming: Some(incoming),
            connection,
            ending: Some(ending),
            progress: None,
            held,
            revocation: None,
            upload: None,
            charger: Charger::default(),
        };
        if body.is_end_stream() {
            body.finish();
        }
        body
    }

    /// Ends it when policy no longer allows its request.
    pub(super) fn under(mut self, entry: Option<Arc<RequestEntry>>) -> Self {
        if !self.is_end_stream() {
            self.revocation = entry.map(|entry| Revocation {
                revoked: Box::pin(entry.end().clone().cancelled_owned()),
                _entry: entry,
            });
        }
        self
    }

    /// Stops the request's body, unless it comes to its own end before.
    pub(super) fn watching(mut self, upload: Watch) -> Self {
        if self.is_end_stream() {
            upload.leave();
        } else {
            self.upload = Some(upload);
        }
        self
    }

    /// Charges a party for what is on its way.
    pub(super) fn charged(mut self, party: &Party) -> Self {
        self.charger = Charger::new(party);
        self
    }

    /// Tells the connection to the client when it has ended.
    pub(super) fn tell_end(&mut self, progress: Arc<Progress>) {
        if self.is_end_stream() {
            progress.answered();
        } else {
            self.progress = Some(progress);
        }
    }

    /// All of it has come.
    fn finish(&mut self) {
        self.revocation = None;
        if let Some(upload) = self.upload.take() {
            upload.leave();
        }
        if let Some(progress) = self.progress.take() {
            progress.answered();
        }
        if let Some(used) = self.connection.take() {
            used.give_back();
        }
        if let Some(ending) = self.ending.take() {
            ending.ended();
        }
        self.held = None;
    }

    /// What was looked at before, or an end by what bounds it; none: what comes next decides.
    fn poll_held(&mut self, context: &mut Context<'_>) -> Option<Result<Frame<Bytes>, BodyError>> {
        let held = self.held.as_mut()?;
        if let Some(first) = held.first.take() {
            return Some(Ok(first));
        }
        let deadlines = held.deadlines.as_mut()?;
        let Poll::Ready(late) = deadlines.poll(context) else {
            return None;
        };
        deadlines.cancel();
        let trailers = held.is_told.then(|| answer::late_trailers(late));
        self.held = None;
        self.connection = None;
        self.incoming = None;
        self.upload = None;
        if let Some(ending) = self.ending.take() {
            ending.late(late, trailers.as_ref());
        }
        if let Some(trailers) = trailers {
            if let Some(progress) = self.progress.take() {
                progress.answered();
            }
            return Some(Ok(Frame::trailers(trailers)));
        }
        // The client hears that it gets no more: by a reset of its stream, or the end of its connection.
        Some(Err(cancelled()))
    }
}

/// Why a body is cut off.
type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Nobody wants the rest.
fn cancelled() -> BodyError {
    h2::Error::from(h2::Reason::CANCEL).into()
}

impl Used {
    /// The exchange is over.
    pub(super) fn give_back(self) {
        let Self {
            mut connection,
            home,
        } = self;
        // What its server does meanwhile is asked before it is used again.
        if connection.is_done() {
            home.give(connection);
        } else {
            connection.close();
        }
    }
}

impl Body for ResponseBody {
    type Data = Piece;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, BodyError>>> {
        let this = &mut *self;
        if let Some(it) = &mut this.revocation
            && it.revoked.as_mut().poll(context).is_ready()
        {
            this.revocation = None;
            this.incoming = None;
            this.connection = None;
            this.upload = None;
            // Counted as given up.
            this.ending = None;
            return Poll::Ready(Some(Err(cancelled())));
        }
        if let Some(used) = &mut this.connection {
            used.connection.poll(context);
        }
        let first = match this.held {
            None => None,
            Some(_) => match this.poll_held(context) {
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(first)) => Some(first),
                None => None,
            },
        };
        let Some(incoming) = &mut this.incoming else {
            // There is nothing more, or what says why.
            let charger = &mut this.charger;
            let mut charge = |it: Frame<_>| it.map_data(|data| charger.piece(data, true));
            return Poll::Ready(first.map(|it| Ok(charge(it))));
        };
        let frame = match first {
            Some(first) => Some(Ok(first)),
            None => {
                ready!(this.charger.poll_room(context));
                // Where the connection is driven here, nothing else brings parts of it: nobody has to be woken by them, nor
                // told to wait for a turn.
                let mut unwoken = Context::from_waker(Waker::noop());
                let frame = match this.connection {
                    Some(_) => pin!(unconstrained(poll_fn(|context| {
                        Pin::new(&mut *incoming).poll_frame(context)
                    })))
                    .poll(&mut unwoken),
                    None => Pin::new(&mut *incoming).poll_frame(context),
                };
                let frame = ready!(frame);
                frame.map(|it| it.map(check_rest))
            }
        };
        let ended = incoming.is_end_stream();
        match &frame {
            Some(Ok(frame)) => {
                if let Some(ending) = &mut this.ending {
                    match frame.trailers_ref() {
                        Some(trailers) => ending.trailers(trailers),
                        None => ending.part(frame.data_ref().map_or(0, Bytes::len)),
                    }
                }
                if let Some(deadlines) = this.held.as_mut().and_then(|it| it.deadlines.as_mut()) {
                    deadlines.moved();
                }
                if ended {
                    this.finish();
                }
            }
            Some(Err(error)) => {
                this.connection = None;
                let is_of_client = this.upload.take().is_some_and(|it| it.is_broken());
                match this.ending.take() {
                    Some(ending) if is_of_client => ending.broken_off(),
                    Some(ending) => ending.failed(error),
                    None => {}
                }
            }
            None => this.finish(),
        }
        let charger = &mut this.charger;
        let charge = |it: Frame<_>| it.map_data(|data| charger.piece(data, ended));
        Poll::Ready(frame.map(|it| it.map(charge).map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        let has_first = self.held.as_ref().is_some_and(|it| it.first.is_some());
        !has_first && self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let nothing = || SizeHint::with_exact(0);
        let hint = self.incoming.as_ref().map_or_else(nothing, Body::size_hint);
        let first = self.held.as_ref().and_then(|it| it.first.as_ref());
        let Some(data) = first.and_then(Frame::data_ref) else {
            return hint;
        };
        // It was counted out already.
        let mut whole = SizeHint::new();
        whole.set_lower(hint.lower() + data.len() as u64);
        if let Some(upper) = hint.upper() {
            whole.set_upper(upper + data.len() as u64);
        }
        whole
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // The client did not want the rest. Of a response to HEAD, for one, there is none; and with the length that
        // was announced some have all that they wait for, though the stream has not been ended yet.
        if self.is_end_stream() || self.size_hint().exact() == Some(0) {
            self.finish();
        }
    }
}

/// How long a client that asked is kept waiting by a server that does not answer: as long as clients
/// themselves usually wait.
const EXPECT_PATIENCE: Duration = Duration::from_secs(1);
/// Pieces of a body that a copy may be behind.
const MOST_COPIED: usize = 64;
