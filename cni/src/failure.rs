//! What a plugin tells a runtime when something is not done, with the error codes of the CNI specification (1.1, "Error").

use serde::Serialize;

/// Why a call failed. The kubelet shows it in the pod's events, so it says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}{}{details}", if details.is_empty() { "" } else { ": " })]
pub struct Failure {
    /// What kind of failure.
    pub code: Code,
    /// What failed.
    pub message: String,
    /// Why, and what to do. Empty: nothing more is known.
    pub details: String,
}

/// The codes that are used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Code {
    /// The configuration's version is not supported, or has no such command.
    IncompatibleVersion = 1,
    /// An environment variable is missing or cannot be read.
    InvalidEnvironment = 4,
    /// Reading the configuration, or writing the result, failed.
    Io = 5,
    /// What was read is no JSON.
    Decoding = 6,
    /// The configuration is JSON, and cannot be used.
    InvalidConfiguration = 7,
    /// It may work later: runtimes try again.
    TryAgainLater = 11,
    /// The pod is not in the mesh although it belongs there.
    NotEnrolled = 101,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Printed<'a> {
    cni_version: &'a str,
    code: u32,
    msg: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    details: &'a str,
}

impl Failure {
    /// A failure about which nothing more is known.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    /// The same with details.
    #[must_use]
    pub fn because(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// As it is printed for a runtime that speaks this version.
    pub fn to_json(&self, cni_version: &str) -> String {
        let printed = Printed {
            cni_version,
            code: self.code as u32,
            msg: &self.message,
            details: &self.details,
        };
        // Texts and a number: there is nothing in it that could fail.
        serde_json::to_string(&printed).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_as_the_specification_says() {
        let failure = Failure::new(Code::TryAgainLater, "no \"agent\"").because("wait");
        let expected = r#"{"cniVersion":"1.0.0","code":11,"msg":"no \"agent\"","details":"wait"}"#;
        assert_eq!(failure.to_json("1.0.0"), expected);
        let failure = Failure::new(Code::Io, "gone");
        assert_eq!(
            failure.to_json("0.4.0"),
            r#"{"cniVersion":"0.4.0","code":5,"msg":"gone"}"#
        );
        assert_eq!(failure.to_string(), "gone");
    }
}
