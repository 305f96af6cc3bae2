//! Asks an agent by its Unix socket: for the kubelet's probes, and for whoever runs commands in an agent's container, in
//! which there is no other program.
//!
//! A probe of the port would ask whichever agent the kernel picks, and during an upgrade there are two.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Only paths can be asked for.
    #[error("{0:?} is no path such as /ready, /metrics, /config_dump or /log_level")]
    Path(String),
    /// Nobody listens there, or says anything.
    #[error("asking {socket}: is an agent running, with this --admin-socket?")]
    Socket {
        /// The socket.
        socket: String,
        /// What failed.
        source: io::Error,
    },
    /// What was said is not HTTP.
    #[error("the answer cannot be read")]
    Answer,
    /// The agent says no.
    #[error("{status}: {body}")]
    Refused {
        /// The status of HTTP.
        status: u16,
        /// What it says about it.
        body: String,
    },
}

/// Reads a path, or with a body writes it; gives the answer's body if its status is 200.
///
/// # Errors
/// There is no answer, or one with another status.
pub fn ask(socket: &Path, path: &str, body: Option<&str>) -> Result<String, AskError> {
    let printable = path.bytes().all(|it| it.is_ascii_graphic());
    if !path.starts_with('/') || !printable {
        return Err(AskError::Path(path.to_owned()));
    }
    let request = match body {
        None => format!("GET {path} HTTP/1.1\r\nhost: agent\r\n\r\n"),
        Some(body) => {
            let length = body.len();
            format!("PUT {path} HTTP/1.1\r\nhost: agent\r\ncontent-length: {length}\r\n\r\n{body}")
        }
    };
    let answer = exchange(socket, &request).map_err(|source| AskError::Socket {
        socket: socket.display().to_string(),
        source,
    })?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(AskError::Answer)?;
    let status = head.split(' ').nth(1).and_then(|it| it.parse().ok());
    match status.ok_or(AskError::Answer)? {
        200 => Ok(body.to_owned()),
        status => Err(AskError::Refused {
            status,
            body: body.trim_end().to_owned(),
        }),
    }
}

/// The agent closes each connection after its answer.
fn exchange(socket: &Path, request: &str) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// The agent has as long for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
