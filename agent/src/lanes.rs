//! The threads of the data plane, the lanes: one for each CPU, each with a runtime of its own.
//!
//! A flow stays on the lane that it was given when it was accepted, with all that it starts and waits for: the
//! connections that it makes, and the tasks of HTTP/2, are spawned where it runs. So nothing that happens to one
//! flow wakes another thread, which costs more than an exchange of HTTP/2 does otherwise; a runtime of many
//! threads, which passes tasks on to whoever has nothing to do, would do that all the time. The price is that a
//! lane with much to do keeps it, so each new flow goes where there are fewer tasks.
//!
//! All else (the control stream, certificates, pods, the admin port) has a runtime of its own. Where no lanes were
//! started, as in tests of parts, everything stays on the runtime that is there.

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use tokio::runtime::{Builder, EnterGuard, Handle};
use tokio_util::sync::CancellationToken;

/// The lanes' threads. They end when this is dropped, and with them what is left of their flows.
#[derive(Debug)]
pub struct Lanes {
    stop: CancellationToken,
    threads: Vec<JoinHandle<()>>,
}

impl Lanes {
    /// Starts so many, once in a process.
    ///
    /// # Errors
    /// The kernel gives no thread, or no descriptors for a runtime.
    pub fn start(count: usize) -> io::Result<Self> {
        let mut lanes = Self {
            stop: CancellationToken::new(),
            threads: Vec::new(),
        };
        let mut handles = Vec::new();
        for number in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            handles.push(runtime.handle().clone());
            let stop = lanes.stop.clone();
            let thread = thread::Builder::new().name(format!("weft-lane-{number}"));
            lanes.threads.push(thread.spawn(move || {
                HERE.set(Some(number));
                runtime.block_on(stop.cancelled());
            })?);
        }
        HANDLES.get_or_init(|| handles);
        Ok(lanes)
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.stop.cancel();
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// The lane that the calling thread is; none: it is no lane.
pub fn here() -> Option<usize> {
    HERE.get()
}

/// Has sockets and tasks that are made until it is dropped belong to a lane for what is new: this one, unless
/// another one has less to do. Not to be held across an `await`.
pub fn enter() -> Option<EnterGuard<'static>> {
    let handles = HANDLES.get()?;
    Some(handles[choose(handles)].enter())
}

pub fn elsewhere() -> Option<EnterGuard<'static>> {
    let handles = HANDLES.get()?;
    let number = choose(handles);
    (Some(number) != here()).then(|| handles[number].enter())
}

fn choose(handles: &[Handle]) -> usize {
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    match here() {
        Some(here) if handles.len() == 1 => here,
        Some(here) => {
            let other = (here + 1 + next % (handles.len() - 1)) % handles.len();
            if tasks(&handles[here]) <= tasks(&handles[other]) {
                here
            } else {
                other
            }
        }
        None => next % handles.len(),
    }
}

/// Whether [`enter`] would choose another lane than this.
fn tasks(lane: &Handle) -> usize {
    lane.metrics().num_alive_tasks()
}

static HANDLES: OnceLock<Vec<Handle>> = OnceLock::new();
static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static HERE: Cell<Option<usize>> = const { Cell::new(None) };
}
