//! Real programs in pods, started and waited for.

mod database;
mod nginx;
mod prometheus;
mod python;
mod redis;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;

pub use database::MariaDb;
pub use nginx::{AccessLine, Nginx};
pub use prometheus::Prometheus;
pub use python::python_http_server;
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

/// What `curl -i` shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Its exit code.
    pub exit: i32,
    /// The status line of the last answer, without its version: `200 OK`.
    pub status: String,
    /// The version of the last answer: `HTTP/1.1`, `HTTP/2`.
    pub version: String,
    /// How many answers there were: those with a status below 200 count.
    pub answers: usize,
    /// The last answer's headers in alphabetical order, names in lower case; trailers are among them.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
    /// What it complained about.
    pub error: String,
}

impl Shown {
    /// The status code; 0 without an answer.
    pub fn code(&self) -> u16 {
        let code = self.status.split(' ').next();
        code.and_then(|code| code.parse().ok()).unwrap_or(0)
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Runs `curl` in a pod with these arguments, for a URL that names a host `shop` at this address, so
/// that what is sent is the same wherever it goes.
pub fn curl_shop(pod: &Pod, server: SocketAddr, path: &str, args: &[&str]) -> Result<Shown> {
    let port = server.port();
    let heads = pod.dir().join("curl-heads");
    let finished = pod
        .command("curl")?
        .args(["-sS", "--max-time", "30", "--resolve"])
        .arg(format!("shop:{port}:{}", bracketed(server.ip())))
        .arg("--dump-header")
        .arg(&heads)
        .args(args)
        .arg(format!("http://shop:{port}{path}"))
        .output(Duration::from_secs(40))?;
    let text = std::fs::read_to_string(&heads).unwrap_or_default();
    let _ = std::fs::remove_file(&heads);
    Ok(shown(&text, finished))
}

fn shown(heads: &str, finished: Finished) -> Shown {
    let lines = heads.lines().map(str::trim_end);
    let (mut answers, mut version, mut status) = (0, String::new(), String::new());
    let mut headers = Vec::new();
    for line in lines.filter(|line| !line.is_empty()) {
        if line.starts_with("HTTP/") {
            let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
            (version, status) = (first.to_owned(), rest.trim().to_owned());
            answers += 1;
            headers.clear();
        } else if let Some((name, value)) = line.split_once(':') {
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    headers.sort();
    Shown {
        exit: finished.status.code().unwrap_or(-1),
        status,
        version,
        answers,
        headers,
        body: finished.stdout,
        error: finished.stderr,
    }
}

/// The form in which servers write an address into a `listen`: IPv6 in brackets.
pub(crate) fn bracketed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn heads() {
        let heads = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nB: 2\r\nA: 1\r\n\r\n";
        let finished = Finished::new(std::process::ExitStatus::from_raw(0), "body");
        let shown = shown(heads, finished);
        assert_eq!((shown.answers, shown.code()), (2, 200));
        assert_eq!(shown.header("a"), Some("1"));
        assert_eq!(shown.headers[0].0, "a");
    }
}
