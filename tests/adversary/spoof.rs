//! Addresses that are not the attacker's.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use weft_tests::capture::Capture;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Server};
use weft_tests::{Pod, PodSpec};

use crate::stage::{GUARDED, SECRET, Stage, expect_all, expect_nothing};

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
/// node, and from an address of nobody. Such a SYN alone never becomes a connection, so what counts is who
/// answers it: the application's own packets have another time to live than all others of the pod. At a pod
/// that is not meshed the application answers; at the target it never may, and the agent does.
pub(crate) fn forged_packets(stage: &Stage) -> Result<()> {
    let before = stage.seen_at_open()?.len();
    let bare = stage
        .cluster
        .add_pod(PodSpec::new("bare").on(1).unmeshed())?;
    let ttl = TTL.to_string();
    let serve = |pod: &Pod| Server::start(pod, TOLD_APART, "echo", &["--ttl", &ttl]);
    let _servers = [serve(&stage.target)?, serve(&bare)?];
    for attacker in [&stage.near, &stage.far, &stage.outside] {
        let of_target = answers(stage, &stage.target, || {
            forge(stage, attacker, &stage.target)
        })?;
        ensure!(
            of_target.by_application == [0, 0],
            "the application answered {}: {of_target:?}",
            attacker.name()
        );
        // The controls: they arrived, and without Weft they would have got there.
        ensure!(
            of_target.by_others.iter().all(|it| *it > 0),
            "{of_target:?}"
        );
        let of_bare = answers(stage, &bare, || forge(stage, attacker, &bare))?;
        ensure!(
            of_bare.by_application.iter().all(|it| *it > 0),
            "{of_bare:?}"
        );
    }
    let seen = stage.seen_at_open()?.len();
    ensure!(seen == before, "{} connections came of it", seen - before);
    stage.cluster.remove_pod(bare)
}

/// To the ports of the application and of the agent, from everybody that the attacker is not.
fn forge(stage: &Stage, attacker: &Pod, target: &Pod) -> Result<()> {
    let node = stage.cluster.node(1);
    for family in 0..2 {
        let address = target.addresses()[family];
        let node = [node.v4().into(), node.v6().into()][family];
        let nobody = ["198.51.100.7".parse()?, "2001:db8::7".parse()?][family];
        for source in [stage.friend.addresses()[family], address, node, nobody] {
            for port in [TOLD_APART, GUARDED, 15008, 1] {
                for source_port in [port, 40_000] {
                    let source = SocketAddr::new(source, source_port);
                    syn(attacker, source, SocketAddr::new(address, port))?;
                }
            }
        }
    }
    Ok(())
}

/// Has the loopback's network routed to the target, and the target's kernel take that for no mistake
/// (`route_localnet`). What listens on the loopback only must stay out of reach, by packets and by whole
/// connections, and nothing from outside may look like the agent's own deliveries. At a pod that is not meshed
/// both come about.
pub(crate) fn loopback(stage: &Stage) -> Result<()> {
    let attacker = stage.another("router", 1)?;
    let bare = stage
        .cluster
        .add_pod(PodSpec::new("bare").on(1).unmeshed())?;
    let ttl = TTL.to_string();
    let serve = |pod: &Pod| -> Result<Server> {
        let listen = ["127.0.0.1:7017".to_owned(), "[::1]:7017".to_owned()];
        let any = [
            format!("0.0.0.0:{TOLD_APART}"),
            format!("[::]:{TOLD_APART}"),
        ];
        let all = [listen, any].concat();
        Server::start_on(pod, &all, "echo", &["--ttl", &ttl])
    };
    let servers = [serve(&bare)?, serve(&stage.target)?];
    let netns = attacker.netns();
    netns.sysctl("ipv4/conf/all/route_localnet", "1")?;
    netns.ip(&["addr", "del", "127.0.0.1/8", "dev", "lo"])?;
    let outcomes = [&bare, &stage.target].map(|pod| -> Result<_> {
        pod.netns().sysctl("ipv4/conf/all/route_localnet", "1")?;
        let via = pod.v4().to_string();
        netns.ip(&["route", "replace", "127.0.0.0/8", "via", &via])?;
        let answered = answers(stage, pod, || from_loopback(&attacker, pod))?;
        let said = testapp::say(&attacker, "127.0.0.1:7017".parse()?, "knock")?;
        pod.netns().sysctl("ipv4/conf/all/route_localnet", "0")?;
        Ok((answered, said))
    });
    let [of_bare, of_target] = outcomes;
    // The controls: without Weft both got there, and inside the target it is there.
    let (answered, said) = of_bare?;
    ensure!(answered.by_application[0] >= 2, "{answered:?}");
    expect_all("a pod's loopback, without a mesh", &said, "knock")?;
    let (answered, said) = of_target?;
    ensure!(answered.by_application == [0, 0], "{answered:?}");
    expect_nothing("the target's loopback", &said)?;
    let [_, private] = servers;
    ensure!(private.accepted()?.is_empty(), "the loopback was reached");
    expect_echo(&stage.target, "127.0.0.1:7017".parse()?, "home")?;
    let own = stage.target.v4().to_string();
    let args = ["--bind", &own, "--send", "home", "--half-close"];
    let said = testapp::connect(&stage.target, "127.0.0.1:7017".parse()?, &args)?;
    expect_all("bound to the pod's address", &said, "home")?;
    ensure!(private.wait_accepted(2)?.len() == 2);
    stage.cluster.remove_pod(bare)?;
    stage.cluster.remove_pod(attacker)
}

/// SYNs to a pod's loopback, and from the loopback to the pod.
fn from_loopback(attacker: &Pod, pod: &Pod) -> Result<()> {
    let (own, v4, v6) = (attacker.v4(), pod.v4(), pod.v6());
    for (source, target) in [
        (own.to_string(), "127.0.0.1:7017".to_owned()),
        ("127.0.0.1".to_owned(), "127.0.0.1:7017".to_owned()),
        (v4.to_string(), "127.0.0.1:7017".to_owned()),
        ("127.0.0.1".to_owned(), format!("{v4}:{TOLD_APART}")),
        ("127.9.9.9".to_owned(), format!("{v4}:{TOLD_APART}")),
        // As a redirected connection, and as a delivery, would look.
        (v4.to_string(), "127.1.2.3:4".to_owned()),
        ("127.1.0.1".to_owned(), format!("{v4}:{TOLD_APART}")),
        ("[::1]".to_owned(), format!("[{v6}]:{TOLD_APART}")),
        (
            "[::ffff:127.0.0.1]".to_owned(),
            format!("[{v6}]:{TOLD_APART}"),
        ),
    ] {
        syn(
            attacker,
            format!("{source}:40002").parse()?,
            target.parse()?,
        )?;
    }
    Ok(())
}

/// How many SYNs a pod answered with an acceptance, over IPv4 and IPv6.
#[derive(Debug, Default)]
struct Answers {
    by_application: [usize; 2],
    by_others: [usize; 2],
}

/// Those that leave the pod, and those that it sends to itself.
fn answers(stage: &Stage, pod: &Pod, attack: impl FnOnce() -> Result<()>) -> Result<Answers> {
    let captures = ["eth0", "lo"].map(|it| Capture::start(pod.netns(), it, stage.cluster.dir()));
    attack()?;
    let mut answers = Answers::default();
    for capture in captures {
        let captured = capture?.finish()?;
        let acceptances = captured
            .tcp_packets()
            .filter(|packet| packet.syn && packet.ack);
        for packet in acceptances {
            let by = match u32::from(packet.hops) == TTL {
                true => &mut answers.by_application,
                false => &mut answers.by_others,
            };
            by[usize::from(packet.source.is_ipv6())] += 1;
        }
    }
    Ok(answers)
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

/// A port of an application whose packets can be told from the agent's,
const TOLD_APART: u16 = 7018;
/// by this.
const TTL: u32 = 77;
