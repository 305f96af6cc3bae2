//! `http raw`: bytes as they are given, for requests that no HTTP client would send.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use crate::client::{SocketOptions, open, outcome};
use crate::{emit, escaped};

/// Sends bytes and prints what comes back, until the server ends, or says what is waited for, or
/// for long says nothing.
#[derive(Args)]
pub(crate) struct Raw {
    target: SocketAddr,
    #[command(flatten)]
    options: SocketOptions,
    /// What to send: text in which `\r`, `\n`, `\t`, `\0`, `\\` and `\x1f` stand for bytes. May be
    /// given more than once: each is a segment of its own.
    #[arg(long, value_name = "ESCAPED")]
    send: Vec<String>,
    /// Sends a file's bytes after that.
    #[arg(long)]
    file: Option<PathBuf>,
    /// The pause between two segments.
    #[arg(long, default_value_t = 20)]
    pause_ms: u64,
    /// Sends each byte in a segment of its own.
    #[arg(long)]
    bytewise: bool,
    /// Ends the sending side after sending.
    #[arg(long)]
    half_close: bool,
    /// Stops when what came ends with this (escaped) text, so many times in all.
    #[arg(long, value_name = "ESCAPED")]
    until: Option<String>,
    /// How often `until` must have come.
    #[arg(long, default_value_t = 1)]
    times: usize,
    /// Stops when nothing has come for so long.
    #[arg(long, default_value_t = 10_000)]
    quiet_ms: u64,
}

impl Raw {
    pub(crate) fn run(self) -> Result<()> {
        let start = Instant::now();
        let mut report = match open(self.target, &self.options) {
            Ok(stream) => self.exchange(&stream, start)?,
            Err(failure) => failure.report(),
        };
        report["elapsed_ms"] = (start.elapsed().as_secs_f64() * 1e3).into();
        emit(&report);
        Ok(())
    }

    fn exchange(&self, stream: &TcpStream, start: Instant) -> Result<serde_json::Value> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_millis(self.quiet_ms)))?;
        let segments = self.segments()?;
        let until = self.until.as_deref().map(escaped::parse).transpose()?;
        let mut received = Vec::new();
        let (sent, ended) = std::thread::scope(|scope| {
            let sender = scope.spawn(|| self.send_all(stream, &segments));
            let ended = self.receive(stream, until.as_deref(), start, &mut received);
            let sent = sender
                .join()
                .unwrap_or_else(|_| Err(ErrorKind::Other.into()));
            (sent, ended)
        });
        // A reset is told once, and the sender may have been the one who was told.
        let was_told = sent.as_ref().is_err_and(|it| outcome(it) == "reset");
        let outcome = match ended.outcome {
            "eof" if was_told && received.is_empty() => "reset",
            outcome => outcome,
        };
        Ok(json!({
            "outcome": outcome,
            "stage": "receive",
            "received": escaped::print(&received),
            "received_bytes": received.len(),
            "statuses": statuses(&received),
            "first_byte_ms": ended.first_byte_ms,
            "send_error": sent.err().map(|error| error.to_string()),
        }))
    }

    fn segments(&self) -> Result<Vec<Vec<u8>>> {
        let mut segments = Vec::new();
        for text in &self.send {
            segments.push(escaped::parse(text)?);
        }
        if let Some(file) = &self.file {
            let bytes = std::fs::read(file);
            segments.push(bytes.with_context(|| format!("reading {}", file.display()))?);
        }
        if self.bytewise {
            segments = segments.concat().iter().map(|byte| vec![*byte]).collect();
        }
        Ok(segments)
    }

    fn send_all(&self, mut stream: &TcpStream, segments: &[Vec<u8>]) -> std::io::Result<()> {
        for (number, segment) in segments.iter().enumerate() {
            if number > 0 {
                // Not a wait for anything: segments of their own are what is asked for.
                std::thread::sleep(Duration::from_millis(self.pause_ms));
            }
            stream.write_all(segment)?;
        }
        if self.half_close {
            stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    fn receive(
        &self,
        mut stream: &TcpStream,
        until: Option<&[u8]>,
        start: Instant,
        received: &mut Vec<u8>,
    ) -> Ended {
        let mut buffer = vec![0; 64 * 1024];
        let mut first_byte_ms = None;
        let outcome = loop {
            match stream.read(&mut buffer) {
                Ok(0) => break "eof",
                Ok(count) => {
                    first_byte_ms.get_or_insert_with(|| start.elapsed().as_secs_f64() * 1e3);
                    received.extend(&buffer[..count]);
                    if until.is_some_and(|until| times(received, until) >= self.times) {
                        break "found";
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if outcome(&error) == "timeout" => break "quiet",
                Err(error) => break outcome(&error),
            }
        };
        Ended {
            outcome,
            first_byte_ms,
        }
    }
}

struct Ended {
    outcome: &'static str,
    first_byte_ms: Option<f64>,
}

fn times(text: &[u8], wanted: &[u8]) -> usize {
    if wanted.is_empty() {
        return 0;
    }
    let windows = text.windows(wanted.len());
    windows.filter(|window| *window == wanted).count()
}

/// The status codes of all lines that begin as an answer of HTTP/1 does.
fn statuses(received: &[u8]) -> Vec<u16> {
    let text = String::from_utf8_lossy(received);
    let starts = text.match_indices("HTTP/1.");
    starts
        .filter_map(|(at, _)| text.get(at + 9..at + 12)?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines() {
        let text = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nbodyHTTP/1.0 404 x\r\n";
        assert_eq!(statuses(text), [100, 200, 404]);
        assert_eq!(times(b"aXbX", b"X"), 2);
    }
}
