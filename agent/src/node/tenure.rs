//! When this agent takes the node's pods over from an older one, and when it hands them to a newer
//! one: so that an upgrade refuses nobody.
//!
//! An agent that finds no other takes over at once. One that finds an older one running first gets
//! all that it needs to serve as well as that one does: the whole state, and the certificates. The
//! older one notices, and closes its listeners when the kernel sends it nothing more. It drains,
//! and then waits to be told to end: whoever started it decides that.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::NodeConfig;
use super::enroll::Node;
use crate::bpf::Standing;
use crate::proxy::Context;

/// Keeps the node's pods enrolled until `stop`, or until a newer agent does; when it returns, the
/// listeners close. The kernel programs stay attached: what connects while no agent is there is
/// refused.
///
/// # Errors
/// Pods cannot be looked for.
pub async fn run(
    context: Arc<Context>,
    config: NodeConfig,
    stop: CancellationToken,
) -> io::Result<()> {
    let mut tenure = Tenure {
        node: Node::new(Arc::clone(&context), config)?,
        complete_since: None,
        superseded_since: None,
        stopping_since: None,
        stepped_down: false,
        found: 0,
        reconciled: None,
        check_hooks_at: Instant::now(),
    };
    let mut changes = context.store.changes();
    let mut certificates = context.identities.changed();
    let mut places = tenure.node.finder.changes();
    let mut announced = context.pods.announced().changes();
    let mut tick = interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Before looking, so that no change falls in between.
        let seen = changes.borrow_and_update().node_pods;
        tenure.found = *places.borrow_and_update();
        // Loading programs and entering namespaces are system calls that take their time.
        let news = seen.wrapping_add(*announced.borrow_and_update());
        tokio::task::block_in_place(|| tenure.turn(news));
        if tenure.is_over() {
            break;
        }
        tokio::select! {
            () = stop.cancelled(), if tenure.stopping_since.is_none() => {
                tenure.stopping_since = Some(Instant::now());
            }
            _ = tick.tick() => {}
            changed = changes.wait_for(|it| it.node_pods != seen) => if changed.is_err() { break },
            changed = certificates.changed(), if tenure.node.standing == Standing::Starting => {
                if changed.is_err() { break }
            }
            changed = places.changed() => if changed.is_err() { break },
            // Its sender lives as long as the context.
            Ok(()) = announced.changed() => {}
            true = tenure.node.drained_one() => {}
        }
    }
    tenure.node.stop_accepting();
    while tenure.node.drained_one().await {}
    Ok(())
}

struct Tenure {
    node: Node,
    /// Since when the whole state is known.
    complete_since: Option<Instant>,
    /// Since when a newer agent has all pods.
    superseded_since: Option<Instant>,
    /// Since when this agent is to end.
    stopping_since: Option<Instant>,
    /// Whether it gave up its listeners because of a newer agent.
    stepped_down: bool,
    /// How often there was something new of where pods are.
    found: u64,
    /// When, and for which generation of the node's pods and of what was found, what is enrolled was last made what is
    /// wanted.
    reconciled: Option<(Instant, (u64, u64), Standing)>,
    /// When to look whether the kernel programs still are attached.
    check_hooks_at: Instant,
}

impl Tenure {
    /// Does what is to be done now.
    fn turn(&mut self, seen: u64) {
        let now = Instant::now();
        self.stand();
        if self.node.standing == Standing::Starting && self.may_take_over(now) {
            match self.node.context.bpf.claim() {
                Ok(()) => self.stand(),
                Err(error) => tracing::error!(%error, "taking over the node's pods"),
            }
        }
        let standing = self.node.standing;
        let seen = (seen, self.found);
        let fresh = self.reconciled.is_some_and(|(when, what, how)| {
            when + RECHECK > now && what == seen && how == standing
        });
        if !fresh {
            self.node.reconcile();
            self.node.retire_predecessors();
            self.reconciled = Some((now, seen, standing));
        }
        if standing == Standing::Owner && self.check_hooks_at <= now {
            let whole = self.node.check_hooks();
            self.check_hooks_at = now + if whole { HOOKS_WHOLE } else { RECHECK };
        }
        if standing == (Standing::Superseded { settled: true }) {
            let since = *self.superseded_since.get_or_insert(now);
            if !self.stepped_down && since + LINGER <= now {
                tracing::info!("a newer agent has taken over: draining");
                self.stepped_down = true;
                self.node.step_down();
            }
        }
    }

    /// Finds out who owns the kernel's state. Once superseded is for ever, even if the newer agent
    /// dies: its successor will take over, and some pods' listeners are that one's.
    fn stand(&mut self) {
        match self.node.context.bpf.standing() {
            Ok(standing) => {
                let lost = matches!(self.node.standing, Standing::Superseded { .. });
                if !lost || matches!(standing, Standing::Superseded { .. }) {
                    self.node.stand(standing);
                }
            }
            Err(error) => tracing::error!(%error, "finding out which agent serves this node"),
        }
    }

    fn may_take_over(&mut self, now: Instant) -> bool {
        let context = &self.node.context;
        // If that cannot be told, better late than too early.
        if !context.bpf.has_predecessor().unwrap_or(true) {
            return true;
        }
        if !context.store.is_complete() {
            return false;
        }
        let since = *self.complete_since.get_or_insert(now);
        self.node.is_prepared() || since + PATIENCE <= now
    }

    /// Whether this agent may close its listeners and end.
    fn is_over(&self) -> bool {
        let Some(since) = self.stopping_since else {
            return false;
        };
        if self.stepped_down || since.elapsed() >= self.node.context.config.drain_deadline {
            return true;
        }
        // A newer agent that is about to take over gets the time for it.
        !self.node.context.bpf.has_successor().unwrap_or(false)
    }
}

/// How often an agent looks for a newer one.
const LOOK: Duration = Duration::from_millis(200);
/// How often namespaces are checked and waiting pods are tried again.
const RECHECK: Duration = Duration::from_secs(1);
/// Connections that are in the middle of being opened when the listeners are replaced end up with
/// the old ones; across nodes that can take a while.
const LINGER: Duration = Duration::from_secs(1);
/// How long an agent waits for certificates before it takes over without. The older agent's expire
/// too.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the kernel programs are looked at.
const HOOKS_WHOLE: Duration = Duration::from_secs(10);
