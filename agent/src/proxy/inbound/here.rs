//! Flows from a pod of this node, which its half carries as bytes. Where they arrive they are looked at as if
//! they came from another node: what the client's side is told to leave alone is not for the client to say.

use std::pin::pin;
use std::sync::Arc;

use super::{Admitted, serve_http};
use crate::node::LocalPod;
use crate::proxy::ends::unless;
use crate::proxy::error::FlowError;
use crate::proxy::http::first::{Client, Look};
use crate::proxy::let_out::{self, Leads};
use crate::proxy::record::Record;
use crate::proxy::tcp::{FlowSocket, join_sockets};
use crate::proxy::{Context, http, tap};
use crate::telemetry::{Direction, TlsLabel};

/// Carries a flow of `source` until both sides closed. `is_counted` says whether its half has counted what is
/// spoken.
pub(in crate::proxy) async fn carry(
    context: &Arc<Context>,
    source: &LocalPod,
    client: FlowSocket,
    (admitted, is_counted): (Admitted, bool),
    record: &mut Record,
) -> Result<(), FlowError> {
    let (pod, declared) = (Arc::clone(admitted.pod()), admitted.declared);
    let (mut server, meter, verdict, admission) = admitted.part();
    record.verdict = Some(verdict);
    record.moved.meter_too(meter);
    let server_id = pod.id.clone();
    let leads = Leads {
        to: record.endpoint,
        server: Some(&server_id),
    };
    let mut end = pin!(async {
        tokio::select! {
            biased;
            error = let_out::ended(&context.store, source, leads) => error,
            error = admission.ended() => error,
        }
    });
    if let (Some(to), Some(from)) = (record.endpoint, record.client)
        && http::may_be(declared)
    {
        let look = Look {
            telemetry: (!is_counted).then_some(&*context.telemetry),
            ..context.look(declared, &admission)
        };
        let begun = {
            let ends = (Client::Socket(&client), &mut server);
            // Boxed: nothing of it is needed while bytes are copied.
            let noted = (&record.moved, &mut record.server_name);
            let mut looking = Box::pin(admission.look(context, look, ends, noted));
            unless(end.as_mut(), looking.as_mut()).await??
        };
        if let Some((version, first)) = begun {
            let flow = http::inbound::Admitted {
                context: Arc::clone(context),
                pod,
                client: from,
                identity: Some(source.identity.clone()),
                to,
                tls: TlsLabel::SameNode,
                verdict: record.verdict.clone(),
                declared,
            };
            let stream = (http::Stream::socket(client).begun(first), version);
            let mut serving = Box::pin(serve_http(flow, stream, server, &admission, record));
            return unless(end, serving.as_mut()).await?;
        }
    }
    admission.may_be_bytes(context)?;
    tap::opened(context, &pod, Direction::Inbound, record);
    let copying = pin!(join_sockets(client, server, &record.moved));
    Ok(unless(end, copying).await??)
}
