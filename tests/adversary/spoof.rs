//! Addresses that are not the attacker's.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use weft_tests::Pod;
use weft_tests::scenario::{expect_echo, expect_refusal};
use weft_tests::testapp;

use crate::stage::{SECRET, Stage, expect_all, expect_nothing};

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
                for port in [crate::stage::GUARDED, crate::stage::OPEN, 15008, 1] {
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
    // The control: packets of this socket arrive. A SYN in the attacker's own name is answered by the
    // agent's side of the target, which counts the connection that is never finished as none, so what is
    // looked at is the wire.
    let capture =
        weft_tests::capture::Capture::start(stage.target.netns(), "eth0", stage.cluster.dir())?;
    let own = SocketAddr::new(stage.outside.v4().into(), 40_001);
    syn(&stage.outside, own, stage.open()[0])?;
    let arrived = weft_tests::scenario::eventually("the answer to a SYN", || {
        syn(&stage.outside, own, stage.open()[0])
    });
    arrived?;
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
    let private = testapp::Server::start_on(
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
        (
            "127.0.0.1".to_owned(),
            format!("{via}:{}", crate::stage::GUARDED),
        ),
        (
            "127.9.9.9".to_owned(),
            format!("{via}:{}", crate::stage::GUARDED),
        ),
        // As a redirected connection, and as a delivery, would look.
        (via.clone(), "127.1.2.3:4".to_owned()),
        (
            "127.200.1.1".to_owned(),
            format!("{via}:{}", crate::stage::OPEN),
        ),
    ] {
        syn(
            &attacker,
            format!("{source}:40002").parse()?,
            target.parse()?,
        )?;
    }
    let v6 = stage.target.v6();
    for (source, target) in [
        (
            "[::1]:40002".to_owned(),
            format!("[{v6}]:{}", crate::stage::GUARDED),
        ),
        (
            "[::ffff:127.0.0.1]:40002".to_owned(),
            format!("[{v6}]:{}", crate::stage::GUARDED),
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

/// Takes the target's address for its own, as neighbour on the same network, and serves its ports. Whoever
/// connects to the target must reach the target or nobody: an address proves nothing. What the friend says
/// must not reach the attacker, and must not be readable.
pub(crate) fn taken_address(stage: &Stage) -> Result<()> {
    let attacker = stage.another("thief", 1)?;
    let fake = testapp::Server::start(&attacker, crate::stage::GUARDED, "echo", &[])?;
    stage.watched(|| {
        for address in stage.target.addresses() {
            let with = if address.is_ipv4() {
                format!("{address}/24")
            } else {
                format!("{address}/64")
            };
            let mut add = vec!["addr", "add", &with, "dev", "eth0"];
            if address.is_ipv6() {
                add.push("nodad");
            }
            attacker.netns().ip(&add)?;
            announce(&attacker, &address.to_string());
        }
        // Whatever comes of these, it is not the attacker who answers; what is lost is lost to a network
        // that believes everybody, which is not the mesh's to mend.
        for _ in 0..3 {
            for target in stage.guarded() {
                let args = ["--send", SECRET, "--half-close", "--timeout-ms", "1500"];
                stage.expect_visits(1);
                let said = testapp::connect(&stage.friend, target, &args)?;
                ensure!(said.outcome != "ok" || said.text == SECRET, "{said:?}");
            }
        }
        // In plaintext, from a pod of the same node.
        let said = testapp::say(&stage.near, stage.guarded()[0], "who are you?")?;
        expect_nothing("the neighbour", &said)?;
        ensure!(
            fake.accepted()?.is_empty(),
            "the attacker got {:?}",
            fake.accepted()?
        );
        for address in stage.target.addresses() {
            let with = if address.is_ipv4() {
                format!("{address}/24")
            } else {
                format!("{address}/64")
            };
            attacker
                .netns()
                .ip(&["addr", "del", &with, "dev", "eth0"])?;
        }
        forget(stage)
    })?;
    // The control: by its own address the same application is reached.
    expect_echo(
        &stage.friend,
        attacker.sockets(crate::stage::GUARDED)[0],
        "hello thief",
    )?;
    expect_refusal(&attacker, stage.guarded()[0], "and back")?;
    stage.cluster.remove_pod(attacker)
}

fn syn(from: &Pod, source: SocketAddr, destination: SocketAddr) -> Result<()> {
    // What the attacker's own kernel refuses to send has harmed nobody.
    testapp::command(from)?
        .args(["syn", "--source", &source.to_string()])
        .args(["--destination", &destination.to_string()])
        .output(weft_tests::DEADLINE)
        .map(drop)
}

/// Tells the neighbours, as a host does that has just got an address.
fn announce(attacker: &Pod, address: &str) {
    // Where the tool is not there, the kernel's own announcements must do.
    if let Ok(program) = attacker.command("arping") {
        let _ = program.args(["-c", "2", "-A", "-I", "eth0", address]).run();
    }
}

/// Lets everybody on the target's network find out again who has which address.
fn forget(stage: &Stage) -> Result<()> {
    let netns = [stage.cluster.node(1).netns(), stage.near.netns()];
    for netns in netns {
        netns.ip(&["neigh", "flush", "all"])?;
    }
    Ok(())
}
