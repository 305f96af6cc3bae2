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
use weft_tests::webapp::HttpServer;
use weft_tests::{Cluster, ClusterOptions, Pod, PodSpec, cgroup};

use crate::budget::Budget;
use crate::load;
use crate::report::Report;
use crate::rows::{Load, Route, Selection};
use crate::stage::{
    ECHO_PORT, HTTP_PORT, PATIENCE, Pair, add_pods, own_command, start_cluster_with,
};

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
    let cluster = start_cluster_with(ClusterOptions {
        // As pods have it in Kubernetes. Else a flood would have as much as it has threads.
        cpu_shares: true,
        ..ClusterOptions::default()
    })?;
    let meshed = Scene::set(&cluster, route, "meshed", |spec| spec)?;
    let direct = Scene::set(&cluster, route, "direct", PodSpec::unmeshed)?;
    for (row, flood) in FLOODS {
        if !selection.has(row) {
            continue;
        }
        let mut times_direct = Vec::new();
        for _ in 0..budget.runs {
            let [alone, beside] = meshed.compare(flood, budget)?;
            let [direct_alone, direct_beside] = direct.compare(flood, budget)?;
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
    /// It reads the bodies that it is sent.
    _web: HttpServer,
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
        let web = HttpServer::start(&flooded, EXCHANGE_PORT, &[])?;
        Ok(Self {
            _nginx: [near?, far?],
            _echo: echo,
            _web: web,
            client,
            server,
            flooder,
            flooded,
        })
    }

    /// How long requests take alone and beside a flood.
    fn compare(&self, flood: Flood, budget: &Budget) -> Result<[Latency; 2]> {
        let alone = self.latency(budget)?;
        let beside = match flood {
            Flood::Echo(kind, workers) => {
                let mut flood = own_command(&self.flooder, "flood")?
                    .arg(format!("{}:{ECHO_PORT}", self.flooded.v4()))
                    .args(["--kind", kind])
                    .args(["--workers", &workers.to_string()])
                    .with_stdin()
                    .spawn()?;
                flood.wait_for_line("flooding", Duration::from_secs(60))?;
                let beside = self.latency(budget)?;
                flood.finish(PATIENCE)?;
                beside
            }
            Flood::Http(script) => {
                let target = format!("{}:{EXCHANGE_PORT}", self.flooded.v4());
                let attack = || -> Result<Process> {
                    weft_tests::testapp::command(&self.flooder)?
                        .args(["attack", "http", &target, script, "--again"])
                        .spawn()
                };
                let mut attackers = [(); ATTACKERS]
                    .map(|()| attack())
                    .into_iter()
                    .collect::<Result<Vec<_>>>()?;
                std::thread::sleep(UNDER_WAY);
                let beside = self.latency(budget)?;
                for attacker in &mut attackers {
                    ensure!(
                        attacker.is_running(),
                        "the flood has ended: {}",
                        attacker.stderr()
                    );
                    attacker.kill()?;
                }
                beside
            }
        };
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

/// What a flood is.
#[derive(Clone, Copy)]
enum Flood {
    /// A kind of the echo server's clients, and how many of them.
    Echo(&'static str, usize),
    /// A script of a client of HTTP, [`ATTACKERS`] of them.
    Http(&'static str),
}

const FLOODS: [(&str, Flood); 7] = [
    ("fairness-connections", Flood::Echo("connections", 64)),
    ("fairness-stalled", Flood::Echo("stalled", 2000)),
    ("fairness-bulk", Flood::Echo("bulk", 64)),
    ("fairness-bodies", Flood::Http("slow bodies")),
    ("fairness-streams", Flood::Http("ten thousand streams")),
    ("fairness-heads", Flood::Http("a head of megabytes")),
    (
        "fairness-continuations",
        Flood::Http("continuations without end"),
    ),
];
/// It is none of those that are declared opaque.
const EXCHANGE_PORT: u16 = 8090;
const ATTACKERS: usize = 4;
/// After this time they are.
const UNDER_WAY: Duration = Duration::from_millis(500);
/// For what was beside it to have ended, and its pod to use little.
const QUIET: Duration = Duration::from_secs(3);
/// What a pod does that is busy.
const BUSY: [(&str, Load); 2] = [
    ("busy-requests-32", Load::Requests(32)),
    ("busy-bulk-8", Load::Bulk(8)),
];
