//! The way back to `::1` in a pod's namespace.
//!
//! Redirected IPv6 connects go from the pod's address to `::1`, deliveries from `::1` to the pod's
//! address. To the kernel a packet to the pod's address came in by that address' interface, and
//! since `::1` has a scope, what it answers *without a socket* is routed by that interface: resets
//! for connections that are gone, acknowledgements of `TIME_WAIT`. There is no such route, so these
//! answers would be lost, and who still sends would hear of nothing for minutes. A local route adds
//! the way; the packets stay on the loopback device, and no other destination is concerned.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::Ipv6Addr;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// Adds the route by every interface of the namespace that has an IPv6 address.
pub(super) fn add_way_back(netns: &Netns) -> io::Result<()> {
    netns.within(|| change_all(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL))?
}

/// Removes it again.
pub(super) fn remove_way_back(netns: &Netns) -> io::Result<()> {
    netns.within(|| change_all(RTM_DELROUTE, 0))?
}

fn change_all(kind: u16, flags: u16) -> io::Result<()> {
    let interfaces = interfaces_with_ipv6()?;
    if interfaces.is_empty() {
        return Ok(());
    }
    let domain = Domain::from(libc::AF_NETLINK);
    let protocol = Protocol::from(libc::NETLINK_ROUTE);
    let mut socket = Socket::new(domain, Type::RAW.cloexec(), Some(protocol))?;
    for interface in interfaces {
        socket.write_all(&request(kind, flags, interface))?;
        let mut answer = [0; 4096];
        let length = socket.read(&mut answer)?;
        match outcome(&answer[..length])? {
            // It is as it should be: an earlier agent was here, or somebody was faster.
            Errno::EEXIST | Errno::ESRCH => {}
            errno if errno as i32 == 0 => {}
            errno => return Err(errno.into()),
        }
    }
    Ok(())
}

fn interfaces_with_ipv6() -> io::Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for entry in getifaddrs()? {
        let address = entry.address.as_ref().and_then(|it| it.as_sockaddr_in6());
        if address.is_some_and(|it| !it.ip().is_loopback()) {
            found.insert(if_nametoindex(entry.interface_name.as_str())?);
        }
    }
    Ok(found)
}

/// `nlmsghdr`, `rtmsg` and three attributes (rtnetlink(7)), in the machine's byte order.
fn request(kind: u16, flags: u16, interface: u32) -> Vec<u8> {
    let mut body = vec![
        libc::AF_INET6 as u8,
        128, // length of the destination's prefix
        0,   // of the source's
        0,   // type of service
        libc::RT_TABLE_LOCAL,
        libc::RTPROT_STATIC,
        libc::RT_SCOPE_UNIVERSE,
        libc::RTN_LOCAL,
    ];
    body.extend(0_u32.to_ne_bytes());
    attribute(&mut body, libc::RTA_DST, &Ipv6Addr::LOCALHOST.octets());
    attribute(&mut body, libc::RTA_OIF, &interface.to_ne_bytes());
    // Behind the kernel's own route to `::1`.
    attribute(&mut body, libc::RTA_PRIORITY, &METRIC.to_ne_bytes());
    let length = (HEADER + body.len()) as u32;
    let mut message = Vec::with_capacity(length as usize);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    // Sequence number and port: one request at a time needs neither.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// All attributes used here have lengths that are multiples of four: no padding.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
}

/// The error number in an `NLMSG_ERROR`; 0 says that it was done.
fn outcome(answer: &[u8]) -> io::Result<Errno> {
    let number = answer.get(HEADER..HEADER + 4);
    let number = number.and_then(|it| it.try_into().ok());
    let number = number
        .map(i32::from_ne_bytes)
        .ok_or(io::ErrorKind::InvalidData)?;
    Ok(Errno::from_raw(-number))
}

const HEADER: usize = 16;
const METRIC: u32 = 2000;
const RTM_NEWROUTE: u16 = libc::RTM_NEWROUTE;
const RTM_DELROUTE: u16 = libc::RTM_DELROUTE;
const NLM_F_REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const NLM_F_ACK: u16 = libc::NLM_F_ACK as u16;
const NLM_F_CREATE: u16 = libc::NLM_F_CREATE as u16;
const NLM_F_EXCL: u16 = libc::NLM_F_EXCL as u16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_whole() {
        let message = request(RTM_NEWROUTE, NLM_F_CREATE, 7);
        assert_eq!(message.len(), 16 + 12 + 20 + 8 + 8);
        assert_eq!(message[..4], (message.len() as u32).to_ne_bytes());
        let answer = [vec![0; 16], (-17_i32).to_ne_bytes().to_vec()].concat();
        assert_eq!(outcome(&answer).unwrap(), Errno::EEXIST);
        assert_eq!(outcome(&[0; 20]).unwrap() as i32, 0);
        assert!(outcome(&[0; 3]).is_err());
    }
}
