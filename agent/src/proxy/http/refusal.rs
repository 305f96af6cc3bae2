//! Answers to clients who were refused before anybody knew what they speak: those who turn out to speak HTTP are
//! told why, all others are reset, soon.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::Incoming;
use weft_core::Identity;

use super::answer::Told;
use super::first::{self, Client};
use super::idle::Idle;
use super::stream::Stream;
use super::{Version, head, measure, serve};
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::error::FlowError;
use crate::proxy::tcp::{FlowSocket, TunnelHalves};
use crate::proxy::usage::{From, Party};
use crate::telemetry::{Direction, TlsLabel};

/// What was refused.
pub(in crate::proxy) struct Refusal<'a> {
    /// Why.
    pub(in crate::proxy) error: &'a FlowError,
    /// The port that was asked for.
    pub(in crate::proxy) port: u16,
    /// Who asked, if proven.
    pub(in crate::proxy) identity: Option<&'a Identity>,
    /// How the client's side is secured.
    pub(in crate::proxy) tls: TlsLabel,
}

/// Who was refused.
pub(in crate::proxy) enum Refused {
    /// On a socket.
    Socket(FlowSocket),
    /// In a stream of HTTP/2.
    Tunnel(TunnelHalves),
}

/// Tells a client why it was refused by the pod, if it begins to speak HTTP in time. It is let go after one answer.
pub(in crate::proxy) async fn tell(
    context: &Context,
    pod: &Arc<LocalPod>,
    client: Refused,
    refusal: Refusal<'_>,
) {
    // Those who are refused must not take what others need, nor those of one pod what others' have use for.
    let Ok(_place_of_pod) = pod.usage.told.try_acquire() else {
        return;
    };
    let Ok(_place) = context.refusals.try_acquire() else {
        return;
    };
    let Some(begun) = begun(client).await else {
        return;
    };
    let authz = match refusal.error {
        FlowError::Denied(verdict) => {
            let at = (refusal.port, refusal.tls);
            Some(measure::authz(context, pod, at, refusal.identity, verdict))
        }
        _ => None,
    };
    let from = refusal.identity.cloned();
    let from = from.map_or(From::Strangers, From::Workload);
    let party = Party::at_pod(&pod.usage, from);
    let whose = (party, Direction::Inbound);
    answer(context, pod, begun, (refusal.error, whose), move |_| {
        if let Some(authz) = &authz {
            authz.count();
        }
    })
    .await;
}

/// A client that was refused, if it begins to speak HTTP in time; others are let go.
pub(in crate::proxy) async fn begun(mut client: Refused) -> Option<(Stream, Version)> {
    let arriving = match &mut client {
        Refused::Socket(socket) => Client::Socket(socket),
        Refused::Tunnel(halves) => Client::Tunnel(halves),
    };
    let begun = tokio::time::timeout(GRACE, first::begun(arriving)).await;
    let (version, first) = begun.ok()?.ok()??;
    let stream = match client {
        Refused::Socket(socket) => Stream::socket(socket),
        Refused::Tunnel(halves) => Stream::tunnel(halves),
    };
    Some((stream.begun(first), version))
}

/// Answers a client that was refused, and lets it go. `count` is told of each answer.
pub(in crate::proxy) async fn answer(
    context: &Context,
    pod: &Arc<LocalPod>,
    (stream, version): (Stream, Version),
    (error, (party, direction)): (&FlowError, (Party, Direction)),
    count: impl Fn(Told) + Clone + Send + Sync + 'static,
) {
    let answer = Told::to_refused(error);
    let party = party.with_little_to_say();
    let charged = party.clone();
    let leave = pod.stop_accepting.child_token();
    let leaving = leave.clone();
    let service = move |request: Request<Incoming>| {
        leaving.cancel();
        count(answer);
        let charged = charged.clone();
        async move {
            let is_grpc = head::is_grpc(request.headers());
            // Where there is no room for it, nobody waits for the rest of it either.
            let place = charged.enter(request.headers());
            if place.is_ok() {
                swallow(request).await;
            }
            answer.response(is_grpc)
        }
    };
    let idle = Idle {
        // Its time is bounded as a whole.
        limit: Duration::ZERO,
        telemetry: &context.telemetry,
        direction,
    };
    let ends = (&party, &leave, idle);
    let serving = serve::serve(stream, version, pod, ends, service);
    let _ = tokio::time::timeout(MOST_TIME, serving).await;
}

/// Reads what is there of a body: a connection that is closed with bytes unread is reset, and the answer with it.
async fn swallow(request: Request<Incoming>) {
    if request.headers().contains_key(http::header::EXPECT) {
        return;
    }
    let mut body = request.into_body();
    let mut left = MOST_SWALLOWED_BYTES;
    while let Some(Ok(frame)) = body.frame().await {
        let count = frame.data_ref().map_or(0, bytes::Bytes::len);
        match left.checked_sub(count) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

/// How long a client that was refused may take to begin. One that speaks no HTTP is reset after that.
pub(in crate::proxy) const GRACE: Duration = Duration::from_secs(1);
/// How long it may take for all.
const MOST_TIME: Duration = Duration::from_secs(5);
const MOST_SWALLOWED_BYTES: usize = 64 * 1024;
/// Clients that are told at a time; more are reset.
pub(in crate::proxy) const MOST_TOLD: usize = 256;
/// The same of those that one pod has refused.
pub(in crate::proxy) const MOST_TOLD_PER_POD: usize = MOST_TOLD / 4;
