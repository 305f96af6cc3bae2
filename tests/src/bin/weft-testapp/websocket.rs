//! `websocket`: a server that echoes messages, and a client that counts the echoes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use futures::{SinkExt, StreamExt};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{accept_async, client_async};

use crate::emit;

/// WebSocket (RFC 6455).
#[derive(Subcommand)]
pub(crate) enum WebSocket {
    /// Sends back each message.
    Serve(Serve),
    /// Sends messages and expects each back.
    Echo(Echo),
}

/// Accepts connections until killed.
#[derive(Args)]
pub(crate) struct Serve {
    #[arg(long)]
    listen: SocketAddr,
}

/// One connection with messages of growing length, one after the other.
#[derive(Args)]
pub(crate) struct Echo {
    target: SocketAddr,
    #[arg(long, default_value = "/chat")]
    path: String,
    #[arg(long, default_value_t = 10)]
    messages: usize,
    /// How much longer each message is than the one before it.
    #[arg(long, default_value_t = 1000)]
    step: usize,
    #[arg(long, default_value_t = 10_000)]
    timeout_ms: u64,
}

impl WebSocket {
    pub(crate) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        match self {
            WebSocket::Serve(serve) => runtime.block_on(serve.serve()),
            WebSocket::Echo(echo) => {
                let start = Instant::now();
                let timeout = Duration::from_millis(echo.timeout_ms);
                let ended = runtime.block_on(async {
                    let echoes = tokio::time::timeout(timeout, echo.echo());
                    echoes.await.context("timed out").flatten()
                });
                let elapsed = start.elapsed().as_secs_f64() * 1e3;
                match ended {
                    Ok(echoed) => {
                        emit(&json!({"outcome": "ok", "echoed": echoed, "elapsed_ms": elapsed}))
                    }
                    Err(error) => emit(&json!({"outcome": "error", "error": format!("{error:#}")})),
                }
                Ok(())
            }
        }
    }
}

impl Serve {
    async fn serve(self) -> Result<()> {
        let listener = TcpListener::bind(self.listen).await?;
        loop {
            let (stream, peer) = listener.accept().await?;
            tokio::spawn(async move {
                let ended = echo_all(stream).await;
                let error = ended.err().map(|error| format!("{error:#}"));
                emit(&json!({"event": "closed", "peer": peer.to_string(), "error": error}));
            });
        }
    }
}

async fn echo_all(stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut socket = accept_async(stream).await?;
    while let Some(message) = socket.next().await {
        let message = message?;
        if message.is_text() || message.is_binary() {
            socket.send(message).await?;
        }
    }
    Ok(())
}

impl Echo {
    async fn echo(&self) -> Result<usize> {
        let stream = TcpStream::connect(self.target)
            .await
            .context("connecting")?;
        stream.set_nodelay(true)?;
        let request = format!("ws://{}{}", self.target, self.path).into_client_request()?;
        let (mut socket, _) = client_async(request, stream).await.context("upgrading")?;
        for number in 0..self.messages {
            let text = format!("{number} ").repeat(1 + number * self.step / 2);
            let message = match number % 2 {
                0 => Message::text(text),
                _ => Message::binary(text.into_bytes()),
            };
            socket.send(message.clone()).await?;
            let echo = socket.next().await.context("the server ended")??;
            ensure!(echo == message, "message {number} came back as another");
        }
        socket.close(None).await?;
        while let Some(message) = socket.next().await {
            ensure!(message?.is_close(), "a message after the end");
        }
        Ok(self.messages)
    }
}
