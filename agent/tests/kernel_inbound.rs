//! What arrives at a pod, on the running kernel: from outside, from the agent, from the kubelet. Needs
//! root; makes its own network namespaces.

#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod kernel;

use std::{
    io::ErrorKind,
    net::{Ipv6Addr, SocketAddr, TcpStream},
    os::fd::AsFd as _,
};

use kernel::{
    HOST_V6, Meshed, POD_V4, POD_V6, accept, address, assert_refusals, connect, count, eventually,
    ip_address, is_idle, talk,
};
use socket2::{Domain, Protocol, Socket, Type};
use weft_agent::bpf::{Flow, Reason};

#[test]
fn what_arrives_goes_to_the_agent() {
    let meshed = Meshed::new();
    let app = meshed.world.listen("[::]:8080");
    for pod in [POD_V4, POD_V6] {
        for (port, listener) in [
            (8080, &meshed.listeners.plaintext),
            (9, &meshed.listeners.plaintext),
            (15008, &meshed.listeners.tunnel),
        ] {
            let to = SocketAddr::new(ip_address(pod), port);
            let mut client = TcpStream::connect(to).unwrap();
            let (mut accepted, peer) = accept(listener);
            let local = accepted.local_addr().unwrap();
            assert_eq!((local.ip().to_canonical(), local.port()), (to.ip(), port));
            assert_eq!(peer.port(), client.local_addr().unwrap().port());
            assert_eq!(meshed.bpf.flow(accepted.as_fd()).unwrap(), None);
            talk(&mut client, &mut accepted);
        }
    }
    assert!(is_idle(&app) && is_idle(&meshed.listeners.outbound));

    // A redirected connect that nobody published, an agent's delivery that nobody published.
    for (from, to, reason) in [
        ("10.88.0.2:0", "127.77.0.1:4", Reason::UnpublishedTarget),
        ("127.0.0.9:0", "10.88.0.2:8080", Reason::UnpublishedLoopback),
    ] {
        let socket = meshed.world.socket(Domain::IPV4, Protocol::TCP);
        socket.bind(&address(from).into()).unwrap();
        meshed.bpf.mark_outbound(socket.as_fd()).unwrap();
        let refused = socket.connect(&address(to).into()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{to}");
        assert_eq!(count(&meshed.bpf, reason), 1, "{reason:?}");
    }
}

/// From outside with the pod's own address as source: for IPv6 the kernel has no check of its own.
#[test]
fn a_forged_self_connection_is_not_believed() {
    let Meshed {
        listeners,
        bpf,
        world,
        instance,
    } = Meshed::new();
    let _app = world.listen("[::]:8080");
    // Without the listener, what is steered to it is counted. The application would not see a lone
    // SYN, so only the count tells.
    drop(listeners);
    let raw = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::from(IPPROTO_RAW))).unwrap();
    let pod: Ipv6Addr = POD_V6.parse().unwrap();
    let packet = syn(pod, 8080, pod, 8080);
    raw.send_to(&packet, &SocketAddr::from((pod, 0)).into())
        .unwrap();
    eventually("steered packet", || {
        (count(&bpf, Reason::NoListener) > 0).then_some(())
    });
    drop(instance);
}

#[test]
fn the_application_sees_the_real_client() {
    let meshed = Meshed::new();
    let app = meshed.world.listen("[::]:8080");
    let app_v4 = meshed.world.listen("10.88.0.2:8081");
    let table = [
        (
            "127.0.0.2:0",
            "10.88.0.2:8080",
            "198.51.100.7:40000",
            "[::ffff:198.51.100.7]:40000",
            &app,
        ),
        (
            "127.200.3.4:0",
            "10.88.0.2:8081",
            "198.51.100.7:40001",
            "198.51.100.7:40001",
            &app_v4,
        ),
        (
            "[::1]:0",
            "[fd88::2]:8080",
            "[2001:db8::7]:40002",
            "[2001:db8::7]:40002",
            &app,
        ),
    ];
    for (from, to, client, seen, app) in table {
        let socket = meshed
            .world
            .socket(Domain::for_address(address(to)), Protocol::TCP);
        socket.bind(&address(from).into()).unwrap();
        meshed
            .bpf
            .mark_deliver(socket.as_fd(), address(client))
            .unwrap();
        let mut agent = connect(socket, address(to));
        let (mut accepted, peer) = accept(app);
        assert_eq!(peer, address(seen), "accept");
        assert_eq!(accepted.peer_addr().unwrap(), address(seen), "getpeername");
        let own = address(to);
        let local = accepted.local_addr().unwrap();
        assert_eq!(
            (local.ip().to_canonical(), local.port()),
            (own.ip(), own.port())
        );
        assert_eq!(
            meshed.bpf.flow(accepted.as_fd()).unwrap(),
            Some(Flow::Delivered {
                client: address(client)
            })
        );
        assert_eq!(
            agent.peer_addr().unwrap(),
            address(to),
            "the agent sees where it is connected"
        );
        talk(&mut agent, &mut accepted);
    }
    assert_refusals(&meshed, &[]);
}

#[test]
fn probes_of_the_kubelet_pass() {
    let meshed = Meshed::with(|config| config.kubelet_cgroup = Some(config.cgroup.clone()));
    let app = meshed.world.listen("[::]:8080");
    let _unprobed = meshed.world.listen("[::]:8081");
    let mut entry = meshed.world.entry();
    entry.probe_ports = vec![8080, 9999];
    meshed.bpf.update(&entry).unwrap();
    for pod in [POD_V4, POD_V6] {
        let pod = ip_address(pod);
        let client = TcpStream::connect((pod, 8080)).unwrap();
        let (_, peer) = accept(&app);
        let own = client.local_addr().unwrap();
        assert_eq!(
            (peer.ip().to_canonical(), peer.port()),
            (own.ip(), own.port())
        );
        // A dead application is seen to be dead.
        let refused = TcpStream::connect((pod, 9999)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        // Another port is nobody's exemption.
        let _client = TcpStream::connect((pod, 8081)).unwrap();
        accept(&meshed.listeners.plaintext);
    }
    let counters = meshed
        .bpf
        .pod_counters(meshed.world.cookie)
        .unwrap()
        .unwrap();
    assert_eq!(counters.pending_inbound, 0);
    entry.probe_ports.clear();
    meshed.bpf.update(&entry).unwrap();
    let _client = TcpStream::connect((POD_V6, 8080)).unwrap();
    accept(&meshed.listeners.plaintext);
    assert!(is_idle(&app));
    assert_eq!(
        HOST_V6.parse::<std::net::IpAddr>().unwrap(),
        _client.local_addr().unwrap().ip()
    );
}

/// An IPv6 packet with a SYN.
fn syn(from: Ipv6Addr, from_port: u16, to: Ipv6Addr, to_port: u16) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from_port.to_be_bytes());
    tcp.extend(to_port.to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let length = u16::try_from(tcp.len()).unwrap();
    let mut sum = u32::from(length) + IPPROTO_TCP;
    for bytes in [&from.octets()[..], &to.octets()[..], &tcp[..]] {
        sum += bytes
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum::<u32>();
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let checksum = !u16::try_from(sum).unwrap();
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([IPPROTO_TCP as u8, 64]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(tcp);
    packet
}

const IPPROTO_RAW: i32 = 255;
const IPPROTO_TCP: u32 = 6;
