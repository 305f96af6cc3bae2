//! What the agents and the controller hold, and what of it is more than before.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, Result};
use weft_tests::metrics::Metrics;
use weft_tests::{Cluster, run};

/// What the whole cluster holds.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    /// The agents of the nodes, then the controller.
    pub(crate) processes: Vec<Process>,
    /// Entries of each map of each node.
    entries: BTreeMap<String, f64>,
    /// Pins of each node, without the agents' own places, of which each new agent has another.
    pins: BTreeMap<String, usize>,
    /// Network namespaces of the run.
    namespaces: usize,
}

/// What a process holds.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) name: String,
    /// Descriptors by kind: sockets, namespaces, files by their path, ...
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    tasks: f64,
    series: BTreeSet<String>,
    pub(crate) memory_mib: f64,
}

impl Held {
    pub(crate) fn by(cluster: &Cluster) -> Result<Held> {
        let mut held = Held {
            processes: Vec::new(),
            entries: BTreeMap::new(),
            pins: BTreeMap::new(),
            namespaces: run::remains(cluster.name()).len(),
        };
        for node in cluster.nodes() {
            let pid = node.agent_pid().context("no agent")?;
            let metrics = node.metrics()?;
            for sample in metrics.find("weft_map_entries", &[]) {
                let map = sample.labels.get("map").context("a map without a name")?;
                held.entries
                    .insert(format!("{} {map}", node.name()), sample.value);
            }
            let pins = node.pins()?;
            let agents =
                |path: &std::path::PathBuf| path.components().any(|it| it.as_os_str() == "agents");
            let pins = pins.iter().filter(|it| !agents(it)).count();
            held.pins.insert(node.name().to_owned(), pins);
            held.processes
                .push(Process::read(node.name(), pid, &metrics, "weft_tasks")?);
        }
        let controller = cluster.controller()?;
        let pid = controller.pid().context("no controller")?;
        held.processes.push(Process::read(
            "controller",
            pid,
            &controller.metrics()?,
            "weft_controller_tasks",
        )?);
        Ok(held)
    }

    /// What there is more of than before; memory is not looked at. `slack` is how many sockets, tasks
    /// and threads more are nothing yet, where traffic goes on.
    pub(crate) fn more_than(&self, before: &Held, slack: usize) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, before: usize, now: usize, slack: usize| {
            if now > before + slack {
                found.push(format!("{what}: {now} instead of {before}"));
            }
        };
        for (map, entries) in &self.entries {
            let before = before.entries.get(map).copied().unwrap_or(0.0);
            compare(map, before as usize, *entries as usize, 0);
        }
        for (node, pins) in &self.pins {
            let before = before.pins.get(node).copied().unwrap_or(0);
            compare(&format!("pins of {node}"), before, *pins, 0);
        }
        compare(
            "namespaces, cgroups and pin folders",
            before.namespaces,
            self.namespaces,
            0,
        );
        for (now, before) in self.processes.iter().zip(&before.processes) {
            let name = &now.name;
            for (kind, count) in &now.descriptors {
                let before = before.descriptors.get(kind).copied().unwrap_or(0);
                let slack = if kind == "socket" { slack } else { 0 };
                compare(
                    &format!("descriptors of {name}: {kind}"),
                    before,
                    *count,
                    slack,
                );
            }
            let threads = slack + IDLE_THREADS;
            compare(
                &format!("threads of {name}"),
                before.threads,
                now.threads,
                threads,
            );
            let tasks = (before.tasks as usize, now.tasks as usize);
            compare(&format!("tasks of {name}"), tasks.0, tasks.1, slack);
        }
        for (now, before) in self.processes.iter().zip(&before.processes) {
            let new = now.series.difference(&before.series);
            found.extend(new.map(|it| format!("series of {}: {it}", now.name)));
        }
        found
    }

    /// The memory of each process in MiB.
    pub(crate) fn memory(&self) -> Vec<f64> {
        self.processes.iter().map(|it| it.memory_mib).collect()
    }

    /// Whether something of a pod with such a name is left.
    pub(crate) fn mentions(&self, name: &str) -> bool {
        let series = self.processes.iter().flat_map(|it| &it.series);
        series.into_iter().any(|it| it.contains(name))
    }
}

impl Process {
    fn read(name: &str, pid: u32, metrics: &Metrics, tasks: &str) -> Result<Process> {
        let mut descriptors = BTreeMap::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
            let link = std::fs::read_link(entry?.path()).unwrap_or_default();
            let text = link.to_string_lossy();
            let kind = match text.split_once(':') {
                Some((kind, _)) => kind,
                None if text.contains("/netns/") => "netns",
                None => &text,
            };
            *descriptors.entry(kind.to_owned()).or_default() += 1;
        }
        let series = metrics.samples().iter();
        let series = series.map(|it| format!("{} {:?}", it.name, it.labels));
        Ok(Process {
            name: name.to_owned(),
            descriptors,
            threads: std::fs::read_dir(format!("/proc/{pid}/task"))?.count(),
            tasks: metrics.sum(tasks, &[]),
            series: series.collect(),
            memory_mib: resident_mib(pid)?,
        })
    }
}

/// The runtime keeps threads for calls that block for ten seconds, and there always are some.
const IDLE_THREADS: usize = 4;

/// The resident memory of a process.
pub(crate) fn resident_mib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|it| it.trim().strip_suffix(" kB"));
    Ok(kib.context("no VmRSS")?.parse::<f64>()? / 1024.0)
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for it in &self.processes {
            let descriptors: usize = it.descriptors.values().sum();
            write!(
                f,
                "{}: {descriptors} descriptors, {} tasks, {} threads, {} series, {:.1} MiB; ",
                it.name,
                it.tasks,
                it.threads,
                it.series.len(),
                it.memory_mib
            )?;
        }
        let entries: f64 = self.entries.values().sum();
        let pins: usize = self.pins.values().sum();
        write!(
            f,
            "{entries} map entries, {pins} pins, {} namespaces",
            self.namespaces
        )
    }
}
