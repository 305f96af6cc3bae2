//! Namespaces and control groups of the attacker's own making.

use anyhow::{Context, Result, ensure};
use weft_tests::Pod;
use weft_tests::capture::Capture;
use weft_tests::cgroup::Cgroup;
use weft_tests::command::Program;
use weft_tests::testapp::{self, Connected, Server};

use crate::stage::{Stage, connected, expect_all, expect_nothing};

/// Makes a network namespace below the pod's, moves the pod's interface there, and connects from a socket
/// that no program of Weft looks at. It gets out, in plaintext: that is not prevented. But it comes without
/// an identity: refused where one is asked for, and seen as nobody where none is.
pub(crate) fn nested(stage: &Stage) -> Result<()> {
    for node in 0..2 {
        let attacker = stage.another("nester", node)?;
        let own = attacker.v4().to_string();
        escape(stage, &attacker, &own, &[])?;
        stage.cluster.remove_pod(attacker)?;
    }
    Ok(())
}

/// The same with the address of the friend, or of a neighbour that may do more: the address is believed
/// as an address, where a policy asks for no more than that, and never as an identity.
pub(crate) fn nested_as_friend(stage: &Stage) -> Result<()> {
    // A friend by its account, who lives next door to the target.
    let friend = stage.cluster.add_pod(
        weft_tests::PodSpec::new("friend-next-door")
            .service_account("friend")
            .on(1),
    )?;
    let attacker = stage.another("impostor", 1)?;
    let before = stage.seen_at_open()?.len();
    let address = friend.v4().to_string();
    let seen = inside(&attacker, &address, &stage.target, &[])?;
    expect_nothing("as the friend, where only the friend may", &seen[0])?;
    // Whether the answers find their way is the network's affair: if they do, it is as nobody.
    for visitor in stage.seen_at_open()?.split_off(before) {
        ensure!(visitor.accepted.ip() == friend.v4(), "{visitor:?}");
    }
    stage.target.netns().ip(&["neigh", "flush", "all"])?;
    stage.cluster.remove_pod(attacker)?;
    stage.cluster.remove_pod(friend)
}

/// Makes a user namespace with a network namespace in it, as a pod without any rights can: there is no way
/// out of it. With the right to move the pod's interface there, it is as in [`nested`].
pub(crate) fn user(stage: &Stage) -> Result<()> {
    let attacker = stage.another("usurper", 1)?;
    let own = attacker.v4().to_string();
    let shut_in = inside(
        &attacker,
        &own,
        &stage.target,
        &["--user", "--without-interface"],
    )?;
    for said in &shut_in {
        expect_nothing("from a namespace without a way out", said)?;
    }
    escape(stage, &attacker, &own, &["--user"])?;
    stage.cluster.remove_pod(attacker)
}

/// Makes control groups below the pod's and goes into them, three deep: hooks of a group are those of all
/// groups below it. Its connections must be the pod's, as before, and leave through a tunnel.
pub(crate) fn cgroups(stage: &Stage) -> Result<()> {
    for attacker in stage.attackers() {
        let mut group: Cgroup = attacker.cgroup().clone();
        for name in ["a", "b", "c"] {
            group = group.child(name)?;
            let path = testapp::path()?;
            let program = |target: std::net::SocketAddr, text: &str| -> Result<Connected> {
                let program =
                    Program::new(&path, Some(attacker.netns()), Some(&group), attacker.dir())?;
                testapp::connect_with(program, target, &["--send", text, "--half-close"])
            };
            for family in 0..2 {
                expect_nothing(
                    "the guarded port",
                    &program(stage.guarded()[family], "from below")?,
                )?;
                let before = let_in(stage)?;
                expect_all(
                    "the open port",
                    &program(stage.open()[family], "from below")?,
                    "from below",
                )?;
                ensure!(let_in(stage)? > before, "it was not meshed any more");
            }
        }
    }
    Ok(())
}

/// Breaks its own network under the hooks: takes the loopback down, the loopback's routes away, leaves one local
/// port, sends what is for the stand-ins elsewhere. Its connections fail, and nobody else notices. Only
/// an accomplice can have them: see [`accomplice`].
pub(crate) fn sabotage(stage: &Stage) -> Result<()> {
    let text = "out-by-the-back-door";
    for node in 0..2 {
        let attacker = stage.another("saboteur", node)?;
        let netns = attacker.netns();
        let capture = Capture::start(netns, "eth0", stage.cluster.dir())?;
        let [a, b, c, _] = attacker.v4().octets();
        let gateway = format!("{a}.{b}.{c}.1");
        let attempts = |what: &str| -> Result<()> {
            for family in 0..2 {
                let args = ["--send", text, "--half-close", "--timeout-ms", "300"];
                let said = testapp::connect(&attacker, stage.guarded()[family], &args)?;
                expect_nothing(what, &said)?;
                testapp::connect(&attacker, stage.open()[family], &args)?;
            }
            Ok(())
        };
        netns.sysctl("ipv4/ip_local_port_range", "40000 40001")?;
        attempts("with two local ports")?;
        netns.sysctl("ipv4/ip_local_port_range", "32768 60999")?;
        loopback_to(&attacker, Some(&gateway))?;
        attempts("with the loopback's network elsewhere")?;
        loopback_to(&attacker, None)?;
        netns.ip(&["link", "set", "lo", "down"])?;
        attempts("without a loopback")?;
        netns.ip(&["link", "set", "lo", "up"])?;
        // The control: with what it needs, it is as everybody.
        let args = ["--send", text, "--half-close"];
        weft_tests::scenario::eventually("the network to be whole again", || {
            expect_all(
                "as before",
                &testapp::connect(&attacker, stage.open()[0], &args)?,
                text,
            )
        })?;
        capture.finish()?.ensure_without(text)?;
        stage.cluster.remove_pod(attacker)?;
    }
    Ok(())
}

/// The same with somebody who answers where the stand-ins are sent to: a way out in plaintext, like a nested
/// namespace, which is not prevented. It leads to the accomplice and nobody else: to the target it comes as
/// nobody, whatever stand-in it says.
pub(crate) fn accomplice(stage: &Stage) -> Result<()> {
    let text = "to-an-accomplice";
    let attacker = stage.another("saboteur", 0)?;
    // Any address of the loopback is a stand-in, at port 4.
    let _fence = Server::start_on(&stage.outside, &["0.0.0.0:4".to_owned()], "echo", &[])?;
    let local_networks = "ipv4/conf/all/route_localnet";
    for netns in [stage.outside.netns(), stage.target.netns()] {
        netns.sysctl(local_networks, "1")?;
    }
    let args = ["--send", text, "--half-close", "--timeout-ms", "1000"];
    loopback_to(&attacker, Some(&stage.outside.v4().to_string()))?;
    let said = testapp::connect(&attacker, stage.guarded()[0], &args)?;
    expect_all("the accomplice", &said, text)?;
    stage.cluster.remove_pod(attacker)?;
    // The target itself in the accomplice's place, on one network with the attacker.
    let attacker = stage.another("saboteur-next-door", 1)?;
    loopback_to(&attacker, Some(&stage.target.v4().to_string()))?;
    for target in [stage.guarded()[0], stage.open()[0]] {
        let said = testapp::connect(&attacker, target, &args)?;
        expect_nothing("by the target's own loopback", &said)?;
    }
    for netns in [stage.outside.netns(), stage.target.netns()] {
        netns.sysctl(local_networks, "0")?;
    }
    stage.cluster.remove_pod(attacker)
}

/// Sends what is for the loopback's network to somebody else, or to the loopback again.
pub(crate) fn loopback_to(pod: &Pod, via: Option<&str>) -> Result<()> {
    let netns = pod.netns();
    let own = ["local", "127.0.0.0/8", "dev", "lo", "table", "local"];
    let Some(via) = via else {
        netns.ip(&["route", "del", "127.0.0.0/8"])?;
        return netns.ip(&[&["route", "add"][..], &own].concat()).map(drop);
    };
    netns.sysctl("ipv4/conf/all/route_localnet", "1")?;
    netns.ip(&[&["route", "del"][..], &own].concat())?;
    netns
        .ip(&["route", "add", "127.0.0.0/8", "via", via])
        .map(drop)
}

/// How often the attackers' identity was let in to the target.
pub(crate) fn let_in(stage: &Stage) -> Result<f64> {
    let id = stage.near.identity();
    let labels = [("pod", "target"), ("client_id", &id), ("tls", "true")];
    let metrics = stage.cluster.node(1).metrics()?;
    Ok(metrics.sum("inbound_tcp_authz_allow_total", &labels))
}

/// From a nested namespace: refused at the guarded port, let in at the open one, without an identity.
fn escape(stage: &Stage, attacker: &Pod, address: &str, more: &[&str]) -> Result<()> {
    let nobody = [("pod", "target"), ("tls", "no_identity")];
    let allowed = |stage: &Stage| -> Result<f64> {
        let metrics = stage.cluster.node(1).metrics()?;
        Ok(metrics.sum("inbound_tcp_authz_allow_total", &nobody))
    };
    let before = allowed(stage)?;
    let said = inside(attacker, address, &stage.target, more)?;
    expect_nothing("past the hooks, where only the friend may", &said[0])?;
    expect_all("past the hooks, where everybody may", &said[1], "nested")?;
    ensure!(allowed(stage)? == before + 1.0, "it came as somebody");
    Ok(())
}

/// Connects to the guarded and the open port from inside a nested namespace.
fn inside(attacker: &Pod, address: &str, target: &Pod, more: &[&str]) -> Result<Vec<Connected>> {
    let [a, b, c, _] = attacker.v4().octets();
    let ports = [crate::stage::GUARDED, crate::stage::OPEN];
    let out = testapp::command(attacker)?
        .args(["attack", "nested"])
        .args(ports.map(|port| format!("{}:{port}", target.v4())))
        .args(["--address", &format!("{address}/24")])
        .args(["--gateway", &format!("{a}.{b}.{c}.1")])
        .args(more)
        .run()?;
    let said: Result<Vec<Connected>> = out.lines().map(connected).collect();
    let said = said?;
    ensure!(said.len() == ports.len(), "{out}");
    said.first().context("nothing was tried")?;
    Ok(said)
}
