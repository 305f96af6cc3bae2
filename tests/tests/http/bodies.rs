//! Bodies stream: gigabytes would pass, a slow side slows the other down, and the agents hold little
//! of it meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_tests::Checks;
use weft_tests::apps::curl_shop;
use weft_tests::webapp::{HttpServer, raw};

use crate::stage::{Pair, Stage, seen};

#[test]
fn http_bodies() {
    let stage = Stage::build().expect("a cluster");
    let start = |pod| HttpServer::start(pod, HTTP, &["--quiet"]).expect("a server");
    let _servers = [&stage.far, &stage.near].map(start);
    let mut checks = Checks::new("http bodies");
    stage.check_meshed(&mut checks, "a large download", download);
    stage.check_meshed(&mut checks, "a large upload", upload);
    stage.check_meshed(&mut checks, "both at once", both);
    stage.check_meshed(&mut checks, "a slow reader costs no memory", slow_reader);
    stage.check_meshed(&mut checks, "a slow server costs no memory", slow_server);
    stage.check_meshed(&mut checks, "a reader that stops, of a gigabyte", stops);
    stage.check_meshed(&mut checks, "a body that the client ends early", cut_upload);
    checks.finish();
}

/// By both versions, with what comes checked by the digest of what was sent.
fn download(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let path = format!("/bytes/{LARGE}");
    let file = pair.client.dir().join("download");
    let file = file.display().to_string();
    for version in VERSIONS {
        let shown = curl_shop(pair.client, pair.at(HTTP), &path, &[version, "-o", &file])?;
        ensure!(shown.exit == 0 && shown.code() == 200, "{shown:?}");
        // The pattern goes back: the server says whether it is.
        let upload = format!("@{file}");
        let args = [version, "--data-binary", &upload, "-H", "Expect:"];
        let seen = seen(&curl_shop(pair.client, pair.at(HTTP), "/", &args)?)?;
        ensure!(seen.body_bytes == LARGE && seen.body_is_pattern, "{seen:?}");
    }
    std::fs::remove_file(&file).context("the download")
}

fn upload(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let (file, size) = file_of_bytes(pair, LARGE)?;
    for version in VERSIONS {
        for further in [[].as_slice(), &["-H", "Transfer-Encoding: chunked"]] {
            if version == VERSIONS[1] && !further.is_empty() {
                continue;
            }
            let args = [&[version, "-T", &file], further].concat();
            let seen = seen(&curl_shop(pair.client, pair.at(HTTP), "/", &args)?)?;
            ensure!(seen.body_bytes == size, "{seen:?}");
        }
    }
    Ok(())
}

/// The echo of a body is sent while the body is still being sent.
fn both(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let (file, size) = file_of_bytes(pair, LARGE)?;
    let out = pair.client.dir().join("echo");
    for version in VERSIONS {
        let args = [version, "-T", &file, "-o", &out.display().to_string()];
        let shown = curl_shop(pair.client, pair.at(HTTP), "/echo", &args)?;
        ensure!(shown.exit == 0 && shown.code() == 200, "{shown:?}");
        ensure!(
            std::fs::metadata(&out)?.len() == size,
            "the echo is of another length"
        );
    }
    Ok(())
}

fn slow_reader(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    within_memory(stage, || {
        let path = format!("/bytes/{LARGE}");
        for version in VERSIONS {
            let args = [version, "--limit-rate", "40M", "-o", "/dev/null"];
            let shown = curl_shop(pair.client, pair.at(HTTP), &path, &args)?;
            ensure!(shown.exit == 0 && shown.code() == 200, "{shown:?}");
        }
        Ok(())
    })
}

/// Neither side of a gigabyte costs memory while the one that takes it has stopped, nor afterwards.
fn stops(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let (file, _) = file_of_bytes(pair, GIGABYTE)?;
    let server = pair.at(HTTP);
    within_memory(stage, || {
        for version in VERSIONS {
            let curl = format!("curl -sS {version} --max-time 120");
            for (command, expected) in [
                (
                    format!("{curl} http://{server}/bytes/{GIGABYTE} | (sleep 2; wc -c)"),
                    GIGABYTE.to_string(),
                ),
                (
                    format!("{curl} -T {file} -H Expect: 'http://{server}/sink?delay=2000'"),
                    format!("\"body_bytes\":{GIGABYTE},"),
                ),
            ] {
                let shell = pair.client.command("sh")?.args(["-c", &command]);
                let said = shell.output(Duration::from_secs(150))?.success()?;
                ensure!(said.contains(&expected), "{command}: {said}");
            }
        }
        Ok(())
    })
}

fn slow_server(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let (file, size) = file_of_bytes(pair, LARGE)?;
    within_memory(stage, || {
        for version in VERSIONS {
            let args = [version, "-T", &file, "-H", "Expect:"];
            let seen = seen(&curl_shop(
                pair.client,
                pair.at(HTTP),
                "/sink?delay=2000",
                &args,
            )?)?;
            ensure!(seen.body_bytes == size, "{seen:?}");
        }
        Ok(())
    })
}

/// A request that is not complete never looks so to the server.
fn cut_upload(stage: &Stage, pair: Pair<'_>) -> Result<()> {
    let server = HttpServer::start(pair.server, CUT, &[])?;
    for head in ["Content-Length: 1000", "Transfer-Encoding: chunked"] {
        let request =
            format!("POST /cut HTTP/1.1\\r\\nHost: shop\\r\\n{head}\\r\\n\\r\\n3\\r\\nabc\\r\\n");
        let cut = raw(pair.client, pair.at(CUT), &[&request], &["--half-close"])?;
        ensure!(
            !cut.statuses.contains(&200),
            "an answer to half a request: {cut:?}"
        );
    }
    // What came meanwhile is over, and others are served.
    let whole = seen(&curl_shop(&stage.client, pair.at(CUT), "/whole", &[])?)?;
    ensure!(whole.path == "/whole", "{whole:?}");
    drop(server);
    Ok(())
}

/// Neither agent may grow by more than a few buffers while this goes on.
fn within_memory(stage: &Stage, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    let resident = || -> Result<u64> {
        let nodes = stage.cluster.nodes().iter();
        let sizes = nodes.map(|node| node.agent_resident_bytes());
        sizes
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .max()
            .context("no node")
    };
    let before = resident()?;
    let mut peak = before;
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        while !working.is_finished() {
            peak = peak.max(resident()?);
            std::thread::sleep(Duration::from_millis(10));
        }
        working.join().map_err(|_| anyhow::anyhow!("panicked"))?
    })?;
    let grown = peak.saturating_sub(before);
    ensure!(
        grown < MOST_GROWTH,
        "an agent grew by {grown} bytes for what passes"
    );
    Ok(())
}

/// A file in the client's folder.
fn file_of_bytes(pair: Pair<'_>, size: u64) -> Result<(String, u64)> {
    let path = pair.client.dir().join("body");
    std::fs::File::create(&path)?.set_len(size)?;
    Ok((path.display().to_string(), size))
}

const HTTP: u16 = 8080;
const CUT: u16 = 8081;
const LARGE: u64 = 100_000_000;
const GIGABYTE: u64 = 1 << 30;
const VERSIONS: [&str; 2] = ["--http1.1", "--http2-prior-knowledge"];
/// The kernel's buffers are not the agent's; what an exchange may keep is below 1 MiB, the rest is for
/// an allocator that gives nothing back.
const MOST_GROWTH: u64 = 16 << 20;
