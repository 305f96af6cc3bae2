//! Addresses that are not the attacker's.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use weft_tests::Pod;
use weft_tests::capture::Capture;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Server};

use crate::stage::{GUARDED, OPEN, SECRET, Stage, expect_all, expect_nothing};

/// Binds a socket to the friend's address, which `IP_TRANSPARENT` allows to who has `NET_ADMIN`, and
/// connects to the target. It must count as the attacker all the same: refused where only the friend may,
/// and seen with the attacker's own address and identity where everybody may.
pub(crate) fn transparent(stage: &Stage) -> Result<()> {
    for attacker in stage.attackers() {
        for family in 0..2 {
            let friend = stage.friend.addresses()[family].to_string();
            let bind = ["--timeout-ms", "1000", "--transparent", "--bind", &friend];
            let with = |text: &'static str| [&bind[..], &["--send", text, "--half-close"]].concat();
            let said = testapp::connect(attacker, stage.guarded()[family], &with("as the friend"))?;
            expect_nothing("with the friend's address", &said)?;
            let before = stage.seen_at_open()?.len();
            let said = testapp::connect(attacker, stage.open()[family], &with("it's me"))?;
            // It comes about where the kernel lets such a socket connect at all; then as who it is.
            let seen = stage.seen_at_open()?.split_off(before);
            if said.outcome == "ok" {
                expect_all("to the open port", &said, "it's me")?;
                ensure!(!seen.is_empty(), "somebody else answered: {said:?}");
            }
            for visitor in seen {
                ensure!(
                    visitor.accepted.ip() == attacker.addresses()[family],
                    "the target saw {visitor:?}"
                );
            }
        }
        // The control: the same socket without the lie.
        let own = attacker.v4().to_string();
        let args = [
            "--transparent",
            "--bind",
            &own,
            "--send",
            "honest",
            "--half-close",
        ];
        expect_all(
            "bound to its own",
            &testapp::connect(attacker, stage.open()[0], &args)?,
            "honest",
        )?;
    }
    Ok(())
}

/// Sends SYNs from a raw socket that claim to come from the friend, from the target itself, from its
/// node, and from an address of nobody, to the application's port, to the guarded one and to 15008. No
/// application may see a connection because of them, and the target must go on.
pub(crate) fn forged_packets(stage: &Stage) -> Result<()> {
    let before = stage.seen_at_open()?.len();
    for attacker in [&stage.near, &stage.far, &stage.outside] {
        for family in 0..2 {
            let target = stage.target.addresses()[family];
            let node = stage.cluster.node(1);
            let node = [node.v4().into(), node.v6().into()][family];
            let nobody = ["198.51.100.7".parse()?, "2001:db8::7".parse()?][family];
            let claimed = [stage.friend.addresses()[family], target, node, nobody];
            for source in claimed {
                for port in [GUARDED, OPEN, 15008, 1] {
                    let target = SocketAddr::new(target, port);
                    for source_port in [port, 40_000] {
                        syn(attacker, SocketAddr::new(source, source_port), target)?;
                    }
                }
            }
        }
    }
    let seen = stage.seen_at_open()?.len();
    ensure!(seen == before, "{} connections came of it", seen - before);
    // The control: packets of this socket do arrive.
    let capture = Capture::start(stage.target.netns(), "eth0", stage.cluster.dir())?;
    let own = SocketAddr::new(stage.outside.v4().into(), 40_001);
    syn(&stage.outside, own, stage.open()[0])?;
    expect_echo(&stage.friend, stage.open()[0], "meanwhile")?;
    let captured = capture.finish()?;
    ensure!(
        captured.tcp_packets().any(|packet| packet.source == own),
        "no packet arrived"
    );
    Ok(())
}

/// Routes the loopback's network to the target's interface, and sends packets there for 127.0.0.1, and
/// from 127.0.0.1 to the target's address: what only listens on the loopback must stay out of reach,
/// and nothing from outside may look like the agent's own deliveries.
pub(crate) fn loopback(stage: &Stage) -> Result<()> {
    let port = 7017;
    let private = Server::start_on(
        &stage.target,
        &[format!("127.0.0.1:{port}"), format!("[::1]:{port}")],
        "echo",
        &[],
    )?;
    let attacker = stage.another("router", 1)?;
    let netns = attacker.netns();
    netns.sysctl("ipv4/conf/all/route_localnet", "1")?;
    let via = stage.target.v4().to_string();
    netns.ip(&[
        "route",
        "del",
        "local",
        "127.0.0.0/8",
        "dev",
        "lo",
        "table",
        "local",
    ])?;
    netns.ip(&["route", "add", "127.0.0.0/8", "via", &via])?;
    for (source, target) in [
        (attacker.v4().to_string(), format!("127.0.0.1:{port}")),
        ("127.0.0.1".to_owned(), format!("127.0.0.1:{port}")),
        ("127.0.0.1".to_owned(), format!("{via}:{}", GUARDED)),
        ("127.9.9.9".to_owned(), format!("{via}:{}", GUARDED)),
        // As a redirected connection, and as a delivery, would look.
        (via.clone(), "127.1.2.3:4".to_owned()),
        ("127.200.1.1".to_owned(), format!("{via}:{}", OPEN)),
    ] {
        syn(
            &attacker,
            format!("{source}:40002").parse()?,
            target.parse()?,
        )?;
    }
    let v6 = stage.target.v6();
    for (source, target) in [
        ("[::1]:40002".to_owned(), format!("[{v6}]:{}", GUARDED)),
        (
            "[::ffff:127.0.0.1]:40002".to_owned(),
            format!("[{v6}]:{}", GUARDED),
        ),
    ] {
        syn(&attacker, source.parse()?, target.parse()?)?;
    }
    ensure!(private.accepted()?.is_empty(), "the loopback was reached");
    // The control: inside the target it is there.
    expect_echo(&stage.target, format!("127.0.0.1:{port}").parse()?, "home")?;
    ensure!(private.wait_accepted(1)?.len() == 1);
    stage.cluster.remove_pod(attacker)
}

/// Takes the target's addresses for its own, serves its ports, and has the network believe it: what goes to
/// the target comes to the attacker, who is meshed itself. Whoever connects to the target must reach the target or
/// nobody, for an address proves nothing; and what the friend says must not be readable.
pub(crate) fn taken_address(stage: &Stage) -> Result<()> {
    let attacker = stage.another("thief", 1)?;
    let fake = Server::start(&attacker, GUARDED, "echo", &[])?;
    let stolen = stage.target.addresses().map(|address| match address {
        IpAddr::V4(_) => (address.to_string(), format!("{address}/24")),
        IpAddr::V6(_) => (address.to_string(), format!("{address}/64")),
    });
    let capture = Capture::start(attacker.netns(), "eth0", stage.cluster.dir())?;
    stage.watched(|| {
        let router = stage.cluster.node(1).netns();
        let link = link_address(&attacker)?;
        for (address, with_prefix) in &stolen {
            // Last, so that it is no preferred source: its own connections are its own.
            let add = ["addr", "add", with_prefix, "dev", "eth0"];
            attacker
                .netns()
                .ip(&[&add[..], &["preferred_lft", "0"]].concat())?;
            // As announcements of the address would have it, if they were faster.
            router.ip(&["neigh", "replace", address, "lladdr", &link, "dev", "br0"])?;
        }
        for target in stage.guarded() {
            let args = ["--send", SECRET, "--half-close", "--timeout-ms", "1500"];
            stage.expect_visits(1);
            let said = testapp::connect(&stage.friend, target, &args)?;
            ensure!(said.outcome != "ok" || said.text == SECRET, "{said:?}");
            // In plaintext, from a pod that is not meshed.
            let said = testapp::connect(
                &stage.outside,
                target,
                &["--send", "x", "--timeout-ms", "1500"],
            )?;
            expect_nothing("an unmeshed client", &said)?;
        }
        let seen = fake.accepted()?;
        ensure!(seen.is_empty(), "the attacker got {seen:?}");
        for (address, with_prefix) in &stolen {
            attacker
                .netns()
                .ip(&["addr", "del", with_prefix, "dev", "eth0"])?;
            router.ip(&["neigh", "del", address, "dev", "br0"])?;
        }
        eventually("the target to be there again", || {
            stage.expect_visits(1);
            expect_echo(&stage.friend, stage.guarded()[0], SECRET).map(drop)
        })
    })?;
    // The controls: packets for the target did come to the attacker, and its application does serve.
    let captured = capture.finish()?;
    let stolen = stage.target.addresses();
    ensure!(
        captured
            .tcp_packets()
            .any(|it| stolen.contains(&it.destination.ip())),
        "nothing was stolen"
    );
    captured.ensure_without(SECRET)?;
    expect_echo(&stage.friend, attacker.sockets(GUARDED)[0], "hello thief")?;
    stage.cluster.remove_pod(attacker)
}

/// The link-layer address of a pod's interface.
fn link_address(pod: &Pod) -> Result<String> {
    let shown = pod.netns().ip(&["-j", "link", "show", "eth0"])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let address = shown[0]["address"].as_str();
    Ok(address.context("no link address")?.to_owned())
}

fn syn(from: &Pod, source: SocketAddr, destination: SocketAddr) -> Result<()> {
    // What the attacker's own kernel refuses to send has harmed nobody.
    testapp::command(from)?
        .args(["syn", "--source", &source.to_string()])
        .args(["--destination", &destination.to_string()])
        .output(weft_tests::DEADLINE)
        .map(drop)
}
