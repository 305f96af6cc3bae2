//! The command-line tool of the mesh.
//!
//! Each command is a module: what it is asked on the command line, what it finds out, how it says so. What is found
//! out is a type that is shown as a table for people or as JSON for programs: neither knows more than the other.

pub mod authz;
pub mod check;
pub mod command;
pub mod controller;
pub mod diagnostics;
pub mod edges;
pub mod endpoints;
pub mod enroll;
pub mod explain;
pub mod extension;
pub mod identity;
pub mod install;
pub mod metrics;
pub mod outcome;
pub mod output;
pub mod policy;
pub mod stat;
pub mod tap;
pub mod time;
pub mod view;

use command::{Cli, Command, PolicyCommand};
use outcome::Outcome;

/// Why a command could not find out what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Of `weft policy test`.
    #[error(transparent)]
    Policy(#[from] policy::PolicyError),
    /// The mesh cannot be asked.
    #[error(transparent)]
    Reach(#[from] controller::ReachError),
    /// Of `weft diagnostics`.
    #[error(transparent)]
    Diagnostics(#[from] diagnostics::DiagnosticsError),
    /// Of `weft enroll` and `weft unenroll`.
    #[error(transparent)]
    Enroll(#[from] enroll::EnrollError),
    /// Of `weft install`.
    #[error(transparent)]
    Install(#[from] install::InstallError),
    /// Of `weft man`.
    #[error(transparent)]
    Man(#[from] command::ManError),
    /// Of a command that there is not.
    #[error(transparent)]
    Extension(#[from] extension::ExtensionError),
    /// Not even waiting works.
    #[error("cannot begin: {0}")]
    Runtime(std::io::Error),
    /// The answer could not be written.
    #[error("cannot write the answer: {0}")]
    Output(#[from] std::io::Error),
}

/// Does what the command line says, and writes the answer to standard output.
///
/// # Errors
/// What keeps it from being found out, and what to do about it.
pub fn run(cli: Cli) -> Result<Outcome, Error> {
    match cli.command {
        Command::Policy(PolicyCommand::Test(test)) => policy::run(&test),
        Command::Install(install) => install::install(&install),
        Command::Uninstall(uninstall) => install::uninstall(&uninstall),
        Command::Enroll(it) => wait(enroll::run(&it, enroll::Way::In)),
        Command::Unenroll(it) => wait(enroll::run(&it, enroll::Way::Out)),
        Command::Check(check) => wait(check::run(&check)),
        Command::Stat(stat) => wait(stat::run(&stat)),
        Command::StatInbound(stat) => wait(stat::inbound::run(&stat)),
        Command::StatOutbound(stat) => wait(stat::outbound::run(&stat)),
        Command::Routes(routes) => wait(stat::routes::run(&routes)),
        Command::Tap(tap) => wait(tap::run(&tap)),
        Command::Top(top) => wait(tap::top::run(&top)),
        Command::Edges(edges) => wait(edges::run(&edges)),
        Command::Authz(authz) => wait(authz::run(&authz)),
        Command::Identity(identity) => wait(identity::run(&identity)),
        Command::Endpoints(endpoints) => wait(endpoints::run(&endpoints)),
        Command::Explain(explain) => wait(explain::run(&explain)),
        Command::Diagnostics(diagnostics) => wait(diagnostics::run(&diagnostics)),
        Command::Completions(completions) => completions.write(),
        Command::Man(man) => man.write(),
        Command::Extension(words) => Ok(extension::run(&words)?),
    }
}

/// Does what takes waiting.
fn wait(work: impl Future<Output = Result<Outcome, Error>>) -> Result<Outcome, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.map_err(Error::Runtime)?.block_on(work)
}
