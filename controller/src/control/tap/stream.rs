//! The stream of an agent that samples: tells it what, and passes on what it tells.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use weft_proto::v1::{self, tap_command::Command, tap_message::Message};

use super::Taps;
use crate::control::Caller;
use crate::control::authentication::Authentication;
use crate::telemetry::{Metrics, Refused};

/// What a stream works with.
#[derive(Clone, Debug)]
pub(in crate::control) struct Context {
    pub(in crate::control) taps: Arc<Taps>,
    pub(in crate::control) authentication: Arc<Authentication>,
    pub(in crate::control) metrics: Arc<Metrics>,
    pub(in crate::control) stop: CancellationToken,
}

type Outbound = mpsc::Sender<Result<v1::TapCommand, Status>>;

/// How long an agent may take to say who it is, or to hear something.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves the stream until it ends, and tells the agent why.
pub(in crate::control) async fn serve(
    context: Context,
    caller: Caller,
    inbound: Streaming<v1::TapMessage>,
    outbound: Outbound,
) {
    if let Err(ended) = run(&context, &caller, inbound, &outbound).await {
        let (node, reason) = (caller.node, ended.message());
        tracing::debug!(%node, reason, code = ?ended.code(), "ending the agent's stream of taps");
        // Nobody to tell if this fails.
        let _ = timeout(PATIENCE, outbound.send(Err(ended))).await;
    }
}

async fn run(
    context: &Context,
    caller: &Caller,
    mut inbound: Streaming<v1::TapMessage>,
    outbound: &Outbound,
) -> Result<(), Status> {
    let Caller { node, token, from } = caller;
    let lapsed = context.authentication.lapsed(token, node, *from);
    let mut lapsed = std::pin::pin!(lapsed);
    let first = timeout(PATIENCE, inbound.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("nobody said who samples"))??;
    let Some(Message::Inspectable(agent)) = first.and_then(|it| it.message) else {
        return Err(Status::invalid_argument(
            "it does not begin with who samples",
        ));
    };
    if agent.node != node.as_str() {
        context.metrics.refused(Refused::OtherNode);
        return Err(Status::permission_denied("the token is another node's"));
    }
    let mut changes = context.taps.changed.subscribe();
    let _place = context.taps.enter(node);
    let mut told = BTreeSet::new();
    loop {
        let wanted = context.taps.of(node);
        let ended: Vec<u64> = told.iter().copied().collect();
        for tap in ended.into_iter().filter(|it| !wanted.contains_key(it)) {
            told.remove(&tap);
            tell(outbound, Command::Stop(tap)).await?;
        }
        for (tap, start) in wanted {
            if told.insert(tap) {
                tell(outbound, Command::Start(start)).await?;
            }
        }
        tokio::select! {
            biased;
            () = context.stop.cancelled() => {
                return Err(Status::unavailable("the controller ends"));
            }
            status = &mut lapsed => return Err(status),
            // The sender lives as long as the taps do.
            _ = changes.changed() => {}
            message = inbound.message() => match message?.map(|it| it.message) {
                None => return Ok(()),
                Some(Some(Message::Batch(batch))) if told.contains(&batch.tap) => {
                    context.taps.pass(node, batch);
                }
                Some(Some(Message::Ended(ended))) if told.contains(&ended.tap) => {
                    context.taps.refuse(node, &ended);
                }
                // Of a tap that has ended meanwhile.
                Some(Some(Message::Batch(_) | Message::Ended(_)) | None) => {}
                Some(Some(Message::Inspectable(_))) => {
                    return Err(Status::invalid_argument("who samples is known"));
                }
            },
        }
    }
}

async fn tell(outbound: &Outbound, command: Command) -> Result<(), Status> {
    let command = v1::TapCommand {
        command: Some(command),
    };
    let told = timeout(PATIENCE, outbound.send(Ok(command))).await;
    let told = told.map_err(|_| Status::deadline_exceeded("the agent does not listen"))?;
    told.map_err(|_| Status::cancelled("the agent is gone"))
}
