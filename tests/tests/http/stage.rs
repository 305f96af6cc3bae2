//! The pods that most tests need: a client, servers on both nodes, and the same outside of the mesh.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use weft_tests::apps::{Shown, curl_shop};
use weft_tests::command::Process;
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::eventually;
use weft_tests::webapp::HttpServer;
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

/// A cluster with these pods.
pub(crate) struct Stage {
    /// On node 0.
    pub(crate) client: Pod,
    /// On node 1, so that its exchanges go by a tunnel.
    pub(crate) far: Pod,
    /// On node 0.
    pub(crate) near: Pod,
    /// On node 0 and not in the mesh.
    pub(crate) plain_client: Pod,
    /// On node 1 and not in the mesh.
    pub(crate) plain_server: Pod,
    pub(crate) cluster: Cluster,
}

/// A client and a server that it asks.
#[derive(Clone, Copy)]
pub(crate) struct Pair<'a> {
    pub(crate) client: &'a Pod,
    pub(crate) server: &'a Pod,
}

impl Pair<'_> {
    /// The server's IPv4 address with a port.
    pub(crate) fn at(&self, port: u16) -> SocketAddr {
        self.server.sockets(port)[0]
    }
}

impl Stage {
    pub(crate) fn build() -> Result<Stage> {
        Stage::build_with(&[])
    }

    pub(crate) fn build_with(agent_args: &[&str]) -> Result<Stage> {
        let cluster = Cluster::with(ClusterOptions {
            agent_args: agent_args.iter().map(|it| (*it).to_owned()).collect(),
            ..ClusterOptions::default()
        })?;
        Ok(Stage {
            client: cluster.add_pod(PodSpec::new("client").on(0).deployment("shop"))?,
            far: cluster.add_pod(PodSpec::new("far").on(1).deployment("api"))?,
            near: cluster.add_pod(PodSpec::new("near").on(0).deployment("api"))?,
            plain_client: cluster.add_pod(PodSpec::new("plain-client").on(0).unmeshed())?,
            plain_server: cluster.add_pod(PodSpec::new("plain-server").on(1).unmeshed())?,
            cluster,
        })
    }

    /// The ways through the mesh, with what to call them.
    pub(crate) fn meshed(&self) -> [(&'static str, Pair<'_>); 2] {
        let client = &self.client;
        let pair = |server| Pair { client, server };
        [
            ("across nodes", pair(&self.far)),
            ("on one node", pair(&self.near)),
        ]
    }

    /// The way without the mesh.
    pub(crate) fn plain(&self) -> Pair<'_> {
        Pair {
            client: &self.plain_client,
            server: &self.plain_server,
        }
    }

    /// Runs a check on each way through the mesh.
    pub(crate) fn check_meshed(
        &self,
        checks: &mut Checks,
        name: &str,
        check: fn(&Stage, Pair<'_>) -> Result<()>,
    ) {
        for (place, pair) in self.meshed() {
            checks.check(&format!("{name}, {place}"), || check(self, pair));
        }
    }
}

/// Makes a Service, and waits until a `GET /` of the client is answered with a 200.
pub(crate) fn serving(
    cluster: &Cluster,
    client: &Pod,
    spec: &ServiceSpec,
    port: u16,
) -> Result<SocketAddr> {
    let [address, _] = cluster.add_service(spec)?;
    let target = SocketAddr::new(address, port);
    eventually("the Service to answer", || {
        expect_code(&curl_shop(client, target, "/", &[])?, 200)
    })?;
    Ok(target)
}

/// Fails unless this is the status code.
pub(crate) fn expect_code(shown: &Shown, code: u16) -> Result<()> {
    ensure!(shown.code() == code, "expected {code}, got {shown:?}");
    Ok(())
}

/// What the server says it saw, in an answer.
pub(crate) fn seen(shown: &Shown) -> Result<weft_tests::webapp::Seen> {
    ensure!(shown.code() != 0, "no answer: {shown:?}");
    let seen = serde_json::from_str(&shown.body);
    seen.map_err(|error| anyhow::anyhow!("{error} in {shown:?}"))
}

/// Opens requests that take long, each on a connection of its own.
pub(crate) fn hold(
    from: &Pod,
    to: SocketAddr,
    version: &str,
    count: usize,
) -> Result<Vec<Process>> {
    let url = format!("http://{to}/delay/600000");
    let hold = |_| {
        let curl = from.command("curl")?.named("holding");
        let args = ["-sS", version, "--max-time", "600"];
        curl.args(args).arg(&url).spawn()
    };
    (0..count).map(hold).collect()
}

/// The same, until the server has them. By HTTP/2, where a client that leaves is no longer waiting for its answer.
pub(crate) fn held(
    from: &Pod,
    to: SocketAddr,
    server: &HttpServer,
    count: usize,
) -> Result<Vec<Process>> {
    let before = server.requests()?.len();
    let held = hold(from, to, "--http2-prior-knowledge", count)?;
    eventually("the requests to be there", || {
        let now = server.requests()?.len();
        ensure!(now == before + count, "{now} after {before}");
        Ok(())
    })?;
    Ok(held)
}

/// Arguments of curl for each version of HTTP.
pub(crate) const VERSIONS: [&[&str]; 2] = [&["--http1.1"], &["--http2-prior-knowledge"]];

/// Headers by which an application learns who its client is.
pub(crate) const CLIENT_ID: [&str; 2] = ["l5d-client-id", "weft-client-id"];

/// How many upgrades clients have been let into.
pub(crate) fn switched(cluster: &Cluster) -> Result<f64> {
    let labels = [("direction", "outbound"), ("status_code", "101")];
    let nodes = cluster.nodes().iter();
    let counts = nodes.map(|it| Ok(it.metrics()?.sum("response_total", &labels)));
    counts.sum()
}

/// What asks for a WebSocket, escaped.
pub(crate) const UPGRADE: &str = "GET /chat HTTP/1.1\\r\\nHost: shop\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\nSec-WebSocket-Version: 13\\r\\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\\r\\n\\r\\n";
