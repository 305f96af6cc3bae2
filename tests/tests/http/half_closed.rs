//! Clients of HTTP/1 that end their side after their request: they may be waiting for the answer, or be gone.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::apps::curl_shop;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{HttpServer, raw};
use weft_tests::{Checks, Pod, wait_for};

use crate::stage::{Stage, expect_code};

#[test]
fn http_half_closed() {
    let args = ["--max-exchanges-per-pod", &MOST.to_string()];
    let stage = Stage::build_with(&args).expect("a cluster");
    let start = |pod| HttpServer::start(pod, HTTP, &[]).expect("a server");
    let _servers = [&stage.far, &stage.near].map(start);
    let mut checks = Checks::new("http half closed");
    stage.check_meshed(&mut checks, "its answer is waited for", |_, pair| {
        answered(pair.client, pair.at(HTTP))
    });
    checks.check("of one outside of the mesh, too", || {
        answered(&stage.plain_client, stage.far.sockets(HTTP)[0])
    });
    checks.check("but not for ever, and its place is free then", || {
        given_up(&stage)
    });
    checks.finish();
}

/// One answer that takes a while, and one that begins soon and takes longer.
fn answered(client: &Pod, target: SocketAddr) -> Result<()> {
    for path in ["/delay/8000", "/stream?chunks=80&interval=100"] {
        let get = format!(r"GET {path} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n");
        let answer = raw(
            client,
            target,
            &[&get],
            &["--half-close", "--quiet-ms", "20000"],
        )?;
        ensure!(
            answer.statuses == [200] && answer.outcome == "eof",
            "{path}: {answer:?}"
        );
        ensure!(answer.elapsed_ms > 7000.0, "{path}: {answer:?}");
    }
    Ok(())
}

/// As many as may have a request: meanwhile the pod has no other.
fn given_up(stage: &Stage) -> Result<()> {
    let target = stage.far.sockets(HTTP)[0];
    let near = stage.near.sockets(HTTP)[0];
    let get = r"GET /delay/600000 HTTP/1.1\r\nHost: shop\r\n\r\n";
    std::thread::scope(|scope| {
        let args = ["--half-close", "--quiet-ms", "58000"];
        // At two servers: one gives half of its places to one client.
        let wait = |number| {
            let target = [target, near][number % 2];
            scope.spawn(move || raw(&stage.client, target, &[get], &args))
        };
        let waiting: Vec<_> = (0..MOST).map(wait).collect();
        let ask = || curl_shop(&stage.client, near, "/", &[]);
        eventually("all places to be taken", || {
            let shown = ask()?;
            expect_code(&shown, 503)?;
            let why = shown.header("weft-error");
            ensure!(why == Some("too_many_exchanges"), "{shown:?}");
            Ok(())
        })?;
        wait_for("a place to be free", Duration::from_secs(60), || {
            Ok((ask()?.code() == 200).then_some(()))
        })?;
        for waiting in waiting {
            let answer = waiting.join();
            let answer = answer.map_err(|_| anyhow::anyhow!("a thread failed"))??;
            ensure!(answer.outcome == "reset", "{answer:?}");
            ensure!(answer.elapsed_ms > 29_000.0, "{answer:?}");
        }
        Ok(())
    })
}

const MOST: usize = 4;
const HTTP: u16 = 8080;
