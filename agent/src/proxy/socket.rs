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
    let socket = open(context, pod, to)?;
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
pub(super) async fn deliver(
    context: &Context,
    pod: &LocalPod,
    to: SocketAddr,
    client: SocketAddr,
) -> Result<FlowSocket, FlowError> {
    let usual = deliver_from(context, pod, loopback(to.ip()), to, client).await;
    match usual {
        Err(FlowError::Connect { source, .. })
            if source.kind() == io::ErrorKind::AddrNotAvailable =>
        {
            deliver_from(context, pod, spare(to.ip()), to, client).await
        }
        usual => usual,
    }
}

async fn deliver_from(
    context: &Context,
    pod: &LocalPod,
    from: IpAddr,
    to: SocketAddr,
    client: SocketAddr,
) -> Result<FlowSocket, FlowError> {
    let socket = open(context, pod, to)?;
    bind(&socket, from).map_err(|source| FlowError::Kernel {
        doing: "binding a socket in the pod's network namespace",
        source,
    })?;
    context
        .bpf
        .mark_deliver(socket.as_fd(), client)
        .map_err(|error| kernel("marking a socket of the agent", error))?;
    let socket = finish_near(socket, to).await?;
    bound_buffers(pod, &socket);
    FlowSocket::near(socket).map_err(|source| FlowError::Connect { to, source })
}

/// Bounds what the kernel keeps for a socket whose other end is in the pod, if the pod has many: it lets
/// each grow to megabytes, and thousands of flows that nobody reads would take the memory of the node.
/// Within a node small ones are fast, too.
pub(super) fn bound_buffers(pod: &LocalPod, socket: &TcpStream) {
    let Some(bytes) = buffer_bytes(pod.flows.len()) else {
        return;
    };
    let options = SockRef::from(socket);
    // A socket that does not take it works; the kernel has bounds of its own.
    let _ = options.set_recv_buffer_size(bytes);
    let _ = options.set_send_buffer_size(bytes);
}

/// The size for one of so many; none where the kernel may choose.
fn buffer_bytes(flows: usize) -> Option<usize> {
    match flows {
        0..=64 => None,
        65..=1024 => Some(128 * 1024),
        _ => Some(32 * 1024),
    }
}

/// Ends a connection that is not served: its client sees a reset.
pub(super) fn refuse(socket: TcpStream) {
    // Without the option it ends with a FIN, which is no success either.
    let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
}

/// The address at which a connection was accepted; not as an IPv4-mapped one.
pub(super) fn local_address(socket: &TcpStream) -> Result<SocketAddr, FlowError> {
    let local = socket.local_addr().map_err(|source| FlowError::Kernel {
        doing: "reading the address of a connection",
        source,
    })?;
    Ok(canonical(local))
}

/// An IPv4-mapped IPv6 address as what it is.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn open(context: &Context, pod: &LocalPod, to: SocketAddr) -> Result<Socket, FlowError> {
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
    if descriptors::none_left(&socket, pod.flows.len(), context.pods.count()) {
        return Err(FlowError::NoDescriptors);
    }
    Ok(socket)
}

/// Deliveries come from loopback addresses, whose ports are free again at once. Of IPv4's it is a
/// few, each with all ports: the kernel remembers something of every address that it has seen.
fn loopback(to: IpAddr) -> IpAddr {
    match to {
        IpAddr::V4(_) => {
            let [a, b, c, _] = FIRST_SOURCE.octets();
            let number = rand::random::<u8>() % SOURCES;
            Ipv4Addr::new(a, b, c, 1 + number).into()
        }
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// Where a delivery comes from when all ports of the usual address are taken: one of 16 million
/// others, or of IPv6, that has none, the pod's own, where a port that was used stays taken for a
/// minute.
fn spare(to: IpAddr) -> IpAddr {
    match to {
        IpAddr::V4(_) => {
            let [_, b, c, d] = rand::random::<u32>().to_be_bytes();
            // 127.0.0.0/16 is left to applications, 127.255.0.0/16 to the kernel programs.
            Ipv4Addr::new(127, b.clamp(1, 254), c, d.clamp(1, 254)).into()
        }
        IpAddr::V6(_) => to,
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

/// Connects within the kernel. There the handshake is over when the call returns, which says "in
/// progress" nevertheless: asked again, it says how it went, and nobody has to wait for an event.
async fn finish_near(socket: Socket, to: SocketAddr) -> Result<TcpStream, FlowError> {
    let failed = |source| FlowError::Connect { to, source };
    let goes_on = |result: &io::Result<()>| {
        let code = result.as_ref().err().and_then(io::Error::raw_os_error);
        matches!(code, Some(libc::EINPROGRESS | libc::EALREADY))
    };
    let address = to.into();
    let mut connected = socket.connect(&address);
    if goes_on(&connected) {
        connected = socket.connect(&address);
    }
    let waits = goes_on(&connected);
    if !waits {
        connected.map_err(failed)?;
    }
    let stream = TcpStream::from_std(socket.into()).map_err(failed)?;
    if waits {
        tokio::time::timeout(DELIVER_TIMEOUT, stream.writable())
            .await
            .map_err(|_| FlowError::ConnectTimeout { to })?
            .map_err(failed)?;
        if let Some(error) = stream.take_error().map_err(failed)? {
            return Err(failed(error));
        }
    }
    Ok(stream)
}

fn kernel(doing: &'static str, error: BpfError) -> FlowError {
    FlowError::Kernel {
        doing,
        source: io::Error::other(error),
    }
}

/// Where deliveries over IPv4 come from: this address and the next ones.
const FIRST_SOURCE: Ipv4Addr = Ipv4Addr::new(127, 1, 0, 1);
/// With some 28,000 ports each that is more than a pod may have flows.
const SOURCES: u8 = 64;
/// A server somewhere may be slow to answer; the client, already connected to us, waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent of the mesh is not.
const TUNNEL_CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// Leaves an overloaded application the time to take the connection at the kernel's second retry.
const DELIVER_TIMEOUT: Duration = Duration::from_secs(6);
