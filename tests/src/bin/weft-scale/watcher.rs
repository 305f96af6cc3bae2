//! One more watch of the API server, to see how late that itself is: what it takes to tell a change to somebody who does
//! nothing with it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::agents::Common;

/// How late each change was told.
pub(crate) type Delays = Arc<Mutex<Vec<Duration>>>;

/// Watches EndpointSlices, of which every change writes one, after a revision; for ever.
pub(crate) async fn run(
    server: SocketAddr,
    revision: u64,
    common: Arc<Common>,
    delays: Delays,
) -> Result<()> {
    let mut stream = TcpStream::connect(server).await?;
    let path = "/apis/discovery.k8s.io/v1/endpointslices";
    let request = format!(
        "GET {path}?watch=true&resourceVersion={revision} HTTP/1.1\r\nhost: {server}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut stream = BufReader::with_capacity(256 * 1024, stream);
    let mut line = vec![];
    loop {
        line.clear();
        if stream.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        // The others are those of the chunks that they come in.
        if line.starts_with(b"{\"type\":") {
            let mut delays = delays.lock().unwrap_or_else(PoisonError::into_inner);
            let delay = common.board.since(delays.len());
            delays.push(delay.context("a change that nobody made")?);
        }
    }
}
