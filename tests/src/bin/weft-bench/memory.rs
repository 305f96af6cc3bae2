//! What the agents hold in memory: idle, and with thousands of flows. Each on a fresh cluster, so
//! that no figure contains what an earlier load left in the allocator.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit};
use serde::Deserialize;
use weft_tests::cluster::Node;
use weft_tests::usage::resident_bytes;
use weft_tests::{Pod, PodSpec, wait_for};

use crate::budget::Budget;
use crate::report::Report;
use crate::rows::{Load, Protocol, Route, Selection};
use crate::speed::MIB;
use crate::stage::{
    ECHO_PORT, add_pods, exchange_port, own_command, start_cluster, start_echo, start_nginx,
};

/// Measures the rows of this kind that are asked for.
pub(crate) fn measure(selection: &Selection, budget: &Budget, report: &mut Report) {
    for route in selection.routes() {
        // Without flows the routes are the same.
        let idle = route == Route::Across && selection.needs(Load::Idle);
        for (load, row) in KEPT {
            // Idle agents are measured on the way to the first.
            let wanted = selection.needs(load) || (idle && load == Load::Flows);
            if !wanted {
                continue;
            }
            if let Err(error) = on_route(route, load, row, selection, budget, report) {
                let what = format!("memory, {}", route.name());
                budget.tell(&format!("{what} failed: {error:#}"));
                report.fail(&what, &error);
            }
        }
    }
}

/// What is kept open, and the row for it.
const KEPT: [(Load, &str); 2] = [
    (Load::Flows, "memory-8k-flows"),
    (Load::KeepAlive, "memory-8k-keepalive"),
];

fn on_route(
    route: Route,
    load: Load,
    row: &'static str,
    selection: &Selection,
    budget: &Budget,
    report: &mut Report,
) -> Result<()> {
    let cluster = start_cluster()?;
    let server_node = match route {
        Route::Across => 1,
        Route::SameNode => 0,
    };
    let specs = [
        PodSpec::new("client").on(0),
        PodSpec::new("server").on(server_node),
    ];
    let pods = add_pods(&cluster, specs)?;
    let [client, server] = pods.as_slice() else {
        anyhow::bail!("two pods were asked for");
    };
    let agents = &cluster.nodes()[..=server_node];
    let idle = largest_settled(agents)?;
    if route == Route::Across && load == Load::Flows && selection.needs(Load::Idle) {
        budget.tell(&format!("an idle agent holds {:.1} MiB", idle / MIB));
        report.add(route, "memory-idle", None, idle / MIB);
    }
    if selection.needs(load) {
        let count = flows()?;
        let http = load == Load::KeepAlive;
        let bytes = with_flows(http, count, client, server, agents)?;
        let what = if http {
            "kept connections of HTTP/1"
        } else {
            "idle flows"
        };
        let line = format!(
            "{}: {count} {what}, as the descriptor limit allows, take the larger agent from {:.1} to \
             {:.1} MiB: {:.1} kB each",
            route.name(),
            idle / MIB,
            bytes / MIB,
            (bytes - idle) / f64::from(count) / 1000.0
        );
        budget.tell(&line);
        report.note(format!("{row}, {line}."));
        report.add(route, row, None, bytes / MIB);
    }
    Ok(())
}

/// The memory of the larger agent while so many flows are open, in bytes.
fn with_flows(http: bool, count: u32, client: &Pod, server: &Pod, agents: &[Node]) -> Result<f64> {
    let (_server, port) = match http {
        true => (start_nginx(server)?, exchange_port(Protocol::Http1)),
        false => (start_echo(server)?, ECHO_PORT),
    };
    let mut hold = own_command(client, "hold")?
        .arg(format!("{}:{port}", server.v4()))
        .args(["--count", &count.to_string()])
        .args(http.then_some("--http"))
        .with_stdin()
        .spawn()?;
    let line = hold.wait_for_line("held", Duration::from_secs(60))?;
    let held: Held = serde_json::from_str(&line)?;
    ensure!(
        held.held == count,
        "only {} of {count} flows were opened: {}",
        held.held,
        hold.stderr()
    );
    let bytes = largest_settled(agents)?;
    hold.finish(Duration::from_secs(30))?;
    Ok(bytes)
}

#[derive(Deserialize)]
struct Held {
    held: u32,
}

/// How many flows this machine's descriptor limit allows, at most 8,000. On one node a flow takes
/// two of the agent's descriptors, and something is left for everything else.
fn flows() -> Result<u32> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(u32::try_from(hard * 2 / 5).unwrap_or(u32::MAX).min(8000))
}

/// The memory of the largest of these agents, in bytes, when it has stopped to change.
pub(crate) fn largest_settled(agents: &[Node]) -> Result<f64> {
    let mut largest = 0.0_f64;
    for agent in agents {
        let pid = agent.agent_pid().context("the agent does not run")?;
        largest = largest.max(settled(pid)?);
    }
    Ok(largest)
}

/// Waits until the memory has been the same for a while, give or take one per cent.
fn settled(pid: u32) -> Result<f64> {
    let mut before = resident_bytes(pid)?;
    let mut same = 0;
    wait_for(
        "the agent's memory to settle",
        Duration::from_secs(10),
        || {
            let now = resident_bytes(pid)?;
            same = if now.abs_diff(before) <= before / 100 {
                same + 1
            } else {
                0
            };
            before = now;
            // Steps of the waiting are 50 ms.
            Ok((same >= 20).then_some(now as f64))
        },
    )
}
