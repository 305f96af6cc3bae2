//! Everything at once for long: traffic of several kinds, pods that come and go, certificates of
//! twenty seconds, roots that change, and one node's agent replaced again and again by one with another
//! layout of the kernel's maps. The other node's agent and the controller live through it all, and
//! their memory must be flat.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_tests::checks::{figure, report};
use weft_tests::scenario::expect_echo;
use weft_tests::testapp::{self, Counts, Load, Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, run, wait_for};

use crate::held::{Held, resident_mib};
use crate::random::Random;
use crate::{churn, rotation};

#[test]
#[ignore = "half an hour: cargo xtask soak soak"]
fn soak() {
    let cluster = Cluster::with(ClusterOptions {
        controller_args: ["--leaf-lifetime", "20s"].map(Into::into).to_vec(),
        agent_args: ["--drain-deadline", "5s"].map(Into::into).to_vec(),
        alternate_layouts: true,
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let mut checks = Checks::new("soak");
    checks.check("everything at once for long", || soaked(&cluster));
    checks.finish();
    let name = cluster.name().to_owned();
    drop(cluster);
    assert_eq!(
        run::remains(&name),
        Vec::<String>::new(),
        "nothing may be left"
    );
}

fn soaked(cluster: &Cluster) -> Result<()> {
    let add = |spec| cluster.add_pod(spec);
    let client = add(PodSpec::new("client").on(0))?;
    let near = add(PodSpec::new("near").on(0))?;
    let server = add(PodSpec::new("server").on(1))?;
    let plain = add(PodSpec::new("plain").on(0).unmeshed())?;
    let echo = |pod, port| Server::start(pod, port, "echo", &["--quiet"]);
    let _apps = [
        echo(&server, 7700)?,
        echo(&server, 7800)?,
        echo(&near, 7700)?,
        echo(&client, 7700)?,
    ];
    let mut random = Random::new("soak");
    // As long as an agent lives that nobody replaces, its flows do.
    let long = Pulse::start(&server, server.sockets(7700)[0])?;
    let mut traffic = Traffic::start(&client, &near, &server, &plain)?;
    let minutes = minutes()?;
    let (start, mut upgrades, mut roots, mut rounds) = (Instant::now(), 0, 0, 0);
    let mut samples = Vec::new();
    let mut before = None;
    for minute in 0..minutes {
        churn::round(cluster, &mut random, &server, 8)?;
        rounds += 1;
        transfers(&client, [&near, &server])?;
        if minute % 4 == 3 {
            let early = random.below(2) == 0;
            cluster.node(0).take_over(early)?;
            cluster.node(0).wait_left()?;
            cluster.node(0).wait_alone()?;
            upgrades += 1;
        }
        if minute % 9 == 5 {
            rotation::replace_root(cluster, &client, &server)?;
            roots += 1;
        }
        while start.elapsed() < Duration::from_secs(60 * (minute + 1)) {
            std::thread::sleep(Duration::from_secs(2));
            samples.push(memory(cluster)?);
        }
        let latest = samples.last().context("no samples")?;
        report(&format!("soak: minute {}: {latest:.1?} MiB", minute + 1));
        if minute == minutes / 3 {
            // After a pause, as at the end: nothing that is held must be more then.
            traffic.pause()?;
            before = Some(churn::quiet_long(cluster)?);
            traffic.resume()?;
        }
    }
    traffic.pause()?;
    let before = before.context("too short")?;
    let after = churn::quiet_long(cluster)?;
    nothing_more(cluster, &before, after)?;
    let total = traffic.finish()?;
    let end = long.stop()?;
    ensure!(end.outcome == "ok", "the flow on node 1: {end:?}");
    figure("minutes", minutes);
    figure("flows, none failed", total);
    figure("pods that came and went", rounds * 8);
    figure("upgrades of node 0 between two layouts", upgrades);
    figure("issuer and root replaced", roots);
    flat(&samples)
}

/// The kinds of traffic that go on all the time.
struct Traffic<'a> {
    kinds: Vec<(&'static str, &'a Pod, std::net::SocketAddr)>,
    running: Vec<(&'static str, Load)>,
    total: u64,
}

impl<'a> Traffic<'a> {
    fn start(client: &'a Pod, near: &'a Pod, server: &'a Pod, plain: &'a Pod) -> Result<Self> {
        let mut traffic = Traffic {
            kinds: vec![
                ("across", client, server.sockets(7700)[0]),
                ("across, IPv6", near, server.sockets(7700)[1]),
                ("back", server, client.sockets(7700)[0]),
                ("on one node", client, near.sockets(7700)[0]),
                ("from plaintext", plain, near.sockets(7700)[0]),
                ("to itself", near, near.sockets(7700)[1]),
            ],
            running: Vec::new(),
            total: 0,
        };
        traffic.resume()?;
        Ok(traffic)
    }

    fn resume(&mut self) -> Result<()> {
        for (name, from, to) in &self.kinds {
            let args = [
                "--parallel",
                "1",
                "--pause-ms",
                "50",
                "--timeout-ms",
                "8000",
            ];
            self.running.push((name, Load::start(from, *to, &args)?));
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        for (name, load) in self.running.drain(..) {
            let counts: Counts = load.stop()?;
            ensure!(counts.of("ok") == counts.total(), "{name}: {counts:?}");
            self.total += counts.total();
        }
        Ok(())
    }

    fn finish(mut self) -> Result<u64> {
        self.pause()?;
        Ok(self.total)
    }
}

/// Some megabytes there and back.
fn transfers(client: &Pod, servers: [&Pod; 2]) -> Result<()> {
    let args = [
        "--send-bytes",
        "8000000",
        "--half-close",
        "--expect-pattern",
    ];
    for server in servers {
        let done = testapp::connect(client, server.sockets(7700)[0], &args)?;
        ensure!(done.outcome == "ok" && done.intact, "{done:?}");
        expect_echo(server, client.sockets(7700)[1], "and back")?;
    }
    Ok(())
}

/// The resident memory of the agents and the controller.
fn memory(cluster: &Cluster) -> Result<Vec<f64>> {
    let agents = cluster.nodes().iter().map(|node| node.agent_pid());
    let pids = agents.chain([cluster.controller()?.pid()]);
    pids.map(|pid| resident_mib(pid.context("not running")?))
        .collect()
}

/// Compares the medians of the second and the last third.
fn flat(samples: &[Vec<f64>]) -> Result<()> {
    let third = samples.len() / 3;
    let median = |part: &[Vec<f64>], of: usize| {
        let mut values: Vec<f64> = part.iter().map(|it| it[of]).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let mut problems = Vec::new();
    for (of, name) in [
        "agent of node 0 (replaced)",
        "agent of node 1",
        "controller",
    ]
    .into_iter()
    .enumerate()
    {
        let second = median(&samples[third..2 * third], of);
        let last = median(&samples[2 * third..], of);
        figure(
            &format!("memory of the {name}, median of 2nd and 3rd third (MiB)"),
            format!("{second:.1}, {last:.1}"),
        );
        // Each agent of node 0 starts anew, with one of two programs.
        if of != 0 && last > second * FLAT + 1.0 {
            problems.push(format!("{name}: {last:.1} MiB after {second:.1}"));
        }
    }
    ensure!(problems.is_empty(), "memory grows: {problems:?}");
    Ok(())
}

/// What node 1 and the controller hold, and the kernel on both, soon is no more than before: at any one moment somebody may
/// be asking for metrics, or for a certificate.
fn nothing_more(cluster: &Cluster, before: &Held, after: Held) -> Result<()> {
    report(&format!("soak: after a third: {before}"));
    report(&format!("soak: at the end:    {after}"));
    // Node 0 has another agent by now; in the kernel it has what the one before had.
    let of_process =
        ["descriptors", "threads", "tasks", "series"].map(|it| format!("{it} of n0: "));
    let mut after = Some(after);
    wait_for("nothing more to be held", PATIENCE, || {
        let held = match after.take() {
            Some(held) => held,
            None => Held::by(cluster)?,
        };
        let mut more = held.more_than(before, 0);
        more.retain(|it| !of_process.iter().any(|own| it.starts_with(own)));
        ensure!(more.is_empty(), "{more:#?}");
        Ok(Some(()))
    })
}

/// How long: `WEFT_SOAK_MINUTES`, or half an hour.
fn minutes() -> Result<u64> {
    match std::env::var("WEFT_SOAK_MINUTES") {
        Ok(text) => text.parse().context("WEFT_SOAK_MINUTES"),
        Err(_) => Ok(30),
    }
}

/// The last third may have so many times what the second had, and a MiB.
const FLAT: f64 = 1.05;
/// How long what is held for a moment may be held.
const PATIENCE: Duration = Duration::from_secs(60);
