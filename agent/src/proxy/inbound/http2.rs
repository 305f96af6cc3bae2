//! Flows that arrive as streams of HTTP/2: `weft-h2/1` and HBONE.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;

use ::http::StatusCode;
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;

use super::peer::{Peer, tunnel_arrival, tunnel_record};
use super::{Admitted, admit, serve_http};
use crate::node::LocalPod;
use crate::proxy::ends::unless;
use crate::proxy::error::FlowError;
use crate::proxy::http::first::Client;
use crate::proxy::http::refusal::{self, Refused};
use crate::proxy::record::Record;
use crate::proxy::tcp::{Broken, Moved, Side, TunnelHalves, join_tunnel};
use crate::proxy::tunnel::chunk::Chunk;
use crate::proxy::tunnel::wire;
use crate::proxy::{Context, http, tap};
use crate::telemetry::{Direction, TlsLabel};

/// Serves one stream of a tunnel.
pub(super) async fn tunnel_flow(
    context: Arc<Context>,
    pod: Arc<LocalPod>,
    peer: Arc<Peer>,
    (head, receive): (Box<::http::request::Parts>, RecvStream),
    mut respond: SendResponse<Chunk>,
) {
    let mut record = tunnel_record(&context, &pod, &peer);
    let opening = open_tunnel_flow(&context, &pod, &peer, head, &mut respond, &mut record);
    let result = match Box::pin(opening).await {
        Ok(admitted) => {
            let parts = (&context, &pod, &*peer);
            Box::pin(carry_tunnel_flow(
                parts,
                admitted,
                receive,
                respond,
                &mut record,
            ))
            .await
        }
        // Who has no headers of ours to be told by has an application that speaks HTTP.
        Err(error) if !peer.ours && is_told_by_http(&context, &pod, &error, &record) => {
            let accepted = wire::write_response(StatusCode::OK, None);
            if let Ok(send) = respond.send_response(accepted, false) {
                let client = Refused::Tunnel(TunnelHalves {
                    send,
                    receive,
                    first: Bytes::new(),
                });
                let refusal = refusal::Refusal {
                    error: &error,
                    port: record.original.map_or(0, |it| it.port()),
                    identity: Some(&peer.identity),
                    tls: TlsLabel::Mutual,
                };
                Box::pin(refusal::tell(&context, &pod, client, refusal)).await;
            }
            Err(error)
        }
        Err(error) => {
            let reason = error.refusal().filter(|_| peer.ours).map(|it| it.as_str());
            let response = wire::write_response(error.status(), reason);
            // The peer may be gone, which is no news then.
            let _ = respond.send_response(response, true);
            Err(error)
        }
    };
    record.finish(&context.telemetry, &context.store, &result);
}

/// Whether policy refused it at a port that is declared to be HTTP's, so that there is an answer in HTTP to wait
/// for. Of an endpoint that cannot be reached the peer itself has to know: it may try another one.
fn is_told_by_http(context: &Context, pod: &LocalPod, error: &FlowError, record: &Record) -> bool {
    let declared = record.original;
    let declared = declared.map(|to| context.store.inbound_protocol(&pod.id, to.port()));
    declared.is_some_and(http::takes_nothing_else) && matches!(error, FlowError::Denied(_))
}

async fn open_tunnel_flow(
    context: &Context,
    pod: &Arc<LocalPod>,
    peer: &Peer,
    head: Box<::http::request::Parts>,
    respond: &mut SendResponse<Chunk>,
    record: &mut Record,
) -> Result<Admitted, FlowError> {
    let asked = wire::read_request(&head, peer.connected, peer.ours)?;
    drop(head);
    let asked = (asked.port, asked.source_port, asked.opaque_by);
    let arrival = tunnel_arrival(peer, asked, record);
    tokio::select! {
        admitted = admit(context, pod, arrival) => admitted,
        _ = poll_fn(|context| respond.poll_reset(context)) => Err(Broken::Reset(Side::Client).into()),
    }
}

async fn carry_tunnel_flow(
    (context, pod, peer): (&Arc<Context>, &Arc<LocalPod>, &Peer),
    admitted: Admitted,
    receive: RecvStream,
    mut respond: SendResponse<Chunk>,
    record: &mut Record,
) -> Result<(), FlowError> {
    let declared = admitted.declared;
    let (mut server, meter, verdict, admission) = admitted.part();
    record.verdict = Some(verdict);
    record.moved = Moved::metered(vec![meter], admission.usage());
    let send = respond
        .send_response(wire::write_response(StatusCode::OK, None), false)
        .map_err(Broken::Tunnel)?;
    let mut halves = TunnelHalves {
        send,
        receive,
        first: Bytes::new(),
    };
    if let (Some(to), Some(client)) = (record.original, record.client)
        && http::may_be(declared)
    {
        let begun = {
            let look = context.look(declared, &admission);
            let ends = (Client::Tunnel(&mut halves), &mut server);
            let noted = (&record.moved, &mut record.server_name);
            let mut looking = Box::pin(admission.look(context, look, ends, noted));
            unless(pin!(admission.ended()), looking.as_mut()).await??
        };
        if let Some((version, first)) = begun {
            let flow = http::inbound::Admitted {
                context: Arc::clone(context),
                pod: Arc::clone(pod),
                client,
                identity: Some(peer.identity.clone()),
                to,
                tls: TlsLabel::Mutual,
                verdict: record.verdict.clone(),
                declared,
            };
            let stream = (http::Stream::tunnel(halves).begun(first), version);
            return Box::pin(serve_http(flow, stream, server, &admission, record)).await;
        }
    }
    admission.may_be_bytes(context)?;
    tap::opened(context, pod, Direction::Inbound, record);
    let copying = pin!(join_tunnel(server, Side::Server, halves, &record.moved));
    admission.watch(copying).await
}
