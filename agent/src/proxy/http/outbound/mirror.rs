//! Copies of requests for another backend, whose answers nobody waits for.

use std::sync::Arc;
use std::time::Duration;

use http::request;
use http_body_util::BodyExt;
use hyper::Request;
use weft_core::route::Mirror;

use super::lead::{Goal, backend_port};
use super::send::send;
use super::tried::Tried;
use super::upstream::Upstream;
use super::{Ending, Facts, home};
use crate::proxy::http::answer::ExchangeError;
use crate::proxy::http::body::{RequestBody, ResponseBody, Used};
use crate::proxy::http::head;

/// Sends the request to another backend too, in a task of its own. Its body is what passes by: who does not
/// keep up loses the rest.
pub(super) fn mirror(
    client: &Arc<Facts>,
    to: &Mirror,
    head: &request::Parts,
    body: &mut RequestBody,
) {
    let Ok(port) = backend_port(&client.context, &to.target) else {
        return;
    };
    // Those that cannot be had are left out: nobody waits for a mirror.
    let Some(place) = client.pod.exchanges.mirror() else {
        return;
    };
    let request = Request::from_parts(head::line_and_headers(head), body.copied());
    let client = Arc::clone(client);
    let pod = Arc::clone(&client.pod);
    let ended = pod.end_flows.clone();
    pod.spawn_flow(async move {
        let _place = place;
        let sending = async {
            let goal = Goal::Port(port);
            let sent = Box::pin(send(&client, &goal, None, &Tried::ONCE, request)).await?;
            let used = match sent.upstream {
                Upstream::Http1(connection) => Some(Used {
                    connection,
                    home: home(&client),
                }),
                Upstream::Http2 { .. } => None,
            };
            let mut answer = ResponseBody::of(sent.response.into_body(), used, Ending::nothing());
            while let Some(Ok(_)) = answer.frame().await {}
            Ok::<(), ExchangeError>(())
        };
        let sending = tokio::time::timeout(MIRROR_TIMEOUT, sending);
        let sent = tokio::select! {
            sent = sending => sent,
            () = ended.cancelled() => return,
        };
        match sent {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a mirrored request failed"),
            Err(_) => tracing::debug!("a mirrored request took too long"),
        }
    });
}

/// How long a mirrored request may take: nobody waits for it.
const MIRROR_TIMEOUT: Duration = Duration::from_secs(30);
