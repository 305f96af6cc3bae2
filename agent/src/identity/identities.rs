//! The identities of this node's pods: one certificate and one set of TLS configurations each.
//!
//! [`Identities::run`] decides whose turn it is and talks to the signer; connections only clone what
//! was published. A certificate is installed only if peers with the trust bundle in force will believe
//! it: one that they would not never replaces a good one.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, UnixTime};
use serde::{Serialize, Serializer};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use weft_core::{Identity, TrustBundle};

use super::certificate::Leaf;
use super::schedule::{self, CertificateState};
use super::signer::Signer;
use super::tls::Configs;
use super::verifier::Verifier;
use super::{Alpn, IdentityError};
use crate::discovery::Store;

mod request;

/// All of them. Shared by `Arc`.
pub struct Identities {
    signer: Arc<dyn Signer>,
    store: Arc<Store>,
    entries: ArcSwap<HashMap<Identity, Arc<Entry>>>,
    trust: ArcSwapOption<Trust>,
    /// Held while something is published, so that a certificate that comes while the trust bundle
    /// changes gets the new one.
    publishing: Mutex<()>,
    wake: Notify,
    changed: watch::Sender<u64>,
}

/// How one identity is doing; for metrics, readiness and dumps. Never a key.
#[derive(Clone, Debug, Serialize)]
pub struct CertificateStatus {
    /// The identity.
    pub identity: Identity,
    /// The certificate's serial number in hexadecimal.
    pub serial: Option<String>,
    /// Since when the certificate is valid; in dumps, seconds since 1970.
    #[serde(serialize_with = "unix_seconds")]
    pub not_before: Option<SystemTime>,
    /// Until when.
    #[serde(serialize_with = "unix_seconds")]
    pub not_after: Option<SystemTime>,
    /// How well off it is.
    pub state: CertificateState,
    /// Tries to get a certificate that failed, in a row.
    pub failures: u32,
    /// Why the last one failed.
    pub last_error: Option<String>,
}

/// The trust bundle in force.
struct Trust {
    bundle: Arc<TrustBundle>,
    verifier: Arc<Verifier>,
}

struct Entry {
    identity: Identity,
    held: ArcSwapOption<Held>,
    /// Says when the first certificate is there.
    ready: watch::Sender<bool>,
    /// Connections that wait for it.
    awaiting: AtomicUsize,
    progress: Mutex<Progress>,
}

/// A certificate with its key, ready for use.
struct Held {
    key: Arc<CertifiedKey>,
    leaf: Leaf,
    received: SystemTime,
    configs: Configs,
}

struct Progress {
    due: SystemTime,
    asking: bool,
    failures: u32,
    last_error: Option<String>,
}

impl Identities {
    /// None yet. [`Identities::run`] must run for certificates to come.
    pub fn new(signer: Arc<dyn Signer>, store: Arc<Store>) -> Arc<Self> {
        Arc::new(Self {
            signer,
            store,
            entries: ArcSwap::default(),
            trust: ArcSwapOption::empty(),
            publishing: Mutex::default(),
            wake: Notify::new(),
            changed: watch::Sender::default(),
        })
    }

    /// Says which identities are needed. Keys of others are forgotten.
    pub fn want(&self, identities: &BTreeSet<Identity>) {
        let publishing = self.publishing();
        let known = self.entries.load_full();
        if known.len() == identities.len() && identities.iter().all(|it| known.contains_key(it)) {
            return;
        }
        let entry = |identity: &Identity| match known.get(identity) {
            Some(entry) => Arc::clone(entry),
            None => Arc::new(Entry::new(identity.clone())),
        };
        let entries = identities.iter().map(|it| (it.clone(), entry(it)));
        self.entries.store(Arc::new(entries.collect()));
        drop(publishing);
        self.wake.notify_one();
    }

    /// The configuration to connect with. Waits, for a few seconds at most, for the first
    /// certificate.
    ///
    /// # Errors
    /// Not an identity of this node, no certificate, or an expired one.
    pub async fn client(
        &self,
        identity: &Identity,
        alpn: Alpn,
    ) -> Result<Arc<ClientConfig>, IdentityError> {
        let pick = |configs: &Configs| match alpn {
            Alpn::Weft => Arc::clone(&configs.weft),
            Alpn::WeftH2 => Arc::clone(&configs.weft_h2),
            Alpn::Hbone => Arc::clone(&configs.hbone),
        };
        self.first(identity, pick).await
    }

    /// The configuration to accept with, now.
    ///
    /// # Errors
    /// Not an identity of this node, no certificate, or an expired one.
    pub fn server(&self, identity: &Identity) -> Result<Arc<ServerConfig>, IdentityError> {
        self.configs(identity, |configs| Arc::clone(&configs.server))
    }

    /// The configuration to accept with; waits a bounded time for the first certificate.
    ///
    /// # Errors
    /// As [`Self::server`].
    pub async fn server_when_ready(
        &self,
        identity: &Identity,
    ) -> Result<Arc<ServerConfig>, IdentityError> {
        self.first(identity, |configs| Arc::clone(&configs.server))
            .await
    }

    /// The same for clients that speak `weft/1`.
    ///
    /// # Errors
    /// As [`Self::server`].
    pub async fn weft_server_when_ready(
        &self,
        identity: &Identity,
    ) -> Result<Arc<ServerConfig>, IdentityError> {
        self.first(identity, |configs| Arc::clone(&configs.weft_server))
            .await
    }

    /// Picks a configuration, waiting a bounded time for the first certificate.
    async fn first<T>(
        &self,
        identity: &Identity,
        pick: impl Fn(&Configs) -> T,
    ) -> Result<T, IdentityError> {
        match self.configs(identity, &pick) {
            Err(IdentityError::NotYet { .. }) => {}
            other => return other,
        }
        self.entry(identity)?.wait().await;
        self.configs(identity, pick)
    }

    /// Whether the roots in force vouch for a peer's chain that was valid at a time. For connections
    /// that are open when the roots change; a certificate that has expired since is no reason to end
    /// them.
    pub fn vouches(&self, chain: &[CertificateDer<'_>], at: UnixTime) -> bool {
        let trust = self.trust.load();
        trust
            .as_ref()
            .is_some_and(|it| it.verifier.vouches(chain, at))
    }

    /// When the certificate of an identity ends; long ago if there is none.
    pub fn valid_until(&self, identity: &Identity) -> SystemTime {
        let entries = self.entries.load();
        let held = entries.get(identity).and_then(|it| it.held.load_full());
        held.map_or(SystemTime::UNIX_EPOCH, |it| it.leaf.not_after)
    }

    /// How they all are, by name.
    pub fn status(&self) -> Vec<CertificateStatus> {
        let now = SystemTime::now();
        let entries = self.entries.load();
        let mut all: Vec<CertificateStatus> = entries.values().map(|it| it.status(now)).collect();
        all.sort_by(|a, b| a.identity.cmp(&b.identity));
        all
    }

    /// Counts changes of certificates and trust roots.
    pub fn generation(&self) -> u64 {
        *self.changed.borrow()
    }

    /// Tells of changed roots or certificates.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Tries again now what failed and waits: the controller is back.
    pub fn retry_now(&self) {
        let now = SystemTime::now();
        for entry in self.entries.load().values() {
            let mut progress = entry.progress();
            if progress.failures > 0 {
                progress.due = progress.due.min(now);
            }
        }
        self.wake.notify_one();
    }

    /// Gets and renews certificates until stopped.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut store = self.store.changes();
        let mut asking = JoinSet::new();
        loop {
            store.mark_unchanged();
            self.refresh_trust();
            let now = SystemTime::now();
            // Without roots nothing that comes could be checked.
            if self.trust.load().is_some() {
                for entry in self.take_turns(now, MAX_ASKING.saturating_sub(asking.len())) {
                    asking.spawn(Arc::clone(&self).renew(entry));
                }
            }
            let next = self.next_due().map(|due| due.duration_since(now));
            let pause = next.map_or(LONGEST_PAUSE, Result::unwrap_or_default);
            let full = asking.len() >= MAX_ASKING || self.trust.load().is_none();
            tokio::select! {
                () = self.wake.notified() => {}
                Ok(()) = store.changed() => {}
                Some(_) = asking.join_next() => {}
                // Clocks jump: look at the wall's again and again.
                () = sleep(pause.min(LONGEST_PAUSE)), if !full => {}
                () = stop.cancelled() => return,
            }
        }
    }

    fn configs<T>(
        &self,
        identity: &Identity,
        pick: impl Fn(&Configs) -> T,
    ) -> Result<T, IdentityError> {
        let entries = self.entries.load();
        let entry = entries
            .get(identity)
            .ok_or_else(|| IdentityError::NotOurs(identity.clone()))?;
        if self.trust.load().is_none() {
            let unknown = "not known yet".to_owned();
            return Err(entry.not_yet(Some(IdentityError::TrustBundle(unknown).to_string())));
        }
        let held = entry.held.load();
        let Some(held) = held.as_ref() else {
            return Err(entry.not_yet(None));
        };
        if held.leaf.not_after <= SystemTime::now() {
            return Err(IdentityError::Expired {
                identity: identity.clone(),
                last_error: entry.progress().last_error.clone(),
            });
        }
        Ok(pick(&held.configs))
    }

    fn entry(&self, identity: &Identity) -> Result<Arc<Entry>, IdentityError> {
        let entries = self.entries.load();
        let entry = entries.get(identity).cloned();
        entry.ok_or_else(|| IdentityError::NotOurs(identity.clone()))
    }

    /// Takes up a changed trust bundle: a new verifier, and all configurations with it.
    fn refresh_trust(&self) {
        let bundle = self.store.trust_bundle();
        let current = self.trust.load();
        let in_force = current.as_ref().map(|it| &it.bundle);
        let same = match (&bundle, in_force) {
            (Some(bundle), Some(current)) => Arc::ptr_eq(bundle, current),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        let publishing = self.publishing();
        let trust = bundle.and_then(|bundle| match Verifier::new(&bundle) {
            Ok(verifier) => Some(Trust { bundle, verifier }),
            Err(error) => {
                warn!(%error, "nobody is trusted");
                None
            }
        });
        if let Some(trust) = &trust {
            let roots = trust.bundle.roots.len();
            info!(roots, "trust bundle in force");
            for entry in self.entries.load().values() {
                entry.follow(&trust.verifier);
            }
        }
        self.trust.store(trust.map(Arc::new));
        drop(publishing);
        self.changed.send_modify(|it| *it += 1);
    }

    /// Those whose turn it is, the most urgent first, marked as being asked for.
    fn take_turns(&self, now: SystemTime, at_most: usize) -> Vec<Arc<Entry>> {
        let entries = self.entries.load();
        let due = |entry: &Arc<Entry>| {
            let progress = entry.progress();
            (!progress.asking && progress.due <= now).then_some(progress.due)
        };
        let mut turns: Vec<_> = entries
            .values()
            .filter_map(|entry| {
                let awaited = entry.awaiting.load(Ordering::Relaxed) > 0;
                let holds_one = entry.held.load().is_some();
                Some((schedule::turn(holds_one, awaited, due(entry)?), entry))
            })
            .collect();
        turns.sort_by_key(|(turn, _)| *turn);
        let taken = turns.into_iter().take(at_most);
        taken
            .map(|(_, entry)| {
                entry.progress().asking = true;
                Arc::clone(entry)
            })
            .collect()
    }

    fn next_due(&self) -> Option<SystemTime> {
        let entries = self.entries.load();
        let due = entries.values().filter_map(|entry| {
            let progress = entry.progress();
            (!progress.asking).then_some(progress.due)
        });
        due.min()
    }

    /// One try for one identity.
    async fn renew(self: Arc<Self>, entry: Arc<Entry>) {
        let asked = request::certificate(Arc::clone(&self.signer), entry.identity.clone());
        // In a task of its own: a panic in there must not leave the entry being asked for forever.
        let asked = tokio::spawn(asked).await;
        let asked = asked.unwrap_or_else(|error| Err(error.to_string()));
        let installed = asked.and_then(|(key, leaf)| self.install(&entry, key, leaf));
        let now = SystemTime::now();
        let mut progress = entry.progress();
        progress.asking = false;
        match installed {
            Ok(held) => {
                let not_after = held.leaf.not_after;
                progress.due = schedule::renew_at(held.received, not_after, rand::random());
                progress.failures = 0;
                progress.last_error = None;
                let serial = &held.leaf.serial;
                info!(identity = %entry.identity, serial, "certificate received");
            }
            Err(error) => {
                progress.failures = progress.failures.saturating_add(1);
                let held = entry.held.load();
                let left = held
                    .as_ref()
                    .map(|it| it.leaf.not_after.duration_since(now).unwrap_or_default());
                let wait = schedule::retry_after(progress.failures, left, rand::random());
                progress.due = now + wait;
                if progress.last_error.as_ref() == Some(&error) {
                    debug!(identity = %entry.identity, error, ?wait, "no certificate again");
                } else {
                    warn!(identity = %entry.identity, error, ?wait, "no certificate");
                    progress.last_error = Some(error);
                }
            }
        }
        drop(progress);
        self.wake.notify_one();
    }

    fn install(&self, entry: &Entry, key: CertifiedKey, leaf: Leaf) -> Result<Arc<Held>, String> {
        let _publishing = self.publishing();
        let trust = self.trust.load();
        let trust = trust.as_ref().ok_or("the trust bundle is gone")?;
        let believed = trust.verifier.believes(&key.cert);
        believed.map_err(|error| format!("peers would not believe what was signed: {error}"))?;
        // To the second the chain's check is right; a connection needs a moment more.
        let received = SystemTime::now();
        if leaf.not_after <= received {
            return Err("what was signed has expired".to_owned());
        }
        let key = Arc::new(key);
        let configs = Configs::new(&key, &trust.verifier).map_err(|error| error.to_string())?;
        let held = Arc::new(Held {
            key,
            leaf,
            received,
            configs,
        });
        entry.held.store(Some(Arc::clone(&held)));
        entry.ready.send_replace(true);
        self.changed.send_modify(|it| *it += 1);
        Ok(held)
    }

    fn publishing(&self) -> MutexGuard<'_, ()> {
        self.publishing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names only; keys are nowhere near.
impl fmt::Debug for Identities {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status();
        let names = status.iter().map(|it| it.identity.to_string());
        formatter.debug_list().entries(names).finish()
    }
}

impl Entry {
    fn new(identity: Identity) -> Self {
        Self {
            identity,
            held: ArcSwapOption::empty(),
            ready: watch::Sender::new(false),
            awaiting: AtomicUsize::new(0),
            progress: Mutex::new(Progress {
                due: SystemTime::now(),
                asking: false,
                failures: 0,
                last_error: None,
            }),
        }
    }

    /// Waits until there is a certificate, or long enough.
    async fn wait(&self) {
        let _waiting = Waiting::new(&self.awaiting);
        let mut ready = self.ready.subscribe();
        let _ = timeout(CLIENT_WAIT, ready.wait_for(|ready| *ready)).await;
    }

    /// The same certificate with another verifier. If the new roots do not cover it, it is renewed
    /// now.
    fn follow(&self, verifier: &Arc<Verifier>) {
        let held = self.held.load();
        let Some(held) = held.as_ref() else {
            return;
        };
        if let Err(error) = verifier.believes(&held.key.cert) {
            info!(identity = %self.identity, %error, "renewing: not covered by the trust bundle");
            self.progress().due = SystemTime::now();
        }
        match Configs::new(&held.key, verifier) {
            Ok(configs) => self.held.store(Some(Arc::new(Held {
                key: Arc::clone(&held.key),
                leaf: held.leaf.clone(),
                received: held.received,
                configs,
            }))),
            // Nothing of it depends on the roots; should it fail all the same, fail closed.
            Err(error) => {
                warn!(identity = %self.identity, %error, "no TLS configuration");
                self.held.store(None);
            }
        }
    }

    fn status(&self, now: SystemTime) -> CertificateStatus {
        let held = self.held.load();
        let progress = self.progress();
        let leaf = held.as_ref().map(|it| &it.leaf);
        CertificateStatus {
            identity: self.identity.clone(),
            serial: leaf.map(|it| it.serial.clone()),
            not_before: leaf.map(|it| it.not_before),
            not_after: leaf.map(|it| it.not_after),
            state: held.as_ref().map_or(CertificateState::Missing, |it| {
                schedule::state(now, it.received, it.leaf.not_after)
            }),
            failures: progress.failures,
            last_error: progress.last_error.clone(),
        }
    }

    fn not_yet(&self, reason: Option<String>) -> IdentityError {
        IdentityError::NotYet {
            identity: self.identity.clone(),
            last_error: reason.or_else(|| self.progress().last_error.clone()),
        }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one who waits for as long as it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn unix_seconds<S: Serializer>(
    time: &Option<SystemTime>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let since = time.and_then(|it| it.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map(|it| it.as_secs()).serialize(serializer)
}

/// Requests in flight at a time.
const MAX_ASKING: usize = 8;
/// How long a connection waits for the first certificate of its identity.
const CLIENT_WAIT: Duration = Duration::from_secs(3);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[cfg(test)]
#[path = "identities_tests.rs"]
mod tests;
