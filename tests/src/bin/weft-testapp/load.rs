//! Many connections: in a row, at once, or one for long.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use nix::sys::resource::{Resource, setrlimit};
use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::client::{SocketOptions, open, outcome};
use crate::emit;

/// Opens connections one after the other to an echo server and counts the outcomes.
#[derive(Args)]
pub(crate) struct Churn {
    target: SocketAddr,
    #[arg(long)]
    count: u64,
    /// How many at once.
    #[arg(long, default_value_t = 1)]
    parallel: u64,
    /// The client closes first, so that it keeps `TIME_WAIT`; else it waits for the server.
    #[arg(long)]
    client_first: bool,
    /// Opens and closes without sending.
    #[arg(long)]
    no_data: bool,
    #[command(flatten)]
    options: SocketOptions,
}

impl Churn {
    pub(crate) fn run(self) -> Result<()> {
        let start = Instant::now();
        let counts = Counts::default();
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..self.parallel {
                scope.spawn(|| {
                    while next.fetch_add(1, Ordering::Relaxed) < self.count {
                        counts.add(self.once());
                    }
                });
            }
        });
        emit(&json!({"event": "end", "counts": counts.all(),
            "elapsed_ms": start.elapsed().as_secs_f64() * 1e3}));
        Ok(())
    }

    fn once(&self) -> &'static str {
        match open(self.target, &self.options) {
            Err(failure) => {
                let mut report = failure.report();
                report["event"] = "failed".into();
                emit(&report);
                outcome(&failure.error)
            }
            Ok(_) if self.no_data => "ok",
            Ok(stream) => match ping(&stream, b"churn") {
                Ok(()) if self.client_first => "ok",
                Ok(()) => {
                    let _ = stream.shutdown(std::net::Shutdown::Write);
                    let _ = (&stream).read(&mut [0; 8]);
                    "ok"
                }
                Err(error) => {
                    emit(
                        &json!({"event": "failed", "stage": "exchange", "outcome": outcome(&error),
                        "local": stream.local_addr().ok().map(|local| local.to_string())}),
                    );
                    outcome(&error)
                }
            },
        }
    }
}

/// Opens connections and keeps them until standard input ends.
#[derive(Args)]
pub(crate) struct Hold {
    target: SocketAddr,
    #[arg(long)]
    count: u64,
    /// Starts all connects without waiting for any: these count as `started`.
    #[arg(long)]
    at_once: bool,
    #[command(flatten)]
    options: SocketOptions,
}

impl Hold {
    pub(crate) fn run(self) -> Result<()> {
        setrlimit(Resource::RLIMIT_NOFILE, self.count + 64, self.count + 64)?;
        let counts = Counts::default();
        let mut kept = Vec::new();
        for _ in 0..self.count {
            let opened = if self.at_once {
                start(self.target).map(|socket| ("started", socket.into()))
            } else {
                open(self.target, &self.options)
                    .map(|stream| ("ok", stream.into()))
                    .map_err(|failure| failure.error)
            };
            match opened {
                Ok((how, socket)) => {
                    let socket: OwnedFd = socket;
                    counts.add(how);
                    kept.push(socket);
                }
                Err(error) => counts.add(outcome(&error)),
            }
        }
        emit(&json!({"counts": counts.all()}));
        wait_for_end_of_input();
        Ok(())
    }
}

/// A connect that is on its way.
fn start(target: SocketAddr) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&target.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Connects, sends, receives and closes in a row until standard input ends.
#[derive(Args)]
pub(crate) struct Load {
    target: SocketAddr,
    #[arg(long, default_value_t = 4)]
    parallel: usize,
    /// The pause between two connections of a worker.
    #[arg(long, default_value_t = 5)]
    pause_ms: u64,
    #[command(flatten)]
    options: SocketOptions,
}

impl Load {
    pub(crate) fn run(self) -> Result<()> {
        let start = Instant::now();
        let counts = Counts::default();
        let last: Mutex<&'static str> = Mutex::new("");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..self.parallel {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let how = self.once();
                        counts.add(how);
                        say_change(&last, how, start);
                        std::thread::sleep(Duration::from_millis(self.pause_ms));
                    }
                });
            }
            wait_for_end_of_input();
            stop.store(true, Ordering::Relaxed);
        });
        emit(&json!({"event": "end", "counts": counts.all(),
            "elapsed_ms": start.elapsed().as_secs_f64() * 1e3}));
        Ok(())
    }

    fn once(&self) -> &'static str {
        let stream = match open(self.target, &self.options) {
            Ok(stream) => stream,
            Err(failure) => return outcome(&failure.error),
        };
        ping(&stream, LOAD_TEXT).map_or_else(|error| outcome(&error), |()| "ok")
    }
}

fn say_change(last: &Mutex<&'static str>, how: &'static str, start: Instant) {
    if let Ok(mut last) = last.lock()
        && *last != how
    {
        *last = how;
        emit(
            &json!({"event": "change", "outcome": how, "at_ms": start.elapsed().as_secs_f64() * 1e3}),
        );
    }
}

/// One connection, a message and its echo over and over.
#[derive(Args)]
pub(crate) struct Pulse {
    target: SocketAddr,
    #[arg(long, default_value_t = 20)]
    interval_ms: u64,
    #[command(flatten)]
    options: SocketOptions,
}

impl Pulse {
    pub(crate) fn run(self) -> Result<()> {
        let stream = match open(self.target, &self.options) {
            Ok(stream) => stream,
            Err(failure) => {
                let mut report = failure.report();
                report["event"] = "ended".into();
                emit(&report);
                return Ok(());
            }
        };
        let start = Instant::now();
        let stop = AtomicBool::new(false);
        let mut pulses = 0_u64;
        let mut how = "ok";
        emit(&json!({"event": "open", "local": stream.local_addr().ok().map(|a| a.to_string())}));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_for_end_of_input();
                stop.store(true, Ordering::Relaxed);
            });
            while !stop.load(Ordering::Relaxed) {
                if let Err(error) = ping(&stream, LOAD_TEXT) {
                    how = outcome(&error);
                    break;
                }
                pulses += 1;
                if pulses == 1 {
                    emit(&json!({"event": "beating"}));
                }
                std::thread::sleep(Duration::from_millis(self.interval_ms));
            }
            emit(&json!({"event": "ended", "outcome": how, "pulses": pulses,
                "elapsed_ms": start.elapsed().as_secs_f64() * 1e3}));
            // The thread that waits for the input would keep a broken pulse alive.
            std::process::exit(0);
        });
        Ok(())
    }
}

/// Sends a message and receives it back; an early end is a reset.
fn ping(mut stream: &TcpStream, message: &[u8]) -> std::io::Result<()> {
    stream.write_all(message)?;
    let mut reply = vec![0; message.len()];
    stream
        .read_exact(&mut reply)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                std::io::Error::from_raw_os_error(libc::ECONNRESET)
            }
            _ => error,
        })
}

fn wait_for_end_of_input() {
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
}

/// How many ended how.
#[derive(Default)]
struct Counts(Mutex<BTreeMap<&'static str, u64>>);

impl Counts {
    fn add(&self, how: &'static str) {
        if let Ok(mut counts) = self.0.lock() {
            *counts.entry(how).or_default() += 1;
        }
    }

    fn all(&self) -> BTreeMap<&'static str, u64> {
        self.0
            .lock()
            .map(|counts| counts.clone())
            .unwrap_or_default()
    }
}

/// What `load` and `pulse` send: tests search the wire for it.
const LOAD_TEXT: &[u8] = b"weft-testapp-load-in-the-clear";
