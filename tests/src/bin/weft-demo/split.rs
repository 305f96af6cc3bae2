//! The claim about splits: two versions of a server behind one Service, and weights that change while one
//! client sends request after request.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use weft_tests::apps::Nginx;
use weft_tests::command::Process;
use weft_tests::manifests::{ServiceSpec, backend, http_route};
use weft_tests::{Cluster, DEADLINE, Pod, PodSpec, wait_for};

use crate::acts::Tell;
use crate::stage::Stage;

/// Nine of ten requests go to the first version, then one of ten, on one connection of one curl.
pub(crate) fn split(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    // It stays, as the pods of the stage do.
    let started = Catalog::start(stage)?;
    let catalog = &*stage.catalog.insert(started);
    tell(&format!(
        "nginx serves in catalog-v1 (node 1) and catalog-v2 (node 0), both behind the Service catalog at {}",
        catalog.service
    ));
    Catalog::weigh(&stage.cluster, [90, 10])?;
    Catalog::wait_for_route(&stage.cluster)?;
    tell("applied an HTTPRoute for it: weight 90 for catalog-v1, 10 for catalog-v2");
    let before = catalog.requests(&stage.order, 1000)?.wait()?;
    tell(&format!("order$ curl, 1000 requests:  {}", Counts(&before)));
    Counts(&before).expect(0.9)?;

    let mut running = catalog.requests(&stage.order, 6000)?;
    running.wait_for_answers(1000)?;
    Catalog::weigh(&stage.cluster, [10, 90])?;
    ensure!(running.is_running(), "curl was done before the change");
    tell("while curl sends 6000 more on one connection: edited the weights to 10 and 90");
    let answers = running.wait()?;
    ensure!(answers.len() == 6000, "{} answers", answers.len());
    let (first, last) = (Counts(&answers[..1000]), Counts(&answers[5000..]));
    tell(&format!("the first 1000 of these:     {first}"));
    tell(&format!("the last 1000 of these:      {last}"));
    first.expect(0.9)?;
    last.expect(0.1)?;
    let failed = answers.iter().filter(|it| it.status != 200).count();
    ensure!(failed == 0, "{failed} requests failed");
    let connects: u32 = answers.iter().map(|it| it.connects).sum();
    ensure!(connects == 1, "curl had to connect {connects} times");
    tell("no request failed, and curl's connection was the same from the first to the last");
    Ok(())
}

/// Two versions of a server.
pub(crate) struct Catalog {
    // The programs end before their pods.
    _servers: [(Nginx, Pod); 2],
    service: SocketAddr,
}

impl Catalog {
    fn start(stage: &Stage) -> Result<Catalog> {
        let start = |name: &str, node| -> Result<(Nginx, Pod)> {
            let spec = PodSpec::new(name).namespace("production");
            let spec = spec.label("tier", "catalog").deployment(name);
            let pod = stage.cluster.add_pod(spec.on(node))?;
            let own = ServiceSpec::new(name).namespace("production");
            let own = own.select("app", name).port(80, 8080);
            stage.cluster.add_service(&own)?;
            Ok((Nginx::start(&pod, 8080)?, pod))
        };
        let servers = [start("catalog-v1", 1)?, start("catalog-v2", 0)?];
        let service = ServiceSpec::new("catalog").namespace("production");
        let service = service.select("tier", "catalog").port(80, 8080);
        let [address, _] = stage.cluster.add_service(&service)?;
        Ok(Catalog {
            _servers: servers,
            service: (address, 80).into(),
        })
    }

    /// Writes the route into the directory that the controller reads.
    fn weigh(cluster: &Cluster, [v1, v2]: [u32; 2]) -> Result<()> {
        let backends = [backend("catalog-v1", 80, v1), backend("catalog-v2", 80, v2)];
        let rules = json!([{"backendRefs": backends}]);
        let route = http_route("production", "catalog", "catalog", 80, &rules);
        cluster.apply(&route)
    }

    /// Waits until the client's agent has a route for the Service.
    fn wait_for_route(cluster: &Cluster) -> Result<()> {
        wait_for("the route to reach the agent", DEADLINE, || {
            let catalog = cluster.node(0).known_service("catalog")?;
            let routed = catalog.filter(|it| it["ports"][0]["routes"].as_array().is_some());
            Ok(routed.map(drop))
        })
    }

    /// One curl that sends so many requests, one after the other, at 1000 a second.
    fn requests(&self, client: &Pod, count: usize) -> Result<Requests> {
        let url = format!("http://{}/?request=[1-{count}]", self.service);
        let curl = client.command("curl")?.args(["-sS", "--rate", "1000/s"]);
        let curl = curl.args(["-w", "%{http_code} %{num_connects}\n", &url]);
        Ok(Requests(curl.spawn()?))
    }
}

/// A curl that sends requests.
struct Requests(Process);

impl Requests {
    fn is_running(&mut self) -> bool {
        self.0.is_running()
    }

    fn wait_for_answers(&self, count: usize) -> Result<()> {
        wait_for("curl to get its first answers", DEADLINE, || {
            let answers = answers(&self.0.stdout());
            Ok((answers.len() >= count).then_some(()))
        })
    }

    fn wait(mut self) -> Result<Vec<Answer>> {
        let status = self.0.wait(Duration::from_secs(60))?;
        ensure!(status.success(), "curl: {status}, {}", self.0.stderr());
        Ok(answers(&self.0.stdout()))
    }
}

/// What one request got.
struct Answer {
    is_v1: bool,
    status: u16,
    /// Connections that had to be made for it.
    connects: u32,
}

/// Reads what curl printed: a body, `hello from <pod>`, and behind it status and connections.
fn answers(printed: &str) -> Vec<Answer> {
    let mut answers = Vec::new();
    let mut is_v1 = false;
    for line in printed.lines() {
        if line.starts_with("hello from ") {
            is_v1 = line.ends_with("catalog-v1");
        } else if let Some((status, connects)) = line.split_once(' ')
            && let (Ok(status), Ok(connects)) = (status.parse(), connects.parse())
        {
            answers.push(Answer {
                is_v1,
                status,
                connects,
            });
        }
    }
    answers
}

/// How many requests went where.
struct Counts<'a>(&'a [Answer]);

impl Counts<'_> {
    fn v1(&self) -> usize {
        self.0.iter().filter(|it| it.is_v1).count()
    }

    /// Fails unless the first version's part of them is this, within what chance allows: four standard
    /// deviations.
    fn expect(&self, part: f64) -> Result<()> {
        let total = self.0.len() as f64;
        let share = self.v1() as f64 / total;
        let deviation = (part * (1.0 - part) / total).sqrt();
        ensure!(
            (share - part).abs() <= 4.0 * deviation,
            "{share} instead of {part} went to catalog-v1"
        );
        Ok(())
    }
}

impl fmt::Display for Counts<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v1 = self.v1();
        let v2 = self.0.len() - v1;
        write!(formatter, "{v1} to catalog-v1, {v2} to catalog-v2")
    }
}
