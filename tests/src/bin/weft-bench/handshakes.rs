//! A node with 100 pods: what its agent holds, and how fast it makes tunnels.
//!
//! A tunnel is made for the first flow between two pods. So new client pods each open one flow to
//! every one of the 100 servers, all at once: every flow is a TLS handshake with certificates on
//! both sides, between the shipped agents.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Deserialize;
use weft_tests::command::Process;
use weft_tests::{Cluster, Pod, PodSpec};

use crate::budget::Budget;
use crate::memory::largest_settled;
use crate::report::Report;
use crate::rows::{Load, Route, Selection};
use crate::speed::MIB;
use crate::stage::{ECHO_PORT, PATIENCE, add_pods, own_command, start_cluster, start_echo};

/// Measures the rows of this kind that are asked for.
pub(crate) fn measure(selection: &Selection, budget: &Budget, report: &mut Report) {
    let asked_for = selection.needs(Load::Pods) || selection.needs(Load::Handshakes);
    if !asked_for || !selection.routes().contains(&Route::Across) {
        return;
    }
    if let Err(error) = on_node(selection, budget, report) {
        budget.tell(&format!("the node with 100 pods failed: {error:#}"));
        report.fail("a node with 100 pods", &error);
    }
}

fn on_node(selection: &Selection, budget: &Budget, report: &mut Report) -> Result<()> {
    budget.tell(&format!(
        "a node with {PODS} pods, each with its own identity"
    ));
    let cluster = start_cluster()?;
    let specs = (0..PODS).map(|number| PodSpec::new(&format!("server-{number}")).on(1));
    let servers = add_pods(&cluster, specs)?;
    if selection.needs(Load::Pods) {
        let bytes = largest_settled(&cluster.nodes()[1..])?;
        budget.tell(&format!("its agent holds {:.1} MiB", bytes / MIB));
        report.add(Route::Across, "memory-100-pods", None, bytes / MIB);
    }
    if selection.needs(Load::Handshakes) {
        let echoes: Vec<Process> = servers.iter().map(start_echo).collect::<Result<_>>()?;
        for repetition in 0..budget.runs {
            let rate = handshakes(&cluster, &servers, repetition, budget.handshake_clients)?;
            budget.tell(&format!("{rate:.0} tunnels a second"));
            report.add(Route::Across, "handshakes", None, rate);
        }
        drop(echoes);
    }
    Ok(())
}

/// How many tunnels a second are made when new clients connect to all servers.
fn handshakes(cluster: &Cluster, servers: &[Pod], repetition: u32, clients: usize) -> Result<f64> {
    let specs = (0..clients).map(|number| {
        let name = format!("client-{repetition}-{number}");
        PodSpec::new(&name).on(0)
    });
    let pods = add_pods(cluster, specs)?;
    let targets: Vec<String> = servers
        .iter()
        .map(|server| format!("{}:{ECHO_PORT}", server.v4()))
        .collect();
    let mut processes = Vec::new();
    for pod in &pods {
        let mut process = own_command(pod, "each")?
            .args(&targets)
            .with_stdin()
            .spawn()?;
        process.wait_for_line("ready", PATIENCE)?;
        processes.push(process);
    }
    for process in &mut processes {
        process.close_stdin();
    }
    let mut longest = 0.0_f64;
    let mut opened = 0;
    for process in processes {
        let printed = process.finish(Duration::from_secs(60))?;
        let last = printed.lines().last().unwrap_or_default();
        let result: EachResult = serde_json::from_str(last)?;
        opened += result.opened;
        longest = longest.max(result.seconds);
    }
    let expected = pods.len() * servers.len();
    ensure!(
        opened == expected,
        "only {opened} of {expected} tunnels were made"
    );
    for pod in pods {
        cluster.remove_pod(pod)?;
    }
    Ok(opened as f64 / longest)
}

#[derive(Deserialize)]
struct EachResult {
    opened: usize,
    seconds: f64,
}

const PODS: usize = 100;
