//! TLSRoute and TCPRoute: where connections go that are not HTTP, by the name that their client asks for, or by weight.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::Redis;
use weft_tests::command::Process;
use weft_tests::manifests::{ServiceSpec, backend};
use weft_tests::scenario::eventually;
use weft_tests::{Checks, Cluster, DEADLINE, Pod, PodSpec};

#[test]
fn flow_routes() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("flow routes");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("TLS without a route goes to the Service", |scene| {
        scene.expect_server(&["-servername", "one.example"], Some("own"))
    });
    check("TLS goes by the name that it asks for", tls_names);
    check("TLS by weight", tls_weights);
    check("without the TLSRoute, the Service again", tls_removed);
    check("TCP by weight, changed live", tcp_weights);
    check("TCP whose backend does not exist is reset", tcp_nowhere);
    checks.finish();
}

/// A Service `shop` with the pod `own`, and `v1` and `v2` with a Service each. All serve TLS and redis.
struct Scene {
    _servers: Vec<(Process, Redis, Pod)>,
    target: SocketAddr,
    client: Pod,
    cluster: Cluster,
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let mut servers = Vec::new();
        let mut target = None;
        for (name, service, node) in [("own", "shop", 1), ("v1", "v1", 1), ("v2", "v2", 0)] {
            let pod = cluster.add_pod(PodSpec::new(name).on(node))?;
            let redis = Redis::start(&pod, REDIS)?;
            let own = pod.v4().into();
            Redis::command(&pod, own, REDIS, &["set", "name", name])?.success()?;
            servers.push((tls_server(&pod)?, redis, pod));
            let spec = ServiceSpec::new(service).select("app", name);
            let spec = spec.port(443, TLS).port(REDIS, REDIS);
            let [address, _] = cluster.add_service(&spec)?;
            target.get_or_insert(SocketAddr::new(address, 443));
        }
        Ok(Scene {
            _servers: servers,
            target: target.context("a Service")?,
            client,
            cluster,
        })
    }

    /// Applies a route at a port of the Service.
    fn route(&self, kind: &str, port: u16, further: &Value, rules: &Value) -> Result<Value> {
        let mut route = json!({
            "apiVersion": "gateway.networking.k8s.io/v1alpha2",
            "kind": kind,
            "metadata": {"name": kind.to_lowercase(), "namespace": "default"},
            "spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": "shop", "port": port}],
                "rules": rules,
            },
        });
        if let Some(further) = further.as_object() {
            for (key, value) in further {
                route["spec"][key] = value.clone();
            }
        }
        self.cluster.apply(&route)?;
        Ok(route)
    }

    /// Who answers a TLS client with these arguments; none: the connection was cut off.
    fn tls_server(&self, args: &[&str]) -> Result<Option<String>> {
        let openssl = self.client.command("openssl")?;
        let openssl = openssl.args(["s_client", "-connect", &self.target.to_string()]);
        let finished = openssl.args(args).output(Duration::from_secs(20))?;
        let subject = finished.stdout.lines().find_map(|line| {
            let line = line.replace(' ', "");
            line.strip_prefix("subject=CN=").map(str::to_owned)
        });
        Ok(subject)
    }

    fn expect_server(&self, args: &[&str], expected: Option<&str>) -> Result<()> {
        eventually("the right server to answer", || {
            let server = self.tls_server(args)?;
            ensure!(server.as_deref() == expected, "{args:?}: {server:?}");
            Ok(())
        })
    }

    /// The name of the redis that answers.
    fn redis(&self) -> Result<String> {
        let got = Redis::command(&self.client, self.target.ip(), REDIS, &["get", "name"])?;
        Ok(got.success()?.trim().to_owned())
    }

    /// How many of so many connections each redis answered.
    fn redis_counts(&self, count: usize) -> Result<BTreeMap<String, usize>> {
        let mut counts = BTreeMap::new();
        for _ in 0..count {
            *counts.entry(self.redis()?).or_default() += 1;
        }
        Ok(counts)
    }
}

/// A server whose certificate says who it is.
fn tls_server(pod: &Pod) -> Result<Process> {
    let (key, certificate) = (pod.dir().join("tls.key"), pod.dir().join("tls.crt"));
    let openssl = pod.command("openssl")?.named("openssl-req");
    let openssl = openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt"]);
    let openssl = openssl.args(["ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
    let openssl = openssl.args(["-subj", &format!("/CN={}", pod.name())]);
    let openssl = openssl
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate);
    openssl.run()?;
    let openssl = pod.command("openssl")?.named("openssl-server");
    let openssl = openssl.args(["s_server", "-accept", &TLS.to_string(), "-www"]);
    let openssl = openssl.arg("-key").arg(&key).arg("-cert").arg(&certificate);
    let mut server = openssl.spawn()?;
    server.wait_listening(TLS)?;
    Ok(server)
}

fn tls_names(scene: &Scene) -> Result<()> {
    let rule = |name| json!([{"backendRefs": [backend(name, 443, 1)]}]);
    scene.route(
        "TLSRoute",
        443,
        &json!({"hostnames": ["one.example"]}),
        &rule("v1"),
    )?;
    scene.expect_server(&["-servername", "one.example"], Some("v1"))?;
    scene.expect_server(&["-servername", "ONE.example"], Some("v1"))?;
    let both = json!({"hostnames": ["two.example", "*.two.example"]});
    scene.route("TLSRoute", 443, &both, &rule("v2"))?;
    for name in ["two.example", "a.two.example", "a.b.two.example"] {
        scene.expect_server(&["-servername", name], Some("v2"))?;
    }
    // Nobody's: cut off.
    for name in ["one.example", "example", "two.example.org"] {
        scene.expect_server(&["-servername", name], None)?;
    }
    scene.expect_server(&["-noservername"], Some("own"))
}

fn tls_weights(scene: &Scene) -> Result<()> {
    let split = |weights: [u32; 2]| {
        let backends = [
            backend("v1", 443, weights[0]),
            backend("v2", 443, weights[1]),
        ];
        let rules = json!([{"backendRefs": backends}]);
        scene.route(
            "TLSRoute",
            443,
            &json!({"hostnames": ["split.example"]}),
            &rules,
        )
    };
    let args = ["-servername", "split.example"];
    let all_to = |name: &str| {
        eventually("all to go to one", || {
            for _ in 0..20 {
                let server = scene.tls_server(&args)?;
                ensure!(server.as_deref() == Some(name), "{server:?}");
            }
            Ok(())
        })
    };
    split([1, 0])?;
    scene.expect_server(&args, Some("v1"))?;
    split([1, 1])?;
    for name in ["v1", "v2"] {
        scene.expect_server(&args, Some(name))?;
    }
    split([1, 0])?;
    all_to("v1")?;
    split([9, 1])?;
    scene.expect_server(&args, Some("v2"))?;
    let mut v1 = 0;
    for _ in 0..200 {
        let server = scene.tls_server(&args)?.context("a server")?;
        v1 += u32::from(server == "v1");
    }
    // 180 of 200, within four standard deviations.
    ensure!((163..=197).contains(&v1), "{v1} of 200 went to v1");
    split([0, 1])?;
    all_to("v2")
}

fn tls_removed(scene: &Scene) -> Result<()> {
    let rules = json!([{"backendRefs": [backend("v1", 443, 1)]}]);
    let route = scene.route(
        "TLSRoute",
        443,
        &json!({"hostnames": ["one.example"]}),
        &rules,
    )?;
    scene.expect_server(&["-servername", "other.example"], None)?;
    scene.cluster.remove(&route)?;
    scene.expect_server(&["-servername", "other.example"], Some("own"))
}

/// A connection stays where it is when the weights change; those after it go by the new ones.
fn tcp_weights(scene: &Scene) -> Result<()> {
    eventually("the Service's own redis to answer", || {
        let name = scene.redis()?;
        ensure!(name == "own", "{name}");
        Ok(())
    })?;
    let split = |weights: [u32; 2]| {
        let backends = [
            backend("v1", REDIS, weights[0]),
            backend("v2", REDIS, weights[1]),
        ];
        let rules = json!([{"backendRefs": backends}]);
        scene.route("TCPRoute", REDIS, &Value::Null, &rules)
    };
    split([9, 1])?;
    eventually("the route to be in effect", || {
        let counts = scene.redis_counts(10)?;
        ensure!(!counts.contains_key("own"), "{counts:?}");
        Ok(())
    })?;
    let counts = scene.redis_counts(200)?;
    let v1 = counts.get("v1").copied().unwrap_or(0);
    // 180 of 200, within four standard deviations.
    ensure!((163..=197).contains(&v1), "{counts:?}");
    split([1, 0])?;
    eventually("all to go to v1", || {
        let counts = scene.redis_counts(20)?;
        ensure!(counts.keys().eq(["v1"]), "{counts:?}");
        Ok(())
    })?;
    let redis_cli = scene.client.command("redis-cli")?.named("redis-held");
    let redis_cli = redis_cli.args(["-h", &scene.target.ip().to_string()]);
    let mut held = redis_cli
        .args(["-p", &REDIS.to_string()])
        .with_stdin()
        .spawn()?;
    held.write_stdin("get name\n")?;
    held.wait_for_line("v1", DEADLINE)?;
    split([0, 1])?;
    eventually("all to go to v2", || {
        let counts = scene.redis_counts(20)?;
        ensure!(counts.keys().eq(["v2"]), "{counts:?}");
        Ok(())
    })?;
    held.write_stdin("echo still\nget name\n")?;
    held.wait_for_line("still", DEADLINE)?;
    let said = held.finish(DEADLINE)?;
    let said: Vec<&str> = said.split_whitespace().collect();
    ensure!(said == ["v1", "still", "v1"], "{said:?}");
    Ok(())
}

fn tcp_nowhere(scene: &Scene) -> Result<()> {
    let rules = json!([{"backendRefs": [backend("no-such-service", REDIS, 1)]}]);
    let route = scene.route("TCPRoute", REDIS, &Value::Null, &rules)?;
    eventually("connections to be reset", || {
        let got = Redis::command(&scene.client, scene.target.ip(), REDIS, &["get", "name"])?;
        let shown = format!("{}{}", got.stdout, got.stderr);
        ensure!(
            shown.contains("reset") || shown.contains("closed"),
            "{shown}"
        );
        Ok(())
    })?;
    scene.cluster.remove(&route)?;
    eventually("the Service's own redis to answer", || {
        let name = scene.redis()?;
        ensure!(name == "own", "{name}");
        Ok(())
    })
}

const TLS: u16 = 8443;
const REDIS: u16 = 6379;
