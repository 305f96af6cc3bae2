//! The rules, alerts and dashboards of the manifests: Prometheus' own tools take them, each alert fires for what it is for and has
//! a heading in the documentation, and a Prometheus that scrapes a mesh has data for every query of every panel.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::{Prometheus, curl_shop};
use weft_tests::cluster::binary;
use weft_tests::command::Program;
use weft_tests::manifests::{ServiceSpec, backend, http_route, server};
use weft_tests::scenario::eventually;
use weft_tests::webapp::{HttpLoad, HttpServer, http_load};
use weft_tests::{Checks, Cluster, PodSpec, wait_for};

#[path = "observability/firing.rs"]
mod firing;

#[test]
fn rules() {
    let mut checks = Checks::new("rules and dashboards");
    checks.check("promtool takes the rules", promtool_takes_them);
    checks.check("each alert has a heading with a cure", runbooks);
    checks.check("each alert fires for what it is for", firing::each_alert);
    checks.check("dashboards are told apart, and name what is there", boards);
    checks.finish();
}

#[test]
fn panels() {
    let mut checks = Checks::new("panels");
    checks.check("every query of every panel has data", every_panel);
    checks.finish();
}

/// A file of the manifests.
fn manifest(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../daemonset/components")
        .join(path)
}

fn rules_file() -> PathBuf {
    manifest("prometheus/scrape-rules.yaml")
}

/// All rules that there are.
fn all_rules() -> Result<Vec<Value>> {
    let text = fs::read_to_string(rules_file())?;
    let file: Value = serde_saphyr::from_str(&text)?;
    let groups = file["groups"].as_array().context("groups")?;
    let rules = groups.iter().filter_map(|it| it["rules"].as_array());
    Ok(rules.flatten().cloned().collect())
}

fn promtool(arguments: &[&str]) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let program = Program::new("promtool", None, None, dir.path())?;
    program.args(arguments).output(TOOL)?.success()
}

fn promtool_takes_them() -> Result<()> {
    let file = rules_file();
    let said = promtool(&["check", "rules", &file.display().to_string()])?;
    ensure!(said.contains("SUCCESS"), "{said}");
    Ok(())
}

fn runbooks() -> Result<()> {
    let page = include_str!("../../docs/alerts.md");
    let (_, page) = page.split_once("\n## Alerts\n").context("a section")?;
    let headings = page.lines().filter_map(|it| it.strip_prefix("### "));
    let headings: Vec<&str> = headings.collect();
    let rules = all_rules()?;
    let alerts: Vec<&Value> = rules.iter().filter(|it| it["alert"].is_string()).collect();
    let names: Vec<&str> = alerts
        .iter()
        .filter_map(|it| it["alert"].as_str())
        .collect();
    ensure!(headings == names, "headings {headings:?}, alerts {names:?}");
    for alert in alerts {
        let name = alert["alert"].as_str().context("a name")?;
        let runbook = alert["annotations"]["runbook_url"].as_str();
        let anchor = format!("/docs/alerts.md#{}", name.to_lowercase());
        let leads = runbook.is_some_and(|it| it.ends_with(&anchor));
        ensure!(leads, "{name}: {runbook:?}");
        let severity = alert["labels"]["severity"].as_str().unwrap_or_default();
        let (_, text) = page.split_once(&format!("### {name}\n")).context("it")?;
        let says = text.trim_start().starts_with(&format!("`{severity}`."));
        ensure!(
            says,
            "{name} is {severity}, and its page says something else"
        );
        for annotation in ["summary", "description"] {
            let text = alert["annotations"][annotation].as_str();
            ensure!(
                text.is_some_and(|it| !it.is_empty()),
                "{name}: no {annotation}"
            );
        }
    }
    Ok(())
}

/// A dashboard.
struct Board {
    file: String,
    content: Value,
}

impl Board {
    fn all() -> Result<Vec<Board>> {
        let mut boards = vec![];
        for entry in fs::read_dir(manifest("grafana/dashboards"))? {
            let path = entry?.path();
            let text = fs::read_to_string(&path)?;
            boards.push(Board {
                file: path.file_name().context("a name")?.to_string_lossy().into(),
                content: serde_json::from_str(&text)?,
            });
        }
        boards.sort_by(|one, other| one.file.cmp(&other.file));
        Ok(boards)
    }

    fn panels(&self) -> Result<impl Iterator<Item = &Value>> {
        let panels = self.content["panels"].as_array().context("panels")?;
        Ok(panels.iter().filter(|it| it["type"] != "row"))
    }
}

fn boards() -> Result<()> {
    let boards = Board::all()?;
    let files: Vec<&str> = boards.iter().map(|it| it.file.as_str()).collect();
    ensure!(
        files == ["node.json", "overview.json", "workload.json"],
        "{files:?}"
    );
    let kustomization = fs::read_to_string(manifest("grafana/kustomization.yaml"))?;
    let page = include_str!("../../docs/alerts.md");
    let mut uids = BTreeSet::new();
    for Board { file, content } in &boards {
        let named = kustomization.contains(&format!("files: [dashboards/{file}]"));
        ensure!(named, "{file} is not in the kustomization");
        let title = content["title"].as_str().context("a title")?;
        ensure!(page.contains(title), "{title} is not in docs/alerts.md");
        ensure!(
            uids.insert(content["uid"].to_string()),
            "{file}: its uid is taken"
        );
        let mut ids = BTreeSet::new();
        for panel in content["panels"].as_array().context("panels")? {
            ensure!(
                ids.insert(panel["id"].to_string()),
                "{file}: twice {}",
                panel["id"]
            );
        }
    }
    // What is recorded is what the dashboards and their page speak of.
    let recorded = all_rules()?;
    let recorded = recorded.iter().filter_map(|it| it["record"].as_str());
    for name in recorded {
        ensure!(
            page.contains(&format!("`{name}`")),
            "{name} is not in docs/alerts.md"
        );
    }
    Ok(())
}

/// Traffic of all kinds that panels are about, and Prometheus with the rules.
fn every_panel() -> Result<()> {
    let cluster = Cluster::start()?;
    let spec = |name: &str, node| {
        PodSpec::new(name)
            .namespace("shop")
            .deployment(name)
            .on(node)
    };
    let web = cluster.add_pod(spec("web", 0))?;
    let order = cluster.add_pod(spec("order", 1))?;
    let outsider = cluster.add_pod(PodSpec::new("outsider").on(0).unmeshed())?;
    let asked = HttpServer::start(&order, PORT, &["--quiet"])?;
    let _of_web = HttpServer::start(&web, PORT, &["--quiet"])?;
    let service = |name: &str| {
        let service = ServiceSpec::new(name)
            .namespace("shop")
            .select("app", "order");
        let service = service.annotation("retry.linkerd.io/http", "5xx");
        service
            .annotation("retry.linkerd.io/limit", "1")
            .port(80, PORT)
    };
    let [order_service, _] = cluster.add_service(&service("order"))?;
    cluster.add_service(&service("order-next"))?;
    let backends = [backend("order", 80, 1), backend("order-next", 80, 1)];
    let rules = json!([{"backendRefs": backends}]);
    cluster.apply(&http_route("shop", "order", "order", 80, &rules))?;
    // Nobody may ask it.
    let _closed = HttpServer::start(&web, CLOSED, &["--quiet"])?;
    cluster.apply(&server("shop", "closed", "web", CLOSED))?;
    let nodes: Vec<_> = cluster.nodes().iter().collect();
    let prometheus = Prometheus::with(&nodes, Some(cluster.controller()?), Some(rules_file()))?;
    prometheus.wait_scraped(nodes.len() + 1)?;
    eventually("the Service to answer", || {
        let code = curl_shop(&web, (order_service, 80).into(), "/", &[])?.code();
        ensure!(code == 200, "{code}");
        Ok(())
    })?;
    let slow = ["--pause-ms", "20", "--connections", "2"];
    let load = HttpLoad::start(&web, (order_service, 80).into(), &slow)?;
    let back = HttpLoad::start(&order, web.sockets(PORT)[0], &slow)?;
    // In plaintext, denied, answered in a server's place, and failing so that it is sent again, for as long as it is looked at.
    let further = || -> Result<()> {
        http_load(&outsider, order.sockets(PORT)[0], 3, &[])?.expect_all("200")?;
        for _ in 0..3 {
            curl_shop(&order, web.sockets(CLOSED)[0], "/", &[])?;
            curl_shop(&web, order.sockets(NOBODY)[0], "/", &[])?;
        }
        asked.configure_some(&order, 0, 503, 6)
    };
    let mut without = vec![];
    for board in Board::all()? {
        for panel in board.panels()? {
            let title = panel["title"].as_str().context("a title")?;
            let targets = panel["targets"].as_array().context("targets")?;
            ensure!(
                !targets.is_empty(),
                "{}: {title} asks for nothing",
                board.file
            );
            for target in targets {
                let query = target["expr"].as_str().context("a query")?;
                let query = settled(query);
                let mut waited = 0;
                let found = wait_for(title, Duration::from_secs(20), || {
                    if waited > 0 {
                        further()?;
                    }
                    waited += 1;
                    let elements = prometheus.vector(&query)?;
                    let numbers = elements.iter().filter_map(|it| it["value"][1].as_str());
                    let some = numbers.filter(|it| *it != "NaN").count() > 0;
                    Ok(some.then_some(()))
                });
                if let Err(error) = found {
                    without.push(format!("{}: {title}: {query}: {error:#}", board.file));
                }
            }
        }
    }
    remembered(&cluster, &prometheus)?;
    load.stop()?;
    back.stop()?;
    ensure!(without.is_empty(), "no data: {}", without.join("\n"));
    Ok(())
}

/// `weft stat` and its like, over a time that only Prometheus knows.
fn remembered(cluster: &Cluster, prometheus: &Prometheus<'_>) -> Result<()> {
    let socket = cluster.controller()?.admin_socket().display().to_string();
    let weft = |arguments: &[&str]| {
        let program = Program::new(
            binary("weft")?,
            Some(prometheus.netns()),
            None,
            cluster.dir(),
        )?;
        let program = program.args(arguments).args(["-n", "shop", "-o", "json"]);
        program
            .env("WEFT_CONTROLLER_SOCKET", socket.clone())
            .output(TOOL)
    };
    let url = prometheus.url();
    let begun = Instant::now();
    for (command, named) in [
        ("stat", "order"),
        ("stat-outbound", "web"),
        ("stat-inbound", "order"),
        ("authz", "order"),
    ] {
        let said = weft(&[command, "--prometheus-url", &url, "--window", "1h"])?.success()?;
        let said: Value = serde_json::from_str(&said)?;
        let rows = said["rows"].as_array().context("rows")?;
        let row = rows.iter().find(|it| it["name"] == named);
        let row = row.with_context(|| format!("{command}: no {named} in {said}"))?;
        if command != "authz" {
            let rate = row["requests_per_second"].as_f64();
            ensure!(rate > Some(0.0), "{command}: {row}");
            ensure!(said["window_seconds"] == 3600.0, "{command}: {said}");
        }
    }
    ensure!(begun.elapsed() < TOOL, "it was waited for");
    let nobody = weft(&[
        "stat",
        "--prometheus-url",
        "http://127.0.0.1:9",
        "--window",
        "1h",
    ])?;
    let is_told = nobody.stderr.contains("port-forward");
    ensure!(nobody.code() == 2 && is_told, "{nobody:?}");
    let other = format!("{url}/nowhere");
    let other = weft(&["stat", "--prometheus-url", &other, "--window", "1h"])?;
    let is_told = other.stderr.contains("without /api");
    ensure!(other.code() == 2 && is_told, "{other:?}");
    Ok(())
}

/// A query as Grafana sends it, with what is chosen.
fn settled(query: &str) -> String {
    let chosen = [
        ("$__rate_interval", "15s"),
        ("$namespace", "shop"),
        ("$workload", "web"),
        ("$node", ".*"),
    ];
    let settled = chosen
        .iter()
        .fold(query.to_owned(), |query, (name, value)| {
            query.replace(name, value)
        });
    assert!(!settled.contains('$'), "a variable is left in {settled}");
    settled
}

const PORT: u16 = 8080;
const CLOSED: u16 = 8086;
/// Nobody listens there.
const NOBODY: u16 = 8099;
const TOOL: Duration = Duration::from_secs(30);
