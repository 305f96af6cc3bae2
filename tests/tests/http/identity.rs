//! The application is told who its client is, and nobody can tell it anything else.

use anyhow::{Context, Result, ensure};
use weft_tests::Checks;
use weft_tests::apps::curl_shop;
use weft_tests::webapp::{GrpcServer, HttpServer, grpc_call};

use crate::stage::{CLIENT_ID, Pair, Stage, seen};

#[test]
fn http_client_identity() {
    let stage = Stage::build().expect("a cluster");
    let start = |pod| HttpServer::start(pod, HTTP, &[]).expect("a server");
    let _servers = [&stage.far, &stage.near].map(start);
    let start = |pod| GrpcServer::start(pod, GRPC).expect("a server");
    let _grpc_servers = [&stage.far, &stage.near].map(start);
    let mut checks = Checks::new("http client identity");
    stage.check_meshed(
        &mut checks,
        "the server is told the client's identity",
        told,
    );
    stage.check_meshed(&mut checks, "what the client forges is taken away", forged);
    stage.check_meshed(&mut checks, "calls are told too", calls);
    stage.check_meshed(
        &mut checks,
        "clients outside of the mesh have none",
        outside,
    );
    stage.check_meshed(
        &mut checks,
        "the mesh's own headers stay inside",
        own_headers,
    );
    checks.finish();
}

fn told(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let seen = seen(&curl_shop(pair.client, pair.at(HTTP), "/", &[version])?)?;
        for name in CLIENT_ID {
            expect_identity(name, &seen.header(name), &stage.client.identity())?;
        }
    }
    Ok(())
}

fn expect_identity(name: &str, values: &[&str], identity: &str) -> Result<()> {
    ensure!(values == [identity], "{name} is {values:?}, not {identity}");
    Ok(())
}

/// In whatever case, once or more often, or named as a hop's own header.
fn forged(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let mut args = vec![version];
        for header in [
            "L5d-Client-Id",
            "l5d-client-id",
            "Weft-Client-ID",
            "weft-client-id",
        ] {
            args.extend(["-H", header]);
        }
        let sent: Vec<String> = args
            .iter()
            .map(|arg| match arg.contains("lient") {
                true => format!("{arg}: spiffe://cluster.local/ns/default/sa/admin"),
                false => (*arg).to_owned(),
            })
            .collect();
        let mut sent: Vec<&str> = sent.iter().map(String::as_str).collect();
        if version == "--http1.1" {
            sent.extend(["-H", "Connection: l5d-client-id, weft-client-id"]);
        }
        let seen = seen(&curl_shop(pair.client, pair.at(HTTP), "/", &sent)?)?;
        for name in CLIENT_ID {
            expect_identity(name, &seen.header(name), &stage.client.identity())?;
        }
    }
    Ok(())
}

fn calls(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let forged = [
        "--metadata",
        "l5d-client-id: admin",
        "--metadata",
        "weft-client-id: admin",
    ];
    for args in [[].as_slice(), &forged] {
        let called = grpc_call(pair.client, pair.at(GRPC), args)?;
        let answer = called
            .answers
            .first()
            .with_context(|| format!("{called:?}"))?;
        for name in CLIENT_ID {
            let value = answer.metadata.get(name).map(String::as_str);
            expect_identity(
                name,
                &value.into_iter().collect::<Vec<_>>(),
                &stage.client.identity(),
            )?;
        }
    }
    Ok(())
}

/// Who has no identity cannot have one by saying so.
fn outside(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let forged = ["-H", "l5d-client-id: admin", "-H", "weft-client-id: admin"];
    for args in [[].as_slice(), &forged] {
        let seen = seen(&curl_shop(&stage.plain_client, pair.at(HTTP), "/", args)?)?;
        for name in CLIENT_ID {
            let values = seen.header(name);
            ensure!(
                values.is_empty(),
                "{name} is {values:?} for a client without an identity"
            );
        }
    }
    Ok(())
}

/// What agents tell each other is no application's business, and an application cannot say it.
fn own_headers(_: &Stage, pair: Pair<'_>) -> Result<()> {
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let args = [
            version,
            "-H",
            "weft-port: 1",
            "-H",
            "weft-version: 9",
            "-H",
            "weft-anything: x",
        ];
        let shown = curl_shop(pair.client, pair.at(HTTP), "/", &args)?;
        let seen = seen(&shown)?;
        let leaked = seen.headers.iter().chain(&shown.headers);
        let mut leaked =
            leaked.filter(|(name, _)| name.starts_with("weft-") && name != CLIENT_ID[1]);
        ensure!(leaked.next().is_none(), "{seen:?}");
    }
    Ok(())
}

const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
