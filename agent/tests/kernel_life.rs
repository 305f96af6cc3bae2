//! The life of the kernel programs on the running kernel: installed, taken over, left behind,
//! removed. Needs root; makes its own network namespaces and control groups.

#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod kernel;

use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use kernel::{
    ELSEWHERE_V4, ELSEWHERE_V6, HOST_V4, Instance, Listeners, Meshed, POD_V4, World, accept,
    address, assert_refusals, connect, eventually, ip_address, is_idle, talk,
};
use socket2::{Domain, Protocol};
use weft_agent::bpf::{Bpf, Namespace, Reason, cgroup2_root};

#[test]
fn without_an_agent_everything_is_refused() {
    let Meshed {
        listeners,
        bpf,
        world,
        instance,
    } = Meshed::new();
    let app = world.listen("[::]:8080");
    let elsewhere = TcpListener::bind("[::]:80").unwrap();
    drop((listeners, bpf));
    for to in [ELSEWHERE_V4, ELSEWHERE_V6, "10.88.0.1:80", "[fd88::1]:80"] {
        assert_eq!(
            world.connect(address(to)).unwrap_err().kind(),
            ErrorKind::ConnectionRefused,
            "{to}"
        );
    }
    for to in ["10.88.0.2:8080", "[fd88::2]:8080", "10.88.0.2:15008"] {
        assert_eq!(
            TcpStream::connect(to).unwrap_err().kind(),
            ErrorKind::ConnectionRefused,
            "{to}"
        );
    }
    assert!(is_idle(&app) && is_idle(&elsewhere));
    // The pod still reaches itself.
    let _client = world.connect(address("127.0.0.1:8080")).unwrap();
    accept(&app);

    // Another agent comes.
    let bpf = instance.open();
    assert_eq!(bpf.enrolled().unwrap(), [world.cookie]);
    let listeners = Listeners::open(&world);
    listeners.enroll(&bpf, &world, &world.entry());
    let meshed = Meshed {
        listeners,
        bpf,
        world,
        instance,
    };
    let _client = meshed.world.connect(address(ELSEWHERE_V4)).unwrap();
    meshed.accept_redirected(address(ELSEWHERE_V4));
    assert_refusals(&meshed, &[(Reason::NoListener, 7)]);
}

#[test]
fn agents_follow_each_other_without_a_gap() {
    let mut meshed = Meshed::new();
    let first = meshed.bpf.verify().unwrap();
    let mut open = Vec::new();
    for turn in 0..10 {
        let to = address(&format!("203.0.113.{turn}:80"));
        let client = meshed.world.connect(to).unwrap();
        open.push((client, meshed.accept_redirected(to)));

        // The next agent takes the hooks over while the pods' connects still reach the old one's
        // listeners.
        let next = meshed.instance.open();
        let during = meshed.world.connect(to).unwrap();
        open.push((during, meshed.accept_redirected(to)));
        let listeners = Listeners::open(&meshed.world);
        listeners.enroll(&next, &meshed.world, &meshed.world.entry());
        meshed.bpf = next;
        meshed.listeners = listeners;

        let report = meshed.bpf.verify().unwrap();
        assert_eq!(report.hooks.len(), first.hooks.len());
        for (now, then) in report.hooks.iter().zip(&first.hooks) {
            assert_eq!(
                (&now.name, now.link, now.target),
                (&then.name, then.link, then.target)
            );
            assert_ne!(now.program, then.program, "{} was replaced", now.name);
        }
    }
    for (client, accepted) in &mut open {
        talk(client, accepted);
    }
    let counters = meshed
        .bpf
        .pod_counters(meshed.world.cookie)
        .unwrap()
        .unwrap();
    assert_eq!((counters.redirected, counters.pending_outbound), (20, 0));
}

/// What is closed, and what is to be meshed and cannot be enrolled, is refused.
#[test]
fn without_listeners_everything_is_refused() {
    let meshed = Meshed::new();
    let world = World::new();
    let is_refused = |world: &World| {
        let error = world.connect(address(ELSEWHERE_V4)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        let error = TcpStream::connect("10.88.0.2:8080").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    };
    let app = world.listen("[::]:8080");
    for _ in 0..2 {
        let entry = world.entry();
        meshed.bpf.refuse(&entry, world.pod.as_fd()).unwrap();
        is_refused(&world);
    }
    let listeners = Listeners::open(&world);
    listeners.enroll(&meshed.bpf, &world, &world.entry());
    let _client = world.connect(address(ELSEWHERE_V4)).unwrap();
    accept(&listeners.outbound);
    meshed.bpf.close(world.cookie).unwrap();
    is_refused(&world);
    assert!(is_idle(&app) && is_idle(&listeners.outbound));
    let addresses = meshed.bpf.addresses(world.cookie).into_iter().collect();
    let expected = BTreeSet::from_iter(world.entry().addresses);
    assert_eq!(expected, addresses);
    assert_eq!(
        meshed.bpf.namespace(world.cookie).unwrap(),
        Namespace::Alive
    );
    meshed.bpf.verify().unwrap();
}

#[test]
fn a_pod_that_leaves_is_left_alone() {
    let meshed = Meshed::new();
    let app = meshed.world.listen("10.88.0.2:8080");
    let elsewhere = TcpListener::bind((HOST_V4, 80)).unwrap();
    meshed.bpf.unenroll(meshed.world.cookie).unwrap();
    assert_eq!(meshed.bpf.enrolled().unwrap(), [0u64; 0]);
    let client = meshed
        .world
        .connect(elsewhere.local_addr().unwrap())
        .unwrap();
    assert_eq!(accept(&elsewhere).1, client.local_addr().unwrap());
    let client = TcpStream::connect("10.88.0.2:8080").unwrap();
    assert_eq!(accept(&app).1, client.local_addr().unwrap());
    for map in meshed.bpf.occupancy().unwrap() {
        assert_eq!(map.entries, 0, "{}", map.map);
    }
    meshed.bpf.verify().unwrap();
    meshed.bpf.unenroll(meshed.world.cookie).unwrap();
    meshed.bpf.remove_all().unwrap();
    assert!(!meshed.instance.config.pin_root.exists());
}

#[test]
fn the_host_cannot_be_meshed() {
    let world = World::new();
    let instance = Instance::new();
    let bpf = instance.open();
    let host = weft_agent::netns::Netns::current().unwrap();
    let mut entry = world.entry();
    entry.cookie = host.cookie().unwrap();
    let listener = TcpListener::bind("[::]:0").unwrap();
    let listeners = [
        weft_agent::bpf::ListenerRole::Outbound,
        weft_agent::bpf::ListenerRole::Tunnel,
        weft_agent::bpf::ListenerRole::Plaintext,
    ]
    .map(|role| (role, listener.as_fd()));
    let error = bpf.enroll(&entry, host.as_fd(), listeners).unwrap_err();
    assert!(error.to_string().contains("host"), "{error}");
}

#[test]
fn namespaces_that_went_away_are_forgotten() {
    let Meshed {
        listeners,
        bpf,
        world,
        instance,
    } = Meshed::new();
    let cookie = world.cookie;
    drop((listeners, world));
    assert_eq!(bpf.enrolled().unwrap(), [cookie]);
    // The kernel takes namespaces down in its own time.
    eventually("end of the namespace", || {
        (bpf.namespace(cookie).unwrap() == Namespace::Gone).then_some(())
    });
    // That is nobody's fault.
    bpf.verify().unwrap();
    let bpf = instance.open();
    assert_eq!(bpf.enrolled().unwrap(), [0u64; 0]);
    bpf.verify().unwrap();
    for map in bpf.occupancy().unwrap() {
        assert_eq!(map.entries, 0, "{}", map.map);
    }
}

#[test]
fn pods_with_the_same_addresses_do_not_meet() {
    let first = World::new();
    let second = World::new();
    let instance = Instance::new();
    let bpf = instance.open();
    let worlds = [first, second].map(|world| {
        let listeners = Listeners::open(&world);
        listeners.enroll(&bpf, &world, &world.entry());
        (world, listeners)
    });
    let to = address(ELSEWHERE_V4);
    let mut open = Vec::new();
    for (world, listeners) in &worlds {
        let socket = world.socket(Domain::IPV4, Protocol::TCP);
        socket.bind(&address("10.88.0.2:5000").into()).unwrap();
        let client = connect(socket, to);
        open.push((client, accept(&listeners.outbound).0));
    }
    for (client, accepted) in &mut open {
        talk(client, accepted);
    }
    for (world, _) in &worlds {
        let counters = bpf.pod_counters(world.cookie).unwrap().unwrap();
        assert_eq!((counters.redirected, counters.pending_outbound), (1, 0));
    }
    bpf.unenroll(worlds[0].0.cookie).unwrap();
    assert_eq!(bpf.enrolled().unwrap(), [worlds[1].0.cookie]);
    let _client = worlds[1].0.connect(to).unwrap();
    accept(&worlds[1].1.outbound);
}

#[test]
fn instances_do_not_see_each_other() {
    let one = Meshed::new();
    let other = Instance::new();
    let bpf = other.open();
    assert_eq!(bpf.enrolled().unwrap(), [0u64; 0]);
    one.bpf.verify().unwrap();
    bpf.verify().unwrap();
    let _client = one.world.connect(address(ELSEWHERE_V4)).unwrap();
    one.accept_redirected(address(ELSEWHERE_V4));
    drop(other);
    assert!(bpf.verify().is_err());
    one.bpf.verify().unwrap();
}

/// The layout of the maps changed: what the earlier agent left cannot be used, and must not be
/// removed before the pods are meshed anew.
#[test]
fn an_earlier_layout_refuses_until_it_is_replaced() {
    let Meshed {
        listeners,
        bpf,
        world,
        instance,
    } = Meshed::new();
    let other = World::new();
    let theirs = Listeners::open(&other);
    theirs.enroll(&bpf, &other, &other.entry());
    drop((listeners, theirs, bpf));
    let root = &instance.config.pin_root;
    fs::rename(root.join("v1"), root.join("v0")).unwrap();

    let bpf = instance.open();
    let mut left = vec![world.cookie, other.cookie];
    left.sort_unstable();
    assert_eq!(bpf.enrolled().unwrap(), left);
    let refused = |world: &World| {
        let error = world.connect(address(ELSEWHERE_V4)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    };
    refused(&world);
    let listeners = Listeners::open(&world);
    listeners.enroll(&bpf, &world, &world.entry());
    // One pod is still under the earlier programs, so those are still there, and refuse; the other
    // they leave alone.
    let meshed = Meshed {
        listeners,
        bpf,
        world,
        instance,
    };
    let _client = meshed.world.connect(address(ELSEWHERE_V4)).unwrap();
    meshed.accept_redirected(address(ELSEWHERE_V4));
    refused(&other);
    let root = &meshed.instance.config.pin_root;
    assert!(root.join("v0").exists());
    meshed.bpf.unenroll(other.cookie).unwrap();
    assert!(!root.join("v0").exists());

    meshed.bpf.verify().unwrap();
    let _client = meshed.world.connect(address(ELSEWHERE_V4)).unwrap();
    meshed.accept_redirected(address(ELSEWHERE_V4));
}

/// A pod that could not be steered in the earlier layout, or whose program somebody took away, is
/// refused by the earlier connect programs alone: they stay for it.
#[test]
fn an_earlier_layout_stays_for_a_pod_without_a_lookup_program() {
    let meshed = Meshed::new();
    let root = meshed.instance.config.pin_root.clone();
    let links = root.join("v1").join("links");
    for entry in fs::read_dir(&links).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains("sk_lookup-") {
            fs::remove_file(path).unwrap();
        }
    }
    let Meshed {
        listeners,
        bpf,
        world,
        instance,
    } = meshed;
    drop((listeners, bpf));
    fs::rename(root.join("v1"), root.join("v0")).unwrap();

    let bpf = instance.open();
    assert_eq!(bpf.enrolled().unwrap(), [world.cookie]);
    assert!(root.join("v0").exists());
    let error = world.connect(address(ELSEWHERE_V4)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    // It is not known whether it still lives, so nobody takes it out of the mesh.
    assert_eq!(bpf.namespace(world.cookie).unwrap(), Namespace::Unknown);
    let listeners = Listeners::open(&world);
    listeners.enroll(&bpf, &world, &world.entry());
    assert!(!root.join("v0").exists());
}

/// The same beside an agent of the other layout that still runs: what it has is connected and delivered,
/// what comes goes to the new one.
#[test]
fn an_agent_of_another_layout_finishes_what_it_has() {
    let old = Meshed::new();
    let app = old.world.listen("[::]:8080");
    let elsewhere = TcpListener::bind((HOST_V4, 0)).unwrap();
    let to = address(ELSEWHERE_V4);
    let mut before = old.world.connect(to).unwrap();
    let mut accepted = old.accept_redirected(to);
    let root = old.instance.config.pin_root.clone();
    fs::rename(root.join("v1"), root.join("v0")).unwrap();

    let new = old.instance.open();
    let listeners = Listeners::open(&old.world);
    listeners.enroll(&new, &old.world, &old.world.entry());
    assert!(root.join("v0").exists());
    // What the older agent connects to elsewhere is left alone,
    let socket = old.world.socket(Domain::IPV4, Protocol::TCP);
    old.bpf.mark_outbound(socket.as_fd()).unwrap();
    connect(socket, elsewhere.local_addr().unwrap());
    assert_eq!(accept(&elsewhere).1.ip(), ip_address(POD_V4));
    // and what either delivers arrives, from whom it is said to be.
    for (bpf, from) in [(&old.bpf, "127.0.0.9:0"), (&new, "127.0.0.8:0")] {
        let socket = old.world.socket(Domain::IPV4, Protocol::TCP);
        socket.bind(&address(from).into()).unwrap();
        bpf.mark_deliver(socket.as_fd(), address("198.51.100.7:4000"))
            .unwrap();
        connect(socket, address("10.88.0.2:8080"));
        let peer = accept(&app).1;
        assert_eq!(
            (peer.ip().to_canonical(), peer.port()),
            (ip_address("198.51.100.7"), 4000)
        );
    }
    // New connections are the new one's.
    let _out = old.world.connect(to).unwrap();
    accept(&listeners.outbound);
    let _plain = TcpStream::connect("10.88.0.2:8080").unwrap();
    accept(&listeners.plaintext);
    let _tunnel = TcpStream::connect("10.88.0.2:15008").unwrap();
    accept(&listeners.tunnel);
    // The pod reaches itself.
    let _itself = old.world.connect(address("10.88.0.2:8080")).unwrap();
    assert_eq!(accept(&app).1.ip().to_canonical(), ip_address(POD_V4));
    assert_eq!(before.peer_addr().unwrap(), to);
    talk(&mut before, &mut accepted);
    for listener in [&old.listeners.outbound, &old.listeners.plaintext] {
        assert!(is_idle(listener));
    }

    // Nothing of it goes as long as that agent lives.
    new.retire_predecessors().unwrap();
    assert!(root.join("v0").exists());
    let Meshed {
        listeners: theirs,
        bpf,
        world,
        instance: _instance,
    } = old;
    drop((theirs, bpf));
    new.retire_predecessors().unwrap();
    assert!(!root.join("v0").exists());
    new.verify().unwrap();
    let _out = world.connect(to).unwrap();
    accept(&listeners.outbound);
    let _itself = world.connect(address("10.88.0.2:8080")).unwrap();
    accept(&app);
}

/// An agent of another layout came and died before it took over: the owner removes its hooks. Not while
/// it may live.
#[test]
fn a_newcomer_that_died_leaves_nothing() {
    let meshed = Meshed::new();
    let root = &meshed.instance.config.pin_root;
    let (ours, aside, theirs) = (root.join("v1"), root.join("own"), root.join("v0"));
    fs::rename(&ours, &aside).unwrap();
    let newcomer = Bpf::open(&meshed.instance.config).unwrap();
    fs::rename(&ours, &theirs).unwrap();
    fs::rename(&aside, &ours).unwrap();
    meshed.bpf.retire_predecessors().unwrap();
    let other = World::new();
    let listeners = Listeners::open(&other);
    listeners.enroll(&meshed.bpf, &other, &other.entry());
    meshed.bpf.unenroll(other.cookie).unwrap();
    assert!(theirs.join("links/weft_connect4").exists());

    drop(newcomer);
    meshed.bpf.retire_predecessors().unwrap();
    assert!(!theirs.exists());
    meshed.bpf.verify().unwrap();
    let _client = meshed.world.connect(address(ELSEWHERE_V4)).unwrap();
    meshed.accept_redirected(address(ELSEWHERE_V4));
}

#[test]
fn hooks_that_somebody_detached_come_back() {
    let meshed = Meshed::new();
    let before = meshed.bpf.verify().unwrap().hooks.len();
    assert_eq!(meshed.bpf.repair().unwrap(), [""; 0]);
    let links = meshed.instance.config.pin_root.join("v1/links");
    // A link without a pin is gone.
    for name in ["weft_connect4", "weft_sock_ops"] {
        fs::remove_file(links.join(name)).unwrap();
    }
    let lookup = links.join(format!("sk_lookup-{:016x}", meshed.world.cookie));
    fs::remove_file(lookup).unwrap();
    assert!(meshed.bpf.verify().is_err());
    let mut repaired = meshed.bpf.repair().unwrap();
    repaired.sort();
    assert_eq!(repaired, ["weft_connect4", "weft_sock_ops"]);
    for expected in [true, false] {
        let netns = meshed.world.pod.as_fd();
        let repaired = meshed.bpf.repair_pod(meshed.world.cookie, netns).unwrap();
        assert_eq!(repaired, expected);
    }
    assert_eq!(meshed.bpf.verify().unwrap().hooks.len(), before);
    let _client = meshed.world.connect(address(ELSEWHERE_V4)).unwrap();
    meshed.accept_redirected(address(ELSEWHERE_V4));
    let _client = TcpStream::connect("10.88.0.2:8080").unwrap();
    accept(&meshed.listeners.plaintext);
}

/// An agent died when a link was pinned aside and not yet in its place.
#[test]
fn a_link_that_was_left_unfinished_is_removed() {
    let instance = Instance::new();
    let bpf = instance.open();
    let links = instance.config.pin_root.join("v1/links");
    let (place, aside) = (links.join("weft_connect4"), links.join("weft_connect4-new"));
    fs::rename(&place, &aside).unwrap();
    drop(bpf);
    let bpf = instance.open();
    assert!(place.exists() && !aside.exists());
    bpf.verify().unwrap();
}

#[test]
fn a_control_group_that_was_made_anew_gets_its_hooks_back() {
    let _alone = MOVING.lock().unwrap_or_else(PoisonError::into_inner);
    let group = Group::new("anew");
    let mut instance = Instance::new();
    instance.config.cgroup = group.path.clone();
    let bpf = instance.open();
    let before = bpf.verify().unwrap();
    fs::remove_dir(&group.path).unwrap();
    fs::create_dir(&group.path).unwrap();
    assert!(bpf.verify().is_err());
    assert!(!bpf.repair().unwrap().is_empty());
    let after = bpf.verify().unwrap();
    assert_eq!(before.hooks.len(), after.hooks.len());
}

/// The agent and the pods in groups next to each other: both ends of a connection must be seen.
#[test]
fn agent_and_pods_may_be_in_different_control_groups() {
    let _alone = MOVING.lock().unwrap_or_else(PoisonError::into_inner);
    let agents = Group::new("agent");
    let pods = Group::new("pods");
    let home = own_group();
    agents.enter(std::process::id());
    let meshed = Meshed::with(|config| config.cgroup = pods.path.clone());
    let hooks = meshed.bpf.verify().unwrap().hooks;
    let names: Vec<_> = hooks.iter().map(|hook| hook.name.as_str()).collect();
    let has = |it: fn(&&str) -> bool| names.iter().any(it);
    assert!(
        has(|it| *it == "weft_sock_ops") && has(|it| it.starts_with("weft_sock_ops-agent-")),
        "{names:?}"
    );

    // A client of the pod, which prints what it is connected to.
    let mut client = meshed.world.in_pod(|| application(&pods, "client"));
    let mut accepted = meshed.accept_redirected(address(ELSEWHERE_V4));
    let mut told = String::new();
    accepted.read_to_string(&mut told).unwrap();
    assert_eq!(told, format!("10.88.0.2 to {ELSEWHERE_V4}"));
    assert!(client.wait().unwrap().success());

    // A server of the pod, which tells its client who that is.
    let mut server = meshed.world.in_pod(|| application(&pods, "server"));
    let mut told = String::new();
    let mut agent = eventually("server", || {
        let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
        meshed
            .bpf
            .mark_deliver(socket.as_fd(), address("198.51.100.7:4000"))
            .unwrap();
        socket.connect(&address("10.88.0.2:8080").into()).ok()?;
        Some(TcpStream::from(socket))
    });
    agent.read_to_string(&mut told).unwrap();
    assert_eq!(told, "198.51.100.7:4000");
    assert!(server.wait().unwrap().success());

    fs::write(home.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

/// Not a test: the application of the test above, in a process of its own.
#[test]
fn application_process() {
    match std::env::var("KERNEL_LIFE_APPLICATION").as_deref() {
        Ok("client") => {
            let mut server = TcpStream::connect(ELSEWHERE_V4).unwrap();
            let own = server.local_addr().unwrap().ip();
            let peer = server.peer_addr().unwrap();
            server
                .write_all(format!("{own} to {peer}").as_bytes())
                .unwrap();
        }
        Ok("server") => {
            let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
            let (mut client, peer) = listener.accept().unwrap();
            client.write_all(peer.to_string().as_bytes()).unwrap();
        }
        _ => {}
    }
}

fn application(group: &Group, role: &str) -> std::process::Child {
    Command::new("sh")
        .args(["-c", "echo $$ > \"$1\" && shift && exec \"$@\"", "sh"])
        .arg(group.path.join("cgroup.procs"))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "application_process"])
        .env("KERNEL_LIFE_APPLICATION", role)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Which hooks an instance has depends on where the agent is, which is this process.
static MOVING: Mutex<()> = Mutex::new(());

/// A control group, removed when dropped.
struct Group {
    path: PathBuf,
}

impl Group {
    fn new(name: &str) -> Self {
        let path = cgroup2_root()
            .unwrap()
            .join(format!("weft-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self { path }
    }

    fn enter(&self, process: u32) {
        fs::write(self.path.join("cgroup.procs"), process.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever still is inside goes up.
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        for process in fs::read_to_string(self.path.join("cgroup.procs"))
            .unwrap_or_default()
            .lines()
        {
            let _ = fs::write(parent.join("cgroup.procs"), process);
        }
        let _ = fs::remove_dir(&self.path);
    }
}

fn own_group() -> PathBuf {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .unwrap();
    cgroup2_root().unwrap().join(own)
}
