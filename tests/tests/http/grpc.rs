//! gRPC: all four kinds of calls, statuses, metadata, deadlines, and streams that live.

use anyhow::{Context, Result, ensure};
use weft_tests::Checks;
use weft_tests::scenario::Watch;
use weft_tests::webapp::{Called, GrpcServer, grpc_call, grpc_load};

use crate::stage::{CLIENT_ID, Pair, Stage};

#[test]
fn http_grpc() {
    let stage = Stage::build().expect("a cluster");
    let start = |pod| GrpcServer::start(pod, GRPC).expect("a server");
    let _servers = [&stage.far, &stage.near, &stage.plain_server].map(start);
    let mut checks = Checks::new("grpc");
    for (name, args) in CALLS {
        for (place, pair) in stage.meshed() {
            checks.check(&format!("{name}, {place}"), || {
                same_call(&stage, pair, args)
            });
        }
    }
    stage.check_meshed(&mut checks, "a deadline", deadline);
    stage.check_meshed(&mut checks, "many calls at once", many);
    checks.check("nothing readable is on the wire", || {
        let watch = Watch::start(&stage.cluster, &[&stage.client, &stage.far])?;
        let args = [
            "--text",
            "a-secret-text",
            "--metadata",
            "token: a-secret-token",
        ];
        let called = grpc_call(&stage.client, stage.far.sockets(GRPC)[0], &args)?;
        ensure!(called.code == 0, "{called:?}");
        watch
            .finish_encrypted(&["a-secret-text", "a-secret-token"])
            .map(drop)
    });
    checks.finish();
}

/// Name and arguments of `weft-testapp grpc call`.
const CALLS: [(&str, &[&str]); 11] = [
    ("unary", &["--text", "one"]),
    ("client streaming", &["--kind", "collect", "--count", "50"]),
    ("server streaming", &["--kind", "expand", "--count", "50"]),
    (
        "server streaming of much",
        &["--kind", "expand", "--count", "40", "--bytes", "100000"],
    ),
    (
        "both streaming, in turns",
        &["--kind", "chat", "--count", "20"],
    ),
    ("an empty stream", &["--kind", "expand", "--count", "0"]),
    ("not found", &["--code", "5"]),
    ("unauthenticated", &["--code", "16"]),
    (
        "an error after answers",
        &["--kind", "expand", "--count", "3", "--code", "13"],
    ),
    (
        "an error in a conversation",
        &["--kind", "chat", "--code", "9"],
    ),
    (
        "metadata and an authority",
        &[
            "--metadata",
            "x-tenant: blue",
            "--metadata",
            "x-tenant: green",
            "--authority",
            "shop.default",
        ],
    ),
];

/// The same as without a mesh.
fn same_call(stage: &Stage, pair: Pair<'_>, args: &[&str]) -> Result<()> {
    let call = |pair: Pair<'_>| grpc_call(pair.client, pair.at(GRPC), args);
    let (plain, meshed) = (comparable(call(stage.plain())?), comparable(call(pair)?));
    ensure!(
        meshed == plain,
        "without the mesh {plain:?}\n   through it {meshed:?}"
    );
    Ok(())
}

/// Code, message, metadata of the status, and the answers without names and addresses.
type Comparable = (i32, String, Vec<(String, String)>, Vec<String>);

fn comparable(mut called: Called) -> Comparable {
    called.details.retain(|(name, _)| name != "date");
    called.details.sort();
    let answers = called.answers.into_iter().map(|mut answer| {
        answer
            .metadata
            .retain(|name, _| !CLIENT_ID.contains(&name.as_str()));
        format!(
            "{} {} {:?} {}",
            answer.text, answer.received, answer.metadata, answer.payload_bytes
        )
    });
    (
        called.code,
        called.message,
        called.details,
        answers.collect(),
    )
}

fn deadline(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let call = |delay: &str| {
        let args = ["--delay-ms", delay, "--deadline-ms", "500"];
        grpc_call(pair.client, pair.at(GRPC), &args)
    };
    let in_time = call("10")?;
    ensure!(in_time.code == 0, "{in_time:?}");
    let timeout = in_time
        .answers
        .first()
        .and_then(|it| it.metadata.get("grpc-timeout"));
    timeout.context("the server did not see the deadline")?;
    let late = call("5000")?;
    // Tonic's client calls its own timeout Cancelled (1), others' is DeadlineExceeded (4).
    ensure!([1, 4].contains(&late.code), "{late:?}");
    ensure!(late.elapsed_ms < 3000.0, "{late:?}");
    Ok(())
}

fn many(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let report = grpc_load(pair.client, pair.at(GRPC), 400, &["--connections", "4"])?;
    report.expect_all("0")?;
    ensure!(report.share(pair.server.name()) > 0.999, "{report:?}");
    Ok(())
}

const GRPC: u16 = 9090;
