//! What an operator sees: readiness, dumps, log level, the access log, the control stream's state.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use weft_tests::http::{get_unix, request_unix};
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::Server;
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

#[test]
fn operations() {
    let cluster = Cluster::with(ClusterOptions {
        agent_args: ["--log-format", "json"].map(Into::into).to_vec(),
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let client = cluster
        .add_pod(PodSpec::new("client").on(0))
        .expect("a pod");
    let server = cluster
        .add_pod(PodSpec::new("server").on(1))
        .expect("a pod");
    let mut checks = Checks::new("operations");
    checks.check("one line in the access log for each flow", || {
        access_log(&cluster, &client, &server)
    });
    checks.check("the dump says what is in force", || {
        dump(&cluster, &client, &server)
    });
    checks.check("the socket is for root", || private_socket(&cluster));
    checks.check("the log level can be changed", || log_level(&cluster));
    checks.check("readiness names a pod that cannot be enrolled", || {
        readiness(&cluster)
    });
    checks.check("the state of the control stream is in the metrics", || {
        control_stream(&cluster)
    });
    checks.check("the process and the maps are in the metrics", || {
        process(&cluster)
    });
    checks.finish();
}

fn access_log(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let _app = Server::start(server, 7500, "echo", &[])?;
    let target = server.sockets(7500)[0];
    expect_echo(client, target, "twelve bytes")?;
    expect_refusal(client, server.sockets(7999)[0], "nobody there")?;
    let line = |node: usize, direction: &str, port: u16| -> Result<Value> {
        let destination = format!("{}:{port}", server.v4());
        let log = cluster.node(node).agent_log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut flows = lines.filter(|line| line["target"] == "access");
        flows
            .find(|line| line["original"] == destination.as_str() && line["direction"] == direction)
            .with_context(|| format!("no {direction} line for {destination}"))
    };
    let (client_id, server_id) = (client.identity(), server.identity());
    eventually("the lines of the flow", || {
        for (node, direction) in [(0, "outbound"), (1, "inbound")] {
            let line = line(node, direction, 7500)?;
            for (field, expected) in [
                ("src", "default/client"),
                ("dst", "default/server"),
                ("src_id", &client_id),
                ("dst_id", &server_id),
            ] {
                ensure!(line[field] == expected, "{field} of {line}");
            }
            ensure!(
                line["sent_bytes"] == 12 && line["received_bytes"] == 12,
                "{line}"
            );
            ensure!(line["duration_ms"].is_number(), "{line}");
        }
        ensure!(line(1, "inbound", 7500)?["verdict"] == "allow");
        let refused = line(0, "outbound", 7999)?;
        ensure!(
            refused["verdict"] == "refuse" && refused["reason"] == "connect_refused",
            "{refused}"
        );
        Ok(())
    })
}

fn dump(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let dump = cluster.node(0).config_dump()?;
    for section in [
        "pods",
        "workloads",
        "services",
        "policies",
        "certificates",
        "control_stream",
    ] {
        ensure!(dump.get(section).is_some(), "no {section} in the dump");
    }
    let workloads = dump["workloads"].to_string();
    ensure!(workloads.contains(&server.v4().to_string()) && workloads.contains(&server.identity()));
    let pods = dump["pods"].to_string();
    ensure!(
        pods.contains(client.name()) && !pods.contains(server.name()),
        "{pods}"
    );
    Ok(())
}

fn private_socket(cluster: &Cluster) -> Result<()> {
    let mode = std::fs::metadata(cluster.node(0).admin_socket())?
        .permissions()
        .mode();
    ensure!(mode & 0o077 == 0, "its mode is {mode:o}");
    Ok(())
}

fn log_level(cluster: &Cluster) -> Result<()> {
    let node = cluster.node(0);
    let socket = node.admin_socket();
    let before = get_unix(&socket, "/log_level")?.ok()?;
    ensure!(!node.agent_log().contains("\"DEBUG\""));
    request_unix(&socket, "PUT", "/log_level", "debug")?.ok()?;
    eventually("debugging lines", || {
        get_unix(&socket, "/config_dump")?.ok()?;
        let _ = node.metrics()?;
        ensure!(get_unix(&socket, "/log_level")?.ok()?.contains("debug"));
        Ok(())
    })?;
    let bad = request_unix(&socket, "PUT", "/log_level", "no=such=level")?;
    ensure!(bad.status == 400, "a wrong filter: {bad:?}");
    request_unix(&socket, "PUT", "/log_level", before.trim())?.ok()?;
    ensure!(get_unix(&socket, "/log_level")?.ok()?.trim() == before.trim());
    Ok(())
}

fn readiness(cluster: &Cluster) -> Result<()> {
    let node = cluster.node(1);
    let pod = cluster.build_pod(PodSpec::new("nowhere").on(1))?;
    let manifest = pod.manifest();
    pod.delete()?;
    cluster.apply(&manifest)?;
    eventually("readiness to name the pod", || {
        let (status, body) = node.ready()?;
        ensure!(status == 503 && body.contains("nowhere"), "{status} {body}");
        Ok(())
    })?;
    wait_for_metric(node, "weft_pods_waiting", &[], 1.0)?;
    cluster.remove(&manifest)?;
    node.wait_ready()
}

fn control_stream(cluster: &Cluster) -> Result<()> {
    let node = cluster.node(0);
    wait_for_metric(node, "weft_control_connected", &[], 1.0)?;
    cluster.controller()?.kill()?;
    eventually("the loss to be seen", || {
        let metrics = node.metrics()?;
        ensure!(
            metrics.sum("weft_control_connected", &[]) < 0.5,
            "{}",
            metrics.show("control")
        );
        ensure!(
            metrics.sum("weft_control_knowledge_age_seconds", &[]) > 0.5,
            "{}",
            metrics.show("control")
        );
        Ok(())
    })?;
    let (status, body) = node.ready()?;
    ensure!(
        status == 200,
        "an agent that knows everything is ready: {status} {body}"
    );
    cluster.controller()?.start()?;
    wait_for_metric(node, "weft_control_connected", &[], 1.0).map(drop)
}

fn process(cluster: &Cluster) -> Result<()> {
    let metrics = cluster.node(0).metrics()?;
    for name in [
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
        "process_open_fds",
        "weft_map_capacity",
        "weft_pods_enrolled",
    ] {
        ensure!(
            metrics.sum(name, &[]) > 0.0,
            "{name} is missing: {}",
            metrics.show(name)
        );
    }
    Ok(())
}
