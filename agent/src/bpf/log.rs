//! What the kernel programs log, when they were built to (`cargo xtask build-ebpf --debug-log`) and
//! the agent was asked to read it. For debugging the programs; a build without it has no trace of
//! it.

use std::{thread, time::Duration};

use aya::Ebpf;
use aya_log::{EbpfLogger, Level};

use super::error::BpfError;

/// The map that the log statements write to; only there if they are.
pub(super) const MAP: &str = "AYA_LOGS";

/// The level to load programs with.
pub(super) fn level(wanted: bool) -> &'static u8 {
    const DEBUG: u8 = Level::Debug as u8;
    if wanted { &DEBUG } else { &0 }
}

/// Passes on what the programs log, to the `log` crate's logger, as long as the process lives.
pub(super) fn start(programs: &mut Ebpf) -> Result<(), BpfError> {
    if programs.map(MAP).is_none() {
        tracing::warn!(
            "the kernel programs cannot log: build with `cargo xtask build-ebpf --debug-log`"
        );
        return Ok(());
    }
    let mut logger = match EbpfLogger::init(programs) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!(%error, "the kernel programs' log cannot be read");
            return Ok(());
        }
    };
    thread::Builder::new()
        .name("kernel-log".to_owned())
        .spawn(move || {
            loop {
                logger.flush();
                thread::sleep(INTERVAL);
            }
        })
        .map(drop)
        .map_err(|source| BpfError::System {
            what: "starting a thread",
            source,
        })
}

const INTERVAL: Duration = Duration::from_millis(50);
