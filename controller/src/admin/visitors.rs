//! Who may ask at the loopback port, which `kubectl port-forward` and the command `weft` reach through the API server.
//!
//! A right to forward ports in the controller's namespace says little of who somebody is, and nothing of what they may see:
//! so each request shows a token. It must be for [`INSPECTION_AUDIENCE`], so that nobody has to hand over a token
//! that the API server itself takes: neither this process nor what the bytes pass on their way learns anything that is of
//! use elsewhere. Whose it is says a TokenReview, and whether they may look a SubjectAccessReview for the verb `get` on
//! `inspections.policy.weft.dev` in the whole cluster: what agents say is of all namespaces.
//!
//! To watch what goes on at pods is another right, with another token, for [`TAP_AUDIENCE`]: the verb `watch` on `…/tap` in
//! the group `tap.weft.dev`, of what is watched, in its namespace.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use hyper::{Request, StatusCode};
use k8s_openapi::api::authentication::v1::{
    TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo,
};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::tap::Ask;
use super::{Reply, TEXT, respond};
use crate::config::{INSPECTION_AUDIENCE, TAP_AUDIENCE};
use crate::control::authentication::{Fingerprint, fingerprint, shape};
use crate::source::kubernetes::explain;
use crate::telemetry::Metrics;

/// Decides about visitors.
pub struct Visitors {
    tokens: Api<TokenReview>,
    accesses: Api<SubjectAccessReview>,
    metrics: Arc<Metrics>,
    /// Those who may look, and since when that is known.
    known: Mutex<HashMap<Fingerprint, (Instant, Arc<Visitor>)>>,
    at_a_time: Semaphore,
}

/// Somebody who may look.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Visitor {
    name: String,
    /// What the API server calls their token in its own audit log, if it does.
    credential: String,
}

/// Somebody who may watch something.
#[derive(Clone, Debug)]
pub(super) struct Watcher {
    pub(super) name: String,
    pub(super) credential: String,
    /// By which it is asked again; none: it was not asked.
    shown: Option<Box<ShownToWatch>>,
}

/// What let somebody watch.
#[derive(Clone)]
struct ShownToWatch {
    token: String,
    right: ResourceAttributes,
}

/// Why somebody may not look.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nobody may.
    #[error("nobody is let in here")]
    Nobody,
    /// No token is shown.
    #[error(
        "a token is needed: Authorization: Bearer TOKEN, for the audience {INSPECTION_AUDIENCE}, or {TAP_AUDIENCE} for /tap"
    )]
    NoToken,
    /// No service account has a token like that.
    #[error("this is no token of a service account")]
    Malformed,
    /// The API server does not believe it, or it is for somebody else.
    #[error(
        "the API server does not accept the token for the audience {0}: is it expired, or meant for somebody else?"
    )]
    NotAuthenticated(&'static str),
    /// They have no right to look.
    #[error(
        "{user} may not look into the mesh: the verb get on inspections.policy.weft.dev is needed in the whole cluster, \
         which the ClusterRole weft-viewer gives"
    )]
    Forbidden {
        /// Who.
        user: String,
    },
    /// They have no right to watch that.
    #[error(
        "{user} may not watch {what}: the verb watch on {resource}/tap in the group tap.weft.dev is needed there, which the \
         ClusterRole weft-tap gives where it is bound"
    )]
    NotToBeWatched {
        /// Who.
        user: String,
        /// The resource.
        resource: String,
        /// Which one.
        what: String,
    },
    /// Nobody could be asked.
    #[error("the API server cannot be asked about the token: {0}")]
    Unavailable(String),
}

/// How long an answer holds: the tool asks many times in a row, and a right that is taken away is gone soon.
const KNOWN: Duration = Duration::from_secs(10);
/// People who look at the same time, and more.
const MAX_KNOWN: usize = 256;
/// Requests to the API server at a time.
const AT_A_TIME: usize = 4;
/// Both reviews, and the wait for them.
const TIMEOUT: Duration = Duration::from_secs(8);
/// More of a path, with its query, is not logged.
const MAX_PATH: usize = 512;
/// The name of a token in the API server's audit log, since Kubernetes 1.30.
const CREDENTIAL: &str = "authentication.kubernetes.io/credential-id";

impl Visitors {
    /// Asks this API server.
    pub fn new(client: Client, metrics: Arc<Metrics>) -> Self {
        Self {
            tokens: Api::all(client.clone()),
            accesses: Api::all(client),
            metrics,
            known: Mutex::default(),
            at_a_time: Semaphore::new(AT_A_TIME),
        }
    }

    /// Lets a request in, or not; counts it, and logs who asked for what.
    pub(super) async fn admit(&self, request: &Request<Incoming>) -> Result<(), Refusal> {
        let asked = request.uri().path_and_query();
        let path = asked.map_or("", |it| it.as_str());
        let path: String = path.chars().take(MAX_PATH).collect();
        let admitted = self.visitor(request.headers()).await;
        self.metrics.inspected(label(admitted.as_ref().err()));
        match &admitted {
            Ok(visitor) => {
                let Visitor { name, credential } = &**visitor;
                tracing::info!(
                    user = name,
                    credential,
                    path,
                    "somebody looks into the mesh"
                );
            }
            Err(Refusal::Forbidden { user }) => {
                tracing::warn!(user, path, "somebody may not look into the mesh");
            }
            // Whoever has no good token could fill the log.
            Err(refusal) => {
                tracing::debug!(%refusal, path, "somebody unknown may not look into the mesh");
            }
        }
        admitted.map(drop)
    }

    async fn visitor(&self, headers: &HeaderMap) -> Result<Arc<Visitor>, Refusal> {
        let token = shape(bearer(headers)?).ok_or(Refusal::Malformed)?;
        let fingerprint = fingerprint(token.as_bytes());
        if let Some(visitor) = self.remembered(&fingerprint) {
            return Ok(visitor);
        }
        let asked = async {
            // Never closed.
            let _permit = self.at_a_time.acquire().await;
            // Somebody may have asked about the same one meanwhile.
            if let Some(visitor) = self.remembered(&fingerprint) {
                return Ok(visitor);
            }
            let visitor = Arc::new(self.review(token).await?);
            self.remember(fingerprint, visitor.clone());
            Ok(visitor)
        };
        let answered = timeout(TIMEOUT, asked).await;
        answered.unwrap_or_else(|_| Err(unanswered()))
    }

    /// Asks whose a token is, and whether they may look.
    async fn review(&self, token: String) -> Result<Visitor, Refusal> {
        let user = self.user(token, INSPECTION_AUDIENCE).await?;
        let name = user.username.clone().unwrap_or_default();
        let inspections = ResourceAttributes {
            group: Some("policy.weft.dev".to_owned()),
            resource: Some("inspections".to_owned()),
            verb: Some("get".to_owned()),
            ..ResourceAttributes::default()
        };
        if !self.may(asked_for(&user, inspections)).await? {
            return Err(Refusal::Forbidden { user: name });
        }
        Ok(Visitor {
            name,
            credential: credential(&user),
        })
    }

    /// Lets somebody watch, or not, and counts it. Who is let in is logged with what came of it.
    pub(super) async fn admit_watcher(
        &self,
        request: &Request<Incoming>,
        ask: &Ask,
    ) -> Result<Watcher, Refusal> {
        let admitted = async {
            // Never closed.
            let _permit = self.at_a_time.acquire().await;
            self.watcher(request.headers(), ask).await
        };
        let admitted = timeout(TIMEOUT, admitted).await;
        let admitted = admitted.unwrap_or_else(|_| Err(unanswered()));
        self.metrics.tapped(label(admitted.as_ref().err()));
        match &admitted {
            Ok(_) => {}
            Err(Refusal::NotToBeWatched {
                user,
                resource,
                what,
            }) => {
                tracing::warn!(user, resource, what, "somebody may not watch");
            }
            // Whoever has no good token could fill the log.
            Err(refusal) => tracing::debug!(%refusal, "somebody unknown may not watch"),
        }
        admitted
    }

    async fn watcher(&self, headers: &HeaderMap, ask: &Ask) -> Result<Watcher, Refusal> {
        let token = shape(bearer(headers)?).ok_or(Refusal::Malformed)?;
        let right = watched(ask);
        let user = self.may_watch(token.clone(), &right).await?;
        Ok(Watcher {
            name: user.username.clone().unwrap_or_default(),
            credential: credential(&user),
            shown: Some(Box::new(ShownToWatch { token, right })),
        })
    }

    /// Asks whether somebody may watch that whom it was asked about before: whether the token is still good, and gives the right.
    pub(super) async fn may_still_watch(&self, watcher: &Watcher) -> Result<(), Refusal> {
        let Some(shown) = &watcher.shown else {
            return Ok(());
        };
        let asked = async {
            // Never closed.
            let _permit = self.at_a_time.acquire().await;
            self.may_watch(shown.token.clone(), &shown.right).await
        };
        let asked = timeout(TIMEOUT, asked).await;
        asked.unwrap_or_else(|_| Err(unanswered())).map(drop)
    }

    /// Whose a token is, if it gives a right to watch.
    async fn may_watch(
        &self,
        token: String,
        right: &ResourceAttributes,
    ) -> Result<UserInfo, Refusal> {
        let user = self.user(token, TAP_AUDIENCE).await?;
        if self.may(asked_for(&user, right.clone())).await? {
            return Ok(user);
        }
        let text = |it: &Option<String>| it.clone().unwrap_or_default();
        let namespace = text(&right.namespace);
        let name = text(&right.name);
        let resource = text(&right.resource);
        let which = match name.is_empty() {
            true => resource.clone(),
            false => format!("{resource}/{name}"),
        };
        let what = match namespace.is_empty() {
            true => format!("{which} of the whole cluster"),
            false => format!("{which} in the namespace {namespace}"),
        };
        Err(Refusal::NotToBeWatched {
            user: user.username.unwrap_or_default(),
            resource,
            what,
        })
    }

    /// Whose a token is that is for an audience.
    async fn user(&self, token: String, audience: &'static str) -> Result<UserInfo, Refusal> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![audience.to_owned()]),
                token: Some(token),
            },
            ..TokenReview::default()
        };
        let reviewed = self.tokens.create(&PostParams::default(), &review).await;
        let reviewed = reviewed.map_err(|error| Refusal::Unavailable(explain(&error)))?;
        user(reviewed.status, audience)
    }

    /// Whether somebody may do something.
    async fn may(&self, spec: SubjectAccessReviewSpec) -> Result<bool, Refusal> {
        let access = SubjectAccessReview {
            spec,
            ..SubjectAccessReview::default()
        };
        let decided = self.accesses.create(&PostParams::default(), &access).await;
        let decided = decided.map_err(|error| Refusal::Unavailable(explain(&error)))?;
        let decided = decided.status;
        Ok(decided.is_some_and(|it| it.allowed && it.denied != Some(true)))
    }

    fn remembered(&self, token: &Fingerprint) -> Option<Arc<Visitor>> {
        let known = self.locked();
        let (since, visitor) = known.get(token)?;
        (since.elapsed() < KNOWN).then(|| visitor.clone())
    }

    fn remember(&self, token: Fingerprint, visitor: Arc<Visitor>) {
        let mut known = self.locked();
        known.retain(|_, (since, _)| since.elapsed() < KNOWN);
        if known.len() >= MAX_KNOWN {
            // It is only memory.
            known.clear();
        }
        known.insert(token, (Instant::now(), visitor));
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<Fingerprint, (Instant, Arc<Visitor>)>> {
        // Single inserts and removes only: a panic elsewhere leaves it whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Visitors {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Visitors").finish_non_exhaustive()
    }
}

/// What somebody is told who may not look.
pub(super) fn refused(refusal: &Refusal) -> Reply {
    let status = match refusal {
        Refusal::Nobody | Refusal::Forbidden { .. } | Refusal::NotToBeWatched { .. } => {
            StatusCode::FORBIDDEN
        }
        Refusal::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::UNAUTHORIZED,
    };
    let mut reply = respond(status, TEXT, format!("{refusal}\n"));
    if status == StatusCode::UNAUTHORIZED {
        let scheme = HeaderValue::from_static("Bearer");
        reply.headers_mut().insert(WWW_AUTHENTICATE, scheme);
    }
    reply
}

fn label(refusal: Option<&Refusal>) -> &'static str {
    match refusal {
        None => "accepted",
        Some(Refusal::Nobody) => "nobody",
        Some(Refusal::NoToken) => "no_token",
        Some(Refusal::Malformed) => "malformed",
        Some(Refusal::NotAuthenticated(_)) => "not_authenticated",
        Some(Refusal::Forbidden { .. } | Refusal::NotToBeWatched { .. }) => "forbidden",
        Some(Refusal::Unavailable(_)) => "unavailable",
    }
}

fn unanswered() -> Refusal {
    Refusal::Unavailable(format!("no answer for {} s", TIMEOUT.as_secs()))
}

impl fmt::Debug for ShownToWatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("ShownToWatch");
        shown.field("right", &self.right).finish_non_exhaustive()
    }
}

impl Watcher {
    /// Whoever can open the socket.
    pub(super) fn root() -> Self {
        Self {
            name: "root, at the socket".to_owned(),
            credential: String::new(),
            shown: None,
        }
    }
}

/// What the API server calls somebody's token.
fn credential(user: &UserInfo) -> String {
    let all = user.extra.as_ref().and_then(|it| it.get(CREDENTIAL));
    all.map(|it| it.join(" ")).unwrap_or_default()
}

/// The right to watch something.
fn watched(ask: &Ask) -> ResourceAttributes {
    let text = |it: &str| (!it.is_empty()).then(|| it.to_owned());
    let (resource, name) = ask.resource();
    ResourceAttributes {
        group: Some("tap.weft.dev".to_owned()),
        resource: Some(resource.to_owned()),
        subresource: Some("tap".to_owned()),
        verb: Some("watch".to_owned()),
        namespace: text(&ask.target.namespace),
        name: text(name),
        ..ResourceAttributes::default()
    }
}

/// The one token of a request.
fn bearer(headers: &HeaderMap) -> Result<&[u8], Refusal> {
    let mut all = headers.get_all(AUTHORIZATION).iter();
    let (Some(only), None) = (all.next(), all.next()) else {
        return Err(Refusal::NoToken);
    };
    let token = only.as_bytes().strip_prefix(b"Bearer ");
    token.ok_or(Refusal::NoToken)
}

/// Whom a token is of, by the answer about it.
fn user(status: Option<TokenReviewStatus>, audience: &'static str) -> Result<UserInfo, Refusal> {
    let refused = || Refusal::NotAuthenticated(audience);
    let status = status.ok_or_else(refused)?;
    let fails = status.error.is_some_and(|it| !it.is_empty());
    // A server that knows no audiences names none: the token may be meant for anybody.
    let audiences = status.audiences.unwrap_or_default();
    let is_for_this = audiences.iter().any(|it| it == audience);
    if status.authenticated != Some(true) || fails || !is_for_this {
        return Err(refused());
    }
    let user = status.user.ok_or_else(refused)?;
    match user.username.as_deref() {
        None | Some("") => Err(refused()),
        Some(_) => Ok(user),
    }
}

fn asked_for(user: &UserInfo, attributes: ResourceAttributes) -> SubjectAccessReviewSpec {
    let extra = user.extra.iter().flatten();
    let extra: BTreeMap<_, _> = extra.map(|(it, all)| (it.clone(), all.clone())).collect();
    SubjectAccessReviewSpec {
        user: user.username.clone(),
        groups: user.groups.clone(),
        uid: user.uid.clone(),
        extra: Some(extra),
        resource_attributes: Some(attributes),
        ..SubjectAccessReviewSpec::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_one_token() {
        let read = |all: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in all {
                headers.append(AUTHORIZATION, HeaderValue::from_static(value));
            }
            bearer(&headers).map(<[u8]>::to_vec)
        };
        assert_eq!(read(&["Bearer a.b.c"]), Ok(b"a.b.c".to_vec()));
        for bad in [
            &[][..],
            &["Basic a.b.c"],
            &["a.b.c"],
            &["Bearer a.b.c", "Bearer d.e.f"],
        ] {
            assert_eq!(read(bad), Err(Refusal::NoToken), "{bad:?}");
        }
    }

    #[test]
    fn only_a_token_for_this_audience_is_anybodys() {
        let status = || TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![INSPECTION_AUDIENCE.to_owned()]),
            error: None,
            user: Some(UserInfo {
                username: Some("system:serviceaccount:a:b".to_owned()),
                ..UserInfo::default()
            }),
        };
        let user = |it| user(it, INSPECTION_AUDIENCE);
        let name = user(Some(status())).expect("somebody").username;
        assert_eq!(name.as_deref(), Some("system:serviceaccount:a:b"));
        let changed = |change: fn(&mut TokenReviewStatus)| {
            let mut status = status();
            change(&mut status);
            user(Some(status))
        };
        for bad in [
            changed(|it| it.authenticated = Some(false)),
            changed(|it| it.authenticated = None),
            changed(|it| it.error = Some("no".to_owned())),
            changed(|it| it.audiences = None),
            changed(|it| it.audiences = Some(vec!["weft-controller".to_owned()])),
            changed(|it| it.user = None),
            changed(|it| it.user = Some(UserInfo::default())),
            user(None),
        ] {
            assert_eq!(bad, Err(Refusal::NotAuthenticated(INSPECTION_AUDIENCE)));
        }
    }
}
