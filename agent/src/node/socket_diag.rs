//! TCP connections of a network namespace, asked of the kernel and ended by it (sock_diag(7), `linux/inet_diag.h`).

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{NetlinkAddr, connect};
use socket2::{Domain, Protocol, Socket, Type};

/// A way to ask, of the namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Diag(Socket);

/// A connection that is open, or is being opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Connection {
    /// This end.
    pub(super) local: SocketAddr,
    /// The other end; an IPv4 address is one, whatever kind of socket has it.
    pub(super) remote: SocketAddr,
    /// Of the socket; 0: nobody has accepted it yet, or holds it any more.
    pub(super) inode: u32,
    /// This end has closed it, and waits for the other to do so.
    pub(super) is_closed: bool,
    /// Names it.
    pub(super) identifier: Identifier,
    /// The family of the socket.
    pub(super) family: u8,
}

/// `struct inet_diag_sockid`, with a cookie that is not given twice.
pub(super) type Identifier = [u8; 48];

/// The end of that, which is not given twice, to requests of connections neither.
pub(super) type Cookie = [u8; 8];

/// What became of a connection that was to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destroyed {
    /// It was reset.
    Done,
    /// It was not there any more.
    Gone,
    /// The kernel did not. Others it may.
    Refused(Errno),
}

impl Connection {
    /// What it keeps from its first packet on, whatever becomes of it: an address of a dual-stack socket is written in
    /// another way once the connection is established.
    pub(super) fn cookie(&self) -> Cookie {
        let [.., a, b, c, d, e, f, g, h] = self.identifier;
        [a, b, c, d, e, f, g, h]
    }
}

impl Diag {
    /// In the namespace that the calling thread is in.
    pub(super) fn open() -> io::Result<Self> {
        let domain = Domain::from(libc::AF_NETLINK);
        let protocol = Protocol::from(libc::NETLINK_SOCK_DIAG);
        let socket = Socket::new(domain, Type::RAW.cloexec(), Some(protocol))?;
        // From now on nobody but the kernel is heard: a pod that may could speak in its place.
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        // It answers at once.
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// All connections.
    pub(super) fn connections(&mut self) -> io::Result<Vec<Connection>> {
        let mut found = Vec::new();
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            let body = query(family, STATES, &NONE);
            let flags = NLM_F_REQUEST | NLM_F_DUMP;
            self.0
                .write_all(&message(SOCK_DIAG_BY_FAMILY, flags, &body))?;
            let mut answer = vec![0; ANSWER];
            loop {
                let length = self.0.read(&mut answer)?;
                if take(&answer[..length], &mut found)? {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Ends one, by a reset.
    ///
    /// # Errors
    /// The kernel was not heard.
    pub(super) fn destroy(&mut self, connection: &Connection) -> io::Result<Destroyed> {
        let body = query(connection.family, STATES, &connection.identifier);
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        self.0.write_all(&message(SOCK_DESTROY, flags, &body))?;
        let mut answer = [0; 4096];
        let length = self.0.read(&mut answer)?;
        let number = answer[..length].get(HEADER..HEADER + 4);
        match number.and_then(errno) {
            None => Err(io::ErrorKind::InvalidData.into()),
            Some(0) => Ok(Destroyed::Done),
            Some(number) => Ok(match Errno::from_raw(number) {
                Errno::ENOENT => Destroyed::Gone,
                refused => Destroyed::Refused(refused),
            }),
        }
    }
}

/// `nlmsghdr` (netlink(7)) and a body.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = (HEADER + body.len()) as u32;
    let mut message = Vec::with_capacity(length as usize);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and port: one request at a time needs neither.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// `struct inet_diag_req_v2`.
fn query(family: u8, states: u32, identifier: &Identifier) -> Vec<u8> {
    let mut body = vec![family, libc::IPPROTO_TCP as u8, 0, 0];
    body.extend(states.to_ne_bytes());
    body.extend(identifier);
    body
}

/// Takes what an answer tells; true: that was all.
fn take(mut answer: &[u8], found: &mut Vec<Connection>) -> io::Result<bool> {
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    while !answer.is_empty() {
        let length = answer.get(..4).and_then(|it| it.try_into().ok());
        let length = length.map(u32::from_ne_bytes).ok_or_else(broken)? as usize;
        let kind = answer.get(4..6).and_then(|it| it.try_into().ok());
        let kind = kind.map(u16::from_ne_bytes).ok_or_else(broken)?;
        let body = answer.get(HEADER..length).ok_or_else(broken)?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let number = body.get(..4).and_then(errno).ok_or_else(broken)?;
                return Err(io::Error::from_raw_os_error(number));
            }
            _ => found.extend(connection(body)),
        }
        let next = length.next_multiple_of(4).min(answer.len());
        answer = &answer[next..];
    }
    Ok(false)
}

/// `struct inet_diag_msg`: family, state and two more bytes, the identifier, and five numbers.
fn connection(body: &[u8]) -> Option<Connection> {
    let identifier: Identifier = body.get(4..52)?.try_into().ok()?;
    let family = *body.first()?;
    let inode = body.get(68..72)?.try_into().ok()?;
    let port = |at: usize| u16::from_be_bytes([identifier[at], identifier[at + 1]]);
    let address = |at: usize| {
        let bytes: [u8; 16] = identifier[at..at + 16].try_into().ok()?;
        let [a, b, c, d, ..] = bytes;
        Some(match i32::from(family) {
            libc::AF_INET => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            _ => IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical(),
        })
    };
    Some(Connection {
        local: (address(4)?, port(0)).into(),
        remote: (address(20)?, port(2)).into(),
        inode: u32::from_ne_bytes(inode),
        is_closed: *body.get(1)? == FIN_WAIT2,
        identifier,
        family,
    })
}

/// The number in an `NLMSG_ERROR`; 0 says that it was done.
fn errno(bytes: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(bytes.try_into().ok()?).wrapping_neg())
}

/// Any connection.
const NONE: Identifier = [0; 48];
/// Established, being opened from here or from there, and those of which one side has closed: `1 << TCP_...`
/// (`linux/tcp_states.h`).
const STATES: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << FIN_WAIT2 | 1 << 8;
const FIN_WAIT2: u8 = 5;
const HEADER: usize = 16;
/// The kernel fills up to 32 KiB of it at a time.
const ANSWER: usize = 64 * 1024;
const PATIENCE: Duration = Duration::from_secs(2);
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;
const NLM_F_REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const NLM_F_ACK: u16 = libc::NLM_F_ACK as u16;
const NLM_F_DUMP: u16 = libc::NLM_F_DUMP as u16;

/// Leaves connections of a listener in their handshake until something comes.
#[cfg(test)]
#[allow(unsafe_code)]
pub(super) fn defer(listener: &std::net::TcpListener) -> io::Result<()> {
    let seconds: libc::c_int = 60;
    // SAFETY: the option's value is a number, which is what is handed in.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use proptest::prelude::*;

    use super::*;

    /// Needs root, and a kernel that can.
    #[test]
    fn a_connection_is_found_and_ended() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let mut diag = Diag::open().unwrap();
            let find = |diag: &mut Diag| {
                let found = diag.connections().unwrap().into_iter();
                found
                    .filter(|it| it.local == local && it.remote == remote)
                    .collect::<Vec<_>>()
            };
            let found = find(&mut diag);
            assert_eq!(found.len(), 1);
            assert_ne!(found[0].inode, 0);
            // Of another connection of that name: none.
            let mut other = found[0].clone();
            other.identifier[47] ^= 0x55;
            assert_eq!(diag.destroy(&other).unwrap(), Destroyed::Gone);
            assert_eq!(diag.destroy(&found[0]).unwrap(), Destroyed::Done);
            assert_eq!(diag.destroy(&found[0]).unwrap(), Destroyed::Gone);
            assert!(find(&mut diag).is_empty());
            for end in [&mut client, &mut server] {
                end.set_read_timeout(Some(PATIENCE)).unwrap();
                let error = end.read(&mut [0]).unwrap_err();
                let expected = [
                    io::ErrorKind::ConnectionReset,
                    io::ErrorKind::ConnectionAborted,
                ];
                assert!(expected.contains(&error.kind()), "{error}");
            }
        }
    }

    /// The handshake is not over as long as nothing comes for a listener that waits for that.
    #[test]
    fn a_connection_that_is_being_opened_is_found_and_ended() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        defer(&listener).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut diag = Diag::open().unwrap();
        let find = |diag: &mut Diag| {
            let mut found = diag.connections().unwrap().into_iter();
            found.find(|it| it.remote == client.local_addr().unwrap())
        };
        let opening = find(&mut diag).unwrap();
        assert_eq!((opening.inode, opening.is_closed), (0, false));
        (&client).write_all(b"x").unwrap();
        let (server, _) = listener.accept().unwrap();
        let open = find(&mut diag).unwrap();
        assert_ne!(open.inode, 0);
        assert_eq!(open.cookie(), opening.cookie());
        drop(server);
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let find = |diag: &mut Diag| {
            let mut found = diag.connections().unwrap().into_iter();
            found.find(|it| it.remote == client.local_addr().unwrap())
        };
        let opening = find(&mut diag).unwrap();
        assert_eq!(diag.destroy(&opening).unwrap(), Destroyed::Done);
        assert_eq!(find(&mut diag), None);
    }

    /// Whoever may configure the pod's network may send to others' sockets of this kind.
    #[test]
    fn nobody_speaks_in_the_kernels_place() {
        use nix::sys::socket::{MsgFlags, getsockname, sendto};
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let protocol = Some(Protocol::from(libc::NETLINK_SOCK_DIAG));
        let new = || Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, protocol).unwrap();
        let send = |to: &Socket| {
            let address: NetlinkAddr = getsockname(to.as_raw_fd()).unwrap();
            assert_ne!(address.pid(), 0);
            let forged = message(NLMSG_DONE, 0, &[0; 4]);
            sendto(new().as_raw_fd(), &forged, &address, MsgFlags::empty())
        };
        // A control: it would be heard.
        let mut open = new();
        open.write_all(&message(
            SOCK_DIAG_BY_FAMILY,
            NLM_F_REQUEST | NLM_F_DUMP,
            &query(2, STATES, &NONE),
        ))
        .unwrap();
        assert!(send(&open).is_ok());
        let diag = Diag::open().unwrap();
        assert_eq!(send(&diag.0), Err(Errno::ECONNREFUSED));
    }

    #[test]
    fn answers_end() {
        let mut found = vec![];
        let done = message(NLMSG_DONE, 0, &[0; 4]);
        assert!(take(&done, &mut found).unwrap());
        let refused = message(NLMSG_ERROR, 0, &(-libc::EPERM).to_ne_bytes());
        let error = take(&refused, &mut found).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        let one = message(SOCK_DIAG_BY_FAMILY, 0, &[libc::AF_INET as u8; 72]);
        assert!(!take(&[one.clone(), one.clone()].concat(), &mut found).unwrap());
        assert_eq!(found.len(), 2);
        assert!(take(&one[..40], &mut found).is_err());
        assert!(take(&[0; 20], &mut found).is_err());
    }

    proptest! {
        #[test]
        fn any_answer_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = take(&bytes, &mut vec![]);
        }
    }
}
