//! Certificates of seconds, and another issuer and root, under load.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weft_tests::checks::figure;
use weft_tests::cluster::Node;
use weft_tests::hbone::Attempt;
use weft_tests::pki::Authority;
use weft_tests::scenario::{Watch, expect_echo};
use weft_tests::testapp::{LOAD_TEXT, Load, Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, wait_for};

use crate::{extent, is_long};

#[test]
fn rotation() {
    let cluster = Cluster::with(ClusterOptions {
        controller_args: vec!["--leaf-lifetime".into(), "20s".into()],
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let client = add(PodSpec::new("client").on(0));
    let server = add(PodSpec::new("server").on(1));
    let _app = Server::start(&server, 7800, "echo", &["--quiet"]).expect("a server");
    let mut checks = Checks::new("rotation");
    checks.check("certificates of twenty seconds, under load", || {
        short_lived(&cluster, &client, &server)
    });
    checks.check("issuer and root are replaced under load", || {
        replaced(&cluster, &client, &server)
    });
    checks.finish();
}

/// In the long form issuer and root are replaced meanwhile, some times.
fn short_lived(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let target = server.sockets(7800)[0];
    let watch = Watch::start_short(cluster, &[client, server])?;
    let mut pulse = Pulse::start(client, target)?;
    // For ten minutes a load that leaves the machine some air.
    let pause = extent("5", "20");
    let args = ["--timeout-ms", "8000", "--pause-ms", pause];
    let load = Load::start(client, target, &args)?;
    let start = Instant::now();
    let mut last = f64::MAX;
    let mut roots = 0;
    while start.elapsed() < extent(Duration::from_secs(22), Duration::from_secs(600)) {
        if is_long() && start.elapsed() > (roots + 1) * ROOTS_LAST {
            // What began under the old root does not outlive it.
            let end = pulse.stop()?;
            ensure!(end.outcome == "ok", "{end:?}");
            replace_root(cluster, client, server)?;
            roots += 1;
            pulse = Pulse::start(client, target)?;
        }
        std::thread::sleep(Duration::from_millis(500));
        for node in cluster.nodes() {
            last = last.min(shortest_life(node)?);
        }
    }
    let counts = load.stop()?;
    ensure!(counts.of("ok") == counts.total(), "{counts:?}");
    let end = pulse.stop()?;
    ensure!(end.outcome == "ok", "{end:?}");
    figure("seconds with leaves of 20 s", start.elapsed().as_secs());
    figure("issuer and root replaced meanwhile", roots);
    figure("flows meanwhile, none failed", counts.total());
    figure(
        "shortest life that a certificate had left (s)",
        format!("{last:.1}"),
    );
    ensure!(last > 1.0, "a certificate was hardly valid: {last} s");
    watch
        .capture_only()?
        .ensure_only_tunnels(&[client, server].map(Pod::addresses).concat())
}

fn replaced(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let target = server.sockets(7800)[0];
    let watch = Watch::start(cluster, &[client, server])?;
    let load = Load::start(client, target, &["--timeout-ms", "8000"])?;
    replace_root(cluster, client, server)?;
    std::thread::sleep(Duration::from_secs(1));
    let counts = load.stop()?;
    ensure!(counts.of("ok") == counts.total(), "{counts:?}");
    watch.finish_encrypted(&[LOAD_TEXT])?;
    // Whoever starts anew knows nothing of the old root.
    cluster.node(0).kill_agent()?;
    cluster.node(0).start_agent()?;
    expect_echo(client, target, "a new agent").map(drop)
}

/// Replaces issuer and root; what is open under the new ones goes on.
pub(crate) fn replace_root(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let target = server.sockets(7800)[0];
    let dir = cluster.controller()?.ca_dir();
    let old = Authority::of_cluster(dir)?;
    let old_root = std::fs::read_to_string(dir.join("ca.crt"))?;
    let new = Authority::foreign()?;
    // First everybody trusts both,
    replace(dir, "ca.crt", &format!("{old_root}{}", new.pem()))?;
    wait_roots(cluster, 2)?;
    let identity = client.identity();
    let is_served = |by: &Authority| {
        let attempt = Attempt::hbone(target, by.sign(&identity)?).sending(b"hello");
        attempt.run(cluster.node(0).netns())
    };
    ensure!(is_served(&old)?.status == 200 && is_served(&new)?.status == 200);
    // then certificates come from the new one,
    new.write(dir)?;
    let issuer = new.name()?;
    wait_for("all certificates to be the new issuer's", PATIENCE, || {
        let shown = is_served(&old)?.server_certificate;
        Ok((weft_tests::pki::issuer(&shown)? == issuer).then_some(()))
    })?;
    // (all others are renewed within half of their life, too; and a connection that was made with the
    // server's old one takes new flows until the client's next certificate)
    std::thread::sleep(Duration::from_secs(24));
    let pulse = Pulse::start(client, target)?;
    // and then the old root is no longer trusted.
    replace(dir, "ca.crt", new.pem())?;
    wait_roots(cluster, 1)?;
    wait_for("the old root to be gone", Duration::from_secs(5), || {
        Ok(is_served(&old).is_err().then_some(()))
    })?;
    ensure!(is_served(&new)?.status == 200, "the new one is trusted");
    expect_echo(client, target, "after all that")?;
    let end = pulse.stop()?;
    ensure!(end.outcome == "ok", "a flow under the new root: {end:?}");
    Ok(())
}

/// How long the certificate that ends first is still valid, in seconds.
fn shortest_life(node: &Node) -> Result<f64> {
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH)?;
    let metrics = node.metrics()?;
    let ends = metrics.find("identity_cert_expiration_timestamp_seconds", &[]);
    let first = ends.map(|it| it.value).reduce(f64::min);
    Ok(first.context("no certificates")? - now.as_secs_f64())
}

/// Waits until all agents have so many roots in force.
fn wait_roots(cluster: &Cluster, count: usize) -> Result<()> {
    let last = format!("trust bundle in force roots={count}");
    wait_for("the roots to be in force", PATIENCE, || {
        let in_force = cluster.nodes().iter().all(|node| {
            let log = node.agent_log();
            let line = log.lines().rfind(|it| it.contains("trust bundle in force"));
            line.is_some_and(|it| it.contains(&last))
        });
        Ok(in_force.then_some(()))
    })
}

/// As who mounts a Secret does it: the file is there as a whole.
fn replace(dir: &Path, name: &str, content: &str) -> Result<()> {
    let temporary = dir.join(format!(".{name}.test"));
    std::fs::write(&temporary, content)?;
    std::fs::rename(temporary, dir.join(name))?;
    Ok(())
}

/// From one replacement of issuer and root to the next one, in the long form.
const ROOTS_LAST: Duration = Duration::from_secs(110);
const PATIENCE: Duration = Duration::from_secs(30);
