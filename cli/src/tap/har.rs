//! An HTTP archive (HAR 1.2), which browsers and other tools show.
//!
//! What is not known of an exchange is left as that format has it: there are no headers, cookies, queries or contents in it.
//! What the format has no place for begins with `_`. Flows that are no exchanges are not in it.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::event::{Begin, End, Event, Head, Running, What};
use crate::output::escaped;

/// An archive that is being written.
pub(super) struct Har {
    running: Running<(u64, Box<Begin>, Option<Head>)>,
    has_entries: bool,
}

impl Har {
    pub(super) fn begin(to: &mut impl Write) -> io::Result<Self> {
        let creator = json!({"name": "weft", "version": env!("CARGO_PKG_VERSION")});
        write!(
            to,
            "{{\"log\":{{\"version\":\"1.2\",\"creator\":{creator},\"entries\":["
        )?;
        Ok(Self {
            running: Running::default(),
            has_entries: false,
        })
    }

    pub(super) fn event(&mut self, to: &mut impl Write, event: &Event) -> io::Result<()> {
        match &event.what {
            What::Begin(begin) if begin.method.is_some() => {
                self.running
                    .begin(event, (event.at_us, begin.clone(), None));
            }
            What::Begin(_) => {}
            What::Head(head) => {
                if let Some((_, _, known)) = self.running.of(event) {
                    *known = Some(*head);
                }
            }
            What::End(end) => {
                if let Some((at_us, begin, head)) = self.running.end(event) {
                    let comma = match std::mem::replace(&mut self.has_entries, true) {
                        true => ",",
                        false => "",
                    };
                    let entry = entry(&event.node, at_us, &begin, head, end).to_string();
                    write!(to, "{comma}\n{}", escaped(&entry))?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn end(&mut self, to: &mut impl Write) -> io::Result<()> {
        writeln!(to, "\n]}}}}")?;
        to.flush()
    }
}

fn entry(node: &str, at_us: u64, begin: &Begin, head: Option<Head>, end: &End) -> Value {
    let ms = |us: u64| us as f64 / 1000.0;
    let (wait, receive) = match head {
        Some(head) => (head.latency_us, end.duration_us),
        None => (end.duration_us, 0),
    };
    let version = match begin.protocol.as_str() {
        "HTTP/1" => "HTTP/1.1",
        _ => "HTTP/2",
    };
    let address = begin.destination.address.as_deref().unwrap_or_default();
    let host = begin.authority.as_deref().unwrap_or(address);
    let path = begin.path.as_deref().unwrap_or_default();
    json!({
        "startedDateTime": moment(at_us),
        "time": ms(wait + receive),
        "request": {
            "method": begin.method, "url": format!("http://{host}{path}"), "httpVersion": version,
            "cookies": [], "headers": [], "queryString": [], "headersSize": -1, "bodySize": end.request_bytes,
        },
        "response": {
            "status": head.map_or(0, |it| it.status), "statusText": "", "httpVersion": version,
            "cookies": [], "headers": [], "redirectURL": "", "headersSize": -1, "bodySize": end.response_bytes,
            "content": {"size": end.response_bytes, "mimeType": ""},
        },
        "cache": {},
        "timings": {"send": 0, "wait": ms(wait), "receive": ms(receive)},
        "serverIPAddress": address.rsplit_once(':').map_or(address, |it| it.0).trim_matches(['[', ']']),
        "_node": node,
        "_direction": begin.direction,
        "_protocol": begin.protocol,
        "_source": begin.source,
        "_destination": begin.destination,
        "_service": begin.service,
        "_route": begin.route,
        "_tls": begin.tls,
        "_grpcStatus": end.grpc_status,
        "_error": end.error,
    })
}

/// A moment as RFC 3339 has it, in UTC.
fn moment(at_us: u64) -> String {
    let (seconds, us) = (at_us / 1_000_000, at_us % 1_000_000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.{us:06}Z",
        second % 60
    )
}

/// The date so many days after 1970-01-01, by eras of 400 years that begin in March.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::moment;

    #[test]
    fn moments_are_written_as_dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (1_796_047_512, "2026-11-30T14:05:12.000000Z"),
        ] {
            assert_eq!(moment(seconds * 1_000_000), expected);
        }
        assert_eq!(moment(1_000_007), "1970-01-01T00:00:01.000007Z");
    }
}
