//! What policy says about each request, where it arrives: at its connection's, and, where the Server has
//! routes, at its own route.
//!
//! What is allowed may still be more than the Server takes: its limit is asked last, so that nobody uses it up
//! with requests that are denied.
//!
//! What follows an accepted CONNECT is no longer asked about. So where each request is looked at it is refused:
//! an application that answers it as any other request would be told what nobody has seen.
//!
//! There is one gate for a client's connection to a port of a pod. What it knows of policy is kept until policy
//! changes, so that a port without routes or a limit costs a comparison of two numbers for each request.

use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use http::request::Parts;
use http::{HeaderValue, Method, Request, response};
use tokio_util::sync::CancellationToken;
use weft_core::route::{Filter, InboundMatch, Place, RouteName, apply_to_request};
use weft_core::{
    AuthorizationName, Client, Identity, PortProtocol, RequestDenial, Server, Verdict,
};

use super::answer::ExchangeError;
use super::head::{self, BadHead};
use super::{Version, is_taken, takes_nothing_else};
use crate::discovery::RequestPolicy;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::error::FlowError;
use crate::proxy::limiters::Limiter;
use crate::proxy::live_requests::{Live, LiveRequest, RequestEntry};
use crate::telemetry::exchange::{HttpAuthz, RouteRef, Stopped};
use crate::telemetry::{AuthzLabels, TlsLabel};

/// Decides about the requests of one client at one port.
#[derive(Debug)]
pub(in crate::proxy) struct Gate {
    /// The server's pod.
    pod: Arc<LocalPod>,
    port: u16,
    /// Where the client connects from, and how.
    client: IpAddr,
    tls: TlsLabel,
    /// Who it is, if proven.
    identity: Option<Identity>,
    /// The same, as the application is told.
    told: Option<HeaderValue>,
    /// The connection was let in for requests: it stays when policy no longer allows some of them.
    is_for_requests: bool,
    known: Mutex<Option<Arc<Known>>>,
}

/// Policy, as of one moment.
#[derive(Debug)]
struct Known {
    number: u64,
    /// What is declared of the port.
    declared: PortProtocol,
    /// About the client's connection.
    connection: Verdict,
    requests: Option<RequestPolicy>,
    limiter: Option<Arc<Limiter>>,
    /// Where it is counted what holds for all of the connection.
    counted: HttpAuthz,
    /// The same for rules: which, and what opened it.
    of_rules: Mutex<Vec<(Decided, HttpAuthz)>>,
}

/// What is counted together.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Decided {
    rule: Option<usize>,
    authorization: Option<AuthorizationName>,
}

/// A request that may pass.
#[derive(Debug, Default)]
pub(super) struct Pass {
    /// What is to happen to its response.
    pub(super) filters: Vec<Filter>,
    /// The request's head before its route has changed it, if that was to.
    original: Option<Box<Parts>>,
    /// Its head says who the client is.
    is_told: bool,
    /// Ends it if policy changes; none: its connection is ended, whatever of it is no longer allowed.
    pub(super) entry: Option<Arc<RequestEntry>>,
}

impl Gate {
    /// The gate of a client that connects to a port of a pod, and was let in by this verdict.
    pub(in crate::proxy) fn new(
        pod: Arc<LocalPod>,
        port: u16,
        (client, tls): (IpAddr, TlsLabel),
        identity: Option<Identity>,
        verdict: Option<&Verdict>,
    ) -> Self {
        Self {
            is_for_requests: verdict.is_some_and(Verdict::requests_only),
            pod,
            port,
            client,
            tls,
            told: identity.as_ref().and_then(head::client_id),
            identity,
            known: Mutex::default(),
        }
    }

    /// Decides about a request that comes by `version`, counts it, says in its head who the client is, and does
    /// to that what its route says. `end` is that of its connection.
    ///
    /// # Errors
    /// It is denied, no route is for it, its route answers it, or the port is declared not to take it.
    pub(super) fn ask(
        &self,
        context: &Context,
        version: Version,
        head: &mut Parts,
        end: &CancellationToken,
    ) -> Result<Pass, ExchangeError> {
        // Before routes match by it, and again when they have changed it.
        head::set_client(&mut head.headers, self.told.as_ref());
        let mut known = self.known(context);
        if !is_taken(known.declared, version) {
            return Err(FlowError::NotHttp.into());
        }
        if head.method == Method::CONNECT && known.looks_at_each() {
            return Err(BadHead::ConnectUnseen.into());
        }
        let is_grpc = head::is_grpc(&head.headers);
        let mut entry = None;
        let has_routes = |it: &RequestPolicy| it.server().routes.is_some();
        if self.is_for_requests || known.requests.as_ref().is_some_and(has_routes) {
            // Before it is decided: a change in between must not be missed.
            entry = Some(Arc::new(self.enter(context, head, is_grpc, end)));
            known = self.known(context);
        }
        if !known.connection.admits_requests() {
            known.counted.count();
            return Err(FlowError::Denied(known.connection.clone()).into());
        }
        let Some(policy) = &known.requests else {
            // All of one moment: without routes nobody is let in for requests only.
            known.counted.count();
            return Ok(Pass::of(entry));
        };
        match policy.authorize(self.client(), head, is_grpc) {
            Ok(passed) => {
                let decided = Decided {
                    rule: passed.rule.map(|it| it.ordinal),
                    authorization: passed.authorization.cloned(),
                };
                let route = passed.rule.map(|it| it.route);
                let verdict = || passed.verdict(policy.server());
                self.count(context, &known, decided, route, verdict);
                self.limit(context, &known)?;
                let mut pass = Pass::of(entry);
                if let Some(rule) = passed.rule.filter(|it| !it.rule.filters.is_empty()) {
                    pass.original = Some(Box::new(head::line_and_headers(head)));
                    filter(&rule, head)?;
                    head::set_client(&mut head.headers, self.told.as_ref());
                    pass.filters.clone_from(&rule.rule.filters);
                }
                Ok(pass)
            }
            Err(RequestDenial::NotFound) => {
                let labels = self.labels(&known.connection);
                let stopped = context.telemetry.http_stopped(labels, Stopped::NoRoute);
                stopped.count();
                Err(ExchangeError::NoRule)
            }
            Err(RequestDenial::Denied { route, verdict }) => {
                let labels = self.labels(&verdict);
                let route = route_ref(route.as_ref());
                context.telemetry.http_authz(labels, route).count();
                Err(FlowError::Denied(*verdict).into())
            }
        }
    }

    fn limit(&self, context: &Context, known: &Known) -> Result<(), ExchangeError> {
        let Some(limiter) = &known.limiter else {
            return Ok(());
        };
        limiter.take(self.identity.as_ref()).map_err(|limited| {
            let labels = self.labels(&known.connection);
            let stopped = Stopped::Limited(limiter.limit().name.clone(), limited.scope);
            context.telemetry.http_stopped(labels, stopped).count();
            ExchangeError::Limited(limited.retry_after)
        })
    }

    fn known(&self, context: &Context) -> Arc<Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let store = &context.store;
        let current = store.policy_number();
        if let Some(known) = known.as_ref().filter(|it| it.number == current) {
            return Arc::clone(known);
        }
        let (number, connection, requests) =
            store.authorize_requests(&self.pod.id, self.port, self.client());
        let labels = self.labels(&connection);
        let made = Arc::new(Known {
            number,
            declared: store.inbound_protocol(&self.pod.id, self.port),
            limiter: requests.as_ref().and_then(|it| {
                let Server {
                    name, rate_limit, ..
                } = it.server();
                let limit = rate_limit.as_ref()?;
                Some(self.pod.limiters.of(name, limit))
            }),
            requests,
            counted: context.telemetry.http_authz(labels, route_ref(None)),
            connection,
            of_rules: Mutex::default(),
        });
        *known = Some(Arc::clone(&made));
        made
    }

    fn enter(
        &self,
        context: &Context,
        head: &Parts,
        is_grpc: bool,
        end: &CancellationToken,
    ) -> RequestEntry {
        context
            .live
            .requests
            .enter(Live::Request(Box::new(LiveRequest {
                pod: self.pod.id.clone(),
                port: self.port,
                client: self.client,
                identity: self.identity.clone(),
                head: head::line_and_headers(head),
                is_grpc,
                end: end.child_token(),
            })))
    }

    fn count(
        &self,
        context: &Context,
        known: &Known,
        decided: Decided,
        route: Option<&RouteName>,
        verdict: impl FnOnce() -> Verdict,
    ) {
        let mut counted = known
            .of_rules
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((_, counted)) = counted.iter().find(|(it, _)| *it == decided) {
            counted.count();
            return;
        }
        let labels = self.labels(&verdict());
        let here = context.telemetry.http_authz(labels, route_ref(route));
        here.count();
        if counted.len() < MOST_COUNTED {
            counted.push((decided, here));
        }
    }

    fn client(&self) -> Client<'_> {
        Client {
            address: self.client,
            identity: self.identity.as_ref(),
        }
    }

    fn labels(&self, verdict: &Verdict) -> AuthzLabels {
        let (pod, client) = (self.pod.labels.clone(), self.identity.clone());
        AuthzLabels::new(pod, self.port, self.tls, client, verdict)
    }
}

impl Known {
    /// Whether nothing may pass the port that is no request.
    fn looks_at_each(&self) -> bool {
        self.requests.is_some() || takes_nothing_else(self.declared)
    }
}

/// Does to the head what the rule says.
///
/// # Errors
/// It answers the request, or cannot be applied.
pub(in crate::proxy) fn filter(
    rule: &InboundMatch<'_>,
    head: &mut Parts,
) -> Result<(), ExchangeError> {
    let place = Place {
        prefix: rule.prefix,
        // Which one the client used is nobody's to know but the client's.
        port: head::port(head).unwrap_or(80),
    };
    match apply_to_request(&rule.rule.filters, head, place) {
        Some(answer) => Err(ExchangeError::Answered(Box::new(answer))),
        None => Ok(()),
    }
}

fn route_ref(route: Option<&RouteName>) -> RouteRef {
    match route {
        Some(route) => RouteRef::Resource {
            group: route.group(),
            kind: route.kind.as_str(),
            name: route.name.clone(),
        },
        None => RouteRef::Default("default"),
    }
}

impl Pass {
    /// Of a request that a gate was asked about.
    fn of(entry: Option<Arc<RequestEntry>>) -> Self {
        Self {
            is_told: true,
            entry,
            ..Self::default()
        }
    }

    /// Gives a request back its own head. Where it goes next may be outside of the mesh, and nobody's to know
    /// who the client is: what the client itself said of that is lost.
    pub(super) fn undo<B>(&self, mut request: Request<B>) -> Request<B> {
        if let Some(original) = &self.original {
            *request.method_mut() = original.method.clone();
            *request.uri_mut() = original.uri.clone();
            *request.headers_mut() = original.headers.clone();
        }
        if self.is_told {
            head::remove_own(request.headers_mut());
        }
        request
    }

    /// Waits for a response as long as the request is allowed.
    ///
    /// # Errors
    /// It is not allowed any more.
    pub(super) async fn hold<T>(
        &self,
        sending: impl Future<Output = T>,
    ) -> Result<T, ExchangeError> {
        hold(self.entry.as_deref(), sending).await
    }
}

/// Waits for a response as long as policy lets the request's entry go on; none: nobody may end it.
///
/// # Errors
/// It is not allowed any more.
pub(super) async fn hold<T>(
    entry: Option<&RequestEntry>,
    sending: impl Future<Output = T>,
) -> Result<T, ExchangeError> {
    let Some(entry) = entry else {
        return Ok(sending.await);
    };
    tokio::select! {
        biased;
        () = entry.end().cancelled() => Err(ExchangeError::Revoked),
        sent = sending => Ok(sent),
    }
}

/// What a route has answered in the server's place.
pub(in crate::proxy) type Answer = Box<response::Parts>;

/// Rules of which it is remembered where they are counted.
const MOST_COUNTED: usize = 64;
