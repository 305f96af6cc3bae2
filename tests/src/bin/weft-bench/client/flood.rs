//! A client without manners: as much of one kind of load as the mesh lets it have.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use super::connections::echo_one_byte;
use super::{raise_descriptor_limit, runtime};

/// Floods an echo server until standard input ends, then says how its connections fared. Says
/// "flooding" when each of its workers has had an outcome; those that are to be stalled, when they are.
#[derive(Args)]
pub(crate) struct Flood {
    target: SocketAddr,
    #[arg(long, value_enum)]
    kind: Kind,
    /// How many workers do it at once.
    #[arg(long, default_value_t = 64)]
    workers: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// New connections, each for one byte and its echo.
    Connections,
    /// Connections that send until nobody takes more, and never read.
    Stalled,
    /// Connections that send and receive as much as they can.
    Bulk,
}

#[derive(Default)]
struct Outcomes {
    counts: RefCell<BTreeMap<&'static str, u64>>,
    /// Workers that have had one.
    begun: Cell<usize>,
}

impl Outcomes {
    fn begin(&self) {
        self.begun.set(self.begun.get() + 1);
    }
}

impl Flood {
    pub(crate) fn run(self) -> Result<()> {
        raise_descriptor_limit()?;
        let outcomes = Rc::new(Outcomes::default());
        let (ended, mut end) = tokio::sync::watch::channel(false);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            ended.send(true)
        });
        LocalSet::new().block_on(&runtime()?, async {
            for _ in 0..self.workers {
                let worker = worker(self.target, self.kind, Rc::clone(&outcomes));
                tokio::task::spawn_local(worker);
            }
            while outcomes.begun.get() < self.workers && !*end.borrow() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            println!("flooding");
            end.wait_for(|ended| *ended).await.map(drop)
        })?;
        println!("{}", json!({"counts": *outcomes.counts.borrow()}));
        Ok(())
    }
}

async fn worker(target: SocketAddr, kind: Kind, outcomes: Rc<Outcomes>) {
    let mut first = true;
    loop {
        let opened = open(target).await;
        let how = opened.as_ref().map_or_else(|error| *error, |_| "ok");
        *outcomes.counts.borrow_mut().entry(how).or_default() += 1;
        // Those that are to be stalled have begun when they are: until then they are a bulk transfer.
        let stalls = opened.is_ok() && matches!(kind, Kind::Stalled);
        if !stalls && std::mem::take(&mut first) {
            outcomes.begin();
        }
        let ended = match (opened, kind) {
            // In the way, but not so busy with being refused that it has no CPU for the rest.
            (Err(_), Kind::Stalled | Kind::Bulk) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            (Err(_), Kind::Connections) | (Ok(_), Kind::Connections) => continue,
            (Ok(stream), Kind::Stalled) => {
                let begin = || {
                    if std::mem::take(&mut first) {
                        outcomes.begin();
                    }
                };
                stall(stream, begin).await
            }
            (Ok(stream), Kind::Bulk) => bulk(stream).await,
        };
        let how = match ended {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => "ended by a reset",
            Err(_) => "failed later",
            Ok(()) => "ended",
        };
        *outcomes.counts.borrow_mut().entry(how).or_default() += 1;
    }
}

async fn open(target: SocketAddr) -> Result<TcpStream, &'static str> {
    let mut stream = match TcpStream::connect(target).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Err("refused"),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err("reset"),
        Err(_) => return Err("failed"),
    };
    match tokio::time::timeout(ECHO_DEADLINE, echo_one_byte(&mut stream)).await {
        Ok(Ok(())) => Ok(stream),
        Ok(Err(_)) => Err("reset"),
        Err(_) => Err("hung"),
    }
}

/// Calls `stalled` whenever nobody has taken a byte for a while.
async fn stall(mut stream: TcpStream, mut stalled: impl FnMut()) -> std::io::Result<()> {
    let block = vec![0; BLOCK_BYTES];
    loop {
        match tokio::time::timeout(STALLED_AFTER, stream.write(&block)).await {
            Ok(written) => drop(written?),
            Err(_) => stalled(),
        }
    }
}

async fn bulk(stream: TcpStream) -> std::io::Result<()> {
    let (mut read, mut write) = stream.into_split();
    let receiving = async {
        let mut buffer = vec![0; BLOCK_BYTES];
        while read.read(&mut buffer).await? > 0 {}
        Ok(())
    };
    let sending = async {
        let block = vec![0; BLOCK_BYTES];
        loop {
            write.write_all(&block).await?;
        }
    };
    tokio::select! {
        ended = receiving => ended,
        ended = sending => ended,
    }
}

const BLOCK_BYTES: usize = 64 * 1024;
const STALLED_AFTER: Duration = Duration::from_secs(1);
/// A refusal comes at once: who hears nothing for so long was left hanging.
const ECHO_DEADLINE: Duration = Duration::from_secs(20);
