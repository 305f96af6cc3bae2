//! One more controller beside that of a cluster: another process in the same namespace, which reads and signs from the
//! same, at ports of its own.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};

use super::{Controller, STOP_DEADLINE, grpc_address, lock};
use crate::cluster::{START_DEADLINE, binary, check_running};
use crate::command::{Process, Program};
use crate::http;
use crate::metrics::Metrics;
use crate::wait::wait_for;

/// The other controller of a cluster.
#[derive(Debug)]
pub struct Replica<'a> {
    first: &'a Controller,
    process: Mutex<Option<Process>>,
    log_files: Mutex<Vec<PathBuf>>,
}

impl Controller {
    /// One more controller; it is not started yet.
    pub fn another(&self) -> Replica<'_> {
        Replica {
            first: self,
            process: Mutex::default(),
            log_files: Mutex::default(),
        }
    }
}

impl Replica<'_> {
    /// Where agents connect to.
    pub fn address() -> SocketAddr {
        (grpc_address().ip(), 15011).into()
    }

    /// Starts the binary and waits until agents can connect.
    pub fn start(&self) -> Result<()> {
        self.spawn()?;
        self.wait_ready()
    }

    /// Starts the binary.
    pub fn spawn(&self) -> Result<()> {
        let first = self.first;
        let args = first.args.iter().scan("", |before, it| {
            let argument = match *before {
                "--listen" => Self::address().to_string(),
                "--admin" => ADMIN.to_string(),
                "--admin-socket" => format!("{it}.second"),
                _ => it.clone(),
            };
            *before = it;
            Some(argument)
        });
        let program = binary("weft-controller")?;
        let program = Program::new(
            program,
            Some(&first.netns),
            Some(&first.cgroup),
            &first.logs,
        )?;
        let level = std::env::var("WEFT_TEST_LOG").unwrap_or("info".into());
        let program = program.named("weft-controller-2").env("WEFT_LOG", level);
        let process = program.args(args).spawn()?;
        lock(&self.log_files).extend(process.logs().map(Path::to_owned));
        *lock(&self.process) = Some(process);
        Ok(())
    }

    /// Waits until agents can connect.
    pub fn wait_ready(&self) -> Result<()> {
        wait_for("the other controller to be ready", START_DEADLINE, || {
            let mut process = lock(&self.process);
            let process = process.as_mut().context("it was not started")?;
            if let Err(ended) = check_running(process) {
                return Ok(Some(Err(ended)));
            }
            let reply = self.get("/ready")?;
            ensure!(reply.status == 200, "/ready says {}", reply.body);
            Ok(Some(Ok(())))
        })?
    }

    /// What it answers on its administrative port.
    pub fn get(&self, path: &str) -> Result<http::Reply> {
        http::get(&self.first.netns, ADMIN, path)
    }

    /// Scrapes its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&self.get("/metrics")?.ok()?)
    }

    /// All it logged, over all its starts.
    pub fn log(&self) -> String {
        let files = lock(&self.log_files).clone();
        let text = |it: &PathBuf| fs::read_to_string(it).unwrap_or_default();
        files.iter().map(text).collect()
    }

    /// Ends it with SIGTERM.
    pub fn stop(&self) -> Result<()> {
        let process = lock(&self.process).take();
        let mut process = process.context("the other controller is not running")?;
        process.stop(STOP_DEADLINE).map(drop)
    }

    /// Ends it with SIGKILL.
    pub fn kill(&self) -> Result<()> {
        let process = lock(&self.process).take();
        let mut process = process.context("the other controller is not running")?;
        process.kill()
    }
}

const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15016);
