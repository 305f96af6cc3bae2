//! One load between two pods: runs the programs, and says what came out under the rows' names.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use weft_tests::Pod;

use crate::budget::Budget;
use crate::machine::{Usage, Watch};
use crate::rows::{Load, Protocol};
use crate::stage::{HTTP_PORT, IPERF_PORT, PATIENCE, Pair, exchange_port, own_command};

/// What one run of a load gave.
pub(crate) struct Measured {
    /// Rows and their values.
    pub(crate) values: Vec<(&'static str, f64)>,
    /// What the machine did meanwhile.
    pub(crate) usage: Usage,
}

/// Runs a load once. `cgroup` holds all processes that take part.
pub(crate) fn run(
    load: Load,
    pair: Pair<'_>,
    cgroup: &std::path::Path,
    budget: &Budget,
) -> Result<Measured> {
    match load {
        Load::Bulk(flows) => bulk(flows, pair, cgroup, budget.bulk_seconds),
        Load::Requests(connections) => requests(connections, pair, cgroup, budget.request_seconds),
        Load::Exchanges(protocol, connections) => {
            exchanges(protocol, connections, pair, cgroup, budget.request_seconds)
        }
        Load::Latency => latency(None, pair, cgroup, budget.latency_seconds),
        Load::Tapped => tapped(pair, cgroup, budget.latency_seconds),
        Load::ExchangeLatency(protocol) => {
            latency(Some(protocol), pair, cgroup, budget.latency_seconds)
        }
        Load::Connections => connections(None, pair, cgroup, budget.request_seconds),
        Load::ExchangeConnections(protocol) => {
            connections(Some(protocol), pair, cgroup, budget.request_seconds)
        }
        other => bail!("{other:?} is not a load between two pods"),
    }
}

fn bulk(flows: u8, pair: Pair<'_>, cgroup: &std::path::Path, seconds: u32) -> Result<Measured> {
    let port = IPERF_PORT.to_string();
    let mut server = pair
        .server
        .command("iperf3")?
        .args(["-s", "-1", "-p", &port])
        .spawn()?;
    server.wait_listening(IPERF_PORT)?;
    let address = pair.server.v4().to_string();
    let watch = Watch::start(cgroup)?;
    let printed = pair
        .client
        .command("iperf3")?
        .args(["-J", "-c", &address, "-p", &port])
        .args(["-t", &seconds.to_string(), "-P", &flows.to_string()])
        .output(patience(seconds))?
        .success()?;
    let usage = watch.finish()?;
    server.wait(PATIENCE)?;
    let result: Iperf = serde_json::from_str(&printed).context("reading what iperf3 printed")?;
    let received = result.end.sum_received;
    ensure!(received.bytes > 0.0, "iperf3 transferred nothing");
    let name = match flows {
        1 => "bulk-1",
        4 => "bulk-4",
        _ => "bulk-8",
    };
    let mut values = vec![(name, received.bits_per_second / 1e9)];
    if flows == 1 {
        values.push(("cpu-per-gb", usage.cpu_seconds / (received.bytes / 1e9)));
    }
    Ok(Measured { values, usage })
}

fn requests(
    connections: u8,
    pair: Pair<'_>,
    cgroup: &std::path::Path,
    seconds: u32,
) -> Result<Measured> {
    let watch = Watch::start(cgroup)?;
    let (count, rate) = wrk(connections, pair, HTTP_PORT, seconds)?;
    let usage = watch.finish()?;
    let names = ["requests-1", "requests-32", "cpu-per-10k-requests"];
    Ok(request_rows(names, connections, count, rate, usage))
}

fn exchanges(
    protocol: Protocol,
    connections: u8,
    pair: Pair<'_>,
    cgroup: &std::path::Path,
    seconds: u32,
) -> Result<Measured> {
    let port = exchange_port(protocol);
    let watch = Watch::start(cgroup)?;
    let (count, rate) = match protocol {
        Protocol::Http1 => wrk(connections, pair, port, seconds)?,
        Protocol::Http2 => h2load(connections, pair, port, "/", &[], seconds)?,
        Protocol::Grpc => {
            let call = pair.client.dir().join("bench-call");
            std::fs::write(&call, EMPTY_MESSAGE)?;
            let call = format!("--data={}", call.display());
            let args = [
                &call,
                "-H",
                "content-type: application/grpc",
                "-H",
                "te: trailers",
            ];
            h2load(connections, pair, port, UNARY, &args, seconds)?
        }
    };
    let usage = watch.finish()?;
    let names = match protocol {
        Protocol::Http1 => [
            "http1-requests-1",
            "http1-requests-32",
            "http1-cpu-per-10k-requests",
        ],
        Protocol::Http2 => [
            "http2-requests-1",
            "http2-requests-32",
            "http2-cpu-per-10k-requests",
        ],
        Protocol::Grpc => [
            "grpc-requests-1",
            "grpc-requests-32",
            "grpc-cpu-per-10k-requests",
        ],
    };
    Ok(request_rows(names, connections, count, rate, usage))
}

/// The rows of requests over one connection, or over many: then also what they cost.
fn request_rows(
    [one, many, cpu]: [&'static str; 3],
    connections: u8,
    count: f64,
    rate: f64,
    usage: Usage,
) -> Measured {
    let values = if connections == 1 {
        vec![(one, rate)]
    } else {
        vec![(many, rate), (cpu, usage.cpu_seconds / (count / 1e4))]
    };
    Measured { values, usage }
}

fn wrk(connections: u8, pair: Pair<'_>, port: u16, seconds: u32) -> Result<(f64, f64)> {
    let printed = pair
        .client
        .command("wrk")?
        .args(["-t", "1", "-c", &connections.to_string()])
        .args(["-d", &format!("{seconds}s"), "--timeout", "5s"])
        .arg(format!("http://{}:{port}/", pair.server.v4()))
        .output(patience(seconds))?
        .success()?;
    parse_wrk(&printed)
}

/// One stream at once on each connection, so that rows of different protocols compare.
fn h2load(
    connections: u8,
    pair: Pair<'_>,
    port: u16,
    path: &str,
    args: &[&str],
    seconds: u32,
) -> Result<(f64, f64)> {
    let printed = pair
        .client
        .command("h2load")?
        .args(["-t", "1", "-m", "1", "-c", &connections.to_string()])
        .args(["-D", &seconds.to_string()])
        .args(args)
        .arg(format!("http://{}:{port}{path}", pair.server.v4()))
        .output(patience(seconds))?
        .success()?;
    parse_h2load(&printed)
}

fn latency(
    protocol: Option<Protocol>,
    pair: Pair<'_>,
    cgroup: &std::path::Path,
    seconds: u32,
) -> Result<Measured> {
    let (port, flag, names) = match protocol {
        None => (HTTP_PORT, "", ["latency-500-p50", "latency-500-p99"]),
        Some(Protocol::Http1) => (
            exchange_port(Protocol::Http1),
            "",
            ["http1-latency-500-p50", "http1-latency-500-p99"],
        ),
        Some(Protocol::Http2) => (
            exchange_port(Protocol::Http2),
            "--http2",
            ["http2-latency-500-p50", "http2-latency-500-p99"],
        ),
        Some(Protocol::Grpc) => (
            exchange_port(Protocol::Grpc),
            "--grpc",
            ["grpc-latency-500-p50", "grpc-latency-500-p99"],
        ),
    };
    let watch = Watch::start(cgroup)?;
    let printed = run_own(pair, "latency", port, seconds, flag)?;
    let usage = watch.finish()?;
    let result: LatencyResult = serde_json::from_str(&printed)?;
    let values = names.into_iter().zip([result.p50_us, result.p99_us]);
    Ok(Measured {
        values: values.collect(),
        usage,
    })
}

/// The same, under names of its own: whether somebody watches is not this function's to say.
fn tapped(pair: Pair<'_>, cgroup: &std::path::Path, seconds: u32) -> Result<Measured> {
    let Measured { values, usage } = latency(Some(Protocol::Http1), pair, cgroup, seconds)?;
    let names = ["http1-tapped-500-p50", "http1-tapped-500-p99"];
    let values = names.into_iter().zip(values);
    Ok(Measured {
        values: values.map(|(name, (_, value))| (name, value)).collect(),
        usage,
    })
}

fn connections(
    protocol: Option<Protocol>,
    pair: Pair<'_>,
    cgroup: &std::path::Path,
    seconds: u32,
) -> Result<Measured> {
    let (flag, [many, cpu]) = match protocol {
        None => ("", ["connections-32", "cpu-per-10k-connections"]),
        Some(Protocol::Http1) => (
            "",
            ["http1-connections-32", "http1-cpu-per-10k-connections"],
        ),
        Some(Protocol::Http2) => (
            "--http2",
            ["http2-connections-32", "http2-cpu-per-10k-connections"],
        ),
        Some(Protocol::Grpc) => (
            "--grpc",
            ["grpc-connections-32", "grpc-cpu-per-10k-connections"],
        ),
    };
    let port = protocol.map_or(HTTP_PORT, exchange_port);
    let watch = Watch::start(cgroup)?;
    let printed = run_own(pair, "connections", port, seconds, flag)?;
    let usage = watch.finish()?;
    let result: ConnectionsResult = serde_json::from_str(&printed)?;
    let values = vec![
        (many, result.count / result.seconds),
        (cpu, usage.cpu_seconds / (result.count / 1e4)),
    ];
    Ok(Measured { values, usage })
}

/// Runs a client of this program against one of the pair's servers.
fn run_own(
    pair: Pair<'_>,
    subcommand: &str,
    port: u16,
    seconds: u32,
    further: &str,
) -> Result<String> {
    let client: &Pod = pair.client;
    own_command(client, subcommand)?
        .arg(format!("{}:{port}", pair.server.v4()))
        .args(["--seconds", &seconds.to_string()])
        .args(Some(further).filter(|it| !it.is_empty()))
        .output(patience(seconds))?
        .success()
}

fn patience(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into()) + PATIENCE
}

/// How many requests there were, and how many a second.
fn parse_wrk(printed: &str) -> Result<(f64, f64)> {
    for trouble in ["Socket errors", "Non-2xx"] {
        if let Some(line) = printed.lines().find(|line| line.contains(trouble)) {
            bail!("wrk says: {}", line.trim());
        }
    }
    let count = printed
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))
        .and_then(|(count, _)| count.parse().ok());
    let rate = printed
        .lines()
        .find_map(|line| line.trim().strip_prefix("Requests/sec:"))
        .and_then(|rate| rate.trim().parse().ok());
    match (count, rate) {
        (Some(count), Some(rate)) if count > 0.0 => Ok((count, rate)),
        _ => bail!("wrk did not say how many requests there were:\n{printed}"),
    }
}

/// The same of h2load.
fn parse_h2load(printed: &str) -> Result<(f64, f64)> {
    let line = |start: &str| {
        let mut lines = printed.lines();
        lines.find_map(|line| line.trim().strip_prefix(start))
    };
    // requests: 1234 total, 1235 started, 1234 done, 1234 succeeded, 0 failed, 0 errored, 0 timeout
    let number = |name: &str| -> Option<f64> {
        let mut parts = line("requests:")?.split(',');
        let part = parts.find_map(|part| part.trim().strip_suffix(name))?;
        part.trim().parse().ok()
    };
    let succeeded = number("succeeded");
    let trouble: f64 = ["failed", "errored", "timeout"]
        .iter()
        .filter_map(|it| number(it))
        .sum();
    // finished in 1.00s, 1234.00 req/s, 1.23MB/s
    let mut parts = line("finished in").unwrap_or_default().split(',');
    let rate = parts.find_map(|part| part.trim().strip_suffix("req/s")?.trim().parse().ok());
    match (succeeded, rate) {
        (Some(count), Some(rate)) if count > 0.0 && trouble == 0.0 => Ok((count, rate)),
        _ => bail!("h2load says:\n{printed}"),
    }
}

/// A unary call's message of no bytes, as gRPC frames it: not compressed, length 0.
const EMPTY_MESSAGE: [u8; 5] = [0; 5];
/// What `weft-testapp grpc serve` answers to.
pub(crate) const UNARY: &str = "/weft.test.v1.Echo/Unary";

#[derive(Deserialize)]
struct Iperf {
    end: IperfEnd,
}

#[derive(Deserialize)]
struct IperfEnd {
    sum_received: IperfSum,
}

#[derive(Deserialize)]
struct IperfSum {
    bytes: f64,
    bits_per_second: f64,
}

#[derive(Deserialize)]
struct LatencyResult {
    p50_us: f64,
    p99_us: f64,
}

#[derive(Deserialize)]
struct ConnectionsResult {
    count: f64,
    seconds: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_wrk_prints() {
        let printed = "Running 1s test @ http://10.244.1.10:8080/\n  1 threads and 32 connections\n  \
            90123 requests in 1.00s, 15.2MB read\nRequests/sec:  90021.50\nTransfer/sec: 15MB\n";
        assert_eq!(parse_wrk(printed).expect("parses"), (90123.0, 90021.5));
        let h2load = "finished in 1.00s, 5120.50 req/s, 1.2MB/s\nrequests: 5121 total, 5122 started, 5121 done, \
            5121 succeeded, 0 failed, 0 errored, 0 timeout\n";
        assert_eq!(parse_h2load(h2load).expect("parses"), (5121.0, 5120.5));
        assert!(parse_h2load(&h2load.replace("0 failed", "3 failed")).is_err());
        let broken = format!("{printed}  Socket errors: connect 0, read 3, write 0, timeout 0\n");
        assert!(parse_wrk(&broken).is_err());
    }
}
