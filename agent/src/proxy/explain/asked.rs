//! The question: what is read of it, and the request that it may be about.

use std::net::IpAddr;

use http::header::HOST;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version};
use serde::{Serialize, Serializer};
use weft_core::{Identity, Name, WorkloadId};

use crate::proxy::http::head;
use crate::proxy::tunnel::claim::OpaqueBy;

/// A question.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) is_inbound: bool,
    pub(super) pod: Option<WorkloadId>,
    pub(super) to: String,
    pub(super) from: Option<IpAddr>,
    pub(super) identity: Option<Identity>,
    pub(super) opaque_by: Option<OpaqueBy>,
    /// None: it is about a connection.
    pub(super) request: Option<Request>,
    /// The name that its client's TLS asks for.
    pub(super) server_name: Option<Name>,
}

/// A request that is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    method: Method,
    target: PathAndQuery,
    headers: HeaderMap,
    /// Headers that it has, too, and whose values are nobody's to see who asks.
    pub(super) hidden: Vec<HeaderName>,
}

impl Asked {
    pub(super) fn read(query: &str) -> Result<Self, String> {
        let mut asked = Self::default();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            let bad = |error: &dyn std::fmt::Display| format!("{key}={value}: {error}");
            match &*key {
                "side" => match &*value {
                    "outbound" => asked.is_inbound = false,
                    "inbound" => asked.is_inbound = true,
                    _ => return Err(bad(&"inbound or outbound")),
                },
                "pod" => asked.pod = Some(value.parse().map_err(|it| bad(&it))?),
                "to" => asked.to = value.clone().into_owned(),
                "from" => asked.from = Some(value.parse().map_err(|it| bad(&it))?),
                "identity" => asked.identity = Some(value.parse().map_err(|it| bad(&it))?),
                "opaque_by" => asked.opaque_by = Some(value.parse().map_err(|it| bad(&it))?),
                "sni" => {
                    let name = value.to_ascii_lowercase().parse();
                    asked.server_name = Some(name.map_err(|it| bad(&it))?);
                }
                "method" | "path" | "header" | "hidden" => {
                    let request = asked.request.get_or_insert_default();
                    request.read(&key, &value).map_err(|it| bad(&it))?;
                }
                // What is ignored would be answered wrongly.
                _ => return Err(format!("this agent does not know {key}")),
            }
        }
        if asked.request.is_some() && asked.server_name.is_some() {
            return Err("requests within TLS are not seen: sni= or a request".to_owned());
        }
        Ok(asked)
    }

    pub(super) fn pod(&self) -> Result<&WorkloadId, String> {
        self.pod
            .as_ref()
            .ok_or_else(|| "pod= is missing".to_owned())
    }
}

/// `GET /`.
impl Default for Request {
    fn default() -> Self {
        Self {
            method: Method::GET,
            target: PathAndQuery::from_static("/"),
            headers: HeaderMap::new(),
            hidden: vec![],
        }
    }
}

impl Request {
    fn read(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "method" => {
                let method: Method = value.parse().map_err(|_| "no method")?;
                if method == Method::CONNECT {
                    return Err("what follows a CONNECT is no request".to_owned());
                }
                self.method = method;
            }
            "path" => {
                let path = Some(value).filter(|it| it.starts_with('/'));
                let path = path.and_then(|it| it.parse().ok());
                self.target = path.ok_or("no path, which begins with / and has no spaces")?;
            }
            "hidden" => {
                let name = value.parse().map_err(|_| "no name of a header")?;
                self.hidden.push(name);
            }
            _ => {
                let (name, value) = value.split_once(':').ok_or("not of the form name: value")?;
                let name: HeaderName = name.trim().parse().map_err(|_| "no name of a header")?;
                let value = HeaderValue::from_str(value.trim()).map_err(|_| "no value")?;
                self.headers.append(name, value);
            }
        }
        Ok(())
    }

    /// Its head, for the host that it is sent to if it names no other.
    pub(super) fn head(&self, host: &str) -> Parts {
        let (mut head, ()) = http::Request::new(()).into_parts();
        head.method.clone_from(&self.method);
        head.uri = Uri::from(self.target.clone());
        head.headers.clone_from(&self.headers);
        if let Ok(host) = HeaderValue::from_str(host) {
            head.headers.entry(HOST).or_insert(host);
        }
        if head::is_grpc(&head.headers) {
            head.version = Version::HTTP_2;
        }
        head
    }

    /// The request that goes on, made of the one that came. What a filter has written into headers is hidden.
    pub(super) fn going_on(came: &Parts, goes: &Parts) -> Self {
        let target = goes.uri.path_and_query().cloned();
        let mut request = Self {
            method: goes.method.clone(),
            target: target.unwrap_or_else(|| PathAndQuery::from_static("/")),
            ..Self::default()
        };
        for name in goes.headers.keys() {
            let values = goes.headers.get_all(name);
            if name == HOST || values == came.headers.get_all(name) {
                for value in values {
                    request.headers.append(name, value.clone());
                }
            } else {
                request.hidden.push(name.clone());
            }
        }
        request
    }
}

/// As it is asked for again.
impl Serialize for Request {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // They were texts when they were read.
        let header = |(name, value): (&HeaderName, &HeaderValue)| {
            format!("{name}: {}", value.to_str().unwrap_or_default())
        };
        let headers: Vec<String> = self.headers.iter().map(header).collect();
        let hidden: Vec<&str> = self.hidden.iter().map(HeaderName::as_str).collect();
        let shown = serde_json::json!({
            "method": self.method.as_str(), "path": self.target.as_str(), "headers": headers, "hidden": hidden,
        });
        shown.serialize(serializer)
    }
}

/// `GET /orders`.
impl std::fmt::Display for Request {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}", self.method, self.target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_read_whole_or_not_at_all() {
        let asked = Asked::read(
            "side=inbound&pod=shop%2Fweb-1&to=10.1.0.3%3A80&from=10.1.0.2&identity=\
             spiffe%3A%2F%2Ftd%2Fns%2Fshop%2Fsa%2Forder&opaque_by=web%3A80",
        )
        .expect("a question");
        assert!(asked.is_inbound && asked.to == "10.1.0.3:80");
        assert_eq!(
            asked.pod().map(ToString::to_string),
            Ok("shop/web-1".to_owned())
        );
        assert!(asked.request.is_none());
        let identity = asked.identity.expect("said").to_string();
        assert_eq!(identity, "spiffe://td/ns/shop/sa/order");
        assert_eq!(asked.opaque_by.expect("said").port.get(), 80);
        assert!(Asked::read("").expect("empty").pod().is_err());
        for bad in [
            "side=both",
            "pod=web",
            "from=here",
            "identity=me",
            "opaque_by=web",
            "opaque_by=web:0",
            "more=1",
            "method=G%20T",
            "method=CONNECT",
            "path=orders",
            "path=/a%20b",
            "header=x",
            "header=a%20b:x",
            "header=a:b%0Ac:d",
            "sni=",
            "sni=web.example&method=GET",
        ] {
            assert!(Asked::read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_filters_write_is_not_told() {
        let asked =
            Asked::read("method=POST&path=/a%3Fb%3D1&header=X-A:+1&header=x-a:2&header=x-b:1");
        let request = asked.expect("a question").request.expect("a request");
        let came = request.head("web:80");
        assert_eq!(came.headers[HOST], "web:80");
        let mut goes = request.head("web:80");
        goes.headers
            .insert("x-b", HeaderValue::from_static("token"));
        goes.headers.insert(HOST, HeaderValue::from_static("other"));
        let told = serde_json::to_string(&Request::going_on(&came, &goes)).expect("JSON");
        assert!(!told.contains("token"), "{told}");
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        let expected = serde_json::json!({
            "method": "POST", "path": "/a?b=1", "headers": ["x-a: 1", "x-a: 2", "host: other"], "hidden": ["x-b"],
        });
        assert_eq!(told, expected);
    }
}
