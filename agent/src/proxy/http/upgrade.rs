//! What is no longer HTTP: after `101 Switching Protocols` or an accepted CONNECT both connections carry
//! bytes, which are copied until both sides have closed.

use std::pin::pin;
use std::sync::Arc;

use futures::future::BoxFuture;
use hyper::Response;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio_util::sync::CancellationToken;

use super::body::ResponseBody;
use super::head::{Purpose, strip_hop};
use super::serve::Switched;
use crate::balance::InFlight;
use crate::node::LocalPod;
use crate::proxy::live_requests::RequestEntry;

/// The server's side of an upgrade.
struct Server {
    /// The connection, once it was told.
    connection: OnUpgrade,
    driver: Option<BoxFuture<'static, ()>>,
    /// The endpoint has to do with it.
    in_flight: Option<InFlight>,
}

/// Joins the client's connection with that of the server that has accepted by `response`, until both have
/// closed, `end` is cancelled, or policy ends it by the request's entry. `driver` moves the server's bytes until
/// then, and watches over them afterwards; if nobody else does. The endpoint has to do with it for as long.
/// Yields the answer for the client.
pub(super) fn switch(
    pod: &Arc<LocalPod>,
    client: OnUpgrade,
    mut response: Response<Incoming>,
    driver: Option<BoxFuture<'static, ()>>,
    in_flight: Option<InFlight>,
    (end, entry): (CancellationToken, Option<Arc<RequestEntry>>),
) -> Response<ResponseBody> {
    let connection = hyper::upgrade::on(&mut response);
    let server = Server {
        connection,
        driver,
        in_flight,
    };
    // Cancelled with the connection's too.
    let end = entry.as_ref().map_or(end, |it| it.end().clone());
    join(pod, client, server, (end, entry));
    let (mut parts, _) = response.into_parts();
    parts.extensions.insert(Switched);
    strip_hop(&mut parts.headers, Purpose::Upgrade);
    Response::from_parts(parts, ResponseBody::empty())
}

fn join(
    pod: &Arc<LocalPod>,
    client: OnUpgrade,
    server: Server,
    (end, entry): (CancellationToken, Option<Arc<RequestEntry>>),
) {
    let drained = pod.end_flows.clone();
    pod.spawn_flow(async move {
        let _entry = entry;
        let joined = Box::pin(joined(client, server));
        tokio::select! {
            () = joined => {}
            () = drained.cancelled() => {}
            () = end.cancelled() => {}
        }
    });
}

async fn joined(client: OnUpgrade, server: Server) {
    let Server {
        connection,
        driver,
        in_flight: _in_flight,
    } = server;
    let copying = pin!(async {
        let (client, server) = futures::try_join!(client, connection)?;
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        let copied = copy_bidirectional(&mut client, &mut server).await;
        tracing::debug!(?copied, "an upgraded connection ended");
        Ok::<(), hyper::Error>(())
    });
    let result = match driver {
        Some(mut driver) => tokio::select! {
            // It must not go on.
            () = &mut driver => return,
            result = copying => {
                driver.await;
                result
            }
        },
        None => copying.await,
    };
    if let Err(error) = result {
        tracing::debug!(%error, "an upgrade failed");
    }
}
