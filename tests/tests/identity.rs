//! Identities: who gets certificates, how they are renewed, and that nobody talks to a stranger.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use weft_tests::command::Process;
use weft_tests::hbone::Attempt;
use weft_tests::metrics::wait_for_metric;
use weft_tests::pki::{Authority, Identity, serial};
use weft_tests::scenario::{Watch, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Pulse, Server};
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, wait_for};

#[test]
fn identities() {
    let cluster = Cluster::start().expect("a cluster");
    let client = cluster
        .add_pod(PodSpec::new("client").on(0))
        .expect("a pod");
    let server = cluster
        .add_pod(PodSpec::new("server").on(1))
        .expect("a pod");
    let mut checks = Checks::new("identity");
    checks.check("files of the authority are private", || {
        private_files(&cluster)
    });
    checks.check("no key is ever shown or stored", || no_keys(&cluster));
    checks.check("certificates are in dumps and metrics", || {
        visible(&cluster, &client)
    });
    checks.check("an agent has the identities of its own pods only", || {
        own_only(&cluster, &client, &server)
    });
    impostors(&mut checks, &cluster, &client);
    checks.finish();
}

#[test]
fn renewal() {
    let cluster = Cluster::with(ClusterOptions {
        controller_args: vec!["--leaf-lifetime".into(), "12s".into()],
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let client = cluster
        .add_pod(PodSpec::new("client").on(0))
        .expect("a pod");
    let server = cluster
        .add_pod(PodSpec::new("server").on(1))
        .expect("a pod");
    // Nobody connects to it before certificates have ended.
    let stranger = cluster
        .add_pod(PodSpec::new("stranger").on(1))
        .expect("a pod");
    let mut checks = Checks::new("renewal");
    checks.check("certificates are renewed, and nothing notices", || {
        renewed(&cluster, &client, &server, &stranger)
    });
    checks.finish();
}

fn private_files(cluster: &Cluster) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let dir = cluster.controller()?.ca_dir();
    for (name, forbidden) in [("issuer.key", 0o077), ("", 0o022)] {
        let mode = std::fs::metadata(dir.join(name))?.permissions().mode();
        ensure!(mode & forbidden == 0, "{name:?} has the mode {mode:o}");
    }
    Ok(())
}

fn no_keys(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        let dump = node.config_dump()?.to_string();
        ensure!(
            !dump.contains("PRIVATE KEY"),
            "the dump of {} has a key",
            node.name()
        );
        let log = node.agent_log();
        ensure!(
            !log.contains("PRIVATE KEY"),
            "the log of {} has a key",
            node.name()
        );
        for entry in std::fs::read_dir(node.dir())? {
            let path = entry?.path();
            if path.is_file() {
                let text = std::fs::read(&path)?;
                ensure!(
                    !String::from_utf8_lossy(&text).contains("PRIVATE KEY"),
                    "{} has a key",
                    path.display()
                );
            }
        }
    }
    Ok(())
}

fn visible(cluster: &Cluster, client: &Pod) -> Result<()> {
    let node = cluster.node(0);
    let dump = node.config_dump()?;
    let text = dump
        .get("certificates")
        .context("no certificates in the dump")?
        .to_string();
    ensure!(
        text.contains(&client.identity()),
        "no certificate for the client: {text}"
    );
    let metrics = node.metrics()?;
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)?
        .as_secs_f64();
    let expiry = metrics.sum(EXPIRY, &[("identity", &client.identity())]);
    let left = expiry - now;
    ensure!((22.0..26.0).contains(&(left / 3600.0)), "{left} s are left");
    Ok(())
}

fn own_only(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    for (node, own, foreign) in [(0, client, server), (1, server, client)] {
        let dump = cluster.node(node).config_dump()?;
        let text = dump
            .get("certificates")
            .map(Value::to_string)
            .unwrap_or_default();
        ensure!(
            text.contains(&own.identity()) && !text.contains(&foreign.identity()),
            "{text}"
        );
    }
    Ok(())
}

/// Somebody else answers at the address of a meshed pod: a client's agent must not send a byte.
fn impostors(checks: &mut Checks, cluster: &Cluster, client: &Pod) {
    let victim = cluster
        .add_pod(PodSpec::new("victim").on(1).claimed_by("elsewhere"))
        .expect("a pod");
    let of_cluster = Authority::of_cluster(cluster.controller().expect("a controller").ca_dir())
        .expect("the authority");
    let foreign = Authority::foreign().expect("an authority");
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    let id = victim.identity();
    let other = client.identity();
    let other_domain = id.replace("cluster.local", "other.domain");
    let cases: [(&str, Result<Identity>, bool); 7] = [
        (
            "with the right certificate is no impostor",
            of_cluster.sign(&id),
            true,
        ),
        ("with another identity", of_cluster.sign(&other), false),
        ("of a foreign authority", foreign.sign(&id), false),
        (
            "with an expired certificate",
            of_cluster.sign_expired(&id),
            false,
        ),
        (
            "with a certificate of tomorrow",
            of_cluster.sign_not_yet_valid(&id),
            false,
        ),
        (
            "of another trust domain",
            of_cluster.sign(&other_domain),
            false,
        ),
        (
            "with two identities",
            of_cluster.sign_for(&[&id, &other], now - hour, now + hour),
            false,
        ),
    ];
    for (name, identity, genuine) in cases {
        checks.check(&format!("a server {name}"), || {
            impostor(cluster, client, &victim, &identity?, genuine)
        });
    }
}

fn impostor(
    cluster: &Cluster,
    client: &Pod,
    victim: &Pod,
    identity: &Identity,
    genuine: bool,
) -> Result<()> {
    let _app = Server::start(victim, 7200, "echo", &[])?;
    for target in victim.sockets(7200) {
        let mut tls = tls_server(victim, identity, target.is_ipv6())?;
        let watch = Watch::start(cluster, &[client, victim])?;
        if genuine {
            // It does not speak HTTP/2 back: how this ends is of no interest, only that it began.
            let args = ["--send", "for-the-victim-only", "--timeout-ms", "1000"];
            testapp::connect(client, target, &args)?;
        } else {
            expect_refusal(client, target, "for-the-victim-only")?;
        }
        watch.finish(&["for-the-victim-only"])?;
        tls.stop(Duration::from_secs(5))?;
        let said = tls.stdout();
        // The control: with the right certificate the agent does start to talk, so the others'
        // silence is a decision.
        let began = said.contains("PRI * HTTP/2.0");
        ensure!(
            began == genuine,
            "whether the agent talked: {began}; {said}{}",
            tls.stderr()
        );
        ensure!(
            !said.contains("for-the-victim-only"),
            "a byte of the flow came: {said}"
        );
    }
    if !genuine {
        let metrics = cluster.node(0).metrics()?;
        let count = |reason| {
            metrics.sum(
                "weft_refused_total",
                &[("reason", reason), ("pod", "client")],
            )
        };
        let counted = count("handshake_failed") + count("identity_mismatch");
        ensure!(counted > 0.0, "not counted: {}", metrics.show("refused"));
    }
    Ok(())
}

/// OpenSSL in place of the pod's agent.
fn tls_server(pod: &Pod, identity: &Identity, v6: bool) -> Result<Process> {
    let [chain, key]: [PathBuf; 2] = identity.write(pod.dir())?;
    let mut process = pod
        .command("openssl")?
        .args([
            "s_server",
            if v6 { "-6" } else { "-4" },
            "-accept",
            "15008",
            "-tls1_3",
        ])
        .args(["-alpn", "weft-h2/1,h2", "-Verify", "2"])
        .arg("-cert")
        .arg(&chain)
        .arg("-cert_chain")
        .arg(&chain)
        .arg("-key")
        .arg(&key)
        .with_stdin()
        .spawn()?;
    process.wait_listening(15008)?;
    Ok(process)
}

/// How many of the agents' certificates are still valid.
fn certificates_left(cluster: &Cluster) -> Result<usize> {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)?
        .as_secs_f64();
    let metrics: Vec<_> = cluster
        .nodes()
        .iter()
        .map(|node| node.metrics())
        .collect::<Result<_>>()?;
    let expiries = metrics.iter().flat_map(|metrics| metrics.find(EXPIRY, &[]));
    Ok(expiries.filter(|sample| sample.value > now).count())
}

const EXPIRY: &str = "identity_cert_expiration_timestamp_seconds";

fn renewed(cluster: &Cluster, client: &Pod, server: &Pod, stranger: &Pod) -> Result<()> {
    let _app = Server::start(server, 7201, "echo", &[])?;
    let _other = Server::start(stranger, 7201, "echo", &[])?;
    let target = server.sockets(7201)[0];
    let pulse = Pulse::start(client, target)?;
    let shown = || -> Result<String> {
        let authority = Authority::of_cluster(cluster.controller()?.ca_dir())?;
        let answer = Attempt::hbone(target, authority.sign(&client.identity())?)
            .run(cluster.node(0).netns())?;
        serial(&answer.server_certificate)
    };
    let first = shown()?;
    let second = wait_for(
        "the server's certificate to be renewed",
        Duration::from_secs(20),
        || {
            expect_echo(client, target, "meanwhile")?;
            let now = shown()?;
            Ok((now != first).then_some(now))
        },
    )?;
    wait_for("the next renewal", Duration::from_secs(20), || {
        expect_echo(client, target, "meanwhile")?;
        Ok((shown()? != second).then_some(()))
    })?;
    let end = pulse.stop()?;
    ensure!(end.outcome == "ok", "a renewal broke a flow: {end:?}");
    // Without a controller, certificates end, and with them the talking; nothing goes in the clear.
    // (Not over a tunnel that is open already: the peer was somebody when it was opened.)
    let target = stranger.sockets(7201)[0];
    cluster.controller()?.kill()?;
    let watch = Watch::start(cluster, &[client, stranger])?;
    wait_for("the certificates to end", Duration::from_secs(40), || {
        Ok((certificates_left(cluster)? == 0).then_some(()))
    })?;
    expect_refusal(client, target, "without-a-certificate")?;
    let labels = [("reason", "no_certificate"), ("pod", "client")];
    wait_for_metric(cluster.node(0), "weft_refused_total", &labels, 1.0)?;
    watch.finish(&["without-a-certificate"])?;
    cluster.controller()?.start()?;
    eventually("certificates to be there again", || {
        expect_echo(client, target, "again").map(drop)
    })?;
    wait_for_metric(cluster.node(0), "tcp_open_total", &[("pod", "client")], 1.0).map(drop)
}
