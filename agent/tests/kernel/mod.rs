//! A pod and an agent small enough for these tests: network namespaces without names, which go away
//! by themselves, and an instance of the kernel programs of its own, which is removed in the end.

#![allow(dead_code, reason = "not every test file uses all of it")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use weft_agent::{
    bpf::{Bpf, BpfConfig, Flow, ListenerRole, PodEntry, Reason, bpffs, cgroup2_root},
    netns::Netns,
};

/// The pod's addresses.
pub(crate) const POD_V4: &str = "10.88.0.2";
pub(crate) const POD_V6: &str = "fd88::2";
/// The host's end of the cable.
pub(crate) const HOST_V4: &str = "10.88.0.1";
pub(crate) const HOST_V6: &str = "fd88::1";
/// Nobody is there.
pub(crate) const ELSEWHERE_V4: &str = "203.0.113.9:80";
pub(crate) const ELSEWHERE_V6: &str = "[2001:db8:9::9]:443";

/// A host (the calling thread's own namespace) with one pod.
pub(crate) struct World {
    pub(crate) pod: Netns,
    pub(crate) cookie: u64,
    /// Kept, so that the cable stays when the thread moves on.
    host: Netns,
}

impl World {
    /// Moves the calling thread into a namespace of its own, the host, and connects it to a pod.
    pub(crate) fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test loads kernel programs and makes network namespaces: run it as root"
        );
        let pod = new_netns();
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let pod_path = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            pod.as_fd().as_raw_fd()
        );
        ip("link set lo up");
        ip("link add to-pod type veth peer name eth0");
        ip(&format!("link set eth0 netns {pod_path}"));
        ip(&format!("addr add {HOST_V4}/24 dev to-pod"));
        ip(&format!("addr add {HOST_V6}/64 dev to-pod nodad"));
        ip("link set to-pod up");
        pod.within(|| {
            ip("link set lo up");
            ip(&format!("addr add {POD_V4}/24 dev eth0"));
            ip(&format!("addr add {POD_V6}/64 dev eth0 nodad"));
            ip("link set eth0 up");
            ip(&format!("route add default via {HOST_V4}"));
            ip(&format!("route add default via {HOST_V6}"));
        })
        .unwrap();
        let cookie = pod.cookie().unwrap();
        let host = Netns::current().unwrap();
        Self { pod, cookie, host }
    }

    /// Runs in the pod.
    pub(crate) fn in_pod<T>(&self, f: impl FnOnce() -> T) -> T {
        self.pod.within(f).unwrap()
    }

    /// A socket of the pod.
    pub(crate) fn socket(&self, domain: Domain, protocol: Protocol) -> Socket {
        self.in_pod(|| Socket::new(domain, Type::STREAM, Some(protocol)))
            .unwrap()
    }

    /// A connect of the pod, in the family of the address.
    pub(crate) fn connect(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        self.in_pod(|| TcpStream::connect_timeout(&to, LIMIT))
    }

    /// A listening application of the pod.
    pub(crate) fn listen(&self, on: &str) -> TcpListener {
        self.in_pod(|| TcpListener::bind(on)).unwrap()
    }

    pub(crate) fn entry(&self) -> PodEntry {
        PodEntry {
            cookie: self.cookie,
            addresses: vec![ip_address(POD_V4), ip_address(POD_V6)],
            probe_ports: vec![],
        }
    }
}

/// The agent's listeners in a pod.
pub(crate) struct Listeners {
    pub(crate) outbound: TcpListener,
    pub(crate) tunnel: TcpListener,
    pub(crate) plaintext: TcpListener,
}

impl Listeners {
    pub(crate) fn open(world: &World) -> Self {
        let open = || world.listen("[::]:0");
        Self {
            outbound: open(),
            tunnel: open(),
            plaintext: open(),
        }
    }

    pub(crate) fn enroll(&self, bpf: &Bpf, world: &World, entry: &PodEntry) {
        let listeners = [
            (ListenerRole::Outbound, self.outbound.as_fd()),
            (ListenerRole::Tunnel, self.tunnel.as_fd()),
            (ListenerRole::Plaintext, self.plaintext.as_fd()),
        ];
        bpf.enroll(entry, world.pod.as_fd(), listeners).unwrap();
    }
}

/// An instance of the kernel programs, removed when dropped.
pub(crate) struct Instance {
    pub(crate) config: BpfConfig,
}

impl Instance {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let folder = bpffs(None).unwrap().join("weft");
        remove_leftovers(&folder);
        let name = format!(
            "test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let config = BpfConfig {
            pin_root: folder.join(name),
            cgroup: cgroup2_root().unwrap(),
            kubelet_cgroup: None,
            max_pending: 1024,
            pending_quota: 64,
            log: false,
        };
        Self { config }
    }

    pub(crate) fn open(&self) -> Bpf {
        let opened = Bpf::open(&self.config).and_then(|bpf| {
            bpf.claim()?;
            Ok(bpf)
        });
        opened.unwrap_or_else(|error| panic!("{:?}", anyhow::Error::from(error)))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(error) = Bpf::uninstall(&self.config.pin_root) {
            eprintln!("removing {}: {error}", self.config.pin_root.display());
        }
    }
}

/// Everything together: one pod, enrolled.
pub(crate) struct Meshed {
    pub(crate) listeners: Listeners,
    pub(crate) bpf: Bpf,
    pub(crate) world: World,
    pub(crate) instance: Instance,
}

impl Meshed {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut BpfConfig)) -> Self {
        let world = World::new();
        let mut instance = Instance::new();
        change(&mut instance.config);
        let bpf = instance.open();
        let listeners = Listeners::open(&world);
        listeners.enroll(&bpf, &world, &world.entry());
        Self {
            listeners,
            bpf,
            world,
            instance,
        }
    }

    /// Accepts on the outbound listener what was meant for `original`.
    pub(crate) fn accept_redirected(&self, original: SocketAddr) -> TcpStream {
        let (stream, _) = accept(&self.listeners.outbound);
        let flow = self.bpf.flow(stream.as_fd()).unwrap();
        assert_eq!(flow, Some(Flow::Accepted { original }));
        stream
    }
}

/// Accepts within a deadline.
pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    listener.set_nonblocking(true).unwrap();
    let accepted = eventually("a connection to accept", || listener.accept().ok());
    accepted.0.set_nonblocking(false).unwrap();
    accepted
}

/// Whether a listener has nothing to accept.
pub(crate) fn is_idle(listener: &TcpListener) -> bool {
    listener.set_nonblocking(true).unwrap();
    listener.accept().is_err()
}

/// Waits for something to be there.
pub(crate) fn eventually<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = f() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "no {what} within {LIMIT:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a few bytes each way.
pub(crate) fn talk(one: &mut TcpStream, other: &mut TcpStream) {
    for (from, to) in [(0, 1), (1, 0)] {
        let ends = [&mut *one, &mut *other];
        ends[from].write_all(b"weft").unwrap();
        let mut buffer = [0; 4];
        ends[to].set_read_timeout(Some(LIMIT)).unwrap();
        ends[to].read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"weft");
    }
}

pub(crate) fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(crate) fn ip_address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn connect(socket: Socket, to: SocketAddr) -> TcpStream {
    socket
        .connect(&to.into())
        .unwrap_or_else(|error| panic!("{to}: {error}"));
    socket.into()
}

/// A connect to the unspecified family disconnects.
pub(crate) fn disconnect(socket: &Socket) {
    // SAFETY: an all-zero address of any size is valid, and of that family.
    let ((), nobody) = unsafe {
        SockAddr::try_init(|_, length| {
            *length = 16;
            Ok(())
        })
    }
    .unwrap();
    socket.connect(&nobody).unwrap();
}

pub(crate) fn count(bpf: &Bpf, reason: Reason) -> u64 {
    let counters = bpf.counters().unwrap();
    counters
        .into_iter()
        .find(|(found, _)| *found == reason)
        .unwrap()
        .1
}

/// Exactly these were refused by the kernel.
pub(crate) fn assert_refusals(meshed: &Meshed, expected: &[(Reason, u64)]) {
    let counters = meshed.bpf.counters().unwrap();
    let counted: Vec<_> = counters
        .into_iter()
        .filter(|(_, count)| *count != 0)
        .collect();
    assert_eq!(counted, expected);
}

fn new_netns() -> Netns {
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        Netns::current().unwrap()
    })
    .join()
    .unwrap()
}

/// Runs `ip` in the calling thread's namespace.
fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Instances of test processes that were killed.
fn remove_leftovers(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let process = path.file_name().and_then(|name| {
            name.to_str()?
                .strip_prefix("test-")?
                .split('-')
                .next()?
                .parse::<u32>()
                .ok()
        });
        if process.is_some_and(|process| !PathBuf::from(format!("/proc/{process}")).exists()) {
            let _ = Bpf::uninstall(&path);
        }
    }
}

/// How long anything here may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);
