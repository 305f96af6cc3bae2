//! The listeners that the agent opens inside a pod's namespace.
//!
//! They take ephemeral ports and are reached through the kernel programs. A process of the pod can
//! connect to such a port directly, over the loopback only; what it gets there has no original
//! destination and a loopback address as its own, and is refused. No port reuse is set, so a pod can
//! neither join them nor take them over.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// Opens the outbound, the tunnel and the plaintext listener; non-blocking.
pub(super) fn open(netns: &Netns) -> io::Result<[TcpListener; 3]> {
    netns.within(|| Ok([listener()?, listener()?, listener()?]))?
}

/// One listener for both families; for IPv4 alone where the kernel has no IPv6. On all addresses: a
/// socket bound to any one IPv6 address is for IPv6 only, and the kernel gives it no IPv4 connection.
fn listener() -> io::Result<TcpListener> {
    let dual = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    bind(Domain::IPV6, dual).or_else(|_| bind(Domain::IPV4, (Ipv4Addr::UNSPECIFIED, 0).into()))
}

fn bind(domain: Domain, address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        domain,
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(false)?;
    }
    // What is accepted has the port that the client connected to, and this option. An application that
    // restarts could not listen on its port again while such connections are open, were it not set.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Connections that wait to be accepted; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
