//! The listeners that the agent opens inside a pod's namespace.
//!
//! They take ephemeral ports, or others where a process of the pod has taken all of those (the last
//! resort, below 1024, takes `CAP_NET_BIND_SERVICE`), and are reached through the kernel programs. A
//! process of the pod can connect to such a port directly, over the loopback only; what it gets there
//! has no original destination and a loopback address as its own, and is refused. No port reuse is set, so a pod can
//! neither join them nor take them over.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;

use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;
use crate::proxy::tcp;

/// Opens the outbound, the tunnel and the plaintext listener; non-blocking.
pub(super) fn open(netns: &Netns) -> io::Result<[TcpListener; 3]> {
    let [outbound, tunnel, plaintext] =
        netns.within(|| io::Result::Ok([listener()?, listener()?, listener()?]))??;
    tcp::prepare_flows(&outbound)?;
    tcp::prepare(&tunnel)?;
    tcp::prepare_flows(&plaintext)?;
    Ok([outbound, tunnel, plaintext])
}

/// A listener on an ephemeral port, or on one of those that applications use the least: a process of
/// the pod must not be able to keep the agent out by taking ports.
fn listener() -> io::Result<TcpListener> {
    // At random, so that it takes all of them to be in the way.
    let start = RandomState::new().hash_one(SPARE_STEP) % SPARE_STEP as u64;
    let spare = SPARE_PORTS.rev().skip(start as usize).step_by(SPARE_STEP);
    std::iter::once(0)
        .chain(spare)
        .map(listener_on)
        .find(|result| !matches!(result, Err(error) if error.kind() == ErrorKind::AddrInUse))
        .unwrap_or_else(|| Err(ErrorKind::AddrInUse.into()))
}

/// One listener for both families; for IPv4 alone where the kernel has no IPv6. On all addresses: a
/// socket bound to any one IPv6 address is for IPv6 only, and the kernel gives it no IPv4 connection.
fn listener_on(port: u16) -> io::Result<TcpListener> {
    let v4 = || bind(Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into());
    match bind(Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => v4(),
        result => result,
    }
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

/// From below the ports of redirected IPv6 connections through the ephemeral ones to those that need
/// privilege. To have them all, a process needs as many sockets in the pod.
const SPARE_PORTS: RangeInclusive<u16> = 16..=64_511;
/// A thousand attempts take a few milliseconds.
const SPARE_STEP: usize = 61;

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs root, for a network namespace of its own.
    #[test]
    fn a_pod_that_takes_the_ephemeral_ports_is_listened_in() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let range = "/proc/sys/net/ipv4/ip_local_port_range";
        let test = move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            std::fs::write(range, "40000 40099").unwrap();
            let taken: Vec<_> = (40_000..40_100)
                .map(|port| listener_on(port).unwrap())
                .collect();
            let error = listener_on(0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AddrInUse);
            let found = [(); 3].map(|()| listener().unwrap().local_addr().unwrap());
            assert!(
                found.iter().all(|it| it.port() > 60_000 && it.is_ipv6()),
                "{found:?}"
            );
            drop(taken);
        };
        std::thread::spawn(test).join().unwrap();
    }
}
