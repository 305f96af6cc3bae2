//! Bytes through the mesh: all of them, in order, with their ends, and without piling up.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_tests::scenario::Watch;
use weft_tests::testapp::{self, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

/// What all flows across nodes go by: `weft/1`.
#[test]
fn copying() {
    let cluster = Cluster::start().expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let client = add(PodSpec::new("client").on(0));
    let far = add(PodSpec::new("far").on(1));
    let near = add(PodSpec::new("near").on(0));
    let plain = add(PodSpec::new("plain").on(1).unmeshed());
    let mut checks = Checks::new("copying");
    for (place, server) in [
        ("across nodes", &far),
        ("on one node", &near),
        ("to plaintext", &plain),
    ] {
        ends(&mut checks, place, &client, server);
    }
    for (place, server) in [("across nodes", &far), ("on one node", &near)] {
        amounts(&mut checks, place, &cluster, &client, server);
    }
    checks.check("many flows at once, each intact", || many(&client, &far));
    checks.check("a burst of connections between two pods", || {
        burst(&client, &far)
    });
    checks.finish();
}

/// The same by `weft-h2/1`, which agents speak that have no `weft/1`.
#[test]
fn copying_by_http2() {
    let cluster = Cluster::with(ClusterOptions {
        agent_args: vec!["--tunnel".into(), "weft-h2".into()],
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let client = cluster.add_pod(PodSpec::new("client").on(0));
    let client = client.expect("a pod");
    let far = cluster.add_pod(PodSpec::new("far").on(1)).expect("a pod");
    let mut checks = Checks::new("copying_by_http2");
    ends(&mut checks, "by HTTP/2", &client, &far);
    amounts(&mut checks, "by HTTP/2", &cluster, &client, &far);
    checks.check("many flows at once, each intact", || many(&client, &far));
    checks.check("a burst of connections between two pods", || {
        burst(&client, &far)
    });
    checks.finish();
}

fn ends(checks: &mut Checks, place: &str, client: &Pod, server: &Pod) {
    checks.check(&format!("the client ends first, {place}"), || {
        client_ends(client, server)
    });
    checks.check(&format!("the server ends first, {place}"), || {
        server_ends(client, server)
    });
    checks.check(&format!("the server resets, {place}"), || {
        server_resets(client, server)
    });
    checks.check(&format!("the client resets, {place}"), || {
        client_resets(client, server)
    });
    checks.check(&format!("the client leaves in the middle, {place}"), || {
        client_leaves(client, server)
    });
    checks.check(&format!("the server leaves in the middle, {place}"), || {
        server_leaves(client, server)
    });
    checks.check(
        &format!("a server that closes with data unread, {place}"),
        || closes_unread(client, server),
    );
}

fn amounts(checks: &mut Checks, place: &str, cluster: &Cluster, client: &Pod, server: &Pod) {
    checks.check(&format!("a gigabyte each way at once, {place}"), || {
        exchange(cluster, client, server)
    });
    checks.check(
        &format!("a slow server holds the client back, {place}"),
        || slow_server(cluster, client, server),
    );
    checks.check(
        &format!("a slow client holds the server back, {place}"),
        || slow_client(cluster, client, server),
    );
}

fn client_ends(client: &Pod, server: &Pod) -> Result<()> {
    let sink = Server::start(server, 7100, "sink", &[])?;
    for (count, target) in server.sockets(7100).into_iter().enumerate() {
        let got = testapp::connect(client, target, &["--send-bytes", "300000", "--half-close"])?
            .expect(&["ok"])?;
        ensure!(
            got.text == "300000 true" && got.eof,
            "the answer after the end: {got:?}"
        );
        let closed = sink.wait_closed(count + 1)?.remove(count);
        ensure!(
            closed.received == 300_000 && closed.intact && closed.outcome == "ok",
            "{closed:?}"
        );
    }
    Ok(())
}

fn server_ends(client: &Pod, server: &Pod) -> Result<()> {
    let ends = Server::start(server, 7101, "fin-first", &["--greeting", "that was all"])?;
    for (count, target) in server.sockets(7101).into_iter().enumerate() {
        let args = ["--receive-first", "--send-bytes", "300000", "--half-close"];
        let got = testapp::connect(client, target, &args)?.expect(&["ok"])?;
        ensure!(got.text == "that was all" && got.eof, "{got:?}");
        let closed = ends.wait_closed(count + 1)?.remove(count);
        ensure!(
            closed.received == 300_000 && closed.intact,
            "after the server's end: {closed:?}"
        );
    }
    Ok(())
}

fn server_resets(client: &Pod, server: &Pod) -> Result<()> {
    let _resets = Server::start(server, 7102, "reset", &[])?;
    for target in server.sockets(7102) {
        let got = testapp::connect(client, target, &["--send", "x"])?;
        ensure!(
            got.outcome == "reset",
            "a reset must not look like an end: {got:?}"
        );
    }
    Ok(())
}

fn client_resets(client: &Pod, server: &Pod) -> Result<()> {
    let echo = Server::start(server, 7103, "echo", &[])?;
    for (count, target) in server.sockets(7103).into_iter().enumerate() {
        let args = ["--send", "xyz", "--receive-bytes", "3", "--reset"];
        testapp::connect(client, target, &args)?.expect(&["ok"])?;
        let closed = echo.wait_closed(count + 1)?.remove(count);
        ensure!(
            closed.outcome == "reset",
            "a reset must not look like an end: {closed:?}"
        );
    }
    Ok(())
}

/// A client that closes while data is on its way: the server must hear of it at once.
fn client_leaves(client: &Pod, server: &Pod) -> Result<()> {
    let bytes = GIGABYTE.to_string();
    let source = Server::start(server, 7110, "source", &["--bytes", &bytes])?;
    for (count, target) in server.sockets(7110).into_iter().enumerate() {
        testapp::connect(client, target, &["--receive-bytes", "100000"])?.expect(&["ok"])?;
        let closed = source
            .wait_closed(count + 1)
            .with_context(|| format!("from {target}"))?;
        ensure!(closed[count].outcome == "reset", "{closed:?}");
    }
    Ok(())
}

/// A server that closes while data is on its way: the client must hear of it at once.
fn server_leaves(client: &Pod, server: &Pod) -> Result<()> {
    let bytes = GIGABYTE.to_string();
    for target in server.sockets(7111) {
        let mut app = Server::start(server, 7111, "echo", &[])?;
        std::thread::scope(|scope| -> Result<()> {
            let sender = scope.spawn(|| {
                let args = [
                    "--send-bytes",
                    &bytes,
                    "--expect-pattern",
                    "--timeout-ms",
                    "8000",
                ];
                testapp::connect(client, target, &args)
            });
            app.wait_accepted(1)?;
            app.process().kill()?;
            let got = sender
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")))?;
            ensure!(got.outcome == "reset", "{target}: {got:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn closes_unread(client: &Pod, server: &Pod) -> Result<()> {
    let _closes = Server::start(server, 7104, "close", &[])?;
    let got = testapp::connect(
        client,
        server.sockets(7104)[0],
        &["--send-bytes", "5000000"],
    )?;
    // The server's kernel resets; the client must notice, as without a mesh.
    ensure!(got.outcome == "reset", "{got:?}");
    Ok(())
}

fn exchange(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let bytes = GIGABYTE.to_string();
    let app = Server::start(server, 7105, "exchange", &["--bytes", &bytes])?;
    let watch = Watch::start_short(cluster, &[client, server])?;
    let got = testapp::connect(
        client,
        server.sockets(7105)[0],
        &[
            "--send-bytes",
            &bytes,
            "--half-close",
            "--expect-pattern",
            "--timeout-ms",
            "60000",
        ],
    )?;
    ensure!(
        got.outcome == "ok" && got.received == GIGABYTE && got.intact && got.eof,
        "{got:?}"
    );
    let closed = app.wait_closed(1)?.remove(0);
    ensure!(closed.received == GIGABYTE && closed.intact, "{closed:?}");
    // The capture keeps the start of each packet only, so records cannot be followed through; that
    // nothing left beside a tunnel can.
    let captured = watch.capture_only()?;
    let beside = captured.to_or_from_port(7105).count();
    ensure!(beside == 0, "{beside} packets went beside the tunnel");
    eprintln!(
        "copying: 2 x {GIGABYTE} bytes in {:.1} s",
        got.elapsed_ms / 1e3
    );
    Ok(())
}

fn slow_server(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let bytes = GIGABYTE.to_string();
    let sink = Server::start(server, 7106, "sink", &["--read-delay-ms", "2500"])?;
    let growth = memory_growth(cluster, || {
        let args = [
            "--send-bytes",
            &bytes,
            "--half-close",
            "--timeout-ms",
            "60000",
        ];
        let got = testapp::connect(client, server.sockets(7106)[1], &args)?.expect(&["ok"])?;
        ensure!(got.text == format!("{bytes} true"), "{got:?}");
        Ok(())
    })?;
    sink.wait_closed(1)?;
    ensure!(
        growth < MEMORY_BOUND,
        "the agents grew by {growth} bytes while the reader slept"
    );
    Ok(())
}

fn slow_client(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let bytes = GIGABYTE.to_string();
    let _source = Server::start(server, 7107, "source", &["--bytes", &bytes])?;
    let growth = memory_growth(cluster, || {
        let args = [
            "--half-close",
            "--expect-pattern",
            "--read-delay-ms",
            "2500",
            "--timeout-ms",
            "60000",
        ];
        let got = testapp::connect(client, server.sockets(7107)[0], &args)?.expect(&["ok"])?;
        ensure!(got.received == GIGABYTE && got.intact && got.eof, "{got:?}");
        Ok(())
    })?;
    ensure!(
        growth < MEMORY_BOUND,
        "the agents grew by {growth} bytes while the reader slept"
    );
    Ok(())
}

fn many(client: &Pod, server: &Pod) -> Result<()> {
    let app = Server::start(server, 7108, "exchange", &["--bytes", "1000000", "--quiet"])?;
    let target: SocketAddr = server.sockets(7108)[0];
    std::thread::scope(|scope| {
        let flows: Vec<_> = (0..32)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let args = [
                        "--send-bytes",
                        "1000000",
                        "--half-close",
                        "--expect-pattern",
                    ];
                    let got = testapp::connect(client, target, &args)?.expect(&["ok"])?;
                    ensure!(got.received == 1_000_000 && got.intact, "{got:?}");
                    Ok(())
                })
            })
            .collect();
        flows.into_iter().try_for_each(|flow| {
            flow.join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("a flow's thread panicked")))
        })
    })?;
    drop(app);
    Ok(())
}

/// Hundreds at once, from no tunnel on: none may be lost to limits that are meant for attackers.
fn burst(client: &Pod, server: &Pod) -> Result<()> {
    let _app = Server::start(server, 7109, "echo", &["--quiet"])?;
    let args = ["--parallel", "300"];
    let counts = testapp::churn(client, server.sockets(7109)[1], 3000, &args)?;
    ensure!(counts.of("ok") == 3000, "{counts:?}");
    Ok(())
}

/// By how much the agents' memory grew at most while this went on, in bytes.
fn memory_growth(cluster: &Cluster, work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let memory = || -> Result<u64> {
        cluster
            .nodes()
            .iter()
            .map(|node| node.agent_resident_bytes())
            .sum()
    };
    let before = memory()?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| -> Result<u64> {
            let mut most = 0;
            while !done.load(Ordering::Relaxed) {
                most = most.max(memory()?);
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(most)
        });
        let worked = work();
        done.store(true, Ordering::Relaxed);
        let most = watcher
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the watcher panicked")))?;
        worked.map(|()| most.saturating_sub(before))
    })
}

const GIGABYTE: u64 = 1 << 30;
/// What the agents together may need for one flow that is as fast as the machine.
const MEMORY_BOUND: u64 = 48 << 20;
