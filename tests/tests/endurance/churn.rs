//! Pods that come and go in every order while traffic flows, and what is left of them: nothing.

use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::checks::{figure, report};
use weft_tests::cluster::Node;
use weft_tests::scenario::expect_echo;
use weft_tests::testapp::{self, Load, Server};
use weft_tests::{Checks, Cluster, Pod, PodSpec, run, wait_for};

use crate::held::Held;
use crate::random::Random;
use crate::{extent, is_long};

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
    let mut phase = |rounds: u64, count: u64| {
        let load = Load::start(&client, target, &["--timeout-ms", "8000"])?;
        for _ in 0..rounds {
            round(cluster, &mut random, &server, count)?;
        }
        let counts = load.stop()?;
        ensure!(counts.of("ok") == counts.total(), "{counts:?}");
        figure("flows meanwhile, none failed", counts.total());
        quiet(cluster)
    };
    // The first round fills what stays: buffers, threads, tables that have grown.
    let (rounds, count) = extent((3, 16), (5, 50));
    let before = phase(extent(1, 2), count)?;
    report(&format!("churn: before: {before}"));
    let once = phase(rounds, count)?;
    report(&format!("churn: after:  {once}"));
    let once = nothing_more(cluster, &before, once)?;
    if is_long() {
        // As much again, and if need be once more: what is held for good was allocated before, and what
        // leaks, leaks each time.
        let mut last = once;
        let mut pods = (rounds + 2) * count;
        for attempts_left in [1, 0] {
            let again = phase(rounds, count)?;
            pods += rounds * count;
            report(&format!("churn: again:  {again}"));
            let again = nothing_more(cluster, &last, again)?;
            let (then, now) = (last.memory(), again.memory());
            figure(
                &format!(
                    "memory before and after {} pods (agents, controller; MiB)",
                    rounds * count
                ),
                format!("{then:.1?}, {now:.1?}"),
            );
            let grown = then.iter().zip(&now).map(|(then, now)| now - then);
            let most = grown.fold(0.0, f64::max);
            if most <= MEMORY_NOISE_MIB {
                break;
            }
            ensure!(attempts_left > 0, "{most:.1} MiB more, again");
            last = again;
        }
        figure("pods", pods);
    } else {
        let memory = before.memory();
        let memory = memory.iter().zip(once.memory());
        for (before, after) in memory {
            ensure!(after <= before * 1.25 + 8.0, "{after} MiB, {before} before");
        }
    }
    Ok(())
}

/// What is held when all pods have gone, and in the long form when tunnels that are kept for the next
/// flow have closed too.
fn quiet(cluster: &Cluster) -> Result<Held> {
    wait_for("the pods to be gone", Duration::from_secs(60), || {
        let held = Held::by(cluster)?;
        let gone = !held.mentions("churn-") && cluster.nodes().iter().all(is_settled);
        ensure!(gone, "{held}");
        Ok(Some(()))
    })?;
    if is_long() {
        std::thread::sleep(TUNNELS_IDLE);
    }
    Held::by(cluster)
}

/// Whether a node has in the kernel's maps just the pods that are described.
fn is_settled(node: &Node) -> bool {
    let metrics = node.metrics();
    metrics.is_ok_and(|it| {
        it.sum("weft_map_entries", &[("map", "PODS")]) == it.sum("weft_pods_enrolled", &[])
    })
}

/// The same, always with the pause.
pub(crate) fn quiet_long(cluster: &Cluster) -> Result<Held> {
    std::thread::sleep(TUNNELS_IDLE);
    quiet(cluster)
}

/// Fails unless there soon is no more than before. What counts is that it comes back, however long
/// sockets linger.
fn nothing_more(cluster: &Cluster, before: &Held, now: Held) -> Result<Held> {
    // Without the pause tunnels of the load are still open, and more or fewer than before.
    let slack = extent(12, 0);
    let mut now = Some(now);
    wait_for("nothing to be left", 2 * TUNNELS_IDLE, || {
        let held = match now.take() {
            Some(held) => held,
            None => Held::by(cluster)?,
        };
        let more = held.more_than(before, slack);
        ensure!(more.is_empty(), "{more:#?}");
        Ok(Some(held))
    })
}

/// A tunnel is closed when it was unused for 90 seconds.
const TUNNELS_IDLE: Duration = Duration::from_secs(100);
/// How much the memory of a process may differ between two moments when it holds the same.
const MEMORY_NOISE_MIB: f64 = 2.0;

/// Pods come, talk, and go in another order, some without a word to anybody.
pub(crate) fn round(
    cluster: &Cluster,
    random: &mut Random,
    server: &Pod,
    count: u64,
) -> Result<()> {
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
