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
                tokio::spawn(echo(stream));
            }
        })
    }
}

async fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 64];
    loop {
        match stream.read(&mut buffer).await? {
            0 => return Ok(()),
            count => stream.write_all(&buffer[..count]).await?,
        }
    }
}
