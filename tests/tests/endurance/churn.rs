//! Pods that come and go in every order while traffic flows, and what is left of them: nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_tests::checks::report;
use weft_tests::cluster::Node;
use weft_tests::scenario::expect_echo;
use weft_tests::testapp::{self, Load, Server};
use weft_tests::{Checks, Cluster, Pod, PodSpec, run, wait_for};

use crate::extent;
use crate::random::Random;

#[test]
fn churn() {
    let cluster = Cluster::start().expect("a cluster");
    let mut checks = Checks::new("churn");
    checks.check("pods come and go while traffic flows", || {
        come_and_go(&cluster)
    });
    checks.finish();
    let name = cluster.name().to_owned();
    drop(cluster);
    assert_eq!(
        run::remains(&name),
        Vec::<String>::new(),
        "nothing may be left"
    );
}

fn come_and_go(cluster: &Cluster) -> Result<()> {
    let client = cluster.add_pod(PodSpec::new("client").on(0))?;
    let server = cluster.add_pod(PodSpec::new("server").on(1))?;
    let _app = Server::start(&server, 7700, "echo", &["--quiet"])?;
    let target = server.sockets(7700)[0];
    let mut random = Random::new("churn");
    // The first round fills what stays: buffers, threads, tables that have grown.
    let load = Load::start(&client, target, &["--timeout-ms", "8000"])?;
    round(cluster, &mut random, &server, extent(16, 60))?;
    wait_for("the first pods to be gone", Duration::from_secs(40), || {
        let held = settled(cluster)?;
        let gone = |it: &Held| it.series.is_empty() && it.entries.get("PODS") == Some(&1.0);
        ensure!(held.iter().all(gone), "{held:?}");
        Ok(Some(()))
    })?;
    let before = settled(cluster)?;
    for _ in 0..extent(3, 8) {
        round(cluster, &mut random, &server, extent(16, 60))?;
    }
    let counts = load.stop()?;
    ensure!(counts.of("ok") == counts.total(), "{counts:?}");
    // What counts is that it comes back, however long sockets linger.
    let mut last = Vec::new();
    let back = wait_for("nothing to be left", Duration::from_secs(40), || {
        last = settled(cluster)?;
        ensure!(same(&before, &last), "it is not as it was before");
        Ok(Some(()))
    });
    report(&format!("churn: before {before:?}"));
    report(&format!("churn: after  {last:?}"));
    back
}

/// Pods come, talk, and go in another order, some without a word to anybody.
fn round(cluster: &Cluster, random: &mut Random, server: &Pod, count: u64) -> Result<()> {
    let mut pods = Vec::new();
    for number in 0..count {
        let host = 30 + u8::try_from(number)?;
        let node = (number % 2) as usize;
        // Series of identities stay: there are as many as service accounts, not as pods.
        let spec = PodSpec::new(&format!("churn-{number}")).service_account("visitor");
        let spec = spec.on(node).host(host);
        let pod = cluster.build_pod(spec)?;
        cluster.announce(&pod)?;
        pods.push(pod);
        // Some leave before the last have come, perhaps before they were enrolled.
        if random.below(4) == 0 {
            let at = random.below(pods.len() as u64) as usize;
            cluster.remove_pod(pods.swap_remove(at))?;
        }
    }
    random.shuffle(&mut pods);
    for pod in pods.iter().take(6) {
        cluster.wait_enrolled(pod)?;
        let _app = Server::start(pod, 7701, "echo", &["--quiet"])?;
        expect_echo(pod, server.sockets(7700)[0], "from a pod that will go")?;
        expect_echo(server, pod.sockets(7701)[0], "to a pod that will go")?;
    }
    // Half of them go while they talk.
    for pod in pods {
        let args = ["--send", "last words", "--timeout-ms", "20"];
        let talk = random.below(2) == 0;
        if talk {
            let _ = testapp::connect(&pod, server.sockets(7700)[0], &args)?;
        }
        if random.below(3) == 0 {
            // The namespace goes before the description.
            let manifest = pod.manifest();
            pod.delete()?;
            cluster.remove(&manifest)?;
        } else {
            cluster.remove_pod(pod)?;
        }
    }
    Ok(())
}

/// What an agent holds.
#[derive(Clone, Debug)]
struct Held {
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    entries: BTreeMap<String, f64>,
    /// Series that name a pod that came and went.
    series: Vec<String>,
    memory_mib: f64,
}

fn settled(cluster: &Cluster) -> Result<Vec<Held>> {
    cluster.nodes().iter().map(held).collect()
}

fn held(node: &Node) -> Result<Held> {
    let pid = node.agent_pid().context("no agent")?;
    let mut descriptors = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let link = std::fs::read_link(entry?.path()).unwrap_or_default();
        let text = link.to_string_lossy();
        let kind = text.split(':').next().unwrap_or_default().to_owned();
        *descriptors.entry(kind).or_default() += 1;
    }
    let metrics = node.metrics()?;
    let entries = metrics
        .find("weft_map_entries", &[])
        .filter_map(|it| Some((it.labels.get("map")?.clone(), it.value)))
        .collect();
    Ok(Held {
        descriptors,
        threads: std::fs::read_dir(format!("/proc/{pid}/task"))?.count(),
        entries,
        series: metrics
            .samples()
            .iter()
            .filter(|it| it.labels.values().any(|value| value.contains("churn-")))
            .map(|it| format!("{it:?}"))
            .collect(),
        memory_mib: (node.agent_resident_bytes()? >> 10) as f64 / 1024.0,
    })
}

/// Whether no more is held than before. The pods that stay have a few sockets that come and go.
fn same(before: &[Held], after: &[Held]) -> bool {
    let of = |held: &Held, kind: &str| held.descriptors.get(kind).copied().unwrap_or(0);
    before.iter().zip(after).all(|(before, after)| {
        let stays = [
            "PODS",
            "OWN_ADDRESSES",
            "LISTENERS",
            "PROBES",
            "PENDING",
            "REFUSED",
        ];
        of(after, "net") <= of(before, "net")
            && of(after, "/proc/") <= of(before, "/proc/")
            && of(after, "anon_inode") <= of(before, "anon_inode")
            && of(after, "socket") <= of(before, "socket") + 8
            && after.threads <= before.threads + 4
            && stays
                .iter()
                .all(|map| after.entries.get(*map) <= before.entries.get(*map))
            && after.series.is_empty()
            && after.memory_mib <= before.memory_mib * 1.25 + 8.0
    })
}
