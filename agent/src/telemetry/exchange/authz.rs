//! Decisions of inbound policy about requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use weft_core::{AuthorizationName, LimitScope};

use super::super::labels::{AuthzLabels, PodLabels, Rendered};
use super::super::samples::{Kind, Samples};
use super::labels::RouteRef;
use super::{Idle, OVERFLOW, PodSeries};

/// Where decisions of one kind are counted: looked up once for a connection, a route and what policy says,
/// and kept. Counting is one addition.
#[derive(Clone, Debug)]
pub struct HttpAuthz {
    _pod: Arc<PodSeries>,
    decisions: Arc<Idle<Decisions>>,
}

/// How many decisions of one kind there were.
#[derive(Debug, Default)]
pub(super) struct Decisions(AtomicU64);

#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) enum DecisionKey {
    Of(Box<(AuthzLabels, RouteRef)>),
    Stopped(Box<AuthzLabels>, Stopped),
    Overflow { allowed: bool },
}

/// What no authorization is about, and still no request passes by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Stopped {
    /// The Server has routes, and none is for the request.
    NoRoute,
    /// The Server's limit is reached: by this policy, and as to this of its rates.
    Limited(AuthorizationName, LimitScope),
}

impl HttpAuthz {
    pub(super) fn stopped(pod: Arc<PodSeries>, labels: AuthzLabels, why: Stopped) -> Self {
        let decisions = pod.decisions(DecisionKey::Stopped(Box::new(labels), why));
        Self {
            _pod: pod,
            decisions,
        }
    }

    pub(super) fn new(pod: Arc<PodSeries>, labels: AuthzLabels, route: RouteRef) -> Self {
        let decisions = pod.decisions(DecisionKey::Of(Box::new((labels, route))));
        Self {
            _pod: pod,
            decisions,
        }
    }

    /// Counts a request about which policy decided so.
    pub fn count(&self) {
        self.decisions.counters.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Decisions {
    pub(super) fn moved(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn collect(&self, key: &DecisionKey, pod: &PodLabels, samples: &mut Samples) {
        let (name, help) = if let DecisionKey::Stopped(_, Stopped::NoRoute) = key {
            (
                "inbound_http_route_not_found",
                "HTTP requests that none of the Server's routes is for",
            )
        } else if let DecisionKey::Stopped(_, Stopped::Limited(..)) = key {
            (
                "inbound_http_local_ratelimit",
                "HTTP requests above the limit of a Server",
            )
        } else if key.is_allowed() {
            (
                "inbound_http_authz_allow",
                "HTTP requests that policy allowed",
            )
        } else {
            (
                "inbound_http_authz_deny",
                "HTTP requests that policy denied",
            )
        };
        let count = self.moved() as f64;
        samples.add(Kind::Counter, name, help, key.render(pod), count);
    }
}

impl DecisionKey {
    pub(super) fn overflow(&self) -> Self {
        Self::Overflow {
            allowed: self.is_allowed(),
        }
    }

    fn is_allowed(&self) -> bool {
        match self {
            Self::Of(labels) => labels.0.is_allowed(),
            Self::Stopped(..) => false,
            Self::Overflow { allowed } => *allowed,
        }
    }

    fn render(&self, pod: &PodLabels) -> Rendered {
        match self {
            Self::Of(labels) => {
                let (labels, route) = &**labels;
                labels.render_of_request(|rendered| route.render(rendered))
            }
            Self::Stopped(labels, stopped) => {
                let mut labels = labels.render_of_server();
                if let Stopped::Limited(policy, scope) = stopped {
                    labels.push(("ratelimit_group", policy.group.as_str().to_owned()));
                    labels.push(("ratelimit_kind", "httplocalratelimitpolicy".to_owned()));
                    labels.push(("ratelimit_name", policy.name.name.to_string()));
                    labels.push(("ratelimit_scope", scope.as_str().to_owned()));
                }
                labels
            }
            Self::Overflow { .. } => {
                let mut labels = vec![("direction", "inbound".to_owned())];
                pod.render(&mut labels);
                labels.push(("route_name", OVERFLOW.to_owned()));
                labels
            }
        }
    }
}
