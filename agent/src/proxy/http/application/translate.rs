//! Heads of one version as the other one writes them (RFC 9113, section 8; RFC 9112). Pure. They have been checked
//! before ([`head::accept`]), and lengths are held to by who reads and writes bodies.

use std::net::SocketAddr;

use http::header::{CONTENT_LENGTH, COOKIE, HOST, HeaderValue, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Uri, Version, request, response};

use crate::proxy::http::head::{self, BadHead, Purpose};

/// Makes a request's head one of HTTP/1.
///
/// # Errors
/// It has no form there.
pub(super) fn request_to_http1(head: &mut request::Parts, has_body: bool) -> Result<(), BadHead> {
    head::strip_hop(&mut head.headers, Purpose::Exchange);
    head::announce_te(&mut head.headers);
    if !head.headers.contains_key(HOST) {
        let authority = head.uri.authority().map_or("", Authority::as_str);
        let host = HeaderValue::from_str(authority).map_err(|_| BadHead::Authority)?;
        head.headers.insert(HOST, host);
    }
    let path = path(&head.uri);
    head.uri = Uri::from(path);
    join_cookies(&mut head.headers);
    if has_body && !head.headers.contains_key(CONTENT_LENGTH) {
        // Of GET, for one, nobody would expect a body that has no length and is not announced.
        let chunked = HeaderValue::from_static("chunked");
        head.headers.insert(TRANSFER_ENCODING, chunked);
    }
    head.version = Version::HTTP_11;
    Ok(())
}

/// Makes a request's head one of HTTP/2. One without a host, as HTTP/1.0 has them, is for the address.
///
/// # Errors
/// It has no form there.
pub(super) fn request_to_http2(head: &mut request::Parts, to: SocketAddr) -> Result<(), BadHead> {
    if head.method == Method::CONNECT {
        return Err(BadHead::Connect);
    }
    head::strip_hop(&mut head.headers, Purpose::Exchange);
    let host = head.headers.remove(HOST);
    let host = host.as_ref().map_or("", |it| it.to_str().unwrap_or(""));
    let authority = match head.uri.authority() {
        Some(authority) => authority.clone(),
        None if host.is_empty() => parsed(&to.to_string())?,
        None => parsed(host)?,
    };
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(authority);
    parts.path_and_query = Some(path(&head.uri));
    head.uri = Uri::from_parts(parts).map_err(|_| BadHead::Authority)?;
    head.version = Version::HTTP_2;
    Ok(())
}

/// Makes a response's head one for a client of HTTP/1.
pub(super) fn response_to_http1(head: &mut response::Parts) {
    head::strip_hop(&mut head.headers, Purpose::Exchange);
    head.version = Version::HTTP_11;
}

/// Makes a response's head one for a client of HTTP/2.
///
/// # Errors
/// Its body is coded in a way that cannot be undone.
pub(super) fn response_to_http2(head: &mut response::Parts) -> Result<(), BadHead> {
    head::check_response(head)?;
    head::strip_hop(&mut head.headers, Purpose::Exchange);
    head.version = Version::HTTP_2;
    Ok(())
}

fn parsed(authority: &str) -> Result<Authority, BadHead> {
    authority.trim().parse().map_err(|_| BadHead::Authority)
}

/// Path and query; `*` is one (RFC 9110, section 7.1).
fn path(uri: &Uri) -> PathAndQuery {
    let path = uri.path_and_query().cloned();
    path.filter(|it| !it.as_str().is_empty())
        .unwrap_or_else(|| PathAndQuery::from_static("/"))
}

/// HTTP/2 may have many lines of cookies, HTTP/1 one (RFC 9113, section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut all = Vec::new();
    for cookie in headers.get_all(COOKIE) {
        if !all.is_empty() {
            all.extend_from_slice(b"; ");
        }
        all.extend_from_slice(cookie.as_bytes());
    }
    if headers.get_all(COOKIE).iter().nth(1).is_some()
        && let Ok(joined) = HeaderValue::from_bytes(&all)
    {
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};

    use super::*;

    fn request(
        method: &str,
        version: Version,
        uri: &str,
        headers: &[(&str, &str)],
    ) -> request::Parts {
        let mut request = Request::builder().method(method).version(version).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("valid").into_parts().0
    }

    fn shown(headers: &HeaderMap) -> Vec<(&str, &str)> {
        let shown = headers.iter();
        let mut shown: Vec<_> = shown
            .map(|(name, value)| (name.as_str(), value.to_str().expect("text")))
            .collect();
        shown.sort_unstable();
        shown
    }

    #[test]
    fn requests_of_http2_as_http1() {
        let get = [
            ("cookie", "a=1"),
            ("cookie", "b=2"),
            ("te", "trailers"),
            ("x", "y"),
        ];
        let mut head = request("GET", Version::HTTP_2, "http://shop:81/a?b=c", &get);
        request_to_http1(&mut head, false).expect("has a form");
        assert_eq!(head.uri, "/a?b=c");
        assert_eq!(head.version, Version::HTTP_11);
        let expected = [
            ("connection", "te"),
            ("cookie", "a=1; b=2"),
            ("host", "shop:81"),
            ("te", "trailers"),
            ("x", "y"),
        ];
        assert_eq!(shown(&head.headers), expected);
    }

    #[test]
    fn bodies_of_http2_are_announced() {
        for (method, headers, has_body, expected) in [
            ("POST", &[][..], true, Some("chunked")),
            ("GET", &[], true, Some("chunked")),
            ("POST", &[("content-length", "5")], true, None),
            ("GET", &[], false, None),
        ] {
            let mut head = request(method, Version::HTTP_2, "http://shop/", headers);
            request_to_http1(&mut head, has_body).expect("has a form");
            let coding = head.headers.get(TRANSFER_ENCODING);
            let coding = coding.map(|it| it.to_str().expect("text"));
            assert_eq!(coding, expected, "{method} {headers:?}");
        }
    }

    #[test]
    fn requests_of_http1_as_http2() {
        let to = "10.0.0.1:80".parse().expect("valid");
        let hop = [
            ("host", "shop:81"),
            ("connection", "x-private, close"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("cookie", "a=1; b=2"),
        ];
        for (method, uri, headers, expected) in [
            ("GET", "/a?b", &hop[..], "http://shop:81/a?b"),
            ("GET", "/", &[], "http://10.0.0.1:80/"),
            ("GET", "/", &[("host", "")], "http://10.0.0.1:80/"),
            ("GET", "http://web/x", &[("host", "web")], "http://web/x"),
            ("OPTIONS", "*", &[("host", "shop")], "http://shop*"),
        ] {
            let mut head = request(method, Version::HTTP_11, uri, headers);
            request_to_http2(&mut head, to).expect("has a form");
            let (authority, path) = (head.uri.authority(), head.uri.path_and_query());
            let (authority, path) = (authority.expect("one"), path.expect("one"));
            assert_eq!(format!("http://{authority}{path}"), expected);
            let left = shown(&head.headers);
            let expected = match headers.len() {
                7 => &[("cookie", "a=1; b=2"), ("te", "trailers")][..],
                _ => &[],
            };
            assert_eq!(left, expected);
        }
        let mut connect = request("CONNECT", Version::HTTP_11, "shop:80", &[]);
        assert!(request_to_http2(&mut connect, to).is_err());
    }

    #[test]
    fn responses() {
        let response = || {
            let response = Response::builder()
                .header("connection", "close, x-private")
                .header("x-private", "1")
                .header("content-length", "5");
            response.body(()).expect("valid").into_parts().0
        };
        let mut head = response();
        response_to_http2(&mut head).expect("has a form");
        assert_eq!(shown(&head.headers), [("content-length", "5")]);
        let mut head = response();
        head.version = Version::HTTP_2;
        response_to_http1(&mut head);
        assert_eq!(shown(&head.headers), [("content-length", "5")]);
        assert_eq!(head.version, Version::HTTP_11);
        // The coding decides.
        let mut head = response();
        let coding = HeaderValue::from_static("chunked");
        head.headers.insert(TRANSFER_ENCODING, coding);
        response_to_http2(&mut head).expect("has a form");
        assert!(head.headers.is_empty());
    }
}
