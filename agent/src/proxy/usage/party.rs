//! What exchanges of HTTP hold, and whose that is: how many are open, and the bytes that were taken from
//! one side and not yet written to the other.
//!
//! HTTP/1 and HTTP/2 are a library's, and so are some of their buffers. What is counted here is what can
//! be seen from outside of it: the pieces of bodies from when they are taken out of one connection until
//! the other one has written them, with what each costs beside its bytes, and heads that are large. What cannot be seen
//! is bounded: the bytes that HTTP/2 has received and nobody has taken yet are those of a window, whose size
//! is reserved when the connection begins ([`Party::window`]).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use futures::task::AtomicWaker;
use http::HeaderMap;
use weft_core::Identity;

use super::{Usage, change};
use crate::proxy::error::FlowError;
use crate::proxy::tcp::Broken;

/// Whose exchanges are counted together: those that a pod begins, or those that one source has with it.
#[derive(Clone, Debug)]
pub(in crate::proxy) struct Party {
    usage: Arc<Usage>,
    source: Option<Arc<Source>>,
    has_little_to_say: bool,
}

/// Who has exchanges with a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::proxy) enum From {
    /// All workloads that have proven to be this: who holds a key may come from many addresses.
    Workload(Identity),
    /// All others together.
    Strangers,
}

/// What one source has of what is a pod's.
#[derive(Debug)]
pub(super) struct Source {
    exchanges: AtomicUsize,
    kept: AtomicUsize,
    windows: AtomicUsize,
}

/// An exchange that is open.
#[derive(Debug)]
pub(in crate::proxy) struct Place {
    party: Party,
    /// Of its head, if that is large.
    head_bytes: usize,
}

/// How much an HTTP/2 connection may have received before somebody takes it; reserved until dropped.
#[derive(Debug)]
pub(in crate::proxy) struct Window {
    /// Of all streams.
    pub(in crate::proxy) connection_bytes: u32,
    /// Of one.
    pub(in crate::proxy) stream_bytes: u32,
    party: Party,
}

/// Charges for what a body has on its way.
#[derive(Debug, Default)]
pub(in crate::proxy) struct Charger {
    party: Option<Party>,
    lane: Option<Arc<Lane>>,
}

/// Bytes that are kept of something; given back when dropped.
#[derive(Debug)]
pub(in crate::proxy) struct Hold {
    party: Option<Party>,
    bytes: usize,
}

/// A part of a body, charged until it is dropped.
#[derive(Debug)]
pub(in crate::proxy) struct Piece {
    bytes: Bytes,
    _charge: Option<Charge>,
}

#[derive(Debug)]
struct Charge {
    lane: Arc<Lane>,
    bytes: usize,
}

/// The pieces of a body that are on their way.
#[derive(Debug)]
struct Lane {
    party: Party,
    pieces: AtomicUsize,
    waits: AtomicWaker,
}

impl Party {
    /// Of the exchanges that a pod begins.
    pub(in crate::proxy) fn of_pod(usage: &Arc<Usage>) -> Self {
        Self {
            usage: Arc::clone(usage),
            source: None,
            has_little_to_say: false,
        }
    }

    /// Of those that somebody has with a pod. One takes no more places than are left for all others, and half as
    /// many bytes. So whoever takes all that it may, and however many of them there are, leaves some:
    /// the first has half of the places, a second one a quarter.
    pub(in crate::proxy) fn at_pod(usage: &Arc<Usage>, from: From) -> Self {
        let mut all = usage.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let source = all.get(&from).and_then(Weak::upgrade);
        let source = source.unwrap_or_else(|| {
            all.retain(|_, it| it.strong_count() > 0);
            let new = Arc::new(Source {
                exchanges: AtomicUsize::new(0),
                kept: AtomicUsize::new(0),
                windows: AtomicUsize::new(0),
            });
            all.insert(from, Arc::downgrade(&new));
            new
        });
        drop(all);
        Self {
            usage: Arc::clone(usage),
            source: Some(source),
            has_little_to_say: false,
        }
    }

    /// The same on connections that are answered and closed: those must not take the large windows of others.
    pub(in crate::proxy) fn with_little_to_say(mut self) -> Self {
        self.has_little_to_say = true;
        self
    }

    /// A place for an exchange with this head.
    ///
    /// # Errors
    /// There are as many as there may be, or too many bytes are kept.
    pub(in crate::proxy) fn enter(&self, head: &HeaderMap) -> Result<Place, FlowError> {
        if self.is_full() {
            return Err(Broken::TooManyBytes.into());
        }
        let most = self.usage.most_exchanges;
        let all = self.exchanges().fetch_add(1, Ordering::Relaxed);
        let of_source = self.source.as_ref();
        let of_source = of_source.map_or(0, |it| it.exchanges.fetch_add(1, Ordering::Relaxed));
        // From here on it has the place, and gives it back.
        let mut place = Place {
            party: self.clone(),
            head_bytes: 0,
        };
        let left = most.saturating_sub(all);
        if left == 0 || of_source > 0 && of_source >= left {
            return Err(FlowError::TooManyExchanges);
        }
        let head_bytes = head_bytes(head);
        if head_bytes > SMALL_BYTES {
            place.head_bytes = head_bytes;
            self.change(0, head_bytes);
        }
        Ok(place)
    }

    /// Room for what a connection of HTTP/2 receives: less than usual where there are many of them, so
    /// that all of them together may not have the agent keep more than the pod's budget by much.
    pub(in crate::proxy) fn window(&self) -> Window {
        let fits = |bytes: u32, share: usize| {
            let own = &self.usage;
            let of_pod = own.windows.load(Ordering::Relaxed) + bytes as usize;
            let of_source = self.source.as_ref().is_none_or(|it| {
                let of_source = it.windows.load(Ordering::Relaxed) + bytes as usize;
                of_source <= own.kept.budget / share / 2
            });
            !self.has_little_to_say && of_pod <= own.kept.budget / share && of_source
        };
        let (connection_bytes, stream_bytes) = if fits(WINDOW_BYTES, 4) {
            (WINDOW_BYTES, WINDOW_BYTES / 8)
        } else if fits(WINDOW_BYTES / 4, 2) {
            (WINDOW_BYTES / 4, WINDOW_BYTES / 32)
        } else {
            (LEAST_WINDOW_BYTES, LEAST_WINDOW_BYTES)
        };
        for counter in self.windows() {
            counter.fetch_add(connection_bytes as usize, Ordering::Relaxed);
        }
        Window {
            connection_bytes,
            stream_bytes,
            party: self.clone(),
        }
    }

    /// Whether nothing is to be taken that can wait.
    pub(in crate::proxy) fn is_tight(&self) -> bool {
        self.usage.is_tight() || self.of_source() > self.most_of_source() / 2
    }

    fn is_full(&self) -> bool {
        let of_all = [&*self.usage.kept, &*self.usage.of_node];
        of_all.into_iter().any(|it| it.now() > it.budget)
            || self.of_source() > self.most_of_source()
    }

    /// Bytes that are kept for the source.
    fn of_source(&self) -> usize {
        let source = self.source.as_ref();
        source.map_or(0, |it| it.kept.load(Ordering::Relaxed))
    }

    fn most_of_source(&self) -> usize {
        let kept = &self.usage.kept;
        kept.budget.saturating_sub(kept.now()) / 2
    }

    fn exchanges(&self) -> &AtomicUsize {
        match &self.source {
            Some(_) => &self.usage.inbound_exchanges,
            None => &self.usage.outbound_exchanges,
        }
    }

    fn windows(&self) -> impl Iterator<Item = &AtomicUsize> {
        let source = self.source.as_ref().map(|it| &it.windows);
        std::iter::once(&self.usage.windows).chain(source)
    }

    fn change(&self, before: usize, after: usize) {
        if before == after {
            return;
        }
        self.usage.kept.change(before, after);
        self.usage.of_node.change(before, after);
        if let Some(source) = &self.source {
            change(&source.kept, before, after);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.party.change(self.head_bytes, 0);
        if let Some(source) = &self.party.source {
            source.exchanges.fetch_sub(1, Ordering::Relaxed);
        }
        self.party.exchanges().fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        for counter in self.party.windows() {
            counter.fetch_sub(self.connection_bytes as usize, Ordering::Relaxed);
        }
    }
}

impl Hold {
    /// Says how many bytes it is by now.
    pub(in crate::proxy) fn set(&mut self, bytes: usize) {
        let before = std::mem::replace(&mut self.bytes, bytes);
        if let Some(party) = &self.party {
            party.change(before, bytes);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.set(0);
    }
}

impl Charger {
    /// For a party's bodies.
    pub(in crate::proxy) fn new(party: &Party) -> Self {
        Self {
            party: Some(party.clone()),
            lane: None,
        }
    }

    /// For what else is kept: nothing yet.
    pub(in crate::proxy) fn hold(&self) -> Hold {
        Hold {
            party: self.party.clone(),
            bytes: 0,
        }
    }

    /// Waits until another piece may be taken: while much is kept, each body has one on its way; otherwise
    /// so many that small ones do not cost far more than their bytes.
    pub(in crate::proxy) fn poll_room(&self, context: &mut Context<'_>) -> Poll<()> {
        let Some(lane) = &self.lane else {
            return Poll::Ready(());
        };
        if lane.has_room() {
            return Poll::Ready(());
        }
        lane.waits.register(context.waker());
        if lane.has_room() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Whether nothing is to be taken that can wait.
    pub(in crate::proxy) fn is_tight(&self) -> bool {
        self.party.as_ref().is_some_and(Party::is_tight)
    }

    /// Charges for a piece. One that is `all` there is left is not worth it if it is small: there are no more of
    /// them than exchanges.
    pub(in crate::proxy) fn piece(&mut self, bytes: Bytes, all: bool) -> Piece {
        let Some(party) = &self.party else {
            return Piece::free(bytes);
        };
        if bytes.is_empty() || self.lane.is_none() && all && bytes.len() <= SMALL_BYTES {
            return Piece::free(bytes);
        }
        let lane = self.lane.get_or_insert_with(|| {
            Arc::new(Lane {
                party: party.clone(),
                pieces: AtomicUsize::new(0),
                waits: AtomicWaker::new(),
            })
        });
        let charged = bytes.len() + COST_OF_PIECE;
        lane.pieces.fetch_add(1, Ordering::Relaxed);
        lane.party.change(0, charged);
        Piece {
            bytes,
            _charge: Some(Charge {
                lane: Arc::clone(lane),
                bytes: charged,
            }),
        }
    }
}

impl Lane {
    fn has_room(&self) -> bool {
        match self.pieces.load(Ordering::Acquire) {
            0 => true,
            pieces => pieces < MOST_PIECES && !self.party.is_tight(),
        }
    }
}

impl Piece {
    /// One that nobody is charged for.
    pub(in crate::proxy) fn free(bytes: Bytes) -> Self {
        Self {
            bytes,
            _charge: None,
        }
    }

    /// What is in it.
    pub(in crate::proxy) fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.lane.party.change(self.bytes, 0);
        self.lane.pieces.fetch_sub(1, Ordering::AcqRel);
        self.lane.waits.wake();
    }
}

/// As HTTP/2 counts it (RFC 9113, section 6.5.2).
fn head_bytes(head: &HeaderMap) -> usize {
    let fields = head.iter();
    fields
        .map(|(name, value)| name.as_str().len() + value.len() + 32)
        .sum()
}

/// What an exchange may hold without being charged.
const SMALL_BYTES: usize = 4096;
/// What a piece costs beside its bytes: its place in the queues of both connections.
const COST_OF_PIECE: usize = 512;
/// Pieces of a body on their way at once. Of usual size they are far more than a connection takes.
const MOST_PIECES: usize = 64;
/// Room of a connection, and so what it may have the agent keep. Eight readers that have stopped stop the
/// others of the same connection, which are the same pod's; as much as all streams may fill would be
/// 64 MiB for whoever opens one.
const WINDOW_BYTES: u32 = 2 * 1024 * 1024;
/// The least that HTTP/2 has (RFC 9113, section 6.9.2).
const LEAST_WINDOW_BYTES: u32 = 65_535;

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::super::KeptBytes;
    use super::*;
    use crate::proxy::limits::Limits;

    fn usage(exchanges: usize, bytes: usize) -> Arc<Usage> {
        let limits = Limits {
            exchanges_per_pod: exchanges,
            buffered_bytes_per_pod: bytes,
            ..Limits::default()
        };
        Usage::new(&limits, &KeptBytes::new(1 << 40))
    }

    fn head(bytes: usize) -> HeaderMap {
        let mut head = HeaderMap::new();
        if bytes > 0 {
            let value = "a".repeat(bytes - 33);
            head.insert("a", value.parse().expect("valid"));
        }
        head
    }

    fn workload(number: u8) -> From {
        let id = format!("spiffe://cluster.local/ns/shop/sa/web-{number}");
        From::Workload(id.parse().expect("valid"))
    }

    #[test]
    fn a_source_leaves_places_to_others() {
        let usage = usage(4, 1 << 20);
        let [one, same, other, third] = [1, 1, 2, 3].map(|it| Party::at_pod(&usage, workload(it)));
        let of_one = [one.enter(&head(0)), same.enter(&head(0))].map(|it| it.expect("a place"));
        let refused = one.enter(&head(0));
        assert!(matches!(refused, Err(FlowError::TooManyExchanges)));
        let of_other = other.enter(&head(0)).expect("a place");
        let refused = other.enter(&head(0));
        assert!(matches!(refused, Err(FlowError::TooManyExchanges)));
        let of_third = third.enter(&head(0)).expect("the last");
        let fourth = Party::at_pod(&usage, From::Strangers);
        let refused = fourth.enter(&head(0));
        assert!(
            matches!(refused, Err(FlowError::TooManyExchanges)),
            "the pod has four"
        );
        assert_eq!(usage.exchanges(), (4, 0));
        let own = Party::of_pod(&usage);
        let of_own: Vec<_> = (0..4)
            .map(|_| own.enter(&head(0)).expect("its own"))
            .collect();
        assert!(own.enter(&head(0)).is_err());
        assert_eq!(usage.exchanges(), (4, 4));
        drop((of_one, of_other, of_third, of_own, fourth));
        assert_eq!(usage.exchanges(), (0, 0));
        drop((one, same, other, third));
        let _new = Party::at_pod(&usage, From::Strangers);
        let sources = usage.sources.lock().expect("no panic").len();
        assert_eq!(sources, 1, "those that are gone are forgotten");
    }

    #[test]
    fn large_heads_and_pieces_are_charged() {
        let usage = usage(10, 1 << 20);
        let party = Party::at_pod(&usage, From::Strangers);
        let place = party.enter(&head(4096)).expect("a place");
        assert_eq!(usage.kept_bytes(), 0);
        let large = party.enter(&head(10_000)).expect("a place");
        assert_eq!(usage.kept_bytes(), 10_000);
        let mut charger = Charger::new(&party);
        let last = charger.piece(Bytes::from(vec![0; 4096]), true);
        let nothing = charger.piece(Bytes::new(), false);
        assert_eq!(usage.kept_bytes(), 10_000);
        let piece = charger.piece(Bytes::from(vec![0; 4096]), false);
        assert_eq!(usage.kept_bytes(), 10_000 + 4096 + COST_OF_PIECE);
        let second = charger.piece(Bytes::from_static(b"a"), true);
        assert_eq!(usage.kept_bytes(), 10_000 + 4097 + 2 * COST_OF_PIECE);
        let mut hold = charger.hold();
        let before = usage.kept_bytes();
        for bytes in [700, 100, 0, 5] {
            hold.set(bytes);
            assert_eq!(usage.kept_bytes(), before + bytes);
        }
        drop((place, large, last, nothing, piece, second, hold));
        assert_eq!(usage.kept_bytes(), 0);
        assert_eq!(party.of_source(), 0);
    }

    #[test]
    fn who_keeps_much_has_one_piece_on_its_way_and_begins_nothing() {
        let usage = usage(10, 300_000);
        let [party, other] = [1, 2].map(|it| Party::at_pod(&usage, workload(it)));
        let mut context = Context::from_waker(Waker::noop());
        let mut charger = Charger::new(&party);
        assert!(charger.poll_room(&mut context).is_ready());
        let first = charger.piece(Bytes::from(vec![0; 40_000]), false);
        assert!(charger.poll_room(&mut context).is_ready());
        let second = charger.piece(Bytes::from(vec![0; 61_000]), false);
        assert!(charger.poll_room(&mut context).is_pending());
        let refused = party.enter(&head(0));
        assert!(matches!(
            refused,
            Err(FlowError::Broken(Broken::TooManyBytes))
        ));
        assert!(other.enter(&head(0)).is_ok() && !other.is_tight());
        drop(first);
        assert!(charger.poll_room(&mut context).is_pending());
        drop(second);
        assert!(charger.poll_room(&mut context).is_ready());
        assert!(party.enter(&head(0)).is_ok());
    }

    #[test]
    fn small_pieces_are_few() {
        let usage = usage(10, 1 << 30);
        let mut charger = Charger::new(&Party::of_pod(&usage));
        let mut context = Context::from_waker(Waker::noop());
        let mut pieces = Vec::new();
        while charger.poll_room(&mut context).is_ready() {
            pieces.push(charger.piece(Bytes::from_static(b"a"), false));
        }
        assert_eq!(pieces.len(), MOST_PIECES);
        pieces.pop();
        assert!(charger.poll_room(&mut context).is_ready());
    }

    #[test]
    fn windows_shrink_where_there_are_many() {
        let usage = usage(10, 32 << 20);
        let party = Party::of_pod(&usage);
        let windows: Vec<_> = (0..1000).map(|_| party.window()).collect();
        let of_size = |bytes| {
            let same = windows.iter().filter(|it| it.connection_bytes == bytes);
            same.count()
        };
        assert_eq!(of_size(WINDOW_BYTES), 4);
        assert_eq!(of_size(WINDOW_BYTES / 4), 16);
        assert_eq!(of_size(LEAST_WINDOW_BYTES), 980);
        drop(windows);
        assert_eq!(usage.windows.load(Ordering::Relaxed), 0);
        // One source has half of the large ones.
        let [one, other] = [1, 2].map(|it| Party::at_pod(&usage, workload(it)));
        let refused = one.clone().with_little_to_say();
        assert_eq!(refused.window().connection_bytes, LEAST_WINDOW_BYTES);
        let of_one: Vec<_> = (0..1000).map(|_| one.window()).collect();
        assert_eq!(other.window().connection_bytes, LEAST_WINDOW_BYTES);
        drop(of_one);
        assert_eq!(other.window().connection_bytes, WINDOW_BYTES);
    }
}
