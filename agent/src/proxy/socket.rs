//! The sockets that the proxy opens in pods' namespaces, and what it asks of those it accepts.
//!
//! Every socket is marked, by its descriptor and before its connect, as the agent's own: the kernel
//! programs leave it alone, and no pod can hold such a mark.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::IpBindAddressNoPort};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};
use weft_core::TUNNEL_PORT;

use super::error::FlowError;
use super::tcp::FlowSocket;
use super::{Context, descriptors};
use crate::bpf::{BpfError, Flow};
use crate::node::LocalPod;

/// Where the client of a connection at the outbound listener wanted to go.
pub(super) fn original_destination(
    context: &Context,
    socket: &TcpStream,
) -> Result<SocketAddr, FlowError> {
    match context.bpf.flow(socket.as_fd()) {
        Ok(Some(Flow::Accepted { original })) => Ok(canonical(original)),
        Ok(_) => Err(FlowError::RedirectMiss),
        Err(error) => Err(kernel("reading the original destination", error)),
    }
}

/// Whether the connection was redirected to the agent: at a listener for connections from outside
/// it must not have been.
pub(super) fn is_redirected(context: &Context, socket: &TcpStream) -> Result<bool, FlowError> {
    match context.bpf.flow(socket.as_fd()) {
        Ok(flow) => Ok(flow.is_some()),
        Err(error) => Err(kernel("reading what is known of the connection", error)),
    }
}

/// Connects from the pod's own namespace and address.
pub(super) async fn connect(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
) -> Result<TcpStream, FlowError> {
    let socket = open(pod, to)?;
    context
        .bpf
        .mark_outbound(socket.as_fd())
        .map_err(|error| kernel("marking a socket of the agent", error))?;
    let limit = match to.port() {
        TUNNEL_PORT => TUNNEL_CONNECT_TIMEOUT,
        _ => CONNECT_TIMEOUT,
    };
    finish(socket, to, limit).await
}

/// Connects to an application of the pod from inside its namespace; the application sees `client`.
///
/// Over IPv6 the kernel does not say that nothing listens: its reset to `::1` finds no route
/// (tried on 6.18). So when an answer is overdue, a second connect comes from the pod's own
/// address, where it does; not at once, because a port that is used there stays taken for a minute.
pub(super) async fn deliver(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
    client: SocketAddr,
) -> Result<FlowSocket, FlowError> {
    let from = loopback(to.ip());
    let mut first = Box::pin(deliver_from(context, pod, from, to, client));
    if to.is_ipv4() {
        return first.await;
    }
    match tokio::time::timeout(ANSWER_OVERDUE, &mut first).await {
        Ok(done) => done,
        Err(_) => tokio::select! {
            biased;
            done = first => done,
            done = deliver_from(context, pod, to.ip(), to, client) => done,
        },
    }
}

async fn deliver_from(
    context: &Context,
    pod: &LocalPod,
    from: IpAddr,
    to: SocketAddr,
    client: SocketAddr,
) -> Result<FlowSocket, FlowError> {
    let socket = open(pod, to)?;
    bind(&socket, from).map_err(|source| FlowError::Kernel {
        doing: "binding a socket in the pod's network namespace",
        source,
    })?;
    context
        .bpf
        .mark_deliver(socket.as_fd(), client)
        .map_err(|error| kernel("marking a socket of the agent", error))?;
    let socket = finish(socket, to, DELIVER_TIMEOUT).await?;
    FlowSocket::new(socket).map_err(|source| FlowError::Connect { to, source })
}

/// Ends a connection that is not served: its client sees a reset.
pub(super) fn refuse(socket: TcpStream) {
    // Without the option it ends with a FIN, which is no success either.
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
}

/// Local and peer address of a connection; no IPv4-mapped ones.
pub(super) fn addresses(socket: &TcpStream) -> Result<(SocketAddr, SocketAddr), FlowError> {
    let both = || Ok((socket.local_addr()?, socket.peer_addr()?));
    let (local, peer) = both().map_err(|source| FlowError::Kernel {
        doing: "reading the addresses of a connection",
        source,
    })?;
    Ok((canonical(local), canonical(peer)))
}

/// An IPv4-mapped IPv6 address as what it is.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn open(pod: &LocalPod, to: SocketAddr) -> Result<Socket, FlowError> {
    let new = || {
        Socket::new(
            Domain::for_address(to),
            Type::STREAM.nonblocking().cloexec(),
            Some(Protocol::TCP),
        )
    };
    let socket = pod.netns.within(new).and_then(|socket| socket);
    let socket = socket.map_err(|source| FlowError::Kernel {
        doing: "opening a socket in the pod's network namespace",
        source,
    })?;
    if descriptors::none_left(&socket) {
        return Err(FlowError::NoDescriptors);
    }
    Ok(socket)
}

/// Deliveries come from loopback addresses, whose ports are free again at once; of IPv4's there are
/// 16 million, so that ports never run short.
fn loopback(to: IpAddr) -> IpAddr {
    match to {
        IpAddr::V4(_) => {
            let [_, b, c, d] = rand::random::<u32>().to_be_bytes();
            // 127.0.0.0/16 is left to applications, 127.255.0.0/16 to the kernel programs.
            Ipv4Addr::new(127, b.clamp(1, 254), c, d.clamp(1, 254)).into()
        }
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// The port is chosen when connecting, when the kernel can see whether the whole tuple is free.
fn bind(socket: &Socket, from: IpAddr) -> io::Result<()> {
    setsockopt(socket, IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(from, 0).into())
}

async fn finish(socket: Socket, to: SocketAddr, limit: Duration) -> Result<TcpStream, FlowError> {
    let socket = TcpSocket::from_std_stream(socket.into());
    let connected = tokio::time::timeout(limit, socket.connect(to)).await;
    connected
        .map_err(|_| FlowError::ConnectTimeout { to })?
        .map_err(|source| FlowError::Connect { to, source })
}

fn kernel(doing: &'static str, error: BpfError) -> FlowError {
    FlowError::Kernel {
        doing,
        source: io::Error::other(error),
    }
}

/// Connects inside a namespace take microseconds, unless the application is overloaded.
const ANSWER_OVERDUE: Duration = Duration::from_millis(30);
/// A server somewhere may be slow to answer; the client, already connected to us, waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent of the mesh is not.
const TUNNEL_CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// Leaves an overloaded application the time to take the connection at the kernel's second retry.
const DELIVER_TIMEOUT: Duration = Duration::from_secs(6);
