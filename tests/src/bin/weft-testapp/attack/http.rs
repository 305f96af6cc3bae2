//! `http`: a client that follows a script of `weft_tests::hostile`.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use socket2::SockRef;
use weft_tests::hostile::{PREFACE, Script, scripts};

use crate::client::{SocketOptions, open};
use crate::emit;

/// Does on each of its connections what a script says, and says how that went.
#[derive(Args)]
pub(crate) struct Http {
    target: SocketAddr,
    /// The script's name.
    script: String,
    /// How long it stays when it has said all, in place of what the script says, if the other side bears it so long.
    #[arg(long)]
    hold_ms: Option<u64>,
    /// Each connection does the same again and again on a new one, until this program is killed.
    #[arg(long)]
    again: bool,
    #[command(flatten)]
    options: SocketOptions,
}

/// What became of the connections.
#[derive(Default)]
struct Tally {
    open: usize,
    refused: usize,
    /// Ended by the other side before all was said, or while they were held.
    ended: usize,
    sent: usize,
    received: usize,
    statuses: BTreeMap<String, usize>,
    /// Of HTTP/2, by their type.
    frames: BTreeMap<u8, usize>,
}

impl Http {
    pub(crate) fn run(self) -> Result<()> {
        super::raise_descriptors()?;
        let mut all = scripts().into_iter();
        let script = all.find(|it| it.name == self.script);
        let script = script.with_context(|| format!("no script is called {:?}", self.script))?;
        let mut tally = Tally::default();
        for _ in 0..script.rounds {
            let results: Vec<Tally> = std::thread::scope(|scope| {
                let one = || loop {
                    let tally = self.connection(&script);
                    if !self.again {
                        return tally;
                    }
                };
                let all: Vec<_> = (0..script.connections).map(|_| scope.spawn(one)).collect();
                all.into_iter().filter_map(|it| it.join().ok()).collect()
            });
            for result in results {
                tally.add(result);
            }
        }
        emit(&json!({
            "event": "end",
            "open": tally.open,
            "refused": tally.refused,
            "ended": tally.ended,
            "sent": tally.sent,
            "received": tally.received,
            "statuses": tally.statuses,
            "frames": tally.frames,
        }));
        Ok(())
    }

    fn connection(&self, script: &Script) -> Tally {
        let mut tally = Tally::default();
        let Ok(mut stream) = open(self.target, &self.options) else {
            tally.refused += 1;
            return tally;
        };
        tally.open += 1;
        let _ = stream.set_write_timeout(Some(PATIENCE));
        let reader = stream.try_clone().ok().filter(|_| script.reads);
        std::thread::scope(|scope| {
            let reader = reader.map(|it| scope.spawn(|| read(it)));
            let is_said = tally.send(&mut stream, script);
            let start = Instant::now();
            let hold = Duration::from_millis(self.hold_ms.unwrap_or(script.hold_ms));
            let done = || reader.as_ref().is_some_and(|it| it.is_finished());
            while start.elapsed() < hold && !done() {
                std::thread::sleep(Duration::from_millis(5));
            }
            tally.ended += usize::from(!is_said || done());
            // The end is a reset, whatever is still to come.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            let _ = stream.shutdown(std::net::Shutdown::Both);
            let read = reader.and_then(|it| it.join().ok()).unwrap_or_default();
            tally.received += read.len();
            if script.start.starts_with(PREFACE) {
                tally.count_frames(&read);
                return;
            }
            for line in String::from_utf8_lossy(&read).split("HTTP/1.1 ").skip(1) {
                let status = line.get(..3).unwrap_or_default().to_owned();
                *tally.statuses.entry(status).or_default() += 1;
            }
        });
        tally
    }
}

impl Tally {
    /// Whether all was taken.
    fn send(&mut self, stream: &mut TcpStream, script: &Script) -> bool {
        let mut say = |bytes: &[u8]| {
            let taken = stream.write_all(bytes).is_ok();
            self.sent += if taken { bytes.len() } else { 0 };
            taken
        };
        if !script.start.is_empty() && !say(&script.start) {
            return false;
        }
        for _ in 0..script.times {
            if !say(&script.then) {
                return false;
            }
            if script.pause_ms > 0 {
                std::thread::sleep(Duration::from_millis(script.pause_ms));
            }
        }
        true
    }

    /// RFC 9113, section 4.1.
    fn count_frames(&mut self, mut read: &[u8]) {
        while let [a, b, c, kind, ..] = *read {
            *self.frames.entry(kind).or_default() += 1;
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            read = read.get(FRAME_HEAD_BYTES + length..).unwrap_or_default();
        }
    }

    fn add(&mut self, other: Tally) {
        self.open += other.open;
        self.refused += other.refused;
        self.ended += other.ended;
        self.sent += other.sent;
        self.received += other.received;
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        for (kind, count) in other.frames {
            *self.frames.entry(kind).or_default() += count;
        }
    }
}

/// All that comes, until the end; of much, the start.
fn read(mut stream: TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return all,
            Ok(count) if all.len() < MOST_KEPT => all.extend(&buffer[..count]),
            Ok(_) => {}
            // The other side may be silent for as long as it likes.
            Err(error) if PAUSES.contains(&error.kind()) => {}
            Err(_) => return all,
        }
    }
}

/// How long something may not be taken.
const PATIENCE: Duration = Duration::from_millis(1000);
const MOST_KEPT: usize = 4 << 20;
const PAUSES: [ErrorKind; 3] = [
    ErrorKind::Interrupted,
    ErrorKind::WouldBlock,
    ErrorKind::TimedOut,
];
const FRAME_HEAD_BYTES: usize = 9;
