//! What a command's exit code says, the same for all commands.

use std::process::ExitCode;

/// The answer in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Yes: allowed, healthy, as expected, done. Exit code 0.
    Good,
    /// No: denied, something is wrong, not as expected. Exit code 1.
    Bad,
    /// It could not be found out. Exit code 2, which a wrong command line has too.
    Unknown,
}

impl Outcome {
    /// Good or bad.
    pub fn of(is_good: bool) -> Self {
        match is_good {
            true => Self::Good,
            false => Self::Bad,
        }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Good => Self::SUCCESS,
            Outcome::Bad => Self::from(1),
            Outcome::Unknown => Self::from(2),
        }
    }
}
