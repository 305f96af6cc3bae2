//! The controller's program: reads the command line, and hands over to the library.

use std::io::IsTerminal;

use anyhow::{Context, ensure};
use clap::Parser;
use mimalloc::MiMalloc;
use tracing_subscriber::EnvFilter;
use weft_controller::config::{Cli, Command, LogFormat, Run};

/// A start reads everything at once, page by page, by several threads: glibc's allocator keeps for each what it took, and
/// that is half of what the controller then has. This one gives most of it back.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Crds(crds) => weft_controller::objects::crds::write(&crds.dir, crds.of_linkerd),
        Command::Run(config) => {
            log(&config)?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()?;
            runtime.block_on(weft_controller::run::run(*config))
        }
    }
}

fn log(config: &Run) -> anyhow::Result<()> {
    // Every failure of a request is reported here, with what it means: kube's own lines repeat it.
    let level = &config.log_level;
    // Its parser cuts text by offsets that may be within a letter, and panics.
    ensure!(
        level.is_ascii(),
        "--log-level {level:?}: letters beyond ASCII"
    );
    let filter = EnvFilter::try_new(format!("kube_client=off,{level}"));
    let filter = filter.with_context(|| format!("--log-level {level:?}"))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
