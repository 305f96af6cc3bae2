//! What `weft tap` shows, beside what really goes on.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use weft_tests::apps::curl_shop;
use weft_tests::cluster::binary;
use weft_tests::command::{Process, Program};
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::terminal::InTerminal;
use weft_tests::testapp::Server;
use weft_tests::wait::DEADLINE;
use weft_tests::webapp::{GrpcServer, HttpLoad, grpc_call};
use weft_tests::{Pod, PodSpec};

use super::{PORT, Scene};

const GRPC: u16 = 9090;
const ECHO: u16 = 7000;

/// A tap that runs.
struct Running {
    process: Process,
}

impl Running {
    /// Starts one, and waits until it watches so many pods.
    fn start(scene: &Scene, arguments: &[&str], pods: usize) -> Result<Self> {
        let mut running = Self::spawn(scene, arguments)?;
        let said = match pods {
            0 => "is there yet".to_owned(),
            pods => format!("watching {pods} pods"),
        };
        running.process.wait_for_line(&said, DEADLINE)?;
        Ok(running)
    }

    fn spawn(scene: &Scene, arguments: &[&str]) -> Result<Self> {
        let socket = scene.cluster.controller()?.admin_socket();
        let program = Program::new(binary("weft")?, None, None, scene.cluster.dir())?;
        let program = program.named("tap").arg("tap").args(arguments);
        let program = program.env("WEFT_CONTROLLER_SOCKET", socket.display().to_string());
        Ok(Self {
            process: program.spawn()?,
        })
    }

    /// Repeats something until a line with all of this is shown.
    fn shows(&self, parts: &[&str], act: impl Fn() -> Result<()>) -> Result<String> {
        let mut found = None;
        eventually(&format!("a line with {parts:?}"), || {
            act()?;
            let shown = self.process.stdout();
            let mut lines = shown.lines();
            let line = lines.find(|line| parts.iter().all(|it| line.contains(it)));
            found = Some(line.with_context(|| format!("only {shown}"))?.to_owned());
            Ok(())
        })?;
        found.context("a line")
    }

    /// Ends it by ^C. Gives what it has printed.
    fn end(mut self) -> Result<String> {
        self.process.signal(Signal::SIGINT)?;
        let status = self.process.wait(DEADLINE)?;
        ensure!(status.success(), "{status}: {}", self.process.stderr());
        Ok(self.process.stdout())
    }
}

fn nobody_watches(scene: &Scene) -> Result<()> {
    for node in scene.cluster.nodes() {
        eventually("agents to sample nothing", || {
            let open = node.metrics()?.sum("weft_taps_open", &[]);
            ensure!(open == 0.0, "{open} taps are open on {}", node.name());
            Ok(())
        })?;
    }
    Ok(())
}

fn ask(scene: &Scene, from: &Pod, path: &str) -> Result<()> {
    let target = scene.web.sockets(PORT)[0];
    curl_shop(from, target, path, &[]).map(drop)
}

/// Requests are seen at both of their ends, and no further than is asked.
pub(super) fn exchanges(scene: &Scene) -> Result<()> {
    let server = Running::start(scene, &["pod/web", "-o", "wide"], 1)?;
    let client = Running::start(scene, &["pod/order", "--to", "pod/web", "-o", "json"], 1)?;
    let other = Running::start(scene, &["pod/neighbour", "--path", "/nowhere"], 1)?;
    let asked = || ask(scene, &scene.order, "/tapped?secret=1");
    let request = server.shows(&["req ", ":path=/tapped", "src_pod=order"], asked)?;
    for part in [
        "proxy=in",
        "tls=true",
        ":method=GET",
        "protocol=HTTP/1",
        &format!("src_id={}", scene.order.identity()),
        &format!("dst_id={}", scene.web.identity()),
        &format!("dst={}:{PORT}", scene.web.v4()),
    ] {
        ensure!(request.contains(part), "no {part:?} in {request}");
    }
    server.shows(&["rsp ", ":status=200", "latency="], || Ok(()))?;
    server.shows(&["end ", "response-length=", "duration="], || Ok(()))?;
    client.shows(
        &["\"begin\"", "\"direction\":\"outbound\"", "/tapped"],
        asked,
    )?;
    // On one node both ends are seen by the same agent.
    let neighbours = || ask(scene, &scene.neighbour, "/near");
    server.shows(
        &[
            "req ",
            ":path=/near",
            "src_pod=neighbour",
            "no_tls_reason=same_node",
        ],
        neighbours,
    )?;
    // Of plaintext it is not known who asks.
    let outsiders = || ask(scene, &scene.outsider, "/outside");
    server.shows(&["req ", ":path=/outside", "tls=no_identity"], outsiders)?;
    let shown = server.end()?;
    ensure!(!shown.contains("secret"), "a query is shown: {shown}");
    for line in client.end()?.lines() {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(event["node"] == scene.cluster.node(0).name(), "{event}");
        ensure!(!line.contains("secret"), "{line}");
    }
    let nothing = other.end()?;
    ensure!(nothing.is_empty(), "{nothing}");
    nobody_watches(scene)
}

/// Calls of gRPC, connections, statuses, and an archive.
pub(super) fn protocols(scene: &Scene) -> Result<()> {
    let grpc = GrpcServer::start(&scene.web, GRPC)?;
    let echo = Server::start(&scene.web, ECHO, "echo", &[])?;
    let tap = Running::start(scene, &["pod/web", "-o", "wide"], 1)?;
    let archive = Running::start(scene, &["pod/web", "-o", "har", "--status", "2xx"], 1)?;
    let target = scene.web.sockets(GRPC)[0];
    let call = || grpc_call(&scene.order, target, &[]).map(drop);
    tap.shows(
        &["req ", "protocol=gRPC", ":method=POST", "src_pod=order"],
        call,
    )?;
    tap.shows(&["end ", "protocol=gRPC", "grpc-status=OK"], call)?;
    let target = scene.web.sockets(ECHO)[0];
    let said = || expect_echo(&scene.order, target, "hello").map(drop);
    tap.shows(&["tcp ", "protocol=TCP", "src_pod=order", "tls=true"], said)?;
    tap.shows(
        &[
            "end ",
            "protocol=TCP",
            "request-length=5B",
            "response-length=5B",
        ],
        said,
    )?;
    let failed = Running::start(scene, &["pod/web", "--status", "5xx"], 1)?;
    scene.server.configure(&scene.web, 0, 503)?;
    failed.shows(&["rsp ", ":status=503"], || {
        ask(scene, &scene.order, "/fails")
    })?;
    scene.server.configure(&scene.web, 0, 200)?;
    ask(scene, &scene.order, "/works")?;
    tap.shows(&[":path=/works"], || ask(scene, &scene.order, "/works"))?;
    tap.end()?;
    let shown = failed.end()?;
    ensure!(
        shown.contains("/fails") && !shown.contains("/works"),
        "{shown}"
    );
    let archived: Value = serde_json::from_str(&archive.end()?)?;
    let entries = archived["log"]["entries"].as_array().context("entries")?;
    let works = |it: &&Value| {
        it["request"]["url"]
            .as_str()
            .is_some_and(|it| it.ends_with("/works"))
    };
    let entry = entries.iter().find(works).context("the request")?;
    ensure!(entry["response"]["status"] == 200, "{entry}");
    let is_wanted = |it: &Value| it["response"]["status"] == 200;
    ensure!(entries.iter().all(is_wanted), "{archived}");
    drop(echo);
    grpc.stop()
}

/// Pods that come later are watched, and an agent that comes back goes on.
pub(super) fn what_comes_later(scene: &Scene) -> Result<()> {
    let tap = Running::start(scene, &["pod/late", "-o", "wide"], 0)?;
    let late = scene.cluster.add_pod(PodSpec::new("late").on(0))?;
    tap.shows(&["req ", "src_pod=late"], || ask(scene, &late, "/late"))?;
    let node = scene.cluster.node(0);
    node.stop_agent()?;
    node.start_agent()?;
    scene.cluster.wait_enrolled(&late)?;
    tap.shows(&["req ", ":path=/back"], || ask(scene, &late, "/back"))?;
    tap.end()?;
    scene.cluster.remove_pod(late)?;
    nobody_watches(scene)
}

/// What is too much is left out, and said; whoever goes without a word is missed.
pub(super) fn limits(scene: &Scene) -> Result<()> {
    let tap = Running::start(scene, &["pod/web", "--max-rps", "1"], 1)?;
    eventually("something to be left out", || {
        for _ in 0..5 {
            ask(scene, &scene.order, "/many")?;
        }
        let said = tap.process.stderr();
        ensure!(said.contains("left out"), "{said}");
        Ok(())
    })?;
    tap.process.signal(Signal::SIGKILL)?;
    nobody_watches(scene)?;
    let log = scene.cluster.controller()?.log();
    for part in [
        "somebody begins to watch",
        "somebody has watched",
        "root, at the socket",
    ] {
        ensure!(log.contains(part), "no {part:?} in the log");
    }
    let bad = scene.weft(&["tap", "pod/web", "--status", "9xx"])?;
    ensure!(bad.code() == 2 && bad.stderr.contains("9xx"), "{bad:?}");
    let timed = scene
        .weft(&["tap", "pod/web", "--for", "1s", "-o", "har"])?
        .success()?;
    serde_json::from_str::<Value>(&timed).with_context(|| timed.clone())?;
    Ok(())
}

/// When the controller is gone, so are taps, and the command says so.
pub(super) fn without_a_controller(scene: &Scene) -> Result<()> {
    let mut tap = Running::start(scene, &["pod/web"], 1)?;
    let controller = scene.cluster.controller()?;
    controller.stop()?;
    tap.process
        .wait_for_line("tried again", Duration::from_secs(60))?;
    nobody_watches(scene)?;
    controller.start()?;
    tap.shows(&["req ", ":path=/again"], || {
        ask(scene, &scene.order, "/again")
    })?;
    tap.end().map(drop)
}

/// What is asked while it is watched, by who asks whom for what.
pub(super) fn top(scene: &Scene) -> Result<()> {
    let target = scene.web.sockets(PORT)[0];
    let slow = ["--pause-ms", "20", "--path", "/topped"];
    let load = HttpLoad::start(&scene.order, target, &slow)?;
    let watch = ["top", "pod/web", "--for", "2s", "--path", "/topped"];
    let all = scene.json(&watch)?;
    let table = scene
        .weft(&[&watch[..], &["--sort", "worst"]].concat())?
        .success()?;
    load.stop()?;
    let row = &all["rows"][0];
    ensure!(
        row["client"] == "default/pod/order" && row["server"] == "default/pod/web",
        "{all}"
    );
    ensure!(row["method"] == "GET" && row["path"] == "/topped", "{all}");
    ensure!(
        row["count"].as_u64() > Some(10) && row["worst_us"].as_u64() > Some(0),
        "{all}"
    );
    ensure!(
        row["successes"] == row["ended"] && row["ended"].as_u64() > Some(10),
        "{all}"
    );
    ensure!(
        table.contains("default/pod/order") && table.contains("100.00%"),
        "{table}"
    );
    ensure!(
        !table.contains('\u{1b}'),
        "it is drawn where nobody looks: {table:?}"
    );
    Ok(())
}

/// What is asked often and what is asked seldom, in a terminal in which keys are pressed.
pub(super) fn keys(scene: &Scene) -> Result<()> {
    let target = scene.web.sockets(PORT)[0];
    let load = |path: &str, pause: &str| {
        let arguments = ["--pause-ms", pause, "--path", path];
        HttpLoad::start(&scene.order, target, &arguments)
    };
    let (seldom, often) = (load("/keys-a", "200")?, load("/keys-b", "20")?);
    let start = || {
        let socket = scene.cluster.controller()?.admin_socket();
        let mut command = Command::new(binary("weft")?);
        command.args(["top", "pod/web", "--path", "/keys"]);
        command.env("WEFT_CONTROLLER_SOCKET", socket);
        InTerminal::start(&mut command)
    };
    // What is on the screen: the frame that was drawn last, whole.
    let is_first = |top: &InTerminal, first: &str, other: &str| {
        let shown = top.shown();
        let frame = shown
            .rsplit("\x1b[H\x1b[J")
            .find(|it| it.contains("q quit"));
        let frame = frame.with_context(|| format!("nothing is drawn: {shown:?}"))?;
        let places = (frame.find(first), frame.find(other));
        ensure!(
            matches!(places, (Some(one), Some(two)) if one < two),
            "{frame}"
        );
        Ok(())
    };
    let mut top = start()?;
    eventually("what is asked often, first", || {
        is_first(&top, "/keys-b", "/keys-a")
    })?;
    ensure!(!top.is_as_before()?, "keys are handed over by lines");
    top.press("n")?;
    eventually("the order of names", || {
        is_first(&top, "/keys-a", "/keys-b")
    })?;
    top.press("\x1b[B")?;
    eventually("the other way", || is_first(&top, "/keys-b", "/keys-a"))?;
    top.press("q")?;
    ensure!(top.ended()?.success(), "{}", top.shown());
    ensure!(top.is_as_before()?, "the terminal was not put back");
    let shown = top.shown();
    let left = shown.rsplit("\x1b[?1049l").next().unwrap_or_default();
    ensure!(
        left.contains("/keys-a"),
        "nothing is left behind: {shown:?}"
    );

    let mut top = start()?;
    eventually("the table", || is_first(&top, "/keys-b", "/keys-a"))?;
    kill(Pid::from_raw(top.pid().try_into()?), Signal::SIGTERM)?;
    ensure!(top.ended()?.success(), "{}", top.shown());
    ensure!(top.is_as_before()?, "the terminal was not put back");
    ensure!(top.shown().contains("\x1b[?1049l"), "{:?}", top.shown());
    seldom.stop()?;
    often.stop()?;
    Ok(())
}
