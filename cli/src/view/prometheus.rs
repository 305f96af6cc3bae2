//! Windows that a Prometheus remembers: those that are longer than what agents do.
//!
//! What is asked for are the agents' own counters, not what rules record of them: so every command has its numbers from the
//! same series, whichever way they come.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use http::header::HOST;
use http::uri::{Authority, Scheme};
use http::{Request, StatusCode, Uri};
use http_body_util::Empty;
use hyper::body::Bytes;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Change, Grown};
use crate::controller::send;
use crate::metrics::Series;

/// Where a Prometheus is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrometheusUrl {
    authority: Authority,
    /// Without a slash at its end.
    path: String,
}

/// Why a Prometheus says nothing.
#[derive(Debug, thiserror::Error)]
pub enum PrometheusError {
    /// It is no address of one.
    #[error("{0:?} is no http://HOST:PORT of a Prometheus")]
    Form(String),
    /// TLS is not spoken.
    #[error(
        "https is not spoken: bring it here by kubectl -n monitoring port-forward svc/prometheus 9090, and say http://127.0.0.1:9090"
    )]
    Tls,
    /// Nobody is there.
    #[error(
        "cannot reach Prometheus at {url}: {reason}: of one in the cluster, kubectl port-forward makes a port of this machine"
    )]
    Connect {
        /// Its address.
        url: PrometheusUrl,
        /// Why.
        reason: String,
    },
    /// It is another one.
    #[error("{url} does not answer as Prometheus does: {reason}: give its address without /api")]
    Answer {
        /// Its address.
        url: PrometheusUrl,
        /// What it says.
        reason: String,
    },
    /// It has nothing.
    #[error(
        "Prometheus at {url} knows nothing of the last {seconds} s, such as {metric}: does it scrape the agents, with the labels \
         as they have them (honor_labels)? docs/alerts.md has the configuration"
    )]
    Nothing {
        /// Its address.
        url: PrometheusUrl,
        /// How far back.
        seconds: u64,
        /// What was asked for.
        metric: String,
    },
}

/// What Prometheus answers.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    error: Option<String>,
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    result: Vec<Element>,
}

#[derive(Deserialize)]
struct Element {
    metric: std::collections::BTreeMap<String, String>,
    value: (f64, String),
}

/// Asks by how much these grew; those that are no counters are left out.
///
/// # Errors
/// It cannot be asked, or knows none of them.
pub(super) async fn change(
    url: &PrometheusUrl,
    wanted: &[&str],
    window: Duration,
) -> Result<Change, PrometheusError> {
    // A range has whole units only.
    let ms = window.as_millis();
    let is_counter = |it: &&&str| it.ends_with("_total") || it.ends_with("_bucket");
    let counters: Vec<&str> = wanted.iter().filter(is_counter).copied().collect();
    let mut change = Change {
        seconds: window.as_secs_f64(),
        ..Change::default()
    };
    for name in &counters {
        let bytes = ask(url, &format!("increase({name}[{ms}ms])")).await?;
        let read = read(name, &bytes).map_err(|reason| PrometheusError::Answer {
            url: url.clone(),
            reason,
        })?;
        change.counters.extend(read);
    }
    match (change.counters.is_empty(), counters.first()) {
        (true, Some(metric)) => Err(PrometheusError::Nothing {
            url: url.clone(),
            seconds: window.as_secs(),
            metric: (*metric).to_owned(),
        }),
        _ => Ok(change),
    }
}

async fn ask(url: &PrometheusUrl, query: &str) -> Result<Bytes, PrometheusError> {
    let connect = |reason: String| PrometheusError::Connect {
        url: url.clone(),
        reason,
    };
    let answer = |reason: String| PrometheusError::Answer {
        url: url.clone(),
        reason,
    };
    let mut written = form_urlencoded::Serializer::new(String::new());
    written.append_pair("query", query);
    let request = Request::builder()
        .uri(format!("{}/api/v1/query?{}", url.path, written.finish()))
        .header(HOST, url.authority.as_str())
        .body(Empty::<Bytes>::new());
    let request = request.map_err(|error| answer(error.to_string()))?;
    let host = url.authority.host();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = url.authority.port_u16().unwrap_or(80);
    let stream = timeout(PATIENCE, TcpStream::connect((host, port))).await;
    let stream = stream.map_err(|_| connect(format!("no answer in {} s", PATIENCE.as_secs())))?;
    let stream = stream.map_err(|error| connect(error.to_string()))?;
    let answered = timeout(PATIENCE, send(stream, request)).await;
    let answered =
        answered.map_err(|_| connect(format!("no answer in {} s", PATIENCE.as_secs())))?;
    let (status, bytes) = answered.map_err(connect)?;
    // What is wrong with a query comes as JSON, with another status.
    match status {
        StatusCode::OK | StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => Ok(bytes),
        other => Err(answer(format!("{other}"))),
    }
}

/// Reads what an instant query answers about a metric.
fn read(name: &str, bytes: &[u8]) -> Result<Vec<Grown>, String> {
    let answer: Answer = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if let Some(error) = answer.error {
        return Err(error);
    }
    let data = answer.data.ok_or("no data")?;
    let grown = data.result.into_iter().filter_map(|it| {
        let by: f64 = it.value.1.parse().ok()?;
        by.is_finite().then(|| Grown {
            series: Series {
                name: name.to_owned(),
                labels: it.metric,
            },
            by,
        })
    });
    Ok(grown.collect())
}

impl FromStr for PrometheusUrl {
    type Err = PrometheusError;

    fn from_str(text: &str) -> Result<Self, PrometheusError> {
        let form = || PrometheusError::Form(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| form())?;
        if uri.scheme() == Some(&Scheme::HTTPS) {
            return Err(PrometheusError::Tls);
        }
        let authority = uri.authority().filter(|it| !it.as_str().contains('@'));
        if uri.scheme() != Some(&Scheme::HTTP) || uri.query().is_some() {
            return Err(form());
        }
        Ok(Self {
            authority: authority.ok_or_else(form)?.clone(),
            path: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

impl fmt::Display for PrometheusUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "http://{}{}", self.authority, self.path)
    }
}

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_plain_http() {
        for (text, expected) in [
            ("http://127.0.0.1:9090", "http://127.0.0.1:9090"),
            ("http://[::1]:9090/", "http://[::1]:9090"),
            ("http://prometheus/prefix/", "http://prometheus/prefix"),
        ] {
            let url: PrometheusUrl = text.parse().expect(text);
            assert_eq!(url.to_string(), expected);
        }
        let tls = "https://prometheus".parse::<PrometheusUrl>();
        let told = tls.expect_err("TLS").to_string();
        assert!(told.contains("port-forward"), "{told}");
        for bad in [
            "",
            "prometheus:9090",
            "/api",
            "ftp://a",
            "http://a:b@c",
            "http://a/?b",
        ] {
            let read = bad.parse::<PrometheusUrl>();
            assert!(matches!(read, Err(PrometheusError::Form(_))), "{bad}");
        }
    }

    #[test]
    fn answers_are_what_grew() {
        let answer = br#"{"status": "success", "data": {"resultType": "vector", "result": [
            {"metric": {"pod": "web-1", "direction": "inbound"}, "value": [1700000000.1, "12.5"]},
            {"metric": {"pod": "web-2"}, "value": [1700000000.1, "NaN"]}]}}"#;
        let read = read("response_total", answer).expect("an answer");
        assert_eq!(read.len(), 1);
        assert!(read[0].series.is("direction", "inbound") && read[0].by == 12.5);
        assert_eq!(read[0].series.name, "response_total");
    }

    #[test]
    fn what_is_none_is_told() {
        let refused = br#"{"status": "error", "errorType": "bad_data", "error": "too long"}"#;
        assert_eq!(read("x", refused).expect_err("refused"), "too long");
        for bad in [&b"<html>"[..], b"{}"] {
            assert!(read("x", bad).is_err());
        }
    }
}
