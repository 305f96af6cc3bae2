//! What was open when a pod joined the mesh: its TCP connections are ended once, so that they come back through it.
//!
//! The kernel programs see connections while they are opened. One that was open before stays as it was, in the clear and
//! under no policy, for as long as its ends keep it: a pool of a database client does so for days. So what would be
//! redirected if it were opened now is reset, by `SOCK_DESTROY` (sock_diag(7)) from inside of the pod's namespace; both
//! ends see a reset, as when the other had been restarted. Left alone is what the mesh leaves alone: connections over the
//! loopback and to the pod's own addresses, the kubelet's probes; and the agent's own.
//!
//! Which those are is asked twice, before the pod is enrolled and after. What was there before has to go. What is only
//! there after was opened meanwhile: a connect that went to the agent has its other end on the loopback; and all else came
//! just before the programs did, unless nobody has accepted it yet: then it may have arrived for the agent. Of these it is
//! asked once more, when the agent must have accepted its own: the others wait for an application, which may take its time.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, io};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use weft_core::WorkloadId;

use super::socket_diag::{Connection, Cookie, Destroyed, Diag};
use crate::bpf::PodEntry;
use crate::netns::Netns;

/// When it is clear whose the connections are that were nobody's.
pub(super) const SETTLED: Duration = Duration::from_secs(1);

/// The connections of a pod that is about to join.
pub(super) struct OptIn {
    diag: Diag,
    before: HashSet<Cookie>,
}

/// Those that were nobody's when the pod had joined.
pub(super) struct Nobodys {
    diag: Diag,
    id: WorkloadId,
    pod: PodEntry,
    connections: HashSet<Cookie>,
}

/// What connections are left alone.
struct Left<'a> {
    pod: &'a PodEntry,
    node: HashSet<IpAddr>,
    agents: HashSet<u32>,
}

/// What became of those that were to be ended.
#[derive(Debug, Default)]
struct Outcome {
    ended: usize,
    unsupported: Option<Errno>,
    refused: Option<Errno>,
}

impl OptIn {
    /// Looks, before the pod is in the kernel's maps. None: the kernel tells nothing.
    pub(super) fn begin(pod: &WorkloadId, netns: &Netns) -> Option<Self> {
        let look = || {
            let mut diag = netns.within(Diag::open)??;
            let before = diag.connections()?;
            let before = before.iter().map(Connection::cookie).collect();
            Ok(Self { diag, before })
        };
        look().inspect_err(|error| not_ended(pod, error)).ok()
    }

    /// Ends them, once it is. Gives how many, and those to be looked at again when that is settled.
    pub(super) fn finish(mut self, id: &WorkloadId, pod: &PodEntry) -> (usize, Option<Nobodys>) {
        let mut nobodys = HashSet::new();
        let ended = end(&mut self.diag, id, pod, |it| {
            let is_nobodys = it.inode == 0 && !self.before.contains(&it.cookie());
            if is_nobodys {
                nobodys.insert(it.cookie());
            }
            !is_nobodys
        });
        let is_any = !nobodys.is_empty();
        let nobodys = is_any.then(|| Nobodys {
            diag: self.diag,
            id: id.clone(),
            pod: pod.clone(),
            connections: nobodys,
        });
        (ended, nobodys)
    }
}

impl Nobodys {
    /// Ends those that are there still and that the agent has not accepted. Gives how many.
    pub(super) fn end(mut self) -> usize {
        let are_these = |it: &Connection| self.connections.contains(&it.cookie());
        end(&mut self.diag, &self.id, &self.pod, are_these)
    }
}

/// Ends those that are not left alone, if they are meant.
fn end(
    diag: &mut Diag,
    id: &WorkloadId,
    pod: &PodEntry,
    mut is_meant: impl FnMut(&Connection) -> bool,
) -> usize {
    let mut outcome = Outcome::default();
    let mut end = || {
        let found = diag.connections()?;
        if found.is_empty() {
            return Ok(());
        }
        let left = Left {
            pod,
            node: addresses()?,
            agents: own_sockets()?,
        };
        for connection in found.iter().filter(|it| !left.has(it)) {
            if is_meant(connection) {
                outcome.note(diag.destroy(connection)?);
            }
        }
        Ok(())
    };
    let error = end().err().or_else(|| outcome.error());
    if let Some(error) = error {
        not_ended(id, &error);
    }
    let ended = outcome.ended;
    if ended > 0 {
        tracing::info!(pod = %id, ended, "connections from before the pod joined the mesh are ended");
    }
    ended
}

impl Left<'_> {
    fn has(&self, it: &Connection) -> bool {
        let (local, remote) = (it.local.ip(), it.remote.ip());
        let is_inside = local.is_loopback()
            || remote.is_loopback()
            || local == remote
            || self.pod.addresses.contains(&remote);
        let is_probe =
            self.pod.probe_ports.contains(&it.local.port()) && self.node.contains(&remote);
        // There is no application any more, and the kernel sends no more for it than an acknowledgement.
        let is_over = it.inode == 0 && it.is_closed;
        is_inside || is_probe || is_over || self.agents.contains(&it.inode)
    }
}

impl Outcome {
    fn note(&mut self, destroyed: Destroyed) {
        match destroyed {
            Destroyed::Done => self.ended += 1,
            Destroyed::Gone => {}
            // Of single ones: they are in a state in which there is nothing to be ended.
            Destroyed::Refused(Errno::EOPNOTSUPP) => self.unsupported = Some(Errno::EOPNOTSUPP),
            Destroyed::Refused(errno) => self.refused = Some(errno),
        }
    }

    /// Why some were not ended.
    fn error(&self) -> Option<io::Error> {
        let unsupported = self.unsupported.filter(|_| self.ended == 0);
        self.refused.or(unsupported).map(io::Error::from)
    }
}

/// Those of the network namespace that the agent is in.
fn addresses() -> io::Result<HashSet<IpAddr>> {
    let mut found = HashSet::new();
    for entry in getifaddrs()? {
        let Some(address) = entry.address else {
            continue;
        };
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::from(it.ip()));
        let v6 = address.as_sockaddr_in6().map(|it| IpAddr::from(it.ip()));
        found.extend(v4.or(v6));
    }
    Ok(found)
}

/// The inodes of all sockets of this process.
fn own_sockets() -> io::Result<HashSet<u32>> {
    let folder = fs::File::open("/proc/self/fd")?;
    let entries = fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()))?;
    let inode = |entry: io::Result<fs::DirEntry>| {
        let target = fs::read_link(entry.ok()?.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?;
        inode.strip_suffix(']')?.parse().ok()
    };
    Ok(entries.filter_map(inode).collect())
}

/// Told once where it is the kernel that cannot.
fn not_ended(pod: &WorkloadId, error: &io::Error) {
    static IS_TOLD: AtomicBool = AtomicBool::new(false);
    let is_lacking = matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOENT)
    );
    if !is_lacking {
        tracing::warn!(%pod, %error, "connections from before the pod joined the mesh cannot be ended: they stay outside of it");
    } else if !IS_TOLD.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            %error,
            "this kernel ends no connections (CONFIG_INET_DIAG_DESTROY): those from before a pod joins the mesh stay outside of it"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use socket2::{Domain, Socket, Type};

    use super::super::socket_diag;
    use super::*;

    #[test]
    fn what_would_be_redirected_is_ended() {
        let pod = PodEntry {
            cookie: 1,
            addresses: vec!["10.1.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            probe_ports: vec![8080],
        };
        let left = Left {
            pod: &pod,
            node: HashSet::from(["192.0.2.1".parse().unwrap()]),
            agents: HashSet::from([77]),
        };
        for (local, remote, inode, is_closed, expected) in [
            ("10.1.0.7:40000", "10.1.0.9:80", 5, false, false),
            ("10.1.0.7:80", "10.1.0.9:40000", 5, false, false),
            ("[fd00::7]:40000", "[fd00::9]:80", 5, false, false),
            // Not accepted yet: by the application, or by the agent.
            ("10.1.0.7:80", "10.1.0.9:40000", 0, false, false),
            // Closed, and not let go of.
            ("10.1.0.7:80", "10.1.0.9:40000", 5, true, false),
            ("10.1.0.7:80", "10.1.0.9:40000", 0, true, true),
            // Its own.
            ("127.0.0.1:80", "127.0.0.1:40000", 5, false, true),
            ("10.1.0.7:40000", "127.1.2.3:4", 5, false, true),
            ("[fd00::7]:80", "[::1]:40000", 5, false, true),
            ("10.1.0.7:80", "10.1.0.7:40000", 5, false, true),
            ("10.1.0.8:80", "10.1.0.7:40000", 5, false, true),
            // The agent's.
            ("10.1.0.7:40000", "10.1.0.9:15008", 77, false, true),
            // A probe, and what looks like one.
            ("10.1.0.7:8080", "192.0.2.1:40000", 5, false, true),
            ("10.1.0.7:8081", "192.0.2.1:40000", 5, false, false),
            ("10.1.0.7:8080", "192.0.2.2:40000", 5, false, false),
            ("10.1.0.7:40000", "192.0.2.1:8080", 5, false, false),
        ] {
            let connection = Connection {
                local: local.parse().unwrap(),
                remote: remote.parse().unwrap(),
                inode,
                is_closed,
                identifier: [0; 48],
                family: 2,
            };
            assert_eq!(left.has(&connection), expected, "{connection:?}");
        }
    }

    /// One that the kernel does not end says nothing of the others.
    #[test]
    fn some_that_cannot_be_ended_are_no_error() {
        use Destroyed::{Done, Gone, Refused};
        let (unsupported, denied) = (Refused(Errno::EOPNOTSUPP), Refused(Errno::EPERM));
        for (all, ended, error) in [
            (&[Gone, Done, Done][..], 2, None),
            (&[unsupported, Done, unsupported], 1, None),
            (&[unsupported, Gone], 0, Some(Errno::EOPNOTSUPP)),
            (&[denied, Done], 1, Some(Errno::EPERM)),
            (&[denied, unsupported], 0, Some(Errno::EPERM)),
            (&[Gone], 0, None),
        ] {
            let mut outcome = Outcome::default();
            for destroyed in all {
                outcome.note(*destroyed);
            }
            assert_eq!(outcome.ended, ended, "{all:?}");
            let told = outcome.error().and_then(|it| it.raw_os_error());
            assert_eq!(told, error.map(|it| it as i32), "{all:?}");
        }
    }

    /// In a namespace of its own, with an address of the pod and one of somebody else: the application's and the agent's
    /// are nobody's at first.
    #[test]
    fn what_nobody_has_accepted_is_looked_at_again() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let talk = || {
            // This process' own are the agent's: so the client is one that is not looked at.
            let pod = PodEntry {
                cookie: 1,
                addresses: vec!["10.9.0.1".parse().unwrap()],
                probe_ports: vec![],
            };
            let id: WorkloadId = "shop/web".parse().unwrap();
            let netns = Netns::current().unwrap();
            let [application, agent, deferred] =
                [(); 3].map(|()| TcpListener::bind("10.9.0.1:0").unwrap());
            socket_diag::defer(&deferred).unwrap();
            let connect = |to: &TcpListener| {
                let client = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                let from: SocketAddr = "10.9.0.2:0".parse().unwrap();
                client.bind(&from.into()).unwrap();
                client.connect(&to.local_addr().unwrap().into()).unwrap();
                client
            };
            let before = connect(&application);
            let opt_in = OptIn::begin(&id, &netns).unwrap();
            let during = [connect(&application), connect(&agent), connect(&deferred)];
            let (ended, nobodys) = opt_in.finish(&id, &pod);
            assert_eq!(ended, 1);
            let is_reset = |client: &Socket| client.take_error().unwrap().is_some();
            assert!(is_reset(&before));
            let nobodys = nobodys.unwrap();
            assert_eq!(nobodys.connections.len(), 3);
            let _accepted = agent.accept().unwrap();
            assert_eq!(nobodys.end(), 2);
            let [application, agent, _] = &during;
            assert!(is_reset(application) && !is_reset(agent));
        };
        let test = move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            for words in ["link set lo up", "addr add 10.9.0.1/24 dev lo"] {
                let status = std::process::Command::new("ip")
                    .args(words.split(' '))
                    .status();
                assert!(status.unwrap().success());
            }
            // As within a visit: whoever comes back from another place comes back to here.
            Netns::current().unwrap().within(talk).unwrap();
        };
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn own_sockets_are_known() {
        use std::os::unix::fs::MetadataExt;
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        let inode = fs::metadata(path).unwrap().ino();
        let found = own_sockets().unwrap();
        assert!(found.contains(&u32::try_from(inode).unwrap()));
        assert!(addresses().unwrap().contains(&"127.0.0.1".parse().unwrap()));
    }
}
