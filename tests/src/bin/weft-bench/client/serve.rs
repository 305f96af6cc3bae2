//! An echo server that costs next to nothing per connection.

use std::net::SocketAddr;

use anyhow::Result;
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::{raise_descriptor_limit, runtime};

/// Sends back what comes, until killed.
#[derive(Args)]
pub(crate) struct Serve {
    #[arg(long)]
    listen: SocketAddr,
    /// How much of a connection is echoed at once; as much memory is kept for each.
    #[arg(long, default_value_t = 64)]
    block_bytes: usize,
}

impl Serve {
    pub(crate) fn run(self) -> Result<()> {
        raise_descriptor_limit()?;
        runtime()?.block_on(async {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(self.listen)?;
            let listener = socket.listen(4096)?;
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(echo(stream, self.block_bytes));
            }
        })
    }
}

async fn echo(mut stream: TcpStream, block_bytes: usize) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; block_bytes];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            count => stream.write_all(&buffer[..count]).await?,
        }
    }
}
