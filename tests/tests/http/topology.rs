//! Which endpoints of a Service a client is led to by where it runs: its node and its zone.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use weft_tests::apps::curl_shop;
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{HttpServer, http_load};
use weft_tests::{Checks, Cluster, Pod, PodSpec, wait_for};

use crate::stage::{expect_code, serving};

/// A client and an endpoint on node 0, an endpoint on node 1, and Services that differ in what they
/// prefer.
struct Scene {
    close: SocketAddr,
    same_node: SocketAddr,
    local: SocketAddr,
    any: SocketAddr,
    _servers: Vec<HttpServer>,
    client: Pod,
    near: Option<Pod>,
    _far: Pod,
    cluster: Cluster,
}

#[test]
fn http_topology() {
    let mut scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("http topology");
    checks.check("endpoints of the client's zone are preferred", || {
        scene.goes_to(scene.close, &["near"])?;
        scene.goes_to(scene.any, &["near", "far"])
    });
    checks.check("endpoints of the client's node are preferred", || {
        scene.goes_to(scene.same_node, &["near"])
    });
    checks.check("internalTrafficPolicy: Local keeps to the node", || {
        scene.goes_to(scene.local, &["near"])
    });
    checks.check("a node that changes its zone changes what is near", || {
        scene.zone(1, Some("east"))?;
        scene.goes_to(scene.close, &["near", "far"])?;
        scene.zone(1, Some("west"))?;
        scene.goes_to(scene.close, &["near"])
    });
    checks.check("a node without a zone makes hints be ignored", || {
        scene.zone(1, None)?;
        scene.goes_to(scene.close, &["near", "far"])?;
        scene.zone(1, Some("west"))?;
        scene.goes_to(scene.close, &["near"])
    });
    checks.check(
        "without an endpoint nearby, others serve, but for Local",
        || {
            let near = scene.near.take().expect("it is there");
            scene.cluster.remove_pod(near)?;
            scene.goes_to(scene.close, &["far"])?;
            scene.goes_to(scene.same_node, &["far"])?;
            eventually("Local to have no endpoint", || {
                let shown = curl_shop(&scene.client, scene.local, "/", &["--max-time", "8"])?;
                expect_code(&shown, 503)
            })
        },
    );
    checks.finish();
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        for (node, zone) in [(0, "east"), (1, "west")] {
            cluster.apply(&in_zone(cluster.node(node).manifest(), Some(zone)))?;
        }
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let near = cluster.add_pod(PodSpec::new("near").label("app", "api").on(0))?;
        let far = cluster.add_pod(PodSpec::new("far").label("app", "api").on(1))?;
        let servers = [&near, &far].map(|pod| HttpServer::start(pod, HTTP, &["--quiet"]));
        let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
        // Else the one on the client's node would be chosen for its speed.
        for (server, pod) in servers.iter().zip([&near, &far]) {
            server.configure(pod, 20, 200)?;
        }
        let add = |name: &str, field: Option<(&str, &str)>| {
            let spec = ServiceSpec::new(name).select("app", "api").port(80, HTTP);
            let spec = match field {
                Some((field, value)) => spec.field(field, value),
                None => spec,
            };
            serving(&cluster, &client, &spec, 80)
        };
        Ok(Scene {
            close: add("close", Some(("trafficDistribution", "PreferClose")))?,
            same_node: add("same-node", Some(("trafficDistribution", "PreferSameNode")))?,
            local: add("local", Some(("internalTrafficPolicy", "Local")))?,
            any: add("any", None)?,
            _servers: servers,
            client,
            near: Some(near),
            _far: far,
            cluster,
        })
    }

    fn zone(&self, node: usize, zone: Option<&str>) -> Result<()> {
        let manifest = in_zone(self.cluster.node(node).manifest(), zone);
        self.cluster.apply(&manifest)
    }

    /// Waits until requests go to all of these, and to nobody else.
    fn goes_to(&self, target: SocketAddr, names: &[&str]) -> Result<()> {
        let patience = Duration::from_secs(30);
        wait_for("requests to go where they should", patience, || {
            let args = ["--connections", "8"];
            let report = http_load(&self.client, target, 200, &args)?;
            report.expect_all("200")?;
            let served: Vec<&str> = report.served_by.keys().map(String::as_str).collect();
            let mut expected = names.to_vec();
            expected.sort_unstable();
            ensure!(served == expected, "{served:?}, not {expected:?}");
            Ok(Some(()))
        })
    }
}

fn in_zone(mut node: Value, zone: Option<&str>) -> Value {
    if let Some(zone) = zone {
        node["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone.into();
    }
    node
}

const HTTP: u16 = 8080;
