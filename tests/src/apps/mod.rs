//! Real programs in pods, started and waited for.

mod database;
mod nginx;
mod redis;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;

pub use database::MariaDb;
pub use nginx::{AccessLine, Nginx};
pub use redis::Redis;

use crate::command::{Finished, Program};
use crate::pod::Pod;

/// `http://<address>/<path>`, with brackets where IPv6 wants them.
pub fn url(server: SocketAddr, path: &str) -> String {
    format!("http://{server}/{path}")
}

/// `curl` for this URL, silent, with a limit of ten seconds, printing body and status code on
/// separate lines.
pub fn curl_command(program: Program, url: &str) -> Program {
    program.args(["-sS", "--max-time", "10", "-w", "\n%{http_code}", url])
}

/// What `curl` got.
#[derive(Clone, Debug)]
pub struct Curl {
    /// Its exit code: 0 for an answer, 7 refused, 28 timeout, 52 empty reply, 56 reset.
    pub exit: i32,
    /// The status code; 0 without an answer.
    pub status: u16,
    /// The body.
    pub body: String,
    /// What it complained about.
    pub error: String,
}

/// Runs `curl` in a pod.
pub fn curl(pod: &Pod, server: SocketAddr, path: &str) -> Result<Curl> {
    curl_with(pod.command("curl")?, server, path)
}

/// Runs `curl` anywhere.
pub fn curl_with(program: Program, server: SocketAddr, path: &str) -> Result<Curl> {
    let Finished {
        status,
        stdout,
        stderr,
        ..
    } = curl_command(program, &url(server, path)).output(Duration::from_secs(20))?;
    let (body, code) = stdout.rsplit_once('\n').unwrap_or(("", "0"));
    Ok(Curl {
        exit: status.code().unwrap_or(-1),
        status: code.parse().unwrap_or(0),
        body: body.to_owned(),
        error: stderr,
    })
}

/// The form in which servers write an address into a `listen`: IPv6 in brackets.
pub(crate) fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}
