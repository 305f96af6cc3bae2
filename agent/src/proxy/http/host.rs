//! Which series a request is counted in at its server, by the host that it asks for. A connection remembers the
//! hosts that it has seen: one that it has seen before costs a comparison.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::HOST;
use hyper::Request;

use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::telemetry::exchange::{
    AuthorityLabel, ExchangeLabels, ExchangeSeries, ExchangeTimer, HostScope,
};

/// The series of a connection's requests.
#[derive(Debug)]
pub(super) struct ByHost {
    /// What they have in common.
    labels: ExchangeLabels,
    /// The last one first.
    seen: Vec<Seen>,
    /// Services come and go.
    seen_since: Instant,
    overflow: Option<Arc<ExchangeSeries>>,
}

/// A host as it was written, if one was.
#[derive(Debug)]
struct Seen {
    host: Option<Box<[u8]>>,
    series: Arc<ExchangeSeries>,
    /// The port of a service that it names.
    of: Option<Arc<ServicePortEntry>>,
}

impl ByHost {
    /// None seen yet.
    pub(super) fn new(labels: ExchangeLabels) -> Self {
        Self {
            labels,
            seen: Vec::new(),
            seen_since: Instant::now(),
            overflow: None,
        }
    }

    /// Begins to measure a request to the pod.
    pub(super) fn begin<B>(
        &mut self,
        context: &Context,
        pod: &LocalPod,
        request: &Request<B>,
    ) -> ExchangeTimer {
        let (series, port) = self.find(context, pod, of(request));
        let timer = series.begin();
        let Some(port) = port else { return timer };
        let table = port.routes.load();
        let classes = table.as_deref().and_then(|table| {
            // What the service's own says: clients in another namespace may judge its answers differently.
            let namespace = &port.service.namespace;
            let path = request.uri().path();
            let said = table.unrouted_for(namespace, request.method(), path);
            said.classes
        });
        timer.under(classes.cloned())
    }

    fn find(
        &mut self,
        context: &Context,
        pod: &LocalPod,
        host: Option<&[u8]>,
    ) -> (&Arc<ExchangeSeries>, Option<&Arc<ServicePortEntry>>) {
        if self.seen_since.elapsed() >= KEEP {
            self.seen.clear();
            self.seen_since = Instant::now();
        }
        // Of what is longer than any name nobody needs the rest.
        let host = host.map(|it| &it[..it.len().min(MOST_BYTES)]);
        match self.seen.iter().position(|it| it.host.as_deref() == host) {
            Some(at) => self.seen[..=at].rotate_right(1),
            None if self.seen.len() >= MOST_HOSTS => return (self.overflow(context), None),
            None => {
                let authority = host.map(|it| self.authority(context, pod, it));
                let of = match &authority {
                    Some(AuthorityLabel::Service { service, port }) => {
                        context.store.service_port(service, *port)
                    }
                    _ => None,
                };
                let series = self.look_up(context, authority);
                let host = host.map(Into::into);
                self.seen.insert(0, Seen { host, series, of });
            }
        }
        let seen = &self.seen[0];
        (&seen.series, seen.of.as_ref())
    }

    fn authority(&self, context: &Context, pod: &LocalPod, host: &[u8]) -> AuthorityLabel {
        let client = self.labels.client.as_ref().map(|it| &it.namespace);
        let scope = HostScope {
            namespace: client.unwrap_or(&pod.id.0.namespace),
            pod: &pod.id,
            port: self.labels.target_port.unwrap_or_default(),
            is_known: |name: &_, port| context.store.service_port(name, port).is_some(),
            is_own: |address| pod.has_address(address),
        };
        AuthorityLabel::of_host(host, &scope)
    }

    fn overflow(&mut self, context: &Context) -> &Arc<ExchangeSeries> {
        let overflow = match self.overflow.take() {
            Some(overflow) => overflow,
            None => self.look_up(context, Some(AuthorityLabel::Overflow)),
        };
        overflow.overflowed();
        self.overflow.insert(overflow)
    }

    fn look_up(&self, context: &Context, authority: Option<AuthorityLabel>) -> Arc<ExchangeSeries> {
        context.telemetry.exchanges(ExchangeLabels {
            authority,
            ..self.labels.clone()
        })
    }
}

/// Whom a request asks for: the authority of its target before its `Host`.
fn of<B>(request: &Request<B>) -> Option<&[u8]> {
    let target = request.uri().authority().map(|it| it.as_str().as_bytes());
    target.or_else(|| Some(request.headers().get(HOST)?.as_bytes()))
}

/// Hosts that a connection remembers. What asks for more is counted together.
const MOST_HOSTS: usize = 32;
const KEEP: Duration = Duration::from_secs(60);
/// More than a name with a port can have.
const MOST_BYTES: usize = 264;
