//! Panics on demand, to test what they end: by a header of a request, or by what a flow begins with. Whoever can
//! send a byte could end a task so, hence nobody ships it: it is part of the agent that upgrades are tested with,
//! and does not compile without debug assertions.

#[cfg(not(debug_assertions))]
compile_error!("the feature `faults` is for tests, and must not be in an optimised build");

use http::HeaderMap;

/// A request with this header panics where it is answered.
pub const HEADER: &str = "x-weft-fault";
/// What is read at once from an application's socket and is exactly this panics there.
pub const TEXT: &[u8] = b"weft-fault: panic while this is copied";

/// Whether the request is to panic.
pub fn asked_by(headers: &HeaderMap) -> bool {
    headers.contains_key(HEADER)
}

/// Panics if the bytes ask for it.
pub fn read(bytes: &[u8]) {
    strike(bytes == TEXT);
}

/// Panics if that was asked for.
pub fn strike(asked: bool) {
    assert!(!asked, "on purpose, as a test asked for it");
}
