//! The command line: what can be asked, and how.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::authz::Authz;
use crate::check::Check;
use crate::diagnostics::Diagnostics;
use crate::edges::Edges;
use crate::endpoints::Endpoints;
use crate::enroll::Enroll;
use crate::explain::Explain;
use crate::identity::Identity;
use crate::install::{Install, Uninstall};
use crate::outcome::Outcome;
use crate::policy::PolicyTest;
use crate::stat::Stat;
use crate::stat::inbound::StatInbound;
use crate::stat::outbound::StatOutbound;
use crate::stat::routes::Routes;
use crate::tap::Tap;
use crate::tap::top::Top;

/// Sees what the mesh does.
#[derive(Debug, Parser)]
#[command(
    name = "weft",
    version,
    max_term_width = 100,
    after_help = "weft NAME runs the program weft-NAME on PATH, where there is no command of that name. \
        Exit codes: 0 yes (allowed, healthy, as expected), 1 no, 2 it could not be found out."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prints the manifests that roll out the mesh.
    Install(Install),
    /// Prints what removes the kernel programs, and says what else is to be done.
    Uninstall(Uninstall),
    /// Puts a namespace, or the pods of a workload, into the mesh, by a label. Nothing restarts.
    #[command(
        after_help = "Next: weft stat. Pods that are made later have the label of their namespace, or of their template."
    )]
    Enroll(Enroll),
    /// Takes a namespace, or the pods of a workload, out of the mesh, by a label. Nothing restarts.
    Unenroll(Enroll),
    /// What policy says.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Says whether the mesh is healthy, and if not, what is wrong and what helps.
    Check(Check),
    /// Shows success rates, requests, latencies and connections of workloads.
    Stat(Stat),
    /// Shows what is asked of workloads, by Server, with what its routes let in.
    StatInbound(StatInbound),
    /// Shows what workloads ask of others, by route and backend, with retries and timeouts.
    StatOutbound(StatOutbound),
    /// Shows the routes of Services, whether they are in force, and what goes by them.
    Routes(Routes),
    /// Shows live requests, responses and connections of workloads, until it is ended.
    Tap(Tap),
    /// Shows the requests of workloads by who asks whom for what, as they go by, until it is ended.
    Top(Top),
    /// Shows what talks to what, as whom, and whether it is secured.
    Edges(Edges),
    /// Shows what policy lets in and what it does not, and what decides it.
    Authz(Authz),
    /// Shows who pods are, and until when their certificates say so.
    Identity(Identity),
    /// Shows who is behind a Service, as each node's agent sees it.
    Endpoints(Endpoints),
    /// Explains what becomes of a connection from a pod to a destination, and what decides each step of it.
    Explain(Explain),
    /// Collects all that controllers and agents say of themselves in a folder, without secrets.
    Diagnostics(Diagnostics),
    /// Writes what lets a shell complete the commands and flags of this one.
    Completions(Completions),
    /// Writes the manual's pages, one for each command, into a folder.
    Man(Man),
    /// Any other: `weft NAME` runs the program weft-NAME on PATH.
    #[command(external_subcommand)]
    Extension(Vec<OsString>),
}

/// What `weft completions` is asked.
#[derive(Args, Debug)]
pub struct Completions {
    /// The shell.
    pub shell: Shell,
}

impl Completions {
    /// Writes them.
    ///
    /// # Errors
    /// Writing failed.
    pub fn write(&self) -> Result<Outcome, crate::Error> {
        let mut script = vec![];
        clap_complete::generate(self.shell, &mut Cli::command(), "weft", &mut script);
        io::stdout().write_all(&script)?;
        Ok(Outcome::Good)
    }
}

/// What `weft man` is asked.
#[derive(Args, Debug)]
pub struct Man {
    /// The folder, which is made if it is not there: `man -M` looks for it under the name man1.
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
}

/// Why there is no manual.
#[derive(Debug, thiserror::Error)]
#[error("the manual cannot be written into {}: {reason}", folder.display())]
pub struct ManError {
    folder: PathBuf,
    reason: io::Error,
}

impl Man {
    /// Writes them: `weft.1`, `weft-check.1`, ...
    ///
    /// # Errors
    /// Writing failed.
    pub fn write(&self) -> Result<Outcome, crate::Error> {
        let written = fs::create_dir_all(&self.folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &self.folder));
        let folder = self.folder.clone();
        written.map_err(|reason| ManError { folder, reason })?;
        Ok(Outcome::Good)
    }
}

/// The commands about policy.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Says from manifests alone whether a client would be allowed to do something.
    Test(PolicyTest),
}

/// Reads a time: `10s`, `1m30s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let read = weft_core::route::duration(text).map_err(|error| error.to_string())?;
    read.ok_or_else(|| "more than nothing is needed".to_owned())
}

/// Reads a time that may be in days: `30d`.
pub(crate) fn days(text: &str) -> Result<Duration, String> {
    let read = weft_core::route::annotated_duration(text).map_err(|error| error.to_string())?;
    read.ok_or_else(|| "more than nothing is needed".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_command_has_a_page() {
        let folder = tempfile::tempdir().expect("a folder");
        let man = Man {
            folder: folder.path().join("man1"),
        };
        assert_eq!(man.write().expect("written"), Outcome::Good);
        for command in Cli::command().get_subcommands() {
            let page = man.folder.join(format!("weft-{}.1", command.get_name()));
            let text = fs::read_to_string(&page).expect("a page");
            assert!(text.contains(".SH NAME"), "{text}");
        }
        let in_the_way = Man {
            folder: man.folder.join("weft.1"),
        };
        let error = in_the_way.write().expect_err("no folder").to_string();
        assert!(error.contains("weft.1: "), "{error}");
    }
}
