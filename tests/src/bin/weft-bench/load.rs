//! One load between two pods: runs the programs, and says what came out under the rows' names.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use weft_tests::Pod;

use crate::budget::Budget;
use crate::machine::{Usage, Watch};
use crate::rows::Load;
use crate::stage::{HTTP_PORT, IPERF_PORT, PATIENCE, Pair, own_command};

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
        Load::Latency => latency(pair, cgroup, budget.latency_seconds),
        Load::Connections => connections(pair, cgroup, budget.request_seconds),
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
    let printed = pair
        .client
        .command("wrk")?
        .args(["-t", "1", "-c", &connections.to_string()])
        .args(["-d", &format!("{seconds}s"), "--timeout", "5s"])
        .arg(format!("http://{}:{HTTP_PORT}/", pair.server.v4()))
        .output(patience(seconds))?
        .success()?;
    let usage = watch.finish()?;
    let (count, rate) = parse_wrk(&printed)?;
    let values = if connections == 1 {
        vec![("requests-1", rate)]
    } else {
        let cpu = usage.cpu_seconds / (count / 1e4);
        vec![("requests-32", rate), ("cpu-per-10k-requests", cpu)]
    };
    Ok(Measured { values, usage })
}

fn latency(pair: Pair<'_>, cgroup: &std::path::Path, seconds: u32) -> Result<Measured> {
    let watch = Watch::start(cgroup)?;
    let printed = run_own(pair, "latency", seconds)?;
    let usage = watch.finish()?;
    let result: LatencyResult = serde_json::from_str(&printed)?;
    let values = vec![
        ("latency-500-p50", result.p50_us),
        ("latency-500-p99", result.p99_us),
    ];
    Ok(Measured { values, usage })
}

fn connections(pair: Pair<'_>, cgroup: &std::path::Path, seconds: u32) -> Result<Measured> {
    let watch = Watch::start(cgroup)?;
    let printed = run_own(pair, "connections", seconds)?;
    let usage = watch.finish()?;
    let result: ConnectionsResult = serde_json::from_str(&printed)?;
    let values = vec![
        ("connections-32", result.count / result.seconds),
        (
            "cpu-per-10k-connections",
            usage.cpu_seconds / (result.count / 1e4),
        ),
    ];
    Ok(Measured { values, usage })
}

/// Runs a client of this program against the pair's nginx.
fn run_own(pair: Pair<'_>, subcommand: &str, seconds: u32) -> Result<String> {
    let client: &Pod = pair.client;
    own_command(client, subcommand)?
        .arg(format!("{}:{HTTP_PORT}", pair.server.v4()))
        .args(["--seconds", &seconds.to_string()])
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
        let broken = format!("{printed}  Socket errors: connect 0, read 3, write 0, timeout 0\n");
        assert!(parse_wrk(&broken).is_err());
    }
}
