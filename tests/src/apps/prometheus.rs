//! Prometheus, scraping agents and a controller as it would in a cluster, and asked for its queries.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::{Controller, Node};
use crate::command::{Process, Program};
use crate::http;
use crate::netns::Netns;
use crate::wait::wait_for;

/// A running Prometheus.
#[derive(Debug)]
pub struct Prometheus<'a> {
    _relays: Vec<Process>,
    process: Process,
    netns: &'a Netns,
}

impl<'a> Prometheus<'a> {
    /// Starts it on the first of these nodes, with all of them as targets, every second.
    ///
    /// Agents answer on a port of the node's loopback. So every other node runs a relay on its
    /// underlay address, as an operator's scrape proxy would.
    pub fn start(nodes: &[&'a Node]) -> Result<Prometheus<'a>> {
        Prometheus::with(nodes, None, None)
    }

    /// The same, with the controller as a target, too, and with this file of rules, which it evaluates every second.
    pub fn with(
        nodes: &[&'a Node],
        controller: Option<&Controller>,
        rules: Option<PathBuf>,
    ) -> Result<Prometheus<'a>> {
        let home = nodes.first().context("a node to run on")?;
        let dir = home.dir().join("prometheus");
        fs::create_dir_all(&dir)?;
        let mut scraped = String::new();
        let mut relays = Vec::new();
        for node in nodes {
            let relay = format!("TCP4-LISTEN:{RELAY_PORT},bind={},fork,reuseaddr", node.v4());
            let mut relay = node
                .host_command("socat")?
                .args([relay, format!("TCP4:{}", node.admin_address())])
                .spawn()?;
            relay.wait_listening(RELAY_PORT)?;
            relays.push(relay);
            scraped += &format!(
                "  - targets: ['{}:{RELAY_PORT}']\n    labels: {{node: {}}}\n",
                node.v4(),
                node.name()
            );
        }
        if let Some(controller) = controller {
            let address = controller.address().ip();
            let listen = format!("TCP4-LISTEN:{RELAY_PORT},bind={address},fork,reuseaddr");
            let relay = Program::new("socat", Some(controller.netns()), None, &dir)?;
            let mut relay = relay
                .args([listen, format!("TCP4:{}", controller.admin_address())])
                .spawn()?;
            relay.wait_listening(RELAY_PORT)?;
            relays.push(relay);
            scraped += &format!(
                "- job_name: weft-controller\n  static_configs:\n  - targets: ['{address}:{RELAY_PORT}']\n"
            );
        }
        let config = dir.join("prometheus.yml");
        fs::write(&config, configuration(&scraped, rules.as_ref()))?;
        let mut process = home
            .host_command("prometheus")?
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.join("data").display()
            ))
            .arg(format!("--web.listen-address=127.0.0.1:{PORT}"))
            .arg("--log.level=warn")
            .spawn()?;
        process.wait_listening(PORT)?;
        Ok(Prometheus {
            _relays: relays,
            process,
            netns: home.netns(),
        })
    }

    /// Waits until it has scraped all targets.
    pub fn wait_scraped(&self, targets: usize) -> Result<()> {
        wait_for("Prometheus to scrape all agents", PATIENCE, || {
            let up = self.query("sum(up)")?.unwrap_or(0.0);
            ensure!(up == targets as f64, "{up} of {targets} targets are up");
            Ok(Some(()))
        })
    }

    /// Its address, in the network of its node.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{PORT}")
    }

    /// The network of its node.
    pub fn netns(&self) -> &'a Netns {
        self.netns
    }

    /// The elements of an instant query's answer.
    pub fn vector(&self, query: &str) -> Result<Vec<Value>> {
        let path = format!("/api/v1/query?query={}", percent_encoded(query));
        let reply = http::get(self.netns, ([127, 0, 0, 1], PORT).into(), &path)?;
        ensure!(reply.status == 200, "{query}: {}", reply.body);
        let mut reply: Value = serde_json::from_str(&reply.body)?;
        match reply["data"]["result"].take() {
            Value::Array(elements) => Ok(elements),
            other => anyhow::bail!("{query} gives no vector: {other}"),
        }
    }

    /// The value of an instant query whose answer has one element; none without elements.
    pub fn query(&self, query: &str) -> Result<Option<f64>> {
        let elements = self.vector(query)?;
        ensure!(elements.len() <= 1, "{query} gives several: {elements:?}");
        let value = elements.first().and_then(|it| it["value"][1].as_str());
        value.map(|value| Ok(value.parse()?)).transpose()
    }

    /// Waits until a query has a value that is a number.
    pub fn wait_query(&self, query: &str) -> Result<f64> {
        let start = Instant::now();
        let what = format!("{query} to have a value");
        let value = wait_for(&what, PATIENCE, || {
            let value = self.query(query)?;
            Ok(value.filter(|value| value.is_finite()))
        });
        value.with_context(|| format!("after {:?}", start.elapsed()))
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// As scrape.yaml of the manifests has it, but for how targets are found.
fn configuration(scraped: &str, rules: Option<&PathBuf>) -> String {
    let rules = rules.map_or_else(String::new, |it| {
        format!("rule_files: ['{}']\n", it.display())
    });
    format!(
        "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}
{rules}scrape_configs:
- job_name: weft-agent
  honor_labels: true
  static_configs:
{scraped}"
    )
}

fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            byte if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

const PORT: u16 = 9090;
const RELAY_PORT: u16 = 9099;
const PATIENCE: Duration = Duration::from_secs(30);
