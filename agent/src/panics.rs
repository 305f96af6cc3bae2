//! Panics. One ends the task that it happens in: a connection, an exchange of HTTP/2, or a part of the agent
//! without which it must not go on (`run`). What that task held is given back as it is unwound, and no lock
//! is lost for it: each is taken whether somebody panicked under it or not, and what is changed under one
//! is complete in itself. A panic is a bug nevertheless, so each is told and counted.

use std::backtrace::Backtrace;
use std::panic::{self, PanicHookInfo};
use std::sync::atomic::{AtomicU64, Ordering};

static COUNT: AtomicU64 = AtomicU64::new(0);

/// Tells and counts panics from now on.
pub fn watch() {
    panic::set_hook(Box::new(note));
}

/// How many there were.
pub fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

fn note(panic: &PanicHookInfo<'_>) {
    // First, so that it counts whatever becomes of the rest.
    COUNT.fetch_add(1, Ordering::Relaxed);
    let message = panic.payload_as_str().unwrap_or("of another kind");
    let place = panic.location().map(ToString::to_string);
    let thread = std::thread::current();
    // Empty unless RUST_BACKTRACE asks for it.
    let trace = Backtrace::capture();
    tracing::error!(
        message,
        place,
        thread = thread.name(),
        %trace,
        "a panic: what it happened in has ended. Please report it"
    );
}
