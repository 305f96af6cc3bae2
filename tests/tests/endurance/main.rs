//! What must hold for long: processes killed at random moments, certificates and roots that change,
//! pods that come and go. Short by default; `WEFT_LONG=1` runs what a release is tested with.

mod churn;
mod crashes;
mod random;
mod rotation;

/// The short number, or the long one.
fn extent<T>(short: T, long: T) -> T {
    if std::env::var_os("WEFT_LONG").is_some_and(|it| it != "0") {
        long
    } else {
        short
    }
}
