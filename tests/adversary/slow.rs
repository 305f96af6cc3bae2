//! Connections that are opened and never get anywhere, on each listener there is. Each must go on serving
//! others meanwhile, and end them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use weft_tests::command::{Process, Program, listening};
use weft_tests::scenario::expect_echo;
use weft_tests::testapp;
use weft_tests::{DEADLINE, http};

use crate::peer;
use crate::stage::{NEWCOMER, Stage};

/// Opens connections to port 15008 and says nothing, more than may be unfinished. New tunnels of others come
/// about meanwhile, and the limit of a handshake ends each.
pub(crate) fn tunnel_silent(stage: &Stage) -> Result<()> {
    tunnels(stage, "", &[])
}

/// Begins a handshake, and sends it on a byte at a time: the limit is of the handshake, not of a pause.
pub(crate) fn tunnel_hello(stage: &Stage) -> Result<()> {
    // A record of a handshake, of 512 bytes; a client hello of 508.
    tunnels(
        stage,
        "1603010200010001fc0303",
        &["--then", "00", "--pause-ms", "200"],
    )
}

/// Finishes the handshake, with a certificate of its own, and then says nothing, or starts a frame and does
/// not finish it. Such a connection costs its owner as much as the agent; others are served, and it ends
/// soon, since it has had no flow.
pub(crate) fn tunnel_after(stage: &Stage) -> Result<()> {
    let mut held = Vec::new();
    for number in 0..40 {
        let mut tunnel = peer::tunnel(stage)?;
        if number % 2 == 0 {
            tunnel.send(&[1, 0])?;
        }
        held.push(tunnel);
    }
    fresh_client(stage, "while-others-say-nothing")?;
    let start = Instant::now();
    for tunnel in &mut held {
        tunnel.ended()?;
    }
    let borne = start.elapsed();
    ensure!(borne < Duration::from_secs(15), "borne for {borne:?}");
    Ok(())
}

/// Connects to the agent's listeners from inside the pod, where they can be seen: it is refused at once.
pub(crate) fn in_pod(stage: &Stage) -> Result<()> {
    let sleeper = stage.near.command("sleep")?.arg("60").spawn()?;
    let ports = listening(sleeper.pid());
    ensure!(ports.len() >= 3, "{ports:?}");
    for listener in ports {
        let target = format!("127.0.0.1:{}", listener.port());
        let program = testapp::command(&stage.near)?;
        let borne = trickle(program, &target, &["--count", "50", "--most-ms", "8000"])?.finish()?;
        ensure!(
            borne.ended == borne.open,
            "{target} bears connections: {borne:?}"
        );
    }
    expect_echo(&stage.near, stage.open()[0], "and goes on").map(drop)
}

/// Holds connections to the agent's admin port, silent, and with a header that never ends.
pub(crate) fn agent_admin(stage: &Stage) -> Result<()> {
    let node = stage.cluster.node(1);
    let program = || node.host_command(&testapp::path()?.display().to_string());
    let target = node.admin_address().to_string();
    let get = hex(b"GET /metrics HTTP/1.1\r\nx: ");
    let silent = trickle(program()?, &target, &["--count", "60"])?;
    let slow = trickle(
        program()?,
        &target,
        &["--count", "60", "--start", &get, "--then", "61"],
    )?;
    ensure!(node.ready()?.0 == 200, "not answered meanwhile");
    for borne in [silent.finish()?, slow.finish()?] {
        ensure!(borne.ended == borne.open, "{borne:?}");
        ensure!(borne.longest_ms < 35_000, "{borne:?}");
    }
    // A pod cannot get there: it is the node's loopback.
    let said = testapp::say(
        &stage.near,
        node.admin_address(),
        "GET /metrics HTTP/1.1\r\n\r\n",
    )?;
    ensure!(said.received == 0, "{said:?}");
    Ok(())
}

/// Holds connections to the controller's port, silent, and in the middle of a hello. Agents get through, and
/// those are ended.
pub(crate) fn controller(stage: &Stage) -> Result<()> {
    let controller = stage.cluster.controller()?;
    let target = controller.address().to_string();
    // From a node, as what is meshed gets through to a stranger's port the same way.
    let program = || {
        stage
            .cluster
            .node(0)
            .host_command(&testapp::path()?.display().to_string())
    };
    let silent = trickle(program()?, &target, &["--count", "150"])?;
    let hello = [
        "--count",
        "150",
        "--start",
        "1603010200010001fc0303",
        "--then",
        "00",
    ];
    let slow = trickle(program()?, &target, &hello)?;
    // A pod whose identity is new needs the controller, twice: for its record and for its certificate.
    fresh_client(stage, "new-while-the-controller-is-besieged")?;
    for borne in [silent.finish()?, slow.finish()?] {
        ensure!(borne.ended == borne.open, "{borne:?}");
        ensure!(borne.longest_ms < 15_000, "{borne:?}");
    }
    Ok(())
}

/// The same for the controller's admin port.
pub(crate) fn controller_admin(stage: &Stage) -> Result<()> {
    let controller = stage.cluster.controller()?;
    let program = || -> Result<Program> {
        Program::new(
            testapp::path()?,
            Some(controller.netns()),
            None,
            stage.cluster.dir(),
        )
    };
    let target = controller.admin_address().to_string();
    let get = hex(b"GET /metrics HTTP/1.1\r\nx: ");
    let silent = trickle(program()?, &target, &["--count", "20"])?;
    let slow = trickle(
        program()?,
        &target,
        &["--count", "20", "--start", &get, "--then", "61"],
    )?;
    let reply = http::get(controller.netns(), controller.admin_address(), "/ready")?;
    ensure!(reply.status == 200, "{}", reply.body);
    for borne in [silent.finish()?, slow.finish()?] {
        ensure!(borne.ended == borne.open, "{borne:?}");
    }
    Ok(())
}

/// Strangers hold connections to the target's tunnel listener, and a client that has no tunnel yet comes.
fn tunnels(stage: &Stage, start: &str, more: &[&str]) -> Result<()> {
    let target = stage.target.sockets(15008)[0].to_string();
    let program = testapp::command(&stage.outside)?;
    let args = [&["--count", "400", "--start", start][..], more].concat();
    let trickle = trickle(program, &target, &args)?;
    fresh_client(stage, "while-strangers-say-nothing")?;
    let borne = trickle.finish()?;
    ensure!(borne.ended == borne.open && borne.open > 0, "{borne:?}");
    ensure!(borne.longest_ms < 9_000, "borne for too long: {borne:?}");
    Ok(())
}

/// What the agents of [`many_addresses`] are told: strangers get a quarter, an address or a /64 two.
pub(crate) const HANDSHAKES: u64 = 64;

/// Strangers with a hundred addresses, and as many of a /64 as they like, say nothing to each of eight pods of the
/// node: by their shares of the pods alone they would have all handshakes of the node. Workloads' tunnels come
/// about meanwhile, to each of the pods.
pub(crate) fn many_addresses(stage: &Stage) -> Result<()> {
    let further = (0..6).map(|number| stage.another(&format!("besieged-{number}"), 1));
    let further = further.collect::<Result<Vec<_>>>()?;
    let pods = || [&stage.target, &stage.near].into_iter().chain(&further);
    let netns = stage.outside.netns();
    let v4: Vec<String> = (100..200).map(|host| format!("10.244.0.{host}")).collect();
    let v6: Vec<String> = (0..100)
        .map(|host| format!("fd00:10:244::5:{host:x}"))
        .collect();
    for address in &v4 {
        netns.ip(&["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
    }
    for address in &v6 {
        let address = format!("{address}/64");
        netns.ip(&["addr", "add", &address, "dev", "eth0", "nodad"])?;
    }
    let mut silent = Vec::new();
    for pod in pods() {
        for (target, from) in pod.sockets(15008).into_iter().zip([&v4, &v6]) {
            let args = ["--count", "100", "--from", &from.join(",")];
            let program = testapp::command(&stage.outside)?;
            silent.push(trickle(program, &target.to_string(), &args)?);
        }
    }
    fresh_client(stage, "new-while-strangers-are-everywhere")?;
    for pod in &further {
        let said = testapp::say(&stage.far, pod.sockets(80)[0], "anybody?")?;
        // Nobody serves there, and that is found out by a tunnel.
        ensure!(
            said.outcome == "refused" || said.outcome == "reset",
            "{said:?}"
        );
    }
    let metrics = stage.cluster.node(1).metrics()?;
    for pod in pods() {
        let turned_away = [("reason", "too_many_handshakes"), ("pod", pod.name())];
        let turned_away = metrics.sum("weft_refused_total", &turned_away);
        ensure!(turned_away > 100.0, "{} refused {turned_away}", pod.name());
    }
    for trickle in silent {
        let borne = trickle.finish()?;
        ensure!(borne.ended == borne.open, "{borne:?}");
        ensure!(borne.longest_ms < 9_000, "borne for too long: {borne:?}");
    }
    for address in v4
        .iter()
        .map(|it| format!("{it}/24"))
        .chain(v6.iter().map(|it| format!("{it}/64")))
    {
        netns.ip(&["addr", "del", &address, "dev", "eth0"])?;
    }
    further
        .into_iter()
        .try_for_each(|pod| stage.cluster.remove_pod(pod))
}

/// A client without a tunnel or a certificate so far gets through to the target.
fn fresh_client(stage: &Stage, name: &str) -> Result<()> {
    let spec = weft_tests::PodSpec::new(name)
        .service_account(NEWCOMER)
        .on(0);
    let client = stage.cluster.add_pod(spec)?;
    let start = Instant::now();
    for target in stage.open() {
        let said = testapp::say(&client, target, name)?;
        ensure!(said.text == name, "a new client is not served: {said:?}");
    }
    ensure!(
        start.elapsed() < Duration::from_secs(5),
        "it took {:?}",
        start.elapsed()
    );
    stage.visit()?;
    stage.cluster.remove_pod(client)
}

/// What a slow client says at its end.
#[derive(Debug, Deserialize)]
struct Borne {
    open: u64,
    ended: u64,
    longest_ms: u64,
}

struct Trickle(Process);

fn trickle(program: Program, target: &str, args: &[&str]) -> Result<Trickle> {
    let mut process = program
        .args(["attack", "trickle", target])
        .args(args)
        .spawn()?;
    process.wait_for_line("\"open\"", DEADLINE)?;
    Ok(Trickle(process))
}

impl Trickle {
    /// Waits until all were ended, or too much time has passed.
    fn finish(mut self) -> Result<Borne> {
        self.0.wait(Duration::from_secs(60))?;
        let out = self.0.stdout();
        let line = out
            .lines()
            .rfind(|line| line.contains("\"end\""))
            .context("no end")?;
        Ok(serde_json::from_str(line)?)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
