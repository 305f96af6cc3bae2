//! Policies of CNIs' own kinds: what the pods that they select have with others of their node goes by tunnels, past the
//! CNI, and not from one half of the agent to the other.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::curl_shop;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::Server;
use weft_tests::webapp::HttpServer;
use weft_tests::{Checks, Cluster, Pod, PodSpec, http};

/// A client and a server of one node.
struct Scene {
    client: Pod,
    server: Pod,
    _echo: Server,
    _http: HttpServer,
    cluster: Cluster,
}

/// How a flow went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Handover,
    Tunnel,
}

#[test]
fn cni_policies() {
    let scene = Scene::build().expect("a cluster");
    let mut checks = Checks::new("policies of CNIs");
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("nobody is selected", |it| it.expect(By::Handover, 0.0));
    check("the server is", |it| {
        it.under(
            &cilium(&json!({"matchLabels": {"k8s:app": "server"}})),
            By::Tunnel,
            1.0,
        )
    });
    check("the client is", |it| {
        it.under(&calico("app == 'client'"), By::Tunnel, 1.0)
    });
    check("others are", |it| {
        it.under(&calico("app in {'x', 'y'}"), By::Handover, 0.0)
    });
    check("who nobody can read", |it| {
        it.under(&calico("app = 'x'"), By::Tunnel, 2.0)
    });
    checks.finish();
}

impl Scene {
    fn build() -> Result<Scene> {
        let cluster = Cluster::start()?;
        let client = cluster.add_pod(PodSpec::new("client").on(0))?;
        let server = cluster.add_pod(PodSpec::new("server").on(0))?;
        let echo = Server::start(&server, ECHO, "echo", &[])?;
        let web = HttpServer::start(&server, HTTP, &[])?;
        Ok(Scene {
            client,
            server,
            _echo: echo,
            _http: web,
            cluster,
        })
    }

    /// Fails unless flows go that way now, of bytes and of requests; `selected` is how many pods policies select.
    fn expect(&self, by: By, selected: f64) -> Result<()> {
        let node = self.cluster.node(0);
        eventually("the policy to be in effect", || {
            let found = node.metrics()?.sum("weft_pods_by_tunnels_only", &[]);
            ensure!(
                found == selected,
                "{found} pods are selected, not {selected}"
            );
            Ok(())
        })?;
        let dump = node.config_dump()?;
        let pods = dump["pods"].as_array().map_or(&[][..], Vec::as_slice);
        let shown = pods.iter().filter(|it| it["by_tunnels_only"] == true);
        ensure!(shown.count() as f64 == selected, "{pods:?}");
        for (port, counted) in [(ECHO, "tcp_open_total"), (HTTP, "request_total")] {
            let target = self.server.sockets(port)[0];
            let (all, handed_over) = self.counted(counted)?;
            if port == ECHO {
                expect_echo(&self.client, target, "some bytes")?;
            } else {
                let shown = curl_shop(&self.client, target, "/", &[])?;
                ensure!(shown.code() == 200, "{shown:?}");
            }
            eventually("it to be counted", || {
                let (all_now, handed_over_now) = self.counted(counted)?;
                let went = match (all_now > all, handed_over_now > handed_over) {
                    (true, true) => By::Handover,
                    (true, false) => By::Tunnel,
                    (false, _) => anyhow::bail!("nothing was counted"),
                };
                ensure!(went == by, "port {port}: by {went:?}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// What the client had with the server, of flows or of requests: all, and without a tunnel.
    fn counted(&self, name: &str) -> Result<(f64, f64)> {
        let metrics = self.cluster.node(0).metrics()?;
        let of = [
            ("direction", "outbound"),
            ("pod", "client"),
            ("dst_pod", "server"),
            ("tls", "true"),
        ];
        let handed_over = [&of[..], &[("no_tls_reason", "same_node")]].concat();
        let count = |labels| metrics.sum(name, labels);
        Ok((count(&of), count(&handed_over)))
    }

    fn under(&self, policy: &Value, by: By, selected: f64) -> Result<()> {
        self.cluster.apply(policy)?;
        let outcome = self.expect(by, selected).and_then(|()| {
            let controller = self.cluster.controller()?;
            let (netns, address) = (controller.netns(), controller.admin_address());
            let problems = http::get(netns, address, "/problems")?.ok()?;
            let is_told = problems.contains("port 15008 only");
            ensure!(is_told == (selected > 0.0), "{problems}");
            Ok(())
        });
        self.cluster.remove(policy)?;
        outcome?;
        self.expect(By::Handover, 0.0)
    }
}

fn cilium(selector: &Value) -> Value {
    json!({"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "here", "namespace": "default"},
        "spec": {"endpointSelector": selector, "ingress": [{"fromEndpoints": [{}]}]}})
}

fn calico(selector: &str) -> Value {
    json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
        "metadata": {"name": "everywhere"},
        "spec": {"selector": selector, "types": ["Ingress"], "ingress": [{"action": "Allow"}]}})
}

const ECHO: u16 = 7300;
const HTTP: u16 = 7301;
