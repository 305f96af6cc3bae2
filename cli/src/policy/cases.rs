//! Questions, from the command line or from a file.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::PolicyTest;
use super::decide::Word;

/// A question, and what is expected.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Case {
    /// What it is about, for people.
    #[serde(default)]
    name: Option<String>,
    pub(super) from: String,
    pub(super) to: String,
    pub(super) port: Port,
    #[serde(default)]
    pub(super) method: Option<String>,
    #[serde(default)]
    pub(super) path: Option<String>,
    #[serde(default)]
    pub(super) headers: Vec<String>,
    #[serde(default)]
    pub(super) host: Option<String>,
    #[serde(default)]
    pub(super) grpc: bool,
    #[serde(default)]
    pub(super) address: Option<IpAddr>,
    #[serde(default, rename = "toAddress")]
    pub(super) to_address: Option<IpAddr>,
    pub(super) expect: Word,
}

/// A port, by number or name.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Port {
    Number(u16),
    Name(String),
}

/// Why there are no questions.
#[derive(Debug, thiserror::Error)]
pub enum CasesError {
    /// The file cannot be read.
    #[error("cannot read {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
    /// It is no list of questions.
    #[error("{path} is no list of questions: {reason}: see weft policy test --help")]
    Form {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It asks nothing.
    #[error("{0} asks nothing: a test that tests nothing would always hold")]
    Empty(PathBuf),
}

/// Reads a file of questions.
pub(super) fn read(path: &Path) -> Result<Vec<Case>, CasesError> {
    let read = std::fs::read_to_string(path);
    let text = read.map_err(|reason| CasesError::Read {
        path: path.to_owned(),
        reason,
    })?;
    let cases: Result<Vec<Case>, _> = serde_saphyr::from_str(&text);
    let cases = cases.map_err(|reason| CasesError::Form {
        path: path.to_owned(),
        reason: reason.to_string(),
    })?;
    match cases.is_empty() {
        true => Err(CasesError::Empty(path.to_owned())),
        false => Ok(cases),
    }
}

impl Case {
    /// The question on the command line.
    pub(super) fn of(test: &PolicyTest) -> Self {
        let asked = |it: &Option<String>| it.clone().unwrap_or_default();
        Self {
            name: None,
            from: asked(&test.from),
            to: asked(&test.to),
            port: Port::Name(asked(&test.port)),
            method: test.method.clone(),
            path: test.path.clone(),
            headers: test.headers.clone(),
            host: test.host.clone(),
            grpc: test.grpc,
            address: test.address,
            to_address: test.to_address,
            expect: test.expect,
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(formatter),
            Self::Name(name) => name.fmt(formatter),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.name {
            return formatter.write_str(name);
        }
        write!(formatter, "{} → {}:{}", self.from, self.to, self.port)?;
        match (&self.method, &self.path) {
            (None, None) => Ok(()),
            (method, path) => {
                let method = method.as_deref().unwrap_or("GET");
                let path = path.as_deref().unwrap_or("/");
                write!(formatter, " {method} {path}")
            }
        }
    }
}
