//! Requests one after the other on a connection: by HTTP/1, by HTTP/2 with prior knowledge, or calls of gRPC.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request};
use tokio::runtime::Runtime;

use super::http::read_response;
use crate::load::UNARY;

/// What is spoken.
#[derive(Clone, Copy)]
pub(super) enum Spoken {
    Http1,
    Http2,
    Grpc,
}

/// A connection.
pub(super) enum Exchanges {
    Http1(TcpStream, String),
    /// Driven only while an answer is waited for, by the thread that waits.
    Http2(Runtime, Http2),
}

/// The requests of a connection of HTTP/2.
pub(super) struct Http2 {
    sender: Option<SendRequest<Bytes>>,
    target: SocketAddr,
    grpc: bool,
}

impl Exchanges {
    /// Connects.
    pub(super) fn connect(target: SocketAddr, spoken: Spoken) -> Result<Exchanges> {
        let stream = TcpStream::connect(target)?;
        stream.set_nodelay(true)?;
        if let Spoken::Http1 = spoken {
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            let request = format!("GET / HTTP/1.1\r\nHost: {target}\r\n\r\n");
            return Ok(Exchanges::Http1(stream, request));
        }
        stream.set_nonblocking(true)?;
        let runtime = super::runtime()?;
        let sender = runtime.block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let (sender, connection) = h2::client::handshake(stream).await?;
            tokio::spawn(connection);
            anyhow::Ok(sender)
        })?;
        let http2 = Http2::new(sender, target, matches!(spoken, Spoken::Grpc));
        Ok(Exchanges::Http2(runtime, http2))
    }

    /// Sends a request and waits for the end of its answer.
    pub(super) fn exchange(&mut self) -> Result<()> {
        match self {
            Exchanges::Http1(stream, request) => {
                stream.write_all(request.as_bytes())?;
                read_response(stream)?;
                Ok(())
            }
            Exchanges::Http2(runtime, http2) => runtime.block_on(http2.exchange()),
        }
    }
}

impl Http2 {
    /// Of a connection that is driven by somebody else.
    pub(super) fn new(sender: SendRequest<Bytes>, target: SocketAddr, grpc: bool) -> Http2 {
        Http2 {
            sender: Some(sender),
            target,
            grpc,
        }
    }

    /// Sends a request and waits for the end of its answer.
    pub(super) async fn exchange(&mut self) -> Result<()> {
        let sender = self.sender.take().context("the connection has failed")?;
        let mut sender = sender.ready().await?;
        let path = if self.grpc { UNARY } else { "/" };
        let mut request = Request::new(());
        *request.uri_mut() = format!("http://{}{path}", self.target).parse()?;
        if self.grpc {
            *request.method_mut() = Method::POST;
            let headers = request.headers_mut();
            headers.insert("content-type", "application/grpc".parse()?);
            headers.insert("te", "trailers".parse()?);
        }
        let (response, mut body) = sender.send_request(request, !self.grpc)?;
        if self.grpc {
            body.send_data(Bytes::from_static(&[0; 5]), true)?;
        }
        let response = response.await?;
        ensure!(
            response.status() == 200,
            "the answer is {}",
            response.status()
        );
        let mut body = response.into_body();
        while let Some(data) = body.data().await {
            let _ = body.flow_control().release_capacity(data?.len());
        }
        let trailers = body.trailers().await?;
        if self.grpc {
            let status = trailers.and_then(|it| it.get("grpc-status").cloned());
            ensure!(status.is_some_and(|it| it == "0"), "the call failed");
        }
        self.sender = Some(sender);
        Ok(())
    }
}
