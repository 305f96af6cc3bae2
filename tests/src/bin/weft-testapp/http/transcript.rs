//! `http transcript`: what of the bytes that arrive a careless server would take for requests.
//!
//! It takes bare LF for a line's end, joins no folded lines, minds no repeated header, and believes
//! whichever length it was told to believe: with something in front that passes on what is
//! ambiguous, one request becomes two here.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::{emit, escaped};

/// Answers everything with 200, and writes down every head as it came.
#[derive(Args)]
pub(crate) struct Transcript {
    #[arg(long)]
    listen: SocketAddr,
    /// What says how long a body is, where there is both.
    #[arg(long, value_enum, default_value_t = Trust::Length)]
    trust: Trust,
    /// Which of several lengths counts.
    #[arg(long)]
    last_length: bool,
    /// Says that a connection may wait for so many seconds, and waits for ever.
    #[arg(long)]
    keep_alive: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Trust {
    /// `Content-Length`.
    Length,
    /// `Transfer-Encoding`.
    Chunks,
}

impl Transcript {
    pub(crate) fn run(self) -> Result<()> {
        let listener = TcpListener::bind(self.listen)
            .with_context(|| format!("listening on {}", self.listen))?;
        std::thread::scope(|scope| {
            while let Ok((stream, peer)) = listener.accept() {
                let server = &self;
                scope.spawn(move || {
                    let ended = server.serve(&stream);
                    let error = ended.err().map(|error| error.to_string());
                    emit(&json!({"event": "closed", "peer": peer.to_string(), "error": error}));
                });
            }
        });
        Ok(())
    }

    fn serve(&self, stream: &TcpStream) -> Result<()> {
        let mut reader = BufReader::new(stream);
        loop {
            let head = read_head(&mut reader)?;
            if head.is_empty() {
                return Ok(());
            }
            emit(&json!({"event": "head", "head": escaped::print(&head)}));
            let body = self.read_body(&head, &mut reader)?;
            emit(&json!({"event": "body", "body": escaped::print(&body)}));
            let keep_alive = self.keep_alive;
            let keep_alive = keep_alive.map(|it| format!("Keep-Alive: timeout={it}\r\n"));
            let keep_alive = keep_alive.unwrap_or_default();
            let answer = format!("HTTP/1.1 200 OK\r\n{keep_alive}Content-Length: 3\r\n\r\nok\n");
            (&*stream).write_all(answer.as_bytes())?;
        }
    }

    fn read_body(&self, head: &[u8], reader: &mut impl BufRead) -> Result<Vec<u8>> {
        let text = String::from_utf8_lossy(head).to_ascii_lowercase();
        let values = |name: &str| -> Vec<String> {
            let lines = text.lines().filter_map(|line| line.split_once(':'));
            let own = lines.filter(|(key, _)| key.trim() == name);
            own.map(|(_, value)| value.trim().to_owned()).collect()
        };
        let mut lengths = values("content-length").into_iter();
        let length = match self.last_length {
            true => lengths.next_back(),
            false => lengths.next(),
        };
        let length: Option<u64> = length.and_then(|length| length.parse().ok());
        let chunked = values("transfer-encoding")
            .iter()
            .any(|it| it.contains("chunked"));
        let mut body = Vec::new();
        if chunked && (length.is_none() || self.trust == Trust::Chunks) {
            read_chunks(reader, &mut body)?;
        } else {
            let limit = length.unwrap_or(0);
            reader.take(limit).read_to_end(&mut body)?;
        }
        Ok(body)
    }
}

/// All lines up to an empty one.
fn read_head(reader: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut head = Vec::new();
    loop {
        let start = head.len();
        reader.read_until(b'\n', &mut head)?;
        let line = &head[start..];
        let is_end = line == b"\n" || line == b"\r\n";
        if line.is_empty() || (is_end && start > 0) {
            return Ok(head);
        }
        if is_end {
            // Empty lines before a request count for nothing.
            head.clear();
        }
    }
}

fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> Result<()> {
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let digits = line.trim().split(';').next().unwrap_or_default();
        let size = u64::from_str_radix(digits, 16).context("a chunk's size")?;
        reader.by_ref().take(size).read_to_end(body)?;
        let mut end = String::new();
        reader.read_line(&mut end)?;
        if size == 0 {
            while !end.trim().is_empty() {
                end.clear();
                reader.read_line(&mut end)?;
            }
            return Ok(());
        }
    }
}
