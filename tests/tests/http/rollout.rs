//! All endpoints of a Service are replaced, one after the other, while requests go on: none fails.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::manifests::ServiceSpec;
use weft_tests::webapp::{GrpcServer, HttpLoad, HttpServer};
use weft_tests::{Checks, Cluster, DEADLINE, Pod, PodSpec, wait_for};

use crate::stage::serving;

#[test]
fn http_rolling_restart() {
    let cluster = Cluster::start().expect("a cluster");
    let client = cluster
        .add_pod(PodSpec::new("client").on(0))
        .expect("a pod");
    let mut checks = Checks::new("http rolling restart");
    checks.check("no request fails while all endpoints are replaced", || {
        rolling_restart(&cluster, &client)
    });
    checks.finish();
}

fn rolling_restart(cluster: &Cluster, client: &Pod) -> Result<()> {
    let mut endpoints = Vec::new();
    for number in 0..3 {
        endpoints.push(Endpoint::start(cluster, number)?);
    }
    let spec = ServiceSpec::new("api").select("app", "api").port(80, HTTP);
    let target = serving(cluster, client, &spec.port(90, GRPC), 80)?;
    let grpc = SocketAddr::new(target.ip(), 90);
    let pause = ["--pause-ms", "5"];
    let http2 = [
        &pause[..],
        &["--http2", "--streams", "4", "--connections", "2"],
    ]
    .concat();
    let http1 = [&pause[..], &["--connections", "8"]].concat();
    let posts = [
        &pause[..],
        &[
            "--connections",
            "2",
            "--method",
            "POST",
            "--body-bytes",
            "5000",
        ],
    ]
    .concat();
    let loads = [
        HttpLoad::start(client, target, &http1)?,
        HttpLoad::start(client, target, &http2)?,
        HttpLoad::start(client, target, &posts)?,
        HttpLoad::start(
            client,
            target,
            &[&pause[..], &["--path", "/delay/300"]].concat(),
        )?,
        HttpLoad::start_grpc(
            client,
            grpc,
            &[&pause[..], &["--connections", "2"]].concat(),
        )?,
    ];
    for number in 3..6 {
        // As a Deployment does it: one more, then one less.
        endpoints.push(Endpoint::start(cluster, number)?);
        endpoints.remove(0).end(cluster)?;
    }
    for (number, load) in loads.into_iter().enumerate() {
        let report = load.stop()?;
        let status = if number == 4 { "0" } else { "200" };
        report.expect_all(status)?;
        let new = ["api-3", "api-4", "api-5"].map(|name| report.share(name));
        ensure!(
            new.iter().any(|share| *share > 0.0),
            "none of the new ones answered: {report:?}"
        );
    }
    Ok(())
}

struct Endpoint {
    http: HttpServer,
    grpc: GrpcServer,
    pod: Pod,
}

impl Endpoint {
    /// Its application serves before anybody is told that it is ready.
    fn start(cluster: &Cluster, number: usize) -> Result<Endpoint> {
        let spec = PodSpec::new(&format!("api-{number}")).label("app", "api");
        let pod = cluster.build_pod(spec.on(number % 2))?;
        let (http, grpc) = (
            HttpServer::start(&pod, HTTP, &["--quiet"])?,
            GrpcServer::start(&pod, GRPC)?,
        );
        cluster.announce(&pod)?;
        cluster.wait_enrolled(&pod)?;
        Ok(Endpoint { http, grpc, pod })
    }

    /// Marked as ending, no endpoint any more, told to end after its `preStop` sleep, and gone: what a kubelet
    /// does.
    fn end(self, cluster: &Cluster) -> Result<()> {
        let mut manifest = self.pod.manifest();
        manifest["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        manifest["metadata"]["deletionGracePeriodSeconds"] = json!(30);
        manifest["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
        cluster.apply(&manifest)?;
        let address = self.pod.v4().to_string();
        for node in cluster.nodes() {
            let what = format!("{} to send it nothing new", node.name());
            wait_for(&what, DEADLINE, || {
                let services = node.config_dump()?["services"].to_string();
                Ok((!services.contains(&format!("\"{address}"))).then_some(()))
            })?;
        }
        // Requests that were led there before are on their way: pods are told to wait a little (`preStop`).
        std::thread::sleep(PRE_STOP);
        self.http.stop()?;
        self.grpc.stop()?;
        cluster.remove_pod(self.pod)
    }
}

/// `lifecycle: {preStop: {sleep: {seconds: 1}}}`
const PRE_STOP: Duration = Duration::from_secs(1);
const HTTP: u16 = 8080;
const GRPC: u16 = 9090;
