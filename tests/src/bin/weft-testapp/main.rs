//! A TCP application with fine control, for what ordinary programs cannot be asked to do: a given
//! source port, half-close, reset, a slow reader, thousands of connections in a row; and servers and
//! clients of HTTP, gRPC and WebSocket that say what they saw.
//!
//! It runs as a process of a pod, so that the hooks see it as any application. Each event is one
//! line of JSON on standard output; `weft_tests::testapp` reads them.

mod attack;
mod client;
mod datagram;
mod escaped;
mod fast_open;
mod grpc;
mod http;
mod load;
mod pattern;
mod server;
mod spoof;
mod websocket;

use std::io::Write;

use anyhow::Result;
use clap::Parser;
use serde_json::Value;

#[derive(Parser)]
enum Command {
    /// Accepts connections until killed.
    Serve(server::Serve),
    /// Opens one connection and says how it went.
    Connect(client::Connect),
    /// Opens connections one after the other and counts how they went.
    Churn(load::Churn),
    /// Opens connections and keeps them until standard input ends.
    Hold(load::Hold),
    /// Opens connections in a row until standard input ends, saying when the outcome changes.
    Load(load::Load),
    /// Keeps one connection busy until it breaks or standard input ends.
    Pulse(load::Pulse),
    /// Opens one connection by Fast Open.
    FastOpen(fast_open::FastOpen),
    /// Answers datagrams.
    UdpEcho(datagram::UdpEcho),
    /// Sends a datagram and waits for its answer.
    UdpPing(datagram::UdpPing),
    /// Sends a TCP SYN with addresses of choice.
    Syn(spoof::Syn),
    /// Speaks HTTP/1 and HTTP/2.
    #[command(subcommand)]
    Http(http::Http),
    /// Speaks gRPC.
    #[command(subcommand)]
    Grpc(grpc::Grpc),
    /// Speaks WebSocket.
    #[command(subcommand)]
    Websocket(websocket::WebSocket),
    /// Does what only somebody does who means harm.
    #[command(subcommand)]
    Attack(attack::Attack),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Serve(serve) => serve.run(),
        Command::Connect(connect) => connect.run(),
        Command::Churn(churn) => churn.run(),
        Command::Hold(hold) => hold.run(),
        Command::Load(load) => load.run(),
        Command::Pulse(pulse) => pulse.run(),
        Command::FastOpen(connect) => connect.run(),
        Command::UdpEcho(echo) => echo.run(),
        Command::UdpPing(ping) => ping.run(),
        Command::Syn(syn) => syn.run(),
        Command::Http(http) => http.run(),
        Command::Grpc(grpc) => grpc.run(),
        Command::Websocket(websocket) => websocket.run(),
        Command::Attack(attack) => attack.run(),
    }
}

/// Prints an event as one line, at once.
fn emit(event: &Value) {
    let mut out = std::io::stdout().lock();
    // A reader that went away is no reason to stop.
    let _ = writeln!(out, "{event}").and_then(|()| out.flush());
}
