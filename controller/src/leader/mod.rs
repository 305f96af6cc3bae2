//! One of several controllers leads: the one that holds a Lease. All serve agents and sign; only what is written for
//! everybody, as statuses, is the leader's.
//!
//! No maintained library of leader election fits this client's version; and the part that has to be right is small:
//! `election` has it, without clock and network.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use weft_core::ObjectName;

use crate::pause::about;
use crate::problems::Problems;
use crate::source::kubernetes::explain;
use crate::views::Views;
use election::{DURATION, Election, Move, RETRY, Said};

mod election;

/// One that wants to lead.
pub struct Candidate {
    client: Client,
    name: ObjectName,
    me: String,
    problems: Problems,
    until: watch::Sender<Option<Instant>>,
}

/// Whether this controller leads.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<Option<Instant>>);

/// Longer than a request may take: less than there is between the end of one's lead and the beginning of another's.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(4);

impl Candidate {
    /// Who wants to lead by the Lease of this name, and how it is known whether it does.
    pub fn new(client: Client, name: ObjectName, problems: Problems) -> (Self, Leadership) {
        let (until, leads) = watch::channel(None);
        // The pod's name, in a cluster. For people only.
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        // Another one for each process: one that is started again under the same name has to wait, too.
        let me = format!("{}_{:016x}", host.trim(), rand::random::<u64>());
        let candidate = Self {
            client,
            name,
            me,
            problems,
            until,
        };
        (candidate, Leadership(leads))
    }

    /// The API server that the Lease is in.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Leads whenever it can, until it is stopped. Then the Lease is let go, for another not to have to wait. One that
    /// does not know everything leaves the Lease alone: it could not do what the leader is for.
    pub async fn run(self, views: Arc<Views>, stop: CancellationToken) {
        if stop.run_until_cancelled(views.whole()).await.is_none() {
            return;
        }
        let mut election = Election::new(self.me.clone());
        loop {
            let looked = tokio::select! {
                () = stop.cancelled() => break,
                looked = timeout(REQUEST_TIMEOUT, self.once(&mut election)) => looked,
            };
            let failure = match looked {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(explain(&error)),
                Err(_) => Some(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs())),
            };
            self.report(failure);
            self.tell(election.until());
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(about(RETRY)) => {}
            }
        }
        if self.until.send_replace(None).is_some() {
            // If this fails, another one leads after the Lease's time.
            let _ = timeout(REQUEST_TIMEOUT, self.release()).await;
        }
    }

    /// Looks, and writes if it is to be written.
    async fn once(&self, election: &mut Election) -> Result<(), kube::Error> {
        let lease = self.api().get_opt(self.name.name.as_str()).await?;
        let now = Instant::now();
        let next = election.look(lease.as_ref().map(said), now);
        let written = match (next, lease) {
            (Move::Wait, _) => return Ok(()),
            (_, None) => self.create().await,
            (_, Some(lease)) => self.write(lease, next == Move::Take).await,
        };
        match written {
            Ok(lease) => {
                election.wrote(now, said(&lease).version);
                Ok(())
            }
            // Somebody else was faster: it is looked again.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn create(&self) -> Result<Lease, kube::Error> {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.name.name.to_string()),
                namespace: Some(self.name.namespace.to_string()),
                ..ObjectMeta::default()
            },
            spec: Some(self.spec(LeaseSpec::default(), true)),
        };
        self.api().create(&PostParams::default(), &lease).await
    }

    /// Says that it is held by this one, if nobody wrote since it was read.
    async fn write(&self, lease: Lease, anew: bool) -> Result<Lease, kube::Error> {
        let before = lease.spec.unwrap_or_default();
        self.replace(Lease {
            metadata: lease.metadata,
            spec: Some(self.spec(before, anew)),
        })
        .await
    }

    async fn release(&self) -> Result<(), kube::Error> {
        let Some(lease) = self.api().get_opt(self.name.name.as_str()).await? else {
            return Ok(());
        };
        if said(&lease).holder != self.me {
            return Ok(());
        }
        let spec = LeaseSpec {
            holder_identity: Some(String::new()),
            lease_duration_seconds: Some(1),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..lease.spec.unwrap_or_default()
        };
        tracing::info!(lease = %self.name, "lets another controller lead");
        self.replace(Lease {
            metadata: lease.metadata,
            spec: Some(spec),
        })
        .await
        .map(drop)
    }

    async fn replace(&self, lease: Lease) -> Result<Lease, kube::Error> {
        let name = self.name.name.as_str();
        let (api, parameters) = (self.api(), PostParams::default());
        api.replace(name, &parameters, &lease).await
    }

    fn spec(&self, before: LeaseSpec, anew: bool) -> LeaseSpec {
        let now = || Some(MicroTime(Timestamp::now()));
        let transitions = before.lease_transitions.unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: Some(DURATION.as_secs() as i32),
            acquire_time: if anew { now() } else { before.acquire_time },
            renew_time: now(),
            lease_transitions: Some(transitions.saturating_add(i32::from(anew))),
            ..LeaseSpec::default()
        }
    }

    fn tell(&self, until: Option<Instant>) {
        let led = self.until.send_replace(until).is_some();
        match (led, until.is_some()) {
            (false, true) => tracing::info!(lease = %self.name, me = self.me, "leads"),
            (true, false) => tracing::warn!(lease = %self.name, "another controller leads"),
            _ => {}
        }
    }

    fn report(&self, failure: Option<String>) {
        let place = format!("kubernetes: Lease {}", self.name);
        let effect = "this controller serves agents, and writes no status";
        let failure = failure.map(|it| (format!("it cannot be held: {it}"), effect));
        self.problems.of_place(&place, failure);
    }

    fn api(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), self.name.namespace.as_str())
    }
}

impl fmt::Debug for Candidate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Candidate");
        shown.field("name", &self.name).finish_non_exhaustive()
    }
}

impl Leadership {
    /// That of a controller that never leads: where there is no Lease, nothing is written.
    pub fn none() -> Self {
        Self(watch::channel(None).1)
    }

    /// Whether it leads at this moment.
    pub fn leads(&self) -> bool {
        let until = *self.0.borrow();
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Waits until it does not lead any more.
    pub async fn ends(&self) {
        let mut until = self.0.clone();
        loop {
            let end = *until.borrow_and_update();
            let Some(end) = end.filter(|it| Instant::now() < *it) else {
                return;
            };
            let changed = tokio::time::timeout_at(end, until.changed()).await;
            if let Ok(Err(_)) = changed {
                // Nobody is left to renew it.
                tokio::time::sleep_until(end).await;
            }
        }
    }

    /// Waits until it leads; for ever, if it never will.
    pub async fn begins(&mut self) {
        while !self.leads() {
            if self.0.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

fn said(lease: &Lease) -> Said {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.unwrap_or(0);
    Said {
        holder: spec.holder_identity.unwrap_or_default(),
        duration: Duration::from_secs(seconds.try_into().unwrap_or(0)),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lead_ends_when_it_is_not_renewed_and_when_it_is_let_go() {
        let soon = |millis| Some(Instant::now() + Duration::from_millis(millis));
        let (until, leads) = watch::channel(soon(200));
        let leadership = Leadership(leads);
        let patience = Duration::from_secs(20);
        let began = Instant::now();
        let renewing = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            until.send_replace(soon(400));
        };
        let ended = timeout(patience, async {
            tokio::join!(leadership.ends(), renewing)
        });
        assert!(ended.await.is_ok() && began.elapsed() >= Duration::from_millis(400));
        assert!(!leadership.leads());
        until.send_replace(soon(60_000));
        let letting_go = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            until.send_replace(None);
        };
        let ended = timeout(patience, async {
            tokio::join!(leadership.ends(), letting_go)
        });
        assert!(ended.await.is_ok());
        // Nobody is left to renew it: it lasts for as long as was said.
        until.send_replace(soon(200));
        drop(until);
        let ended = timeout(patience, leadership.ends()).await;
        assert!(ended.is_ok());
    }
}
