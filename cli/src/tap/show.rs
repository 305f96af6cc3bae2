//! Lines for people, as those of Linkerd's `viz tap`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};

use super::event::{Begin, End, Event, Head, Running, What, Who};
use crate::output::{Tone, paint, shown};

/// Lines for people.
pub(super) struct Shown {
    is_wide: bool,
    colours: bool,
    /// Agents by their nodes, in the order in which they were heard.
    agents: BTreeMap<String, usize>,
    /// What is said in each line of something.
    running: Running<String>,
}

impl Shown {
    pub(super) fn new(is_wide: bool, colours: bool) -> Self {
        Self {
            is_wide,
            colours,
            agents: BTreeMap::new(),
            running: Running::default(),
        }
    }

    pub(super) fn event(&mut self, to: &mut impl Write, event: &Event) -> io::Result<()> {
        let next = self.agents.len();
        let agent = *self.agents.entry(event.node.clone()).or_insert(next);
        let id = format!("id={agent}:{}", event.id);
        match &event.what {
            What::Begin(begin) => {
                let word = match begin.method {
                    Some(_) => "req",
                    None => "tcp",
                };
                let ends = self.ends(begin, &event.node);
                let mut line = format!("{word} {id} {ends}");
                for (key, value) in [
                    (":method", &begin.method),
                    (":authority", &begin.authority),
                    (":path", &begin.path),
                ] {
                    add(&mut line, key, value.as_deref());
                }
                self.running.begin(event, ends);
                writeln!(to, "{line}")
            }
            What::Head(Head { status, latency_us }) => {
                let Some(ends) = self.running.of(event) else {
                    return Ok(());
                };
                let tone = match status {
                    500.. => Tone::Bad,
                    400.. => Tone::Warn,
                    _ => Tone::Good,
                };
                let status = paint(&format!(":status={status}"), tone, self.colours);
                writeln!(to, "rsp {id} {ends} {status} latency={}", time(*latency_us))
            }
            What::End(end) => {
                let Some(ends) = self.running.end(event) else {
                    return Ok(());
                };
                let End {
                    duration_us,
                    request_bytes,
                    response_bytes,
                    grpc_status,
                    error,
                } = end;
                let mut line = format!(
                    "end {id} {ends} duration={} request-length={request_bytes}B \
                     response-length={response_bytes}B",
                    time(*duration_us)
                );
                add(&mut line, "grpc-status", grpc_status.as_deref());
                if let Some(error) = error {
                    let error = format!("error={}", word(error));
                    let error = paint(&error, Tone::Bad, self.colours);
                    let _ = write!(line, " {error}");
                }
                writeln!(to, "{line}")
            }
        }
    }

    /// What is said in each line of an exchange or a flow.
    fn ends(&self, begin: &Begin, node: &str) -> String {
        let mut line = match begin.direction.as_str() {
            "inbound" => "proxy=in",
            _ => "proxy=out",
        }
        .to_owned();
        add(&mut line, "src", begin.source.address.as_deref());
        add(&mut line, "dst", begin.destination.address.as_deref());
        let tls = begin.tls.as_deref().unwrap_or("not_connected");
        add(&mut line, "tls", Some(tls));
        if !self.is_wide {
            return line;
        }
        add(&mut line, "no_tls_reason", begin.no_tls_reason.as_deref());
        add(&mut line, "protocol", Some(&begin.protocol));
        for (side, who) in [("src", &begin.source), ("dst", &begin.destination)] {
            let Who {
                namespace,
                pod,
                owner,
                identity,
                ..
            } = who;
            for (what, value) in [
                ("ns", namespace),
                ("pod", pod),
                ("res", owner),
                ("id", identity),
            ] {
                add(&mut line, &format!("{side}_{what}"), value.as_deref());
            }
        }
        add(&mut line, "dst_svc", begin.service.as_deref());
        add(&mut line, "rt", begin.route.as_deref());
        add(&mut line, "node", Some(node));
        line
    }
}

fn add(line: &mut String, key: &str, value: Option<&str>) {
    if let Some(value) = value {
        // Into a string.
        let _ = write!(line, " {key}={}", word(value));
    }
}

/// A word from elsewhere: in it is nothing that looks like another one.
fn word(text: &str) -> String {
    let plain = |it: char| match it.is_whitespace() {
        true => '\u{fffd}',
        false => it,
    };
    shown(text).chars().map(plain).collect()
}

/// A time in the unit that fits.
fn time(us: u64) -> String {
    match us {
        0..10_000 => format!("{us}µs"),
        10_000..10_000_000 => format!("{}ms", us / 1000),
        _ => format!("{}s", us / 1_000_000),
    }
}
