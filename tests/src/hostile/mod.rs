//! What hostile clients and servers of HTTP say, made by hand: no library would send it. Each script is
//! bounded and ends by itself.

mod frames;
mod http1;
mod http2;
mod servers;
mod smuggling;

pub use frames::{PREFACE, frame, literal, request};
pub use servers::{Answer, answers};
pub use smuggling::{Ambiguous, ambiguous};

/// What a hostile client does on each of its connections.
#[derive(Clone, Debug)]
pub struct Script {
    /// What it is.
    pub name: &'static str,
    /// What it says first.
    pub start: Vec<u8>,
    /// What it says then, again and again,
    pub then: Vec<u8>,
    /// so many times,
    pub times: usize,
    /// with this pause between.
    pub pause_ms: u64,
    /// How many connections at once.
    pub connections: usize,
    /// And how often.
    pub rounds: usize,
    /// Whether it reads what comes back.
    pub reads: bool,
    /// How long it stays when it has said all.
    pub hold_ms: u64,
}

impl Script {
    fn new(name: &'static str, start: impl Into<Vec<u8>>) -> Script {
        Script {
            name,
            start: start.into(),
            then: Vec::new(),
            times: 0,
            pause_ms: 0,
            connections: 1,
            rounds: 1,
            reads: true,
            hold_ms: 2000,
        }
    }

    fn then(mut self, bytes: impl Into<Vec<u8>>, times: usize) -> Script {
        self.then = bytes.into();
        self.times = times;
        self
    }

    fn pause(mut self, ms: u64) -> Script {
        self.pause_ms = ms;
        self
    }

    fn on(mut self, connections: usize) -> Script {
        self.connections = connections;
        self
    }

    fn deaf(mut self) -> Script {
        self.reads = false;
        self
    }

    fn rounds(mut self, rounds: usize, hold_ms: u64) -> Script {
        self.rounds = rounds;
        self.hold_ms = hold_ms;
        self
    }
}

/// All that hostile clients do.
pub fn scripts() -> Vec<Script> {
    let mut all = http1::scripts();
    all.extend(http2::scripts());
    all
}
