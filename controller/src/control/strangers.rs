//! Connections that have not proved yet to be an agent's. They are few at a time, also from one
//! address, and for a moment only: whoever holds sockets open keeps no agent away, as the oldest
//! stranger goes when a new one comes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use weft_core::{Counts, Name};

/// Everybody who is connected: strangers one by one, agents by number.
#[derive(Debug, Default)]
pub(super) struct Doors {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    strangers: BTreeMap<u64, (IpAddr, CancellationToken)>,
    by_address: HashMap<IpAddr, BTreeSet<u64>>,
    /// Connections of agents.
    nodes: Counts<Name>,
}

/// A connection's place: among the strangers until it proves to be an agent's.
#[derive(Debug)]
pub(super) struct Seat {
    doors: Arc<Doors>,
    number: u64,
    /// Where it comes from: an address, or the network of one.
    pub(super) address: IpAddr,
    /// Cancelled when the place is needed for another.
    pub(super) leave: CancellationToken,
    node: Mutex<Option<Name>>,
}

/// A connection that ends when its place is lost, or when nobody proves anything for too long.
pub(super) struct Guarded<T> {
    io: T,
    seat: Arc<Seat>,
    /// While it is a stranger's.
    until: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

/// Too many connections of one node's agents.
#[derive(Debug)]
pub(super) struct TooMany;

/// Strangers at a time.
const MAX_STRANGERS: usize = 512;
/// Strangers at a time from one address.
const MAX_PER_ADDRESS: usize = 64;
/// Connections of one node's agents: two of each of the processes that an upgrade may need.
const MAX_PER_NODE: usize = 16;
/// A stranger has this long for the first call, after the handshake.
const PROOF_TIMEOUT: Duration = Duration::from_secs(5);

impl Doors {
    /// Lets a stranger in; the oldest one leaves if there are too many.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Arc<Seat> {
        let address = place(address);
        let leave = CancellationToken::new();
        let mut state = self.locked();
        let from_there = state.by_address.get(&address);
        let oldest = match from_there.filter(|it| it.len() >= MAX_PER_ADDRESS) {
            Some(from_there) => from_there.first().copied(),
            None if state.strangers.len() >= MAX_STRANGERS => {
                state.strangers.keys().next().copied()
            }
            None => None,
        };
        if let Some((_, older)) = oldest.and_then(|it| state.remove(it)) {
            older.cancel();
        }
        state.next += 1;
        let number = state.next;
        state.strangers.insert(number, (address, leave.clone()));
        state.by_address.entry(address).or_default().insert(number);
        drop(state);
        Arc::new(Seat {
            doors: self.clone(),
            number,
            address,
            leave,
            node: Mutex::default(),
        })
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        // Single inserts and removes only: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn remove(&mut self, number: u64) -> Option<(IpAddr, CancellationToken)> {
        let (address, leave) = self.strangers.remove(&number)?;
        if let Some(from_there) = self.by_address.get_mut(&address) {
            from_there.remove(&number);
            if from_there.is_empty() {
                self.by_address.remove(&address);
            }
        }
        Some((address, leave))
    }
}

impl Seat {
    /// The connection proved to be that of a node's agent.
    pub(super) fn prove(&self, node: &Name) -> Result<(), TooMany> {
        let mut proved = self.node();
        if proved.as_ref() == Some(node) {
            return Ok(());
        }
        let mut state = self.doors.locked();
        if state.nodes.of(node) >= MAX_PER_NODE {
            return Err(TooMany);
        }
        state.remove(self.number);
        state.nodes.add(node.clone());
        if let Some(before) = proved.replace(node.clone()) {
            state.nodes.remove(&before);
        }
        Ok(())
    }

    fn is_proved(&self) -> bool {
        self.node().is_some()
    }

    fn node(&self) -> MutexGuard<'_, Option<Name>> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let node = self.node().take();
        let mut state = self.doors.locked();
        state.remove(self.number);
        if let Some(node) = node {
            state.nodes.remove(&node);
        }
    }
}

impl<T> Guarded<T> {
    pub(super) fn new(io: T, seat: Arc<Seat>) -> Self {
        let leave = seat.leave.clone();
        let until = async move {
            let _ = tokio::time::timeout(PROOF_TIMEOUT, leave.cancelled()).await;
        };
        let until: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(until);
        Self {
            io,
            seat,
            until: Some(until),
        }
    }

    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let Some(until) = &mut self.until else {
            return Ok(());
        };
        if self.seat.is_proved() {
            self.until = None;
            return Ok(());
        }
        match until.as_mut().poll(context) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "nobody proved to be an agent",
            )),
        }
    }
}

impl<T> Connected for Guarded<T> {
    type ConnectInfo = Arc<Seat>;

    fn connect_info(&self) -> Arc<Seat> {
        self.seat.clone()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Guarded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Whom an address stands for: of IPv6, everybody has a network of 64 bits.
fn place(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = u128::from(address) >> 64 << 64;
            Ipv6Addr::from(network).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_stranger_leaves() {
        let doors = Arc::new(Doors::default());
        let address = |it: u32| IpAddr::from((0x0a00_0000 + it).to_be_bytes());
        let first = doors.enter(address(0));
        let same: Vec<_> = (1..MAX_PER_ADDRESS)
            .map(|_| doors.enter(address(0)))
            .collect();
        assert!(!first.leave.is_cancelled());
        let one_more = doors.enter(address(0));
        assert!(first.leave.is_cancelled() && !same[0].leave.is_cancelled());
        let left = MAX_STRANGERS - MAX_PER_ADDRESS;
        let others: Vec<_> = (1..=left as u32)
            .map(|it| doors.enter(address(it)))
            .collect();
        assert!(!same[0].leave.is_cancelled());
        // Whoever proves to be an agent does not count any more.
        let node = "one".parse().expect("valid");
        same[0].prove(&node).expect("room");
        same[0].prove(&node).expect("known");
        let fits = doors.enter(address(1));
        assert!(!same[1].leave.is_cancelled());
        let one_too_many = doors.enter(address(2));
        assert!(same[1].leave.is_cancelled() && !same[0].leave.is_cancelled());
        drop((first, same, one_more, others, fits, one_too_many));
        let state = doors.locked();
        assert!(state.strangers.is_empty() && state.by_address.is_empty());
        assert!(state.nodes.is_empty());
    }

    #[tokio::test]
    async fn only_a_strangers_connection_ends() {
        use tokio::io::AsyncReadExt;
        let doors = Arc::new(Doors::default());
        for proved in [false, true] {
            let seat = doors.enter("10.0.0.1".parse().expect("valid"));
            let (near, _far) = tokio::io::duplex(64);
            let mut guarded = Guarded::new(near, seat.clone());
            if proved {
                seat.prove(&"one".parse().expect("valid")).expect("room");
            }
            let began = std::time::Instant::now();
            let longer = PROOF_TIMEOUT + Duration::from_secs(1);
            let read = tokio::time::timeout(longer, guarded.read_u8()).await;
            let ended = read.map(|it| it.expect_err("ended").kind());
            match proved {
                false => assert_eq!(ended.expect("in time"), io::ErrorKind::TimedOut),
                true => assert!(ended.is_err(), "still open"),
            }
            assert!(began.elapsed() >= PROOF_TIMEOUT);
        }
    }

    #[test]
    fn a_nodes_connections_are_bounded() {
        let doors = Arc::new(Doors::default());
        let enter = || doors.enter("10.0.0.1".parse().expect("valid"));
        let node = "one".parse().expect("valid");
        let seats: Vec<_> = (0..MAX_PER_NODE).map(|_| enter()).collect();
        assert!(seats.iter().all(|it| it.prove(&node).is_ok()));
        assert!(enter().prove(&node).is_err());
        drop(seats);
        assert!(enter().prove(&node).is_ok());
    }
}
