//! Requests at a fixed rate, whatever the answers do, and how long each takes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde_json::json;

use super::exchanges::{Exchanges, Spoken};

/// Open loop: requests are due at fixed times, spread over a few connections. A request that could
/// not leave because its connection still waited for an answer counts from when it was due, so that
/// a stall is seen by every request that it delays, not by one.
#[derive(Args)]
pub(crate) struct Latency {
    target: SocketAddr,
    #[arg(long)]
    seconds: u32,
    /// Requests a second, over all connections.
    #[arg(long, default_value_t = 500)]
    rate: u32,
    #[arg(long, default_value_t = 8)]
    connections: u32,
    /// By HTTP/2 with prior knowledge, one request at once on each connection.
    #[arg(long)]
    http2: bool,
    /// Unary calls of gRPC.
    #[arg(long)]
    grpc: bool,
}

impl Latency {
    pub(crate) fn run(self) -> Result<()> {
        let client = &self;
        let interval = Duration::from_secs(1) / self.rate;
        // Everybody is connected and has had an answer before the clock starts.
        let start = Instant::now() + WARM_UP;
        let taken = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.connections)
                .map(|number| {
                    let first = start + interval * number;
                    scope.spawn(move || client.connection(first, interval * client.connections))
                })
                .collect();
            let mut taken = Vec::new();
            for worker in workers {
                let result = worker.join().map_err(|_| anyhow!("a worker panicked"))?;
                taken.extend(result?);
            }
            anyhow::Ok(taken)
        })?;
        print_latencies(taken)
    }

    fn spoken(&self) -> Spoken {
        match (self.grpc, self.http2) {
            (true, _) => Spoken::Grpc,
            (false, true) => Spoken::Http2,
            (false, false) => Spoken::Http1,
        }
    }

    fn connection(&self, first: Instant, interval: Duration) -> Result<Vec<Duration>> {
        // Sleep ends when it is due, not up to 50 µs later.
        nix::sys::prctl::set_timerslack(1)?;
        let mut exchanges = Exchanges::connect(self.target, self.spoken())?;
        for _ in 0..WARM_UP_REQUESTS {
            exchanges.exchange()?;
        }
        let end = first + Duration::from_secs(self.seconds.into());
        let mut taken = Vec::new();
        let mut due = first;
        while due < end {
            let from = wait_until(due);
            exchanges.exchange()?;
            taken.push(from.elapsed());
            due += interval;
        }
        Ok(taken)
    }
}

/// Prints how many there were, the median and the 99th percentile.
fn print_latencies(mut taken: Vec<Duration>) -> Result<()> {
    taken.sort_unstable();
    let at = |part: f64| -> Result<f64> {
        let index = (taken.len() as f64 * part) as usize;
        let value = taken.get(index).context("no request was sent")?;
        Ok(value.as_secs_f64() * 1e6)
    };
    println!(
        "{}",
        json!({"count": taken.len(), "p50_us": at(0.5)?, "p99_us": at(0.99)?})
    );
    Ok(())
}

/// Sleeps until then; gives the time from which the request counts.
fn wait_until(due: Instant) -> Instant {
    let now = Instant::now();
    if now >= due {
        return due;
    }
    std::thread::sleep(due - now);
    Instant::now()
}

const WARM_UP: Duration = Duration::from_millis(300);
const WARM_UP_REQUESTS: u32 = 5;
