//! The typed side of `weft-testapp`, this crate's own application: see its `--help`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::command::{Process, Program};
use crate::pod::Pod;
use crate::wait::{DEADLINE, wait_for};

/// How one connection went.
#[derive(Clone, Debug, Deserialize)]
pub struct Connected {
    /// `ok`, `refused`, `reset`, `timeout`, `unreachable`, `in_use`, `not_available`, `denied` or
    /// `error`.
    pub outcome: String,
    /// Where it ended: `socket`, `bind`, `connect`, `send` or `receive`.
    pub stage: String,
    /// `getsockname`.
    pub local: Option<SocketAddr>,
    /// `getpeername`.
    pub peer: Option<SocketAddr>,
    /// Bytes received.
    #[serde(default)]
    pub received: u64,
    /// Whether the peer ended its sending side.
    #[serde(default)]
    pub eof: bool,
    /// Whether what was received is the pattern, if that was expected.
    #[serde(default)]
    pub intact: bool,
    /// The first 4 KiB received.
    #[serde(default)]
    pub text: String,
    /// How long all took.
    #[serde(default)]
    pub elapsed_ms: f64,
}

impl Connected {
    /// Fails unless the outcome is one of these.
    pub fn expect(self, outcomes: &[&str]) -> Result<Connected> {
        ensure!(
            outcomes.contains(&self.outcome.as_str()),
            "expected {outcomes:?}, got {self:?}"
        );
        Ok(self)
    }
}

/// What a server saw of one connection.
#[derive(Clone, Debug, Deserialize)]
pub struct Accepted {
    /// The address `accept` returned.
    pub accepted: SocketAddr,
    /// `getpeername`.
    pub peer: Option<SocketAddr>,
    /// `getsockname`.
    pub local: Option<SocketAddr>,
}

/// How a server's connection ended.
#[derive(Clone, Debug, Deserialize)]
pub struct Closed {
    /// Bytes received.
    pub received: u64,
    /// As in [`Connected::outcome`].
    pub outcome: String,
    /// Whether what was received is the pattern.
    pub intact: bool,
}

/// How many connections ended how.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Counts {
    /// By outcome as in [`Connected::outcome`].
    pub counts: BTreeMap<String, u64>,
    /// The first that did not end well, in the application's own words.
    #[serde(default)]
    pub failures: Vec<String>,
}

impl Counts {
    /// How many ended so.
    pub fn of(&self, outcome: &str) -> u64 {
        self.counts.get(outcome).copied().unwrap_or(0)
    }

    /// How many there were.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    process: Process,
}

impl Server {
    /// Serves on all IPv4 and IPv6 addresses in a mode: `echo`, `sink`, `source`, `greet`, ...
    pub fn start(pod: &Pod, port: u16, mode: &str, further_args: &[&str]) -> Result<Server> {
        let any = [format!("0.0.0.0:{port}"), format!("[::]:{port}")];
        Server::start_on(pod, &any, mode, further_args)
    }

    /// Serves on these addresses.
    pub fn start_on(
        pod: &Pod,
        listen: &[String],
        mode: &str,
        further_args: &[&str],
    ) -> Result<Server> {
        Server::spawn(command(pod)?, listen, mode, further_args)
    }

    /// Serves anywhere: `program` is `weft-testapp` somewhere.
    pub fn spawn(
        program: Program,
        listen: &[String],
        mode: &str,
        further_args: &[&str],
    ) -> Result<Server> {
        let mut program = program.args(["serve", "--mode", mode]).args(further_args);
        for address in listen {
            program = program.args(["--listen", address]);
        }
        let mut process = program.spawn()?;
        for address in listen {
            process.wait_listening(address.parse::<SocketAddr>()?.port())?;
        }
        Ok(Server { process })
    }

    /// All connections accepted so far.
    pub fn accepted(&self) -> Result<Vec<Accepted>> {
        events(&self.process.stdout(), "accepted")
    }

    /// All connections ended so far.
    pub fn closed(&self) -> Result<Vec<Closed>> {
        events(&self.process.stdout(), "closed")
    }

    /// Waits until this many connections have ended.
    pub fn wait_closed(&self, count: usize) -> Result<Vec<Closed>> {
        wait_for(
            &format!("the server to have ended {count} connections"),
            DEADLINE,
            || {
                let closed = self.closed()?;
                Ok((closed.len() >= count).then_some(closed))
            },
        )
    }

    /// Waits until this many connections have been accepted.
    pub fn wait_accepted(&self, count: usize) -> Result<Vec<Accepted>> {
        wait_for(
            &format!("the server to accept {count} connections"),
            DEADLINE,
            || {
                let accepted = self.accepted()?;
                Ok((accepted.len() >= count).then_some(accepted))
            },
        )
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// A connection that is kept busy; see `weft-testapp pulse`.
#[derive(Debug)]
pub struct Pulse {
    process: Process,
}

/// How a pulse ended.
#[derive(Clone, Debug, Deserialize)]
pub struct PulseEnd {
    /// `ok` if it was stopped, else as in [`Connected::outcome`].
    pub outcome: String,
    /// How many round trips there were.
    #[serde(default)]
    pub pulses: u64,
}

impl Pulse {
    /// Opens the connection and waits for the first round trip.
    pub fn start(pod: &Pod, target: SocketAddr) -> Result<Pulse> {
        Self::start_with(command(pod)?, target)
    }

    /// The same by this program, which is the one at [`path`].
    pub fn start_with(program: Program, target: SocketAddr) -> Result<Pulse> {
        let mut process = program
            .args(["pulse", &target.to_string()])
            .with_stdin()
            .spawn()?;
        let first = process.wait_for_line("event", DEADLINE)?;
        ensure!(
            first.contains("\"open\""),
            "the connection was not opened: {first}"
        );
        process.wait_for_line("beating", DEADLINE)?;
        Ok(Pulse { process })
    }

    /// Whether it still beats.
    pub fn is_beating(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits until it breaks.
    pub fn wait_broken(&mut self, deadline: Duration) -> Result<PulseEnd> {
        self.process
            .wait(deadline)
            .context("the connection goes on")?;
        self.end()
    }

    /// Stops it and says how it went.
    pub fn stop(mut self) -> Result<PulseEnd> {
        self.process.close_stdin();
        self.process.wait(DEADLINE)?;
        self.end()
    }

    fn end(&self) -> Result<PulseEnd> {
        events(&self.process.stdout(), "ended")?
            .pop()
            .context("the pulse said nothing at its end")
    }
}

/// Connections in a row in the background; see `weft-testapp load`.
#[derive(Debug)]
pub struct Load {
    process: Process,
}

impl Load {
    /// Starts it and waits for the first outcome.
    pub fn start(pod: &Pod, target: SocketAddr, further_args: &[&str]) -> Result<Load> {
        Load::spawn(command(pod)?, target, further_args)
    }

    /// The same from anywhere: `program` is `weft-testapp` somewhere.
    pub fn spawn(program: Program, target: SocketAddr, further_args: &[&str]) -> Result<Load> {
        let mut process = program
            .args(["load", &target.to_string()])
            .args(further_args)
            .with_stdin()
            .spawn()?;
        process.wait_for_line("change", DEADLINE)?;
        Ok(Load { process })
    }

    /// Stops it and gives the counts.
    pub fn stop(self) -> Result<Counts> {
        let out = self.process.finish(Duration::from_secs(40))?;
        events(&out, "end")?
            .pop()
            .context("the load said nothing at its end")
    }
}

/// Connections kept open; see `weft-testapp hold`.
#[derive(Debug)]
pub struct Hold {
    /// The outcomes of opening them.
    pub counts: Counts,
    process: Process,
}

impl Hold {
    /// Opens them.
    pub fn start(pod: &Pod, target: SocketAddr, count: u64, further_args: &[&str]) -> Result<Hold> {
        let mut process = command(pod)?
            .args(["hold", &target.to_string(), "--count", &count.to_string()])
            .args(further_args)
            .with_stdin()
            .spawn()?;
        let line = process.wait_for_line("counts", Duration::from_secs(60))?;
        Ok(Hold {
            counts: serde_json::from_str(&line)?,
            process,
        })
    }

    /// Closes them.
    pub fn release(self) -> Result<()> {
        self.process.finish(DEADLINE).map(drop)
    }
}

/// `weft-testapp` in a pod.
pub fn command(pod: &Pod) -> Result<Program> {
    pod.command(&path()?.display().to_string())
}

/// Opens one connection from a pod; `args` as in `weft-testapp connect --help`.
pub fn connect(pod: &Pod, target: SocketAddr, args: &[&str]) -> Result<Connected> {
    connect_with(command(pod)?, target, args)
}

/// Opens one connection from anywhere: `program` is `weft-testapp` somewhere.
pub fn connect_with(program: Program, target: SocketAddr, args: &[&str]) -> Result<Connected> {
    let out = program
        .args(["connect", &target.to_string()])
        .args(args)
        .output(Duration::from_secs(180))?
        .success()?;
    serde_json::from_str(&out).with_context(|| format!("reading {out}"))
}

/// Sends a text to an echo server, ends the sending side, and gives what came back.
pub fn say(pod: &Pod, target: SocketAddr, text: &str) -> Result<Connected> {
    connect(pod, target, &["--send", text, "--half-close"])
}

/// Opens many connections in a row from a pod; `args` as in `weft-testapp churn --help`.
pub fn churn(pod: &Pod, target: SocketAddr, count: u64, args: &[&str]) -> Result<Counts> {
    let out = command(pod)?
        .args(["churn", &target.to_string(), "--count", &count.to_string()])
        .args(args)
        .output(Duration::from_secs(300))?
        .success()?;
    let mut counts: Counts = events(&out, "end")?
        .pop()
        .context("the churn said nothing at its end")?;
    counts.failures = out
        .lines()
        .filter(|line| line.contains("\"failed\""))
        .take(5)
        .map(str::to_owned)
        .collect();
    Ok(counts)
}

/// Where `weft-testapp` is: `WEFT_BIN_DIR`, beside the running program or above it.
pub fn path() -> Result<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    folders.extend(
        std::env::current_exe()?
            .ancestors()
            .skip(1)
            .take(2)
            .map(PathBuf::from),
    );
    folders.extend(std::env::var_os("WEFT_BIN_DIR").map(PathBuf::from));
    let found = folders
        .iter()
        .map(|folder| folder.join("weft-testapp"))
        .find(|path| path.is_file());
    match found {
        Some(path) => Ok(path),
        None => crate::cluster::binary("weft-testapp"),
    }
}

/// The events of one kind in the output.
pub(crate) fn events<T: DeserializeOwned>(output: &str, event: &str) -> Result<Vec<T>> {
    let mut found = Vec::new();
    // A line without its end is still being written.
    for line in output
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
    {
        let value: serde_json::Value =
            serde_json::from_str(line).with_context(|| format!("reading {line}"))?;
        if value.get("event").and_then(|kind| kind.as_str()) == Some(event) {
            found.push(serde_json::from_value(value).with_context(|| format!("reading {line}"))?);
        }
    }
    Ok(found)
}

/// What [`Load`] and [`Pulse`] send, for searching the wire.
pub const LOAD_TEXT: &str = "weft-testapp-load-in-the-clear";
