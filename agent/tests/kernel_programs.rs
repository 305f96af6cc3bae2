//! The kernel programs on the running kernel: that it takes them, and that they do to real sockets
//! what `docs/interception.md` says. Needs root; makes its own network namespaces.

#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod kernel;

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use kernel::{
    ELSEWHERE_V4, ELSEWHERE_V6, HOST_V4, Listeners, Meshed, POD_V4, POD_V6, World, accept, address,
    assert_refusals, connect, disconnect, eventually, ip_address, is_idle, talk,
};
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};
use socket2::{Domain, Protocol, Socket, Type};
use weft_agent::bpf::{Flow, Reason};

/// What the verifier may have to look at per program: far from its limit of a million, near to what
/// it is now.
const MOST_INSTRUCTIONS: u32 = 10_000;

#[test]
fn the_kernel_takes_every_program() {
    let meshed = Meshed::new();
    let report = meshed.bpf.verify().unwrap();
    let mut lines = String::new();
    for hook in &report.hooks {
        let name = hook.name.split('-').next().unwrap();
        lines += &format!("{name} {}\n", hook.verified_instructions);
        assert!(
            (10..MOST_INSTRUCTIONS).contains(&hook.verified_instructions),
            "{name}: {} instructions verified",
            hook.verified_instructions
        );
    }
    println!("instructions verified:\n{lines}");
    std::fs::write(
        Path::new(env!("CARGO_TARGET_TMPDIR")).join("verified_instructions"),
        &lines,
    )
    .unwrap();
    assert_eq!(report.hooks.len(), 8, "{report:?}");
}

#[test]
fn connects_are_redirected_and_keep_their_addresses() {
    let meshed = Meshed::new();
    let mapped = "[::ffff:203.0.113.9]:8080";
    let table = [
        (ELSEWHERE_V4, ELSEWHERE_V4, POD_V4),
        (ELSEWHERE_V6, ELSEWHERE_V6, POD_V6),
        (mapped, "203.0.113.9:8080", "::ffff:10.88.0.2"),
    ];
    for (to, original, local) in table {
        let mut client = meshed.world.connect(address(to)).unwrap();
        let mut accepted = meshed.accept_redirected(address(original));
        assert_eq!(client.peer_addr().unwrap(), address(to));
        assert_eq!(client.local_addr().unwrap().ip(), ip_address(local), "{to}");
        let flow = meshed.bpf.flow(client.as_fd()).unwrap();
        assert_eq!(
            flow,
            Some(Flow::Redirected {
                original: address(original)
            })
        );
        talk(&mut client, &mut accepted);
    }
    let counters = meshed
        .bpf
        .pod_counters(meshed.world.cookie)
        .unwrap()
        .unwrap();
    assert_eq!((counters.redirected, counters.pending_outbound), (3, 0));
    assert_refusals(&meshed, &[]);
}

/// Bound to the pod's address, with and without a port; bound to a port only.
#[test]
fn sockets_bound_to_an_address_or_port() {
    let meshed = Meshed::new();
    let v4 = address(ELSEWHERE_V4);
    let v6 = address(ELSEWHERE_V6);
    for (bind, to) in [
        ("10.88.0.2:0", v4),
        ("10.88.0.2:5001", v4),
        ("0.0.0.0:5002", v4),
        ("[fd88::2]:0", v6),
        ("[fd88::2]:5003", v6),
        ("[::]:5004", v6),
    ] {
        let socket = meshed.world.socket(Domain::for_address(to), Protocol::TCP);
        let bind = address(bind);
        socket.bind(&bind.into()).unwrap();
        let client = connect(socket, to);
        let accepted = meshed.accept_redirected(to);
        let local = client.local_addr().unwrap();
        assert!(bind.port() == 0 || local.port() == bind.port(), "{bind}");
        assert!(
            bind.ip().is_unspecified() || local.ip() == bind.ip(),
            "{bind} {local}"
        );
        assert_eq!(accepted.peer_addr().unwrap().port(), local.port());
    }
    assert_refusals(&meshed, &[]);
}

/// A local port that happens to be the one that the connect is sent to.
#[test]
fn a_socket_bound_to_the_stand_ins_port() {
    let meshed = Meshed::new();
    let to = address("[2001:db8:9::a]:443");
    let stand_in = weft_ebpf_abi::target(&to.ip().into(), to.port());
    let socket = meshed.world.socket(Domain::IPV6, Protocol::TCP);
    socket
        .bind(&SocketAddr::new(ip_address("::"), stand_in.port).into())
        .unwrap();
    let _client = connect(socket, to);
    meshed.accept_redirected(to);
    assert_refusals(&meshed, &[]);
}

/// One local port to many destinations.
#[test]
fn one_local_port_to_many_destinations() {
    let meshed = Meshed::new();
    let mut clients = Vec::new();
    for last in 1..=32 {
        let to = address(&format!("203.0.113.{last}:80"));
        let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
        socket.set_reuse_address(true).unwrap();
        socket.bind(&address("10.88.0.2:5005").into()).unwrap();
        clients.push((connect(socket, to), meshed.accept_redirected(to)));
    }
    assert_refusals(&meshed, &[]);
}

/// Bound to a device, which the loopback is not behind.
#[test]
fn sockets_bound_to_a_device() {
    let meshed = Meshed::new();
    let v4 = address(ELSEWHERE_V4);
    let v6 = address(ELSEWHERE_V6);
    for to in [v4, v6] {
        let socket = meshed.world.socket(Domain::for_address(to), Protocol::TCP);
        socket.bind_device(Some(b"eth0")).unwrap();
        let _client = connect(socket, to);
        meshed.accept_redirected(to);
    }
    assert_refusals(&meshed, &[]);
}

/// Not waiting.
#[test]
fn sockets_that_do_not_wait() {
    let meshed = Meshed::new();
    let v4 = address(ELSEWHERE_V4);
    let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
    socket.set_nonblocking(true).unwrap();
    let started = socket.connect(&v4.into());
    assert_eq!(
        started.unwrap_err().raw_os_error(),
        Some(nix::libc::EINPROGRESS)
    );
    meshed.accept_redirected(v4);
    eventually("connected socket", || socket.peer_addr().ok());
    assert_refusals(&meshed, &[]);
}

/// Fast Open: the connect is a send.
#[test]
fn fast_open() {
    let meshed = Meshed::new();
    let v4 = address(ELSEWHERE_V4);
    let v6 = address(ELSEWHERE_V6);
    for to in [v4, v6] {
        let socket = meshed.world.socket(Domain::for_address(to), Protocol::TCP);
        let fast_open = MsgFlags::from_bits_retain(nix::libc::MSG_FASTOPEN);
        let storage = SockaddrStorage::from(to);
        let sent = sendto(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            b"early",
            &storage,
            fast_open,
        )
        .unwrap();
        assert_eq!(sent, 5);
        let mut accepted = meshed.accept_redirected(to);
        let mut buffer = [0; 5];
        std::io::Read::read_exact(&mut accepted, &mut buffer).unwrap();
        assert_eq!(&buffer, b"early");
        assert_eq!(TcpStream::from(socket).peer_addr().unwrap(), to);
    }
    assert_refusals(&meshed, &[]);
}

/// Multipath: the socket that connects is not the application's.
#[test]
fn multipath() {
    let meshed = Meshed::new();
    let v4 = address(ELSEWHERE_V4);
    let v6 = address(ELSEWHERE_V6);
    for to in [v4, v6] {
        let socket = meshed
            .world
            .socket(Domain::for_address(to), Protocol::MPTCP);
        let mut client = connect(socket, to);
        let mut accepted = meshed.accept_redirected(to);
        assert_eq!(client.peer_addr().unwrap(), to);
        talk(&mut client, &mut accepted);
    }
    assert_refusals(&meshed, &[]);
}

#[test]
fn what_is_not_the_meshs_business_is_left_alone() {
    let meshed = Meshed::new();
    let app = meshed.world.listen("[::]:8080");
    // Itself, by any of its names.
    for to in [
        "127.0.0.1:8080",
        "[::1]:8080",
        "[::ffff:127.0.0.1]:8080",
        "0.0.0.0:8080",
        "10.88.0.2:8080",
        "[fd88::2]:8080",
        "[::ffff:10.88.0.2]:8080",
        "127.9.9.9:8080",
    ] {
        let mut client = meshed
            .world
            .connect(address(to))
            .unwrap_or_else(|error| panic!("{to}: {error}"));
        let (mut accepted, peer) = accept(&app);
        assert_eq!(meshed.bpf.flow(client.as_fd()).unwrap(), None, "{to}");
        assert_eq!(peer.port(), client.local_addr().unwrap().port(), "{to}");
        talk(&mut client, &mut accepted);
    }
    // What looks like where redirected connects are sent.
    for to in ["127.9.9.9:4", "[::1]:65000"].map(address) {
        let app = meshed.world.listen(&to.to_string());
        let _client = meshed.world.connect(to).unwrap();
        accept(&app);
    }

    // UDP.
    let host = UdpSocket::bind((HOST_V4, 0)).unwrap();
    let pod = meshed
        .world
        .in_pod(|| UdpSocket::bind((POD_V4, 0)))
        .unwrap();
    pod.connect(host.local_addr().unwrap()).unwrap();
    assert_eq!(pod.peer_addr().unwrap(), host.local_addr().unwrap());
    pod.send(b"weft").unwrap();
    assert_eq!(
        host.recv_from(&mut [0; 8]).unwrap().1,
        pod.local_addr().unwrap()
    );

    // Other namespaces, such as the host's.
    let other = TcpListener::bind((HOST_V4, 0)).unwrap();
    let client = TcpStream::connect(other.local_addr().unwrap()).unwrap();
    accept(&other);
    assert_eq!(client.peer_addr().unwrap(), other.local_addr().unwrap());

    // The agent's own sockets in the pod.
    let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
    meshed.bpf.mark_outbound(socket.as_fd()).unwrap();
    assert_eq!(meshed.bpf.flow(socket.as_fd()).unwrap(), None);
    let client = connect(socket, other.local_addr().unwrap());
    let (_, peer) = accept(&other);
    assert_eq!(peer, client.local_addr().unwrap());
    assert_eq!(peer.ip(), ip_address(POD_V4));

    assert!(is_idle(&meshed.listeners.outbound) && is_idle(&meshed.listeners.plaintext));
    assert_refusals(&meshed, &[]);
    let counters = meshed
        .bpf
        .pod_counters(meshed.world.cookie)
        .unwrap()
        .unwrap();
    assert_eq!((counters.redirected, counters.pending_outbound), (0, 0));
}

/// Many at once, by clients that close first: each arrives with its own destination, none is left
/// over.
#[test]
fn connections_are_not_mixed_up() {
    const CLIENTS: u16 = 4;
    const CONNECTS: u16 = 400;
    let meshed = Meshed::new();
    let listener = &meshed.listeners.outbound;
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let world = &meshed.world;
            scope.spawn(move || {
                for n in 0..CONNECTS {
                    let to = match n % 3 {
                        0 => format!("[2001:db8:{client}::{n}]:{}", n + 1),
                        1 => format!("[::ffff:203.0.113.{client}]:{}", n + 1),
                        _ => format!("198.51.{}.{}:80", n % 5, client),
                    };
                    let mut stream = world.connect(address(&to)).unwrap();
                    stream.write_all(to.as_bytes()).unwrap();
                }
            });
        }
        for _ in 0..CLIENTS * CONNECTS {
            let (mut stream, _) = accept(listener);
            let mut asked = String::new();
            stream.read_to_string(&mut asked).unwrap();
            let asked = address(&asked);
            let original = SocketAddr::new(asked.ip().to_canonical(), asked.port());
            let flow = meshed.bpf.flow(stream.as_fd()).unwrap();
            assert_eq!(flow, Some(Flow::Accepted { original }));
        }
    });
    let counters = meshed
        .bpf
        .pod_counters(meshed.world.cookie)
        .unwrap()
        .unwrap();
    assert_eq!(counters.redirected, u64::from(CLIENTS * CONNECTS));
    assert_eq!(counters.pending_outbound, 0);
    let occupancy = meshed.bpf.occupancy().unwrap();
    let pending = occupancy.iter().find(|it| it.map == "PENDING").unwrap();
    assert_eq!(pending.entries, 0);
    assert_refusals(&meshed, &[]);
}

/// What the agent accepts is bound to the port that the connect was sent to, which an application
/// may want to listen on.
#[test]
fn connections_take_no_ports_from_applications() {
    let meshed = Meshed::new();
    let open: Vec<_> = (0..300)
        .map(|n| address(&format!("203.0.{}.{}:80", n / 200, n % 200)))
        .map(|to| {
            (
                meshed.world.connect(to).unwrap(),
                meshed.accept_redirected(to),
            )
        })
        .collect();
    // Up to where the clients' own ports begin, without asking to share.
    meshed.world.in_pod(|| {
        for port in 1024..32768 {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let bound = socket.bind(&SocketAddr::from(([0; 4], port)).into());
            bound.unwrap_or_else(|error| panic!("port {port}: {error}"));
        }
    });
    // An application that restarts while its clients are connected to the agent.
    let _client = TcpStream::connect((POD_V4, 8080)).unwrap();
    let _accepted = accept(&meshed.listeners.plaintext);
    meshed.world.listen("0.0.0.0:8080");
    drop(open);
}

#[test]
fn a_socket_that_is_used_again_is_judged_again() {
    let meshed = Meshed::new();
    let app = meshed.world.listen("127.0.0.1:8080");
    let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
    socket.connect(&address(ELSEWHERE_V4).into()).unwrap();
    drop(meshed.accept_redirected(address(ELSEWHERE_V4)));
    disconnect(&socket);
    socket.connect(&address("127.0.0.1:8080").into()).unwrap();
    let (_, peer) = accept(&app);
    let client = TcpStream::from(socket);
    assert_eq!(client.peer_addr().unwrap(), address("127.0.0.1:8080"));
    assert_eq!(client.local_addr().unwrap().port(), peer.port());
    assert_eq!(meshed.bpf.flow(client.as_fd()).unwrap(), None);
}

/// The entry stays until the connection is there, however long that takes and however the kernel
/// gets there.
#[test]
fn slow_handshakes_keep_their_destination() {
    let meshed = Meshed::new();
    // The kernel forgets the SYN and takes the ACK for it: a lookup without a SYN.
    meshed
        .world
        .in_pod(|| std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap());
    for to in [ELSEWHERE_V4, ELSEWHERE_V6].map(address) {
        let mut client = meshed.world.connect(to).unwrap();
        let mut accepted = meshed.accept_redirected(to);
        talk(&mut client, &mut accepted);
    }
    // The queue is full; the SYN is dropped, and sent again later.
    meshed
        .world
        .in_pod(|| std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "0").unwrap());
    let full = meshed.world.in_pod(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.bind(&address("[::]:0").into()).unwrap();
        socket.listen(0).unwrap();
        TcpListener::from(socket)
    });
    let listeners = Listeners {
        outbound: full,
        ..Listeners::open(&meshed.world)
    };
    listeners.enroll(&meshed.bpf, &meshed.world, &meshed.world.entry());
    let to = address(ELSEWHERE_V4);
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
            socket.set_nonblocking(true).unwrap();
            socket.connect(&to.into()).unwrap_err();
            socket
        })
        .collect();
    for _ in &clients {
        let (accepted, _) = accept(&listeners.outbound);
        let flow = meshed.bpf.flow(accepted.as_fd()).unwrap();
        assert_eq!(flow, Some(Flow::Accepted { original: to }));
    }
    let counters = meshed
        .bpf
        .pod_counters(meshed.world.cookie)
        .unwrap()
        .unwrap();
    assert_eq!(counters.pending_outbound, 0);
}

#[test]
fn entries_are_counted_thousands_at_a_time() {
    let meshed = Meshed::new();
    let (cookie, keep) = (meshed.world.cookie, Duration::from_secs(60));
    for number in 0..5_000u32 {
        let to = (std::net::Ipv4Addr::from(0xcb00_7100 + number), 80).into();
        meshed.bpf.remember_refused(cookie, to, keep).unwrap();
    }
    let start = Instant::now();
    let maps = meshed.bpf.occupancy().unwrap();
    let entries = |map: &str| maps.iter().find(|it| it.map == map).unwrap().entries;
    assert_eq!(entries("REFUSED"), 5_000);
    assert_eq!((entries("PODS"), entries("LISTENERS")), (1, 3));
    assert!(start.elapsed() < Duration::from_secs(1));
    meshed.bpf.unenroll(cookie).unwrap();
    let maps = meshed.bpf.occupancy().unwrap();
    assert!(maps.iter().all(|it| it.entries == 0), "{maps:?}");
}

#[test]
fn a_destination_that_refused_refuses_for_a_moment() {
    let meshed = Meshed::new();
    let cookie = meshed.world.cookie;
    for (to, other) in [
        (ELSEWHERE_V4, "203.0.113.9:81"),
        (ELSEWHERE_V6, "[2001:db8:9::9]:444"),
    ] {
        let (to, other) = (address(to), address(other));
        let keep = Duration::from_millis(300);
        meshed.bpf.remember_refused(cookie, to, keep).unwrap();
        let start = Instant::now();
        assert_eq!(
            meshed.world.connect(to).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
        assert!(start.elapsed() < keep, "refused at once");
        let _client = meshed.world.connect(other).unwrap();
        meshed.accept_redirected(other);
        let _client = eventually("end of it", || meshed.world.connect(to).ok());
        assert!(start.elapsed() >= Duration::from_millis(250));
        meshed.accept_redirected(to);

        meshed
            .bpf
            .remember_refused(cookie, to, Duration::from_secs(60))
            .unwrap();
        assert!(meshed.world.connect(to).is_err());
        meshed.bpf.forget_refused(cookie, to).unwrap();
        let _client = meshed.world.connect(to).unwrap();
        meshed.accept_redirected(to);
    }
}

#[test]
fn a_pod_can_use_up_its_own_share_only() {
    let meshed = Meshed::with(|config| config.pending_quota = 4);
    // Nobody accepts, so the queue fills up and connects stay in the middle of opening.
    let full = meshed.world.in_pod(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.bind(&address("[::]:0").into()).unwrap();
        socket.listen(0).unwrap();
        TcpListener::from(socket)
    });
    let listeners = Listeners {
        outbound: full,
        ..Listeners::open(&meshed.world)
    };
    listeners.enroll(&meshed.bpf, &meshed.world, &meshed.world.entry());
    let mut sockets = Vec::new();
    let refused = loop {
        let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
        socket.set_nonblocking(true).unwrap();
        match socket.connect(&address(ELSEWHERE_V4).into()) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {
                sockets.push(socket)
            }
            result => break result,
        }
        assert!(sockets.len() < 20, "no limit");
    };
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(nix::libc::EPERM));
    let counters = meshed
        .bpf
        .pod_counters(meshed.world.cookie)
        .unwrap()
        .unwrap();
    assert_eq!((counters.pending_outbound, counters.quota_refusals), (4, 1));
    assert_refusals(&meshed, &[(Reason::Quota, 1)]);

    // Another pod has its own share.
    let other = World::new();
    let theirs = Listeners::open(&other);
    theirs.enroll(&meshed.bpf, &other, &other.entry());
    let _client = other.connect(address(ELSEWHERE_V4)).unwrap();
    accept(&theirs.outbound);

    // The other direction has its own share.
    let app = meshed.world.listen("10.88.0.2:8080");
    let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
    meshed
        .bpf
        .mark_deliver(socket.as_fd(), address("198.51.100.7:4000"))
        .unwrap();
    let _agent = connect(socket, address("10.88.0.2:8080"));
    accept(&app);

    drop(sockets);
    let counters = meshed
        .bpf
        .pod_counters(meshed.world.cookie)
        .unwrap()
        .unwrap();
    assert_eq!(counters.pending_outbound, 0, "closing clears");
}
