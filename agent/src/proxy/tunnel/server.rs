//! The tunnels that arrive at a pod: HTTP/2 on a TLS connection whose peer has been authenticated.
//! What a request means is the caller's concern.

use std::time::Duration;

use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::chunk::Chunk;
use super::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES, HEADER_BYTES, REMEMBERED_RESETS, SEND_BUFFER_BYTES,
    START_TIMEOUT, STRAY_FRAMES, STREAM_WINDOW_BYTES, STREAMS, UNSEEN_RESETS, Watch, keepalive,
    next_change,
};
use crate::proxy::error::TunnelError;

/// When a tunnel has to end, apart from its [`Watch`].
pub struct Ends<'a> {
    /// Take no new streams, let those that are open finish.
    pub stopping: &'a CancellationToken,
    /// End now.
    pub deadline: &'a CancellationToken,
}

/// Serves one connection until it ends; every request is handed to `on_request`, which must not
/// block. When this returns, streams that are still open are reset.
///
/// # Errors
/// HTTP/2 did not start, or failed.
pub async fn serve<I>(
    io: I,
    mut watch: Watch,
    ends: Ends<'_>,
    mut on_request: impl FnMut(Request<RecvStream>, SendResponse<Chunk>),
) -> Result<(), TunnelError>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let start = tokio::time::timeout(START_TIMEOUT, builder().handshake::<I, Chunk>(io)).await;
    let mut connection = start.map_err(|_| TunnelError::HandshakeTimeout)??;
    let mut alive = Box::pin(keepalive(connection.ping_pong()));
    let mut leaving = false;
    let mut last_used = Instant::now();
    let mut idle_check = tokio::time::interval(IDLE_CHECK);
    loop {
        tokio::select! {
            request = connection.accept() => match request {
                Some(Ok((_, mut respond))) if watch.is_long_expired() => {
                    respond.send_reset(Reason::REFUSED_STREAM);
                    leaving = true;
                    connection.graceful_shutdown();
                }
                Some(Ok((request, respond))) => {
                    last_used = Instant::now();
                    on_request(request, respond);
                }
                Some(Err(error)) => return Err(error.into()),
                None => return Ok(()),
            },
            () = ends.stopping.cancelled(), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
            }
            _ = idle_check.tick() => {
                if connection.has_streams() {
                    last_used = Instant::now();
                } else if !leaving && last_used.elapsed() > IDLE {
                    leaving = true;
                    connection.graceful_shutdown();
                }
            }
            () = next_change(&mut watch.changed) => {
                if !(watch.trusted)() {
                    tracing::info!("a tunnel's peer is no longer vouched for");
                    return Ok(());
                }
            }
            () = &mut alive => return Err(TunnelError::Closed),
            () = watch.pod_gone.cancelled() => return Ok(()),
            () = ends.deadline.cancelled() => return Ok(()),
        }
    }
}

fn builder() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_header_list_size(HEADER_BYTES)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .max_local_error_reset_streams(Some(STRAY_FRAMES))
        .max_pending_accept_reset_streams(UNSEEN_RESETS)
        .max_concurrent_streams(STREAMS);
    builder
}

/// The client owns idle closing; this is for peers that do not.
const IDLE: Duration = Duration::from_secs(600);
const IDLE_CHECK: Duration = Duration::from_secs(30);
