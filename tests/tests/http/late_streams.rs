//! Streams of gRPC whose time is up after something has come: their clients hear DEADLINE_EXCEEDED.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::manifests::ServiceSpec;
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{GrpcServer, grpc_call};
use weft_tests::{Checks, wait_for};

use crate::stage::{Pair, Stage};

#[test]
fn http_late_streams() {
    run("late streams", &[]);
}

/// Between nodes by a tunnel in which exchanges are streams of HTTP/2.
#[test]
fn http_late_streams_by_weft_h2() {
    run("late streams by weft-h2", &["--tunnel", "weft-h2"]);
}

fn run(name: &str, agent_args: &[&str]) {
    let stage = Stage::build_with(agent_args).expect("a cluster");
    let start = |pod| GrpcServer::start(pod, GRPC).expect("a server");
    let _servers = [&stage.far, &stage.near].map(start);
    let mut checks = Checks::new(name);
    stage.check_meshed(&mut checks, "all told", |stage, pair| {
        // Each answer comes in time, and all of them would take minutes.
        let often = ["--delay-ms", "100", "--count", "2000"];
        expect_late(stage, pair, ("request", "request_timeout"), &often, 2)
    });
    stage.check_meshed(&mut checks, "nothing moves", |stage, pair| {
        let seldom = ["--delay-ms", "60000", "--count", "2"];
        expect_late(stage, pair, ("idle", "stream_idle"), &seldom, 0)
    });
    checks.finish();
}

/// A client that knows of no deadline hears that there was one, after so many answers at least, and so do metrics.
fn expect_late(
    stage: &Stage,
    pair: Pair<'_>,
    (time, why): (&str, &str),
    args: &[&str],
    answers: usize,
) -> Result<()> {
    let name = format!("{time}-{}", pair.server.name());
    let spec = ServiceSpec::new(&name).select("app", pair.server.name());
    let spec = spec.annotation(&format!("weft.dev/timeout-{time}"), "1s");
    let [address, _] = stage.cluster.add_service(&spec.port(90, GRPC))?;
    let target = SocketAddr::new(address, 90);
    eventually("calls to be answered", || {
        let called = grpc_call(pair.client, target, &[])?;
        ensure!(called.code == 0, "{called:?}");
        Ok(())
    })?;
    for kind in ["expand", "chat"] {
        let args = [&["--kind", kind], args].concat();
        // On a machine that is busy the time may be up before anything comes.
        let called = wait_for("enough to come in time", Duration::from_secs(30), || {
            let called = grpc_call(pair.client, target, &args)?;
            let is_other = called.code != DEADLINE_EXCEEDED;
            ensure!(is_other || called.answers.len() >= answers, "{called:?}");
            Ok(Some(called))
        })?;
        ensure!(called.code == DEADLINE_EXCEEDED, "{kind}: {called:?}");
        ensure!(called.message == why, "{kind}: {called:?}");
        let told = ("weft-error".to_owned(), why.to_owned());
        ensure!(called.details.contains(&told), "{kind}: {called:?}");
    }
    let labels = [
        ("parent_name", name.as_str()),
        ("grpc_status", "DEADLINE_EXCEEDED"),
    ];
    let metric = "outbound_grpc_route_request_statuses_total";
    wait_for_metric(stage.cluster.node(0), metric, &labels, 2.0).map(drop)
}

const DEADLINE_EXCEEDED: i32 = 4;
const GRPC: u16 = 9090;
