//! `scatter`: a connect to each of very many destinations, to fill whatever remembers them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde_json::json;
use socket2::{Domain, SockRef, Socket, Type};

use crate::client::outcome;
use crate::emit;

/// Connects to port after port of each of some addresses.
#[derive(Args)]
pub(crate) struct Scatter {
    #[arg(required = true)]
    addresses: Vec<IpAddr>,
    /// How many connects in all.
    #[arg(long)]
    count: u64,
    #[arg(long, default_value_t = 32)]
    parallel: u64,
    /// Waits for each to end; else leaves them half done, and keeps so many of them at a time.
    #[arg(long)]
    keep: Option<usize>,
    /// The longest wait for one.
    #[arg(long, default_value_t = 2000)]
    timeout_ms: u64,
    /// Ends after so long, however many there were.
    #[arg(long, default_value_t = 20_000)]
    most_ms: u64,
}

impl Scatter {
    pub(crate) fn run(self) -> Result<()> {
        super::raise_descriptors()?;
        let (next, start) = (AtomicU64::new(0), Instant::now());
        let counts: Mutex<BTreeMap<&'static str, u64>> = Mutex::default();
        let most = Duration::from_millis(self.most_ms);
        std::thread::scope(|scope| {
            for _ in 0..self.parallel {
                scope.spawn(|| {
                    let mut kept = std::collections::VecDeque::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= self.count || start.elapsed() > most {
                            return;
                        }
                        let how = match self.once(number) {
                            Ok(socket) => {
                                if let Some(room) = self.keep {
                                    kept.push_back(socket);
                                    let room = room / self.parallel as usize;
                                    kept.drain(..kept.len().saturating_sub(room));
                                }
                                "ok"
                            }
                            Err(error) => outcome(&error),
                        };
                        if let Ok(mut counts) = counts.lock() {
                            *counts.entry(how).or_default() += 1;
                        }
                    }
                });
            }
        });
        let counts = counts.into_inner().unwrap_or_default();
        emit(&json!({"event": "end", "counts": counts}));
        Ok(())
    }

    fn once(&self, number: u64) -> std::io::Result<Socket> {
        let addresses = self.addresses.len() as u64;
        let address = self.addresses[(number % addresses) as usize];
        let port = 1024 + (number / addresses) % 60_000;
        let target = SocketAddr::new(address, port as u16);
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        // No TIME_WAIT of what came about.
        SockRef::from(&socket).set_linger(Some(Duration::ZERO))?;
        if self.keep.is_none() {
            socket.connect_timeout(&target.into(), Duration::from_millis(self.timeout_ms))?;
            return Ok(socket);
        }
        socket.set_nonblocking(true)?;
        match socket.connect(&target.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => Ok(socket),
        }
    }
}
