//! Flows that arrive outside of tunnels: of clients that are not meshed, or do not prove who they are.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::{Arrival, admit, serve_http};
use crate::node::LocalPod;
use crate::proxy::ends::unless;
use crate::proxy::error::FlowError;
use crate::proxy::http::first::Client;
use crate::proxy::http::refusal::{self, Refused};
use crate::proxy::record::{PathLabel, Record};
use crate::proxy::tcp::{Broken, FlowSocket, Moved, Side, join_sockets};
use crate::proxy::{Context, excess, http, socket, tap};
use crate::telemetry::{Direction, TlsLabel};

/// Serves a connection that arrives outside of tunnels.
pub(super) async fn flow(
    context: Arc<Context>,
    pod: Arc<LocalPod>,
    stream: TcpStream,
    from: SocketAddr,
) {
    let mut record = Record::new(Direction::Inbound, &pod.id);
    record.path = PathLabel::Plaintext;
    record.destination = Some(pod.id.clone());
    record.destination_identity = Some(pod.identity.clone());
    let result = Box::pin(serve(&context, &pod, (stream, from), &mut record)).await;
    record.finish(&context.telemetry, &context.store, &result);
}

async fn serve(
    context: &Arc<Context>,
    pod: &Arc<LocalPod>,
    (stream, from): (TcpStream, SocketAddr),
    record: &mut Record,
) -> Result<(), FlowError> {
    socket::bound_buffers(pod, &stream);
    let client = FlowSocket::accepted(stream);
    let to = socket::local_address(client.socket())?;
    record.client = Some(from);
    record.original = Some(to);
    record.endpoint = Some(to);
    // A meshed workload would have proven who it is: its address alone says nothing.
    let unmeshed = context.store.workload_at(from.ip());
    let unmeshed = unmeshed.filter(|it| it.identity().is_none());
    record.source = unmeshed.map(|it| it.id.clone());
    if socket::is_redirected(context, client.socket())? {
        return Err(FlowError::Loop);
    }
    let arrival = Arrival {
        client: from,
        identity: None,
        to,
        tls: TlsLabel::None,
        opaque_by: None,
    };
    // Boxed: nothing of it is needed while bytes are copied.
    let admitting = Box::pin(admit(context, pod, arrival));
    let admitted = tokio::select! {
        admitted = admitting => admitted,
        () = client.failed() => return Err(Broken::Reset(Side::Client).into()),
    };
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(error) => {
            let declared = context.store.inbound_protocol(&pod.id, to.port());
            if error.is_told() && http::may_be(declared) {
                let client = Refused::Socket(client);
                let refusal = refusal::Refusal {
                    error: &error,
                    port: to.port(),
                    identity: None,
                    tls: TlsLabel::None,
                };
                Box::pin(refusal::tell(context, pod, client, refusal)).await;
            } else if matches!(error, FlowError::TooManyFlows) {
                excess::tell(context, pod, client, Direction::Inbound).await;
            }
            return Err(error);
        }
    };
    let declared = admitted.declared;
    let (mut server, meter, verdict, admission) = admitted.part();
    record.verdict = Some(verdict);
    record.moved = Moved::metered(vec![meter], admission.usage());
    if http::may_be(declared) {
        let begun = {
            let look = context.look(declared, &admission);
            let ends = (Client::Socket(&client), &mut server);
            let noted = (&record.moved, &mut record.server_name);
            let mut looking = Box::pin(admission.look(context, look, ends, noted));
            unless(pin!(admission.ended()), looking.as_mut()).await??
        };
        if let Some((version, first)) = begun {
            let flow = http::inbound::Admitted {
                context: Arc::clone(context),
                pod: Arc::clone(pod),
                client: from,
                identity: None,
                to,
                tls: TlsLabel::None,
                verdict: record.verdict.clone(),
                declared,
            };
            let stream = http::Stream::socket(client).begun(first);
            return Box::pin(serve_http(
                flow,
                (stream, version),
                server,
                &admission,
                record,
            ))
            .await;
        }
    }
    admission.may_be_bytes(context)?;
    tap::opened(context, pod, Direction::Inbound, record);
    let copying = pin!(join_sockets(client, server, &record.moved));
    admission.watch(copying).await
}
