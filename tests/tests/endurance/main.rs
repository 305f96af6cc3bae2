//! What must hold for long: processes killed at random moments, certificates and roots that change,
//! pods that come and go. Short by default; `cargo xtask soak` runs what a release is tested with.

mod churn;
mod crashes;
mod held;
mod random;
mod rotation;
mod soak;

/// Whether this is the long form.
fn is_long() -> bool {
    std::env::var_os("WEFT_LONG").is_some_and(|it| it != "0")
}

/// The short number, or the long one.
fn extent<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}
