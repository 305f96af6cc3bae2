//! `serve`: accepts connections and treats all alike.

use std::io::{Error, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde_json::json;
use socket2::{Domain, SockRef, Socket, Type};

use crate::client::{outcome, send_pattern};
use crate::pattern::Pattern;
use crate::{emit, escaped};

/// Accepts connections until killed, with an event when one comes and one when it ends.
#[derive(Args)]
pub(crate) struct Serve {
    /// Where to listen; may be given more than once.
    #[arg(long, required = true)]
    listen: Vec<SocketAddr>,
    /// What to do with a connection.
    #[arg(long, value_enum, default_value_t = Mode::Echo)]
    mode: Mode,
    /// How many bytes `source` sends.
    #[arg(long, default_value_t = 0)]
    bytes: u64,
    /// What `greet` says.
    #[arg(long, default_value = "220 ready\r\n")]
    greeting: String,
    /// What `reply` says to each request, escaped. May be given more than once: each is a segment of its own.
    #[arg(long, value_name = "ESCAPED")]
    reply: Vec<String>,
    /// The pause between two of them.
    #[arg(long, default_value_t = 0)]
    reply_pause_ms: u64,
    /// How long `reply` waits for a client that says nothing before it greets it; 0: for ever.
    #[arg(long, default_value_t = 0)]
    greet_after_ms: u64,
    /// How long `sink` waits before it reads.
    #[arg(long, default_value_t = 0)]
    read_delay_ms: u64,
    /// An IPv6 socket takes IPv4 connections too.
    #[arg(long)]
    dual: bool,
    /// The length of the accept queue.
    #[arg(long, default_value_t = 1024)]
    backlog: i32,
    /// Says nothing about connections.
    #[arg(long)]
    quiet: bool,
    /// Shares the port with whoever has it and allows that (`SO_REUSEPORT`).
    #[arg(long)]
    reuse_port: bool,
    /// What its packets have as time to live: by that they can be told from others' on a wire.
    #[arg(long)]
    ttl: Option<u32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    /// Sends back what comes, and ends when the client ends.
    Echo,
    /// Takes all, checks it against the pattern, and answers how much it was.
    Sink,
    /// Sends the pattern and ends.
    Source,
    /// Speaks first, then echoes.
    Greet,
    /// Answers what ends with an empty line, again and again, and greets who says nothing: as servers do that
    /// share a port among several protocols.
    Reply,
    /// Sends the pattern while taking all the client sends.
    Exchange,
    /// Resets when something comes.
    Reset,
    /// Closes when something comes, without an answer.
    Close,
    /// Ends its sending side first, then takes all.
    FinFirst,
    /// Neither reads nor writes until the client ends.
    Silent,
}

impl Serve {
    pub(crate) fn run(self) -> Result<()> {
        let listeners = self
            .listen
            .iter()
            .map(|address| {
                self.open(*address)
                    .with_context(|| format!("listening on {address}"))
            })
            .collect::<Result<Vec<_>>>()?;
        let serve = &self;
        std::thread::scope(|scope| {
            for listener in &listeners {
                scope.spawn(move || serve.accept_all(scope, listener));
            }
        });
        Ok(())
    }

    fn open(&self, address: SocketAddr) -> Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(self.reuse_port)?;
        if address.is_ipv6() {
            socket.set_only_v6(!self.dual)?;
        }
        match self.ttl {
            Some(ttl) if address.is_ipv6() => socket.set_unicast_hops_v6(ttl)?,
            Some(ttl) => socket.set_ttl_v4(ttl)?,
            None => {}
        }
        socket.bind(&address.into())?;
        socket.listen(self.backlog)?;
        Ok(socket.into())
    }

    fn accept_all<'scope>(
        &'scope self,
        scope: &'scope std::thread::Scope<'scope, '_>,
        listener: &'scope TcpListener,
    ) {
        while let Ok((stream, accepted)) = listener.accept() {
            scope.spawn(move || self.handle(stream, accepted));
        }
    }

    fn handle(&self, stream: TcpStream, accepted: SocketAddr) {
        let peer = stream.peer_addr().map(|address| address.to_string()).ok();
        let local = stream.local_addr().map(|address| address.to_string()).ok();
        let accepted = accepted.to_string();
        if !self.quiet {
            emit(&json!({"event": "accepted", "accepted": accepted, "peer": peer, "local": local}));
        }
        let mut bytes = 0;
        let result = self.treat(&stream, &mut bytes);
        let how = result.as_ref().err().map_or("ok", outcome);
        if !self.quiet {
            emit(
                &json!({"event": "closed", "peer": peer, "received": bytes, "outcome": how,
                "intact": result.unwrap_or(false)}),
            );
        }
    }

    /// Whether all was intact.
    fn treat(&self, stream: &TcpStream, bytes: &mut u64) -> std::io::Result<bool> {
        match self.mode {
            Mode::Echo => echo(stream, bytes),
            Mode::Greet => {
                (&*stream).write_all(self.greeting.as_bytes())?;
                echo(stream, bytes)
            }
            Mode::Sink => {
                std::thread::sleep(Duration::from_millis(self.read_delay_ms));
                let intact = drain(stream, bytes)?;
                (&*stream).write_all(format!("{bytes} {intact}").as_bytes())?;
                Ok(intact)
            }
            Mode::Reply => self.reply(stream, bytes),
            Mode::Source => {
                send_pattern(stream, self.bytes)?;
                stream.shutdown(Shutdown::Write)?;
                drain(stream, bytes)
            }
            Mode::Exchange => std::thread::scope(|scope| {
                let sender = scope.spawn(|| {
                    send_pattern(stream, self.bytes)?;
                    stream.shutdown(Shutdown::Write)
                });
                let intact = drain(stream, bytes);
                sender.join().unwrap_or(Ok(()))?;
                intact
            }),
            Mode::Reset => {
                *bytes += (&*stream).read(&mut [0; 1024])? as u64;
                SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
                Ok(true)
            }
            Mode::Close => {
                *bytes += (&*stream).read(&mut [0; 1024])? as u64;
                Ok(true)
            }
            Mode::FinFirst => {
                (&*stream).write_all(self.greeting.as_bytes())?;
                stream.shutdown(Shutdown::Write)?;
                drain(stream, bytes)
            }
            Mode::Silent => {
                stream.peek(&mut [0; 1])?;
                // Something is there or the client has ended: its end is an empty peek for ever.
                loop {
                    std::thread::sleep(Duration::from_millis(20));
                    if SockRef::from(stream).take_error()?.is_some()
                        || stream.peek(&mut [0; 1])? == 0
                    {
                        return Ok(true);
                    }
                }
            }
        }
    }

    fn reply(&self, mut stream: &TcpStream, bytes: &mut u64) -> std::io::Result<bool> {
        let parsed = self.reply.iter().map(|it| escaped::parse(it));
        let replies: Vec<Vec<u8>> = parsed.collect::<Result<_>>().map_err(Error::other)?;
        let patience = Some(Duration::from_millis(self.greet_after_ms));
        stream.set_nodelay(true)?;
        stream.set_read_timeout(patience.filter(|it| !it.is_zero()))?;
        let mut said = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(count) => {
                    *bytes += count as u64;
                    said.extend_from_slice(&buffer[..count]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock && *bytes == 0 => {
                    stream.set_read_timeout(None)?;
                    stream.write_all(self.greeting.as_bytes())?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            while let Some(end) = said.windows(4).position(|it| it == b"\r\n\r\n") {
                said.drain(..end + 4);
                for (number, reply) in replies.iter().enumerate() {
                    if number > 0 {
                        // Not a wait for anything: segments of their own are what is asked for.
                        std::thread::sleep(Duration::from_millis(self.reply_pause_ms));
                    }
                    stream.write_all(reply)?;
                }
            }
        }
    }
}

fn echo(mut stream: &TcpStream, bytes: &mut u64) -> std::io::Result<bool> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => {
                *bytes += count as u64;
                stream.write_all(&buffer[..count])?;
            }
        }
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(true)
}

fn drain(mut stream: &TcpStream, bytes: &mut u64) -> std::io::Result<bool> {
    let pattern = Pattern::new();
    let mut intact = true;
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(intact),
            count => {
                intact &= pattern.matches(*bytes, &buffer[..count]);
                *bytes += count as u64;
            }
        }
    }
}
