//! What a flood of one pod costs its neighbour on the same node: the 99th percentile of paced
//! requests through the mesh, alone and beside each kind of flood. And what a pod that is merely busy loses
//! when there is a neighbour: the agents must tell the two apart.
//!
//! Client, servers, flood and agents share the CPUs of one machine, so a flood costs even without a
//! mesh: the kernel divides the CPU between them. A note says what the same flood does to the same
//! pods outside of the mesh.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use weft_tests::command::{Process, Program};
use weft_tests::{Cluster, Pod, PodSpec, cgroup};

use crate::budget::Budget;
use crate::load;
use crate::report::Report;
use crate::rows::{Load, Route, Selection};
use crate::stage::{ECHO_PORT, HTTP_PORT, PATIENCE, Pair, add_pods, own_command, start_cluster};

/// Measures the rows of this kind that are asked for.
pub(crate) fn measure(selection: &Selection, budget: &Budget, report: &mut Report) {
    if !selection.needs(Load::Fairness) {
        return;
    }
    for route in selection.routes() {
        if let Err(error) = on_route(route, selection, budget, report) {
            let what = format!("fairness, {}", route.name());
            budget.tell(&format!("{what} failed: {error:#}"));
            report.fail(&what, &error);
        }
    }
}

fn on_route(
    route: Route,
    selection: &Selection,
    budget: &Budget,
    report: &mut Report,
) -> Result<()> {
    let cluster = start_cluster()?;
    let meshed = Scene::set(&cluster, route, "meshed", |spec| spec)?;
    let direct = Scene::set(&cluster, route, "direct", PodSpec::unmeshed)?;
    for (row, kind, workers) in FLOODS {
        if !selection.has(row) {
            continue;
        }
        let mut times_direct = Vec::new();
        for _ in 0..budget.runs {
            let [alone, beside] = meshed.compare(kind, workers, budget)?;
            let [direct_alone, direct_beside] = direct.compare(kind, workers, budget)?;
            let times = direct_beside.p99_us / direct_alone.p99_us;
            times_direct.push(times);
            budget.tell(&format!(
                "{:<9} {row} {:.0} -> {:.0} µs, {:.1} times (median {:.0} -> {:.0}); without a mesh {:.0} -> {:.0} µs, {times:.1} times",
                route.name(),
                alone.p99_us,
                beside.p99_us,
                beside.p99_us / alone.p99_us,
                alone.p50_us,
                beside.p50_us,
                direct_alone.p99_us,
                direct_beside.p99_us,
            ));
            report.add(route, row, Some(alone.p99_us), beside.p99_us);
        }
        times_direct.sort_by(f64::total_cmp);
        if let Some(median) = times_direct.get(times_direct.len() / 2) {
            report.note(format!(
                "{row}, {}: without a mesh the same flood makes it {median:.1} times as long.",
                route.name()
            ));
        }
    }
    for (row, load) in BUSY {
        if !selection.has(row) {
            continue;
        }
        let group = cgroup::run_root(cluster.name())?;
        for _ in 0..budget.runs {
            let [alone, beside] = meshed.busy(load, &group, budget)?;
            budget.tell(&format!(
                "{:<9} {row} {alone:.1} -> {beside:.1}",
                route.name()
            ));
            report.add(route, row, Some(alone), beside);
        }
    }
    Ok(())
}

/// A client with its server, and on the client's node a pod that floods another server.
struct Scene {
    _nginx: [Process; 2],
    _echo: Process,
    client: Pod,
    server: Pod,
    flooder: Pod,
    flooded: Pod,
}

impl Scene {
    fn set(
        cluster: &Cluster,
        route: Route,
        name: &str,
        also: fn(PodSpec) -> PodSpec,
    ) -> Result<Self> {
        let server_node = match route {
            Route::Across => 1,
            Route::SameNode => 0,
        };
        let pod = |role: &str, node| {
            let spec = also(PodSpec::new(&format!("{name}-{role}")).on(node));
            add_pods(cluster, [spec])?.pop().context("a pod")
        };
        let client = pod("client", 0)?;
        let flooder = pod("flooder", 0)?;
        let server = pod("server", server_node)?;
        let flooded = pod("flooded", server_node)?;
        let nginx = [&server, &flooded].map(crate::stage::start_nginx);
        let [near, far] = nginx;
        let mut echo = own_command(&flooded, "serve")?
            .args(["--listen", &format!("0.0.0.0:{ECHO_PORT}")])
            .args(["--block-bytes", "16384"])
            .spawn()?;
        echo.wait_listening(ECHO_PORT)?;
        Ok(Self {
            _nginx: [near?, far?],
            _echo: echo,
            client,
            server,
            flooder,
            flooded,
        })
    }

    /// How long requests take alone and beside a flood.
    fn compare(&self, kind: &str, workers: usize, budget: &Budget) -> Result<[Latency; 2]> {
        let alone = self.latency(budget)?;
        let mut flood = own_command(&self.flooder, "flood")?
            .arg(format!("{}:{ECHO_PORT}", self.flooded.v4()))
            .args(["--kind", kind])
            .args(["--workers", &workers.to_string()])
            .with_stdin()
            .spawn()?;
        flood.wait_for_line("flooding", Duration::from_secs(60))?;
        let beside = self.latency(budget)?;
        flood.finish(PATIENCE)?;
        Ok([alone, beside])
    }

    fn latency(&self, budget: &Budget) -> Result<Latency> {
        let seconds = budget.latency_seconds;
        let printed = self
            .requests(seconds)?
            .output(Duration::from_secs(seconds.into()) + PATIENCE)?
            .success()?;
        Ok(serde_json::from_str(&printed)?)
    }

    /// What a busy pod gets done, alone and beside the client, which is there before and after.
    fn busy(&self, load: Load, group: &Path, budget: &Budget) -> Result<[f64; 2]> {
        let pair = Pair {
            client: &self.flooder,
            server: &self.flooded,
        };
        let done = || -> Result<f64> {
            let measured = load::run(load, pair, group, budget)?;
            let value = measured.values.first().context("nothing was measured")?;
            Ok(value.1)
        };
        // Whoever was beside it must have been gone for a while.
        std::thread::sleep(QUIET);
        let alone = done()?;
        let longer = budget.request_seconds.max(budget.bulk_seconds) * 2;
        let mut neighbour = self.requests(longer)?.spawn()?;
        let beside = done()?;
        ensure!(neighbour.is_running(), "the neighbour has left");
        neighbour.kill()?;
        Ok([alone, beside])
    }

    fn requests(&self, seconds: u32) -> Result<Program> {
        Ok(own_command(&self.client, "latency")?
            .arg(format!("{}:{HTTP_PORT}", self.server.v4()))
            .args(["--seconds", &seconds.to_string()]))
    }
}

#[derive(Deserialize)]
struct Latency {
    p50_us: f64,
    p99_us: f64,
}

/// Row, kind and how many do it at once.
const FLOODS: [(&str, &str, usize); 3] = [
    ("fairness-connections", "connections", 64),
    ("fairness-stalled", "stalled", 2000),
    ("fairness-bulk", "bulk", 64),
];
/// For longer than agents take a pod for one that is served.
const QUIET: Duration = Duration::from_secs(3);
/// What a pod does that is busy.
const BUSY: [(&str, Load); 2] = [
    ("busy-requests-32", Load::Requests(32)),
    ("busy-bulk-8", Load::Bulk(8)),
];
