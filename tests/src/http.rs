//! The few lines of HTTP that admin endpoints need: one request per connection.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::netns::Netns;

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Reply {
    /// The body of a 200.
    pub fn ok(self) -> Result<String> {
        ensure!(self.status == 200, "status {}: {}", self.status, self.body);
        Ok(self.body)
    }
}

/// `GET path` from a server in a namespace.
pub fn get(netns: &Netns, server: SocketAddr, path: &str) -> Result<Reply> {
    request(netns, server, ["GET", path], "")
}

/// `GET path` from a server in the namespace of the calling thread.
pub fn get_here(server: SocketAddr, path: &str) -> Result<Reply> {
    request_here(server, ["GET", path], "")
}

/// `POST path` to a server in a namespace.
pub fn post(netns: &Netns, server: SocketAddr, path: &str, body: &str) -> Result<Reply> {
    request(netns, server, ["POST", path], body)
}

fn request(netns: &Netns, server: SocketAddr, asked: [&str; 2], body: &str) -> Result<Reply> {
    netns.run(|| request_here(server, asked, body))?
}

fn request_here(server: SocketAddr, [method, path]: [&str; 2], body: &str) -> Result<Reply> {
    let mut stream = TcpStream::connect_timeout(&server, TIMEOUT)
        .with_context(|| format!("connecting to {server}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    exchange(&mut stream, method, path, body)
}

/// `GET path` from a server on a Unix socket.
pub fn get_unix(socket: &Path, path: &str) -> Result<Reply> {
    request_unix(socket, "GET", path, "")
}

/// Any request to a server on a Unix socket.
pub fn request_unix(socket: &Path, method: &str, path: &str, body: &str) -> Result<Reply> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("connecting to {}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    exchange(&mut stream, method, path, body)
}

fn exchange(
    stream: &mut (impl Read + Write),
    method: &str,
    path: &str,
    body: &str,
) -> Result<Reply> {
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let mut bytes = Vec::new();
    stream
        .read_to_end(&mut bytes)
        .context("reading the reply")?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<Reply> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.context("the reply has no end of headers")?;
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let status = head
        .split_whitespace()
        .nth(1)
        .context("the reply has no status")?
        .parse()?;
    let body = &bytes[end + 4..];
    let chunked = head.contains("transfer-encoding: chunked");
    let body = if chunked {
        unchunk(body)?
    } else {
        body.to_vec()
    };
    Ok(Reply {
        status,
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

fn unchunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest
            .windows(2)
            .position(|window| window == b"\r\n")
            .context("a cut chunk")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line])?.trim(), 16)?;
        if size == 0 {
            return Ok(body);
        }
        let start = line + 2;
        body.extend(rest.get(start..start + size).context("a cut chunk")?);
        rest = rest.get(start + size + 2..).context("a cut chunk")?;
    }
}

const TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies() {
        let reply =
            parse(b"HTTP/1.1 503 x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
        let reply = reply.expect("parses");
        assert_eq!((reply.status, reply.body.as_str()), (503, "abc"));
    }
}
