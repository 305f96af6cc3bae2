//! `http-server`: a server that answers as `weft_tests::hostile` says.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use weft_tests::hostile::{Answer, PREFACE, answers};

/// Answers the first request of each connection, until killed.
#[derive(Args)]
pub(crate) struct HttpServer {
    /// The port, on all IPv4 addresses.
    port: u16,
    /// The answer's name.
    answer: String,
}

impl HttpServer {
    pub(crate) fn run(self) -> Result<()> {
        let mut all = answers().into_iter();
        let answer = all.find(|it| it.name == self.answer);
        let answer = answer.with_context(|| format!("no answer is called {:?}", self.answer))?;
        let answer = Arc::new(answer);
        let listener = TcpListener::bind(("0.0.0.0", self.port))?;
        for stream in listener.incoming() {
            let (stream, answer) = (stream?, Arc::clone(&answer));
            std::thread::spawn(move || serve(stream, &answer));
        }
        Ok(())
    }
}

fn serve(mut stream: TcpStream, answer: &Answer) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    let is_asked = |seen: &[u8]| match answer.is_http2 {
        true => has_headers(seen),
        false => seen.windows(4).any(|it| it == b"\r\n\r\n"),
    };
    if answer.is_http2 {
        // Settings first: a client may wait for them.
        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0])?;
    }
    while !is_asked(&seen) {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        seen.extend(&buffer[..count]);
    }
    stream.write_all(&answer.start)?;
    for _ in 0..answer.times {
        stream.write_all(&answer.then)?;
    }
    // Until the other side has had enough.
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Whether there is a frame of HEADERS behind the preface.
fn has_headers(seen: &[u8]) -> bool {
    let mut rest = seen.get(PREFACE.len()..).unwrap_or_default();
    while let [_, high, low, kind, ..] = *rest {
        if kind == 1 {
            return true;
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    false
}

const PATIENCE: Duration = Duration::from_secs(5);
