//! `connect`: one connection, all its details.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::emit;
use crate::pattern::Pattern;

/// Opens one connection, sends, receives until the end, and prints how it went.
#[derive(Args)]
pub(crate) struct Connect {
    target: SocketAddr,
    #[command(flatten)]
    options: SocketOptions,
    /// Sends this text.
    #[arg(long)]
    send: Option<String>,
    /// Sends so many bytes of the pattern.
    #[arg(long, default_value_t = 0)]
    send_bytes: u64,
    /// Ends the sending side after sending.
    #[arg(long)]
    half_close: bool,
    /// Stops receiving after so many bytes; else at the end of the stream.
    #[arg(long)]
    receive_bytes: Option<u64>,
    /// What is received must be the pattern.
    #[arg(long)]
    expect_pattern: bool,
    /// Waits so long before reading anything.
    #[arg(long, default_value_t = 0)]
    read_delay_ms: u64,
    /// Sends the text in two parts with a pause between.
    #[arg(long)]
    split: bool,
    /// Receives to the end before sending.
    #[arg(long)]
    receive_first: bool,
    /// Ends with a reset.
    #[arg(long)]
    reset: bool,
}

/// How the socket is made.
#[derive(Args, Clone)]
pub(crate) struct SocketOptions {
    /// Binds to this address.
    #[arg(long)]
    pub(crate) bind: Option<IpAddr>,
    /// Binds to this port.
    #[arg(long)]
    source_port: Option<u16>,
    /// Binds to this device.
    #[arg(long)]
    device: Option<String>,
    /// Connects without blocking, and waits until the socket is writable.
    #[arg(long)]
    nonblocking: bool,
    /// Makes an MPTCP socket.
    #[arg(long)]
    mptcp: bool,
    /// Binds to an address that is not the pod's (`IP_TRANSPARENT`, which takes `NET_ADMIN`).
    #[arg(long)]
    transparent: bool,
    /// The longest wait of each step.
    #[arg(long, default_value_t = 10_000)]
    timeout_ms: u64,
}

impl Connect {
    pub(crate) fn run(self) -> Result<()> {
        let start = Instant::now();
        let mut report = match open(self.target, &self.options) {
            Ok(opened) => {
                let connected_ms = start.elapsed().as_secs_f64() * 1e3;
                let mut report = self.exchange(opened);
                report["connected_ms"] = connected_ms.into();
                report
            }
            Err(failure) => failure.report(),
        };
        report["elapsed_ms"] = (start.elapsed().as_secs_f64() * 1e3).into();
        emit(&report);
        Ok(())
    }

    fn exchange(&self, stream: TcpStream) -> Value {
        let (local, peer) = (text(stream.local_addr()), text(stream.peer_addr()));
        let (sent, received) = if self.receive_first {
            let received = self.receive(&stream);
            (self.send_all(&stream), received)
        } else {
            std::thread::scope(|scope| {
                let sender = scope.spawn(|| self.send_all(&stream));
                let received = self.receive(&stream);
                let sent = sender
                    .join()
                    .unwrap_or_else(|_| Err(ErrorKind::Other.into()));
                (sent, received)
            })
        };
        if self.reset {
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        }
        let outcome = match (&received.error, &sent) {
            (Some(error), _) => outcome(error),
            (None, Err(error)) => outcome(error),
            (None, Ok(())) => "ok",
        };
        json!({
            "outcome": outcome,
            "stage": if received.error.is_some() { "receive" } else { "send" },
            "local": local,
            "peer": peer,
            "received": received.count,
            "eof": received.eof,
            "intact": received.intact,
            "text": String::from_utf8_lossy(&received.start),
            "send_error": sent.err().map(|error| outcome_text(&error)),
        })
    }

    fn send_all(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        if let Some(message) = &self.send {
            let middle = if self.split { message.len() / 2 } else { 0 };
            stream.write_all(&message.as_bytes()[..middle])?;
            if self.split {
                // Not a wait for anything: two segments are what is asked for.
                std::thread::sleep(Duration::from_millis(50));
            }
            stream.write_all(&message.as_bytes()[middle..])?;
        }
        if self.send_bytes > 0 {
            send_pattern(stream, self.send_bytes)?;
        }
        if self.half_close {
            stream.shutdown(std::net::Shutdown::Write)?;
        }
        Ok(())
    }

    fn receive(&self, mut stream: &TcpStream) -> Received {
        std::thread::sleep(Duration::from_millis(self.read_delay_ms));
        let pattern = self.expect_pattern.then(Pattern::new);
        let mut received = Received::default();
        let mut buffer = vec![0; 64 * 1024];
        while self
            .receive_bytes
            .is_none_or(|wanted| received.count < wanted)
        {
            match stream.read(&mut buffer) {
                Ok(0) => {
                    received.eof = true;
                    break;
                }
                Ok(count) => received.add(&buffer[..count], pattern.as_ref()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    received.error = Some(error);
                    break;
                }
            }
        }
        received
    }
}

/// What came.
struct Received {
    count: u64,
    start: Vec<u8>,
    intact: bool,
    eof: bool,
    error: Option<std::io::Error>,
}

impl Default for Received {
    fn default() -> Self {
        Received {
            count: 0,
            start: Vec::new(),
            intact: true,
            eof: false,
            error: None,
        }
    }
}

impl Received {
    fn add(&mut self, bytes: &[u8], pattern: Option<&Pattern>) {
        if let Some(pattern) = pattern {
            self.intact &= pattern.matches(self.count, bytes);
        }
        let room = 4096_usize.saturating_sub(self.start.len());
        self.start.extend(&bytes[..room.min(bytes.len())]);
        self.count += bytes.len() as u64;
    }
}

/// Sends the pattern.
pub(crate) fn send_pattern(mut stream: &TcpStream, length: u64) -> std::io::Result<()> {
    let pattern = Pattern::new();
    let mut sent = 0;
    while sent < length {
        let chunk = usize::try_from((length - sent).min(64 * 1024)).unwrap_or(64 * 1024);
        stream.write_all(pattern.at(sent, chunk))?;
        sent += chunk as u64;
    }
    Ok(())
}

/// A connection that did not come about.
pub(crate) struct Failure {
    stage: &'static str,
    pub(crate) error: std::io::Error,
    local: Option<SocketAddr>,
}

impl Failure {
    pub(crate) fn report(&self) -> Value {
        json!({"outcome": outcome(&self.error), "stage": self.stage, "error": outcome_text(&self.error),
            "local": self.local.map(|local| local.to_string())})
    }
}

/// Makes the socket and connects it.
pub(crate) fn open(target: SocketAddr, options: &SocketOptions) -> Result<TcpStream, Failure> {
    let fail = |stage| {
        move |error| Failure {
            stage,
            error,
            local: None,
        }
    };
    let protocol = if options.mptcp {
        Protocol::MPTCP
    } else {
        Protocol::TCP
    };
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(protocol))
        .map_err(fail("socket"))?;
    if let Some(device) = &options.device {
        socket
            .bind_device(Some(device.as_bytes()))
            .map_err(fail("device"))?;
    }
    if options.bind.is_some() || options.source_port.is_some() {
        let any: IpAddr = match target {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let source = SocketAddr::new(
            options.bind.unwrap_or(any),
            options.source_port.unwrap_or(0),
        );
        socket.set_reuse_address(true).map_err(fail("bind"))?;
        if options.transparent {
            any_source(&socket, target).map_err(fail("bind"))?;
        }
        socket.bind(&source.into()).map_err(fail("bind"))?;
    }
    let timeout = Duration::from_millis(options.timeout_ms);
    connect(&socket, target, options.nonblocking, timeout).map_err(|error| Failure {
        stage: "connect",
        error,
        local: socket.local_addr().ok().and_then(|local| local.as_socket()),
    })?;
    socket
        .set_read_timeout(Some(timeout))
        .map_err(fail("socket"))?;
    socket
        .set_write_timeout(Some(timeout))
        .map_err(fail("socket"))?;
    Ok(socket.into())
}

fn any_source(socket: &Socket, target: SocketAddr) -> std::io::Result<()> {
    if target.is_ipv4() {
        socket.set_ip_transparent_v4(true)
    } else {
        socket.set_ip_transparent_v6(true)
    }
}

fn connect(
    socket: &Socket,
    target: SocketAddr,
    nonblocking: bool,
    timeout: Duration,
) -> std::io::Result<()> {
    if !nonblocking {
        return socket.connect_timeout(&target.into(), timeout);
    }
    socket.set_nonblocking(true)?;
    match socket.connect(&target.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            wait_writable(socket.try_clone()?.into(), timeout)?;
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
        }
        Err(error) => return Err(error),
    }
    socket.set_nonblocking(false)
}

/// By epoll, as event-driven applications do.
fn wait_writable(stream: TcpStream, timeout: Duration) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::from_std(stream)?;
        match tokio::time::timeout(timeout, stream.writable()).await {
            Ok(writable) => writable,
            Err(_) => Err(ErrorKind::TimedOut.into()),
        }
    })
}

/// One word for how it went.
pub(crate) fn outcome(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => "refused",
        Some(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED) => "reset",
        Some(libc::ETIMEDOUT | libc::EAGAIN) => "timeout",
        Some(libc::EHOSTUNREACH | libc::ENETUNREACH) => "unreachable",
        Some(libc::EADDRINUSE) => "in_use",
        Some(libc::EADDRNOTAVAIL) => "not_available",
        Some(libc::EPERM | libc::EACCES) => "denied",
        _ if error.kind() == ErrorKind::TimedOut => "timeout",
        _ => "error",
    }
}

fn outcome_text(error: &std::io::Error) -> String {
    error.to_string()
}

fn text(address: std::io::Result<SocketAddr>) -> Option<String> {
    address.ok().map(|address| address.to_string())
}
