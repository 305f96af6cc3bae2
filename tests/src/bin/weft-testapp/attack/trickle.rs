//! `trickle`: connections that take up room and give nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::client::{SocketOptions, open, outcome};
use crate::emit;

/// Opens connections, sends a start and then a byte now and then, and says how long each was borne.
#[derive(Args)]
pub(crate) struct Trickle {
    target: SocketAddr,
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// What each begins with, in hexadecimal.
    #[arg(long, default_value = "")]
    start: String,
    /// Sends one byte of this, in hexadecimal, again and again.
    #[arg(long)]
    then: Option<String>,
    /// The pause between two of these bytes.
    #[arg(long, default_value_t = 500)]
    pause_ms: u64,
    /// Gives up after so long.
    #[arg(long, default_value_t = 40_000)]
    most_ms: u64,
    /// Connects from these addresses, one after the other.
    #[arg(long, value_delimiter = ',', conflicts_with = "bind")]
    from: Vec<IpAddr>,
    #[command(flatten)]
    options: SocketOptions,
}

impl Trickle {
    pub(crate) fn run(self) -> Result<()> {
        super::raise_descriptors()?;
        let first = bytes(&self.start);
        let mut open_ones = Vec::new();
        let mut refused = 0;
        for number in 0..self.count {
            let mut options = self.options.clone();
            if !self.from.is_empty() {
                options.bind = Some(self.from[number % self.from.len()]);
            }
            match open(self.target, &options) {
                Ok(mut stream) => {
                    let _ = stream.write_all(&first);
                    stream.set_nonblocking(true)?;
                    open_ones.push(stream);
                }
                Err(failure) => {
                    refused += 1;
                    if refused == 1 {
                        emit(&json!({"event": "refused", "outcome": outcome(&failure.error)}));
                    }
                }
            }
        }
        let opened = open_ones.len();
        emit(&json!({"event": "open", "open": opened, "refused": refused}));
        let (ended, longest_ms) = self.bear(open_ones);
        emit(
            &json!({"event": "end", "open": opened, "refused": refused, "ended": ended,
            "longest_ms": longest_ms}),
        );
        Ok(())
    }

    /// How many were ended by the other side, and how long the last of them was borne.
    fn bear(&self, mut streams: Vec<TcpStream>) -> (usize, u64) {
        let start = Instant::now();
        let drip = self.then.as_deref().map(bytes).unwrap_or_default();
        let mut drops = drip.iter().cycle();
        let (mut ended, mut longest) = (0, 0);
        while !streams.is_empty() && start.elapsed() < Duration::from_millis(self.most_ms) {
            std::thread::sleep(Duration::from_millis(self.pause_ms));
            let next = drops.next();
            streams.retain_mut(|stream| {
                let lives = lives(stream, next);
                if !lives {
                    ended += 1;
                    longest = start.elapsed().as_millis() as u64;
                }
                lives
            });
        }
        (ended, longest)
    }
}

fn lives(stream: &mut TcpStream, next: Option<&u8>) -> bool {
    let mut trash = [0; 4096];
    loop {
        match stream.read(&mut trash) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return false,
        }
    }
    match next.map(|byte| stream.write(&[*byte])) {
        Some(Err(error)) => error.kind() == ErrorKind::WouldBlock,
        _ => true,
    }
}

/// Of two hexadecimal digits each; what is none is left out.
fn bytes(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks(2);
    pairs
        .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}
