//! Heads of requests and responses: what is not fit to be passed on, and what belongs to one hop only.
//! Pure. What hyper refuses by itself (bad names and values, obs-fold, lengths that contradict each
//! other) never comes here.

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::Authority;
use http::{HeaderMap, Method, Request, StatusCode, Version, request, response};
use hyper::body::Body;
use weft_core::Identity;
pub(in crate::proxy) use weft_core::route::is_grpc;

use super::body::RequestBody;

/// Why a request is not passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHead {
    /// RFC 9112, section 3.2: exactly one, unless it is HTTP/1.0.
    #[error("the request has no Host")]
    NoHost,
    /// The same.
    #[error("the request has more than one Host")]
    ManyHosts,
    /// RFC 9110, section 7.2.
    #[error("the request's Host, or the authority of its target, is not one")]
    Authority,
    /// RFC 9112, section 6.1: `chunked` is the one coding that is taken, once.
    #[error("the request's Transfer-Encoding is not chunked, once")]
    Coding,
    /// The same, of an answer.
    #[error("the response's Transfer-Encoding is not chunked, once")]
    ResponseCoding,
    /// RFC 9110, section 15.2.2: the client asked for nothing of the kind.
    #[error("the response switches protocols, and the request did not ask for it")]
    Switched,
    /// RFC 9113, section 8.5: there is nothing in between that would make the connection.
    #[error("CONNECT is not served by HTTP/2")]
    Connect,
    /// What follows it would pass unseen.
    #[error("CONNECT is not served where each request is looked at")]
    ConnectUnseen,
    /// RFC 9113, section 8.3.1.
    #[error("the request's Host is not the authority of its target")]
    OtherHost,
}

/// What becomes of a request's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Another request may follow.
    Exchange,
    /// It may become something else: the answer says so (`Upgrade`, RFC 9110 section 7.8; CONNECT).
    Upgrade,
}

/// Takes a request's head in: what is left of it is fit to be passed on. Says what the request wants of its
/// connection.
///
/// # Errors
/// What is wrong with it.
pub fn accept(head: &mut request::Parts) -> Result<Purpose, BadHead> {
    check(head)?;
    settle_host(head);
    let purpose = purpose(head);
    if head.method == Method::CONNECT {
        // It makes one thing of its connection.
        head.headers.remove(UPGRADE);
    }
    strip_hop(&mut head.headers, purpose);
    if head.version != Version::HTTP_2 {
        announce_te(&mut head.headers);
    }
    Ok(purpose)
}

/// Checks a request's head.
///
/// # Errors
/// What is wrong with it.
fn check(head: &request::Parts) -> Result<(), BadHead> {
    if head.version == Version::HTTP_2 && head.method == Method::CONNECT {
        return Err(BadHead::Connect);
    }
    let mut codings = head.headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next()
        && !(coding.as_bytes().eq_ignore_ascii_case(b"chunked") && codings.next().is_none())
    {
        return Err(BadHead::Coding);
    }
    let mut hosts = head.headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(BadHead::ManyHosts);
    }
    let host = host.map(authority).transpose()?;
    let target = head.uri.authority();
    if target.is_some_and(|it| it.as_str().contains('@') || it.host().is_empty()) {
        return Err(BadHead::Authority);
    }
    match (host, target, head.version) {
        (None, None, Version::HTTP_10 | Version::HTTP_09) => Ok(()),
        (None, None, _) => Err(BadHead::NoHost),
        (None, Some(_), Version::HTTP_11) => Err(BadHead::NoHost),
        (Some(host), Some(target), Version::HTTP_2) if !same_host(host, target.as_str()) => {
            Err(BadHead::OtherHost)
        }
        _ => Ok(()),
    }
}

/// Makes the framing of a response that is one unambiguous: the coding decides, whatever length there is beside
/// it (RFC 9112, section 6.3).
///
/// # Errors
/// The coding is more than `chunked`: what it was taken out of would still be coded. Or it is no response, but
/// the end of HTTP on the connection.
pub fn check_response(head: &mut response::Parts) -> Result<(), BadHead> {
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(BadHead::Switched);
    }
    let headers = &mut head.headers;
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else {
        return Ok(());
    };
    let is_chunked = coding.as_bytes().eq_ignore_ascii_case(b"chunked") && codings.next().is_none();
    headers.remove(CONTENT_LENGTH);
    if is_chunked {
        Ok(())
    } else {
        Err(BadHead::ResponseCoding)
    }
}

/// Whether the client waits to be told to send the body. Of HTTP/2 nobody here hears what it is told, and
/// in HTTP/1.0 it means nothing.
pub(super) fn expects(request: &Request<RequestBody>) -> bool {
    request.version() == Version::HTTP_11 && request.headers().contains_key(EXPECT)
}

/// `host [":" port]`; empty is allowed where the target has no authority.
fn authority(value: &HeaderValue) -> Result<&str, BadHead> {
    let text = value.to_str().map_err(|_| BadHead::Authority)?.trim();
    if text.is_empty() {
        return Ok(text);
    }
    let parsed: Authority = text.parse().map_err(|_| BadHead::Authority)?;
    if parsed.as_str().contains('@') || parsed.host().is_empty() {
        return Err(BadHead::Authority);
    }
    Ok(text)
}

fn same_host(one: &str, other: &str) -> bool {
    one.eq_ignore_ascii_case(other)
}

/// Gives an absolute target's authority precedence over `Host`, which is made the same (RFC 9112, section
/// 3.2.2), so that all who look see one host.
fn settle_host(head: &mut request::Parts) {
    if head.version == Version::HTTP_2 || head.method == Method::CONNECT {
        return;
    }
    let authority = head.uri.authority().map(Authority::as_str);
    if let Some(host) = authority.and_then(|it| HeaderValue::from_str(it).ok()) {
        head.headers.insert(HOST, host);
    }
}

/// What the request wants of its connection.
fn purpose(head: &request::Parts) -> Purpose {
    let upgrades = head.version == Version::HTTP_11
        && head.headers.contains_key(UPGRADE)
        && !upgrades_to_http(&head.headers)
        && options(&head.headers).any(|it| it.eq_ignore_ascii_case(b"upgrade"));
    if upgrades || head.method == Method::CONNECT {
        Purpose::Upgrade
    } else {
        Purpose::Exchange
    }
}

/// Whether a request that was taken in may make something else of its connection.
pub(super) fn is_upgrade<B>(request: &Request<B>) -> bool {
    // Of others it was taken out.
    request.method() == Method::CONNECT || request.headers().contains_key(UPGRADE)
}

/// Whether another version of HTTP is asked for, or TLS, in which it would go on (RFC 2817). Requests of that
/// would pass unseen, and nobody needs it (RFC 9113, section 3.1).
pub fn upgrades_to_http(headers: &HeaderMap) -> bool {
    let values = headers.get_all(UPGRADE).iter();
    let mut protocols = values.flat_map(|it| it.as_bytes().split(|byte| *byte == b','));
    protocols.any(|it| {
        let name = it
            .split(|byte| *byte == b'/')
            .next()
            .unwrap_or(it)
            .trim_ascii();
        [&b"h2c"[..], b"h2", b"http", b"tls"]
            .iter()
            .any(|http| name.eq_ignore_ascii_case(http))
    })
}

/// Whether the answer ends HTTP on the connection.
pub(super) fn is_upgraded(method: &Method, status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS || method == Method::CONNECT && status.is_success()
}

/// Takes out what is meant for the next hop alone (RFC 9110, section 7.6.1). What an upgrade needs stays.
pub fn strip_hop(headers: &mut HeaderMap, purpose: Purpose) {
    if headers.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = options(headers)
            .filter(|it| !it.eq_ignore_ascii_case(b"upgrade"))
            // What a message means is not the connection's to say.
            .filter_map(|it| HeaderName::from_bytes(it).ok())
            .filter(|it| !END_TO_END.contains(it))
            .collect();
        for name in named {
            headers.remove(name);
        }
        headers.remove(CONNECTION);
    }
    for name in HOP {
        headers.remove(name);
    }
    match purpose {
        Purpose::Upgrade if headers.contains_key(UPGRADE) => {
            headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        }
        _ => {
            headers.remove(UPGRADE);
        }
    }
    // Of this only "trailers" is of use beyond the hop: codings are undone here.
    if words(headers, TE).any(|it| it.eq_ignore_ascii_case(b"trailers")) {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    } else {
        headers.remove(TE);
    }
}

/// Says in a request of HTTP/1 that its `TE` is for the next hop alone, as who sends one must (RFC 9110, section 10.1.4).
pub(super) fn announce_te(headers: &mut HeaderMap) {
    if headers.contains_key(TE) {
        let options = match headers.contains_key(CONNECTION) {
            true => "upgrade, te",
            false => "te",
        };
        headers.insert(CONNECTION, HeaderValue::from_static(options));
    }
}

/// The options of `Connection`.
fn options(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    words(headers, CONNECTION)
}

/// The members of a list. Bytes: one that is none must not hide those beside it.
fn words(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &[u8]> {
    headers
        .get_all(name)
        .iter()
        .flat_map(|it| it.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|it| !it.is_empty())
}

/// A client, as an application is told of it.
pub(in crate::proxy) fn client_id(client: &Identity) -> Option<HeaderValue> {
    HeaderValue::try_from(client.to_string()).ok()
}

/// Tells the application who the client is, and takes out what the client says of that itself.
pub(in crate::proxy) fn set_client(headers: &mut HeaderMap, client: Option<&HeaderValue>) {
    remove_own(headers);
    if let Some(client) = client {
        headers.insert(LINKERD_CLIENT_ID, client.clone());
        headers.insert(CLIENT_ID, client.clone());
    }
}

/// Takes out what only the mesh says. Some applications take `_` for `-`.
pub(super) fn remove_own(headers: &mut HeaderMap) {
    let own = |it: &&HeaderName| {
        let name = it.as_str().as_bytes();
        let is_of_weft = matches!(name, [b'w', b'e', b'f', b't', b'-' | b'_', ..]);
        let dashes = |byte: &u8| if *byte == b'_' { b'-' } else { *byte };
        let is_linkerds = |it: &HeaderName| {
            let wanted = it.as_str().bytes();
            name.len() == wanted.len() && name.iter().map(dashes).eq(wanted)
        };
        is_of_weft || is_linkerds(&LINKERD_CLIENT_ID)
    };
    // Once over all of them: there may be very many.
    let found: Vec<HeaderName> = headers.keys().filter(own).cloned().collect();
    for name in found {
        headers.remove(name);
    }
}

/// Whether a failure of HTTP/2 says that the server has not begun with the request (RFC 9113, section 8.7),
/// or that its connection ended, as it does after so many requests or when the server ends. What a server has
/// reset it may have done.
pub(super) fn has_closed(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            let is_refused = error.reason() == Some(h2::Reason::REFUSED_STREAM);
            return is_refused || error.is_go_away() || error.is_io();
        }
        source = error.source();
    }
    error.is_closed() || error.is_canceled() || error.is_incomplete_message()
}

/// Whether a request may be sent a second time when nobody knows what became of the first (RFC 9110,
/// section 9.2.2), and all of it is there.
pub(super) fn may_repeat<B: Body>(request: &Request<B>) -> bool {
    request.body().is_end_stream() && request.method().is_idempotent()
}

/// The same request with another body; of one that has nothing behind its head, with an empty one.
pub(super) fn copy_of<B, C>(request: &Request<B>, body: C) -> Request<C> {
    let mut copy = Request::new(body);
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    // Who is told what comes before the answer.
    *copy.extensions_mut() = request.extensions().clone();
    copy
}

/// What decisions about a request go by.
pub(in crate::proxy) fn line_and_headers(head: &request::Parts) -> request::Parts {
    let (mut copy, ()) = Request::new(()).into_parts();
    copy.method = head.method.clone();
    copy.uri = head.uri.clone();
    copy.version = head.version;
    copy.headers = head.headers.clone();
    copy
}

/// The port that a request's client has asked for, if it says one.
pub(super) fn port(head: &request::Parts) -> Option<u16> {
    let of_header = || {
        let host = head.headers.get(HOST)?.to_str().ok()?;
        host.parse::<Authority>().ok()?.port_u16()
    };
    head.uri.port_u16().or_else(of_header)
}

/// The client's identity, for the application (request).
pub(super) const CLIENT_ID: HeaderName = HeaderName::from_static("weft-client-id");
/// The same under the name that Linkerd gives it.
pub(super) const LINKERD_CLIENT_ID: HeaderName = HeaderName::from_static("l5d-client-id");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// Gone at every hop, whether `Connection` names them or not. `Transfer-Encoding` is made anew.
const HOP: [HeaderName; 4] = [
    KEEP_ALIVE,
    PROXY_CONNECTION,
    TRANSFER_ENCODING,
    HTTP2_SETTINGS,
];
/// Never taken out because `Connection` names them.
const END_TO_END: [HeaderName; 8] = [
    HOST,
    http::header::CONTENT_LENGTH,
    http::header::CONTENT_TYPE,
    http::header::AUTHORIZATION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TRAILER,
    TE,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn head(version: Version, uri: &str, headers: &[(&str, &str)]) -> request::Parts {
        let mut request = Request::builder().version(version).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("valid").into_parts().0
    }

    fn answer(status: u16) -> response::Parts {
        let response = http::Response::builder().status(status).body(());
        response.expect("valid").into_parts().0
    }

    #[test]
    fn hosts() {
        let (one, two, ten) = (Version::HTTP_11, Version::HTTP_2, Version::HTTP_10);
        for (version, uri, hosts, is) in [
            (one, "/", &["web"][..], Ok(())),
            (one, "/", &["web:8080"], Ok(())),
            (one, "/", &["[::1]:80"], Ok(())),
            (one, "/", &[""], Ok(())),
            (one, "/", &[], Err(BadHead::NoHost)),
            (ten, "/", &[], Ok(())),
            (one, "/", &["a", "b"], Err(BadHead::ManyHosts)),
            (one, "/", &["a", "a"], Err(BadHead::ManyHosts)),
            (one, "/", &["a b"], Err(BadHead::Authority)),
            (one, "/", &["a/b"], Err(BadHead::Authority)),
            (one, "/", &["user@a"], Err(BadHead::Authority)),
            (one, "http://a/", &["b"], Ok(())),
            (one, "http://a/", &[], Err(BadHead::NoHost)),
            (one, ":", &["a"], Err(BadHead::Authority)),
            (two, "http://a/", &[], Ok(())),
            (two, "http://a/", &["A"], Ok(())),
            (two, "http://a/", &["b"], Err(BadHead::OtherHost)),
        ] {
            let headers: Vec<_> = hosts.iter().map(|it| ("host", *it)).collect();
            assert_eq!(check(&head(version, uri, &headers)), is, "{uri} {hosts:?}");
        }
    }

    #[test]
    fn one_host() {
        for (uri, host) in [("/", "a"), ("http://b:80/", "b:80")] {
            let mut head = head(Version::HTTP_11, uri, &[("host", "a")]);
            settle_host(&mut head);
            assert_eq!(head.headers[HOST], host);
        }
    }

    #[test]
    fn framing_of_responses() {
        for (codings, is, length) in [
            (&[][..], Ok(()), true),
            (&["chunked"], Ok(()), false),
            (&["gzip, chunked"], Err(BadHead::ResponseCoding), false),
            (&["chunked", "chunked"], Err(BadHead::ResponseCoding), false),
        ] {
            let mut headers = vec![("content-length", "5")];
            headers.extend(codings.iter().map(|it| ("transfer-encoding", *it)));
            let mut response = answer(200);
            response.headers = head(Version::HTTP_11, "/", &headers).headers;
            assert_eq!(check_response(&mut response), is, "{codings:?}");
            let has_length = response.headers.contains_key(CONTENT_LENGTH);
            assert_eq!(has_length, length, "{codings:?}");
        }
        assert_eq!(check_response(&mut answer(101)), Err(BadHead::Switched));
    }

    #[test]
    fn codings() {
        for (codings, is) in [
            (&["chunked"][..], Ok(())),
            (&["Chunked"], Ok(())),
            (&["chunked", "chunked"], Err(BadHead::Coding)),
            (&["chunked, chunked"], Err(BadHead::Coding)),
            (&["gzip, chunked"], Err(BadHead::Coding)),
            (&["identity"], Err(BadHead::Coding)),
        ] {
            let mut headers = vec![("host", "web")];
            headers.extend(codings.iter().map(|it| ("transfer-encoding", *it)));
            let head = head(Version::HTTP_11, "/", &headers);
            assert_eq!(check(&head), is, "{codings:?}");
        }
    }

    #[test]
    fn what_belongs_to_the_hop_is_taken_out() {
        let headers = [
            ("connection", "close, X-Private , te"),
            ("connection", "host,content-length"),
            ("x-private", "1"),
            ("x-public", "2"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("host", "web"),
            ("content-length", "3"),
        ];
        let mut head = head(Version::HTTP_11, "/", &headers);
        assert_eq!(purpose(&head), Purpose::Exchange);
        strip_hop(&mut head.headers, Purpose::Exchange);
        let mut left: Vec<&str> = head.headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "host", "x-public"]);
    }

    #[test]
    fn nothing_is_upgraded_to_http() {
        for (protocol, is) in [
            ("websocket", Purpose::Upgrade),
            ("h2c", Purpose::Exchange),
            ("websocket, H2C", Purpose::Exchange),
            ("HTTP/2.0", Purpose::Exchange),
        ] {
            let headers = [("connection", "upgrade"), ("upgrade", protocol)];
            let head = head(Version::HTTP_11, "/", &headers);
            assert_eq!(purpose(&head), is, "{protocol}");
        }
    }

    #[test]
    fn connect_asks_for_nothing_else() {
        for headers in [
            &[("upgrade", "h2c")][..],
            &[("upgrade", "websocket"), ("connection", "upgrade")],
        ] {
            let headers = [&[("host", "a:80")], headers].concat();
            let mut head = head(Version::HTTP_11, "a:80", &headers);
            head.method = Method::CONNECT;
            assert_eq!(accept(&mut head), Ok(Purpose::Upgrade), "{headers:?}");
            let left: Vec<&str> = head.headers.keys().map(HeaderName::as_str).collect();
            assert_eq!(left, ["host"], "{headers:?}");
        }
    }

    #[test]
    fn nothing_hides_what_belongs_to_the_hop() {
        let headers = [("te", "trailers"), ("te", "gzip"), ("x-private", "1")];
        let mut headers = head(Version::HTTP_11, "/", &headers).headers;
        let value = HeaderValue::from_bytes(b"\xff, x-private").expect("a value");
        headers.insert(CONNECTION, value);
        strip_hop(&mut headers, Purpose::Exchange);
        let left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["te"]);
    }

    #[test]
    fn trailers_are_asked_for_as_they_must_be() {
        let upgrade = [("connection", "upgrade"), ("upgrade", "websocket")];
        for (version, headers, te, connection) in [
            (
                Version::HTTP_11,
                &[("te", "gzip, trailers")][..],
                Some("trailers"),
                Some("te"),
            ),
            (
                Version::HTTP_11,
                &[("te", "gzip"), ("te", "Trailers")],
                Some("trailers"),
                Some("te"),
            ),
            (
                Version::HTTP_11,
                &[("te", "trailers"), ("connection", "close, te")],
                Some("trailers"),
                Some("te"),
            ),
            (
                Version::HTTP_11,
                &[("te", "gzip;q=0.5, deflate")],
                None,
                None,
            ),
            (Version::HTTP_11, &[("te", "trailers;q=0.5x")], None, None),
            (Version::HTTP_11, &[], None, None),
            (Version::HTTP_11, &upgrade, None, Some("upgrade")),
            (
                Version::HTTP_11,
                &[upgrade[0], upgrade[1], ("te", "trailers")],
                Some("trailers"),
                Some("upgrade, te"),
            ),
            (
                Version::HTTP_2,
                &[("te", "trailers")],
                Some("trailers"),
                None,
            ),
        ] {
            let all = [&[("host", "web")], headers].concat();
            let mut head = head(version, "http://web/", &all);
            accept(&mut head).expect("is taken");
            let value = |name: HeaderName| head.headers.get(name).and_then(|it| it.to_str().ok());
            assert_eq!(
                (value(TE), value(CONNECTION)),
                (te, connection),
                "{headers:?}"
            );
        }
    }

    #[test]
    fn an_upgrade_keeps_what_it_needs() {
        let headers = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("te", "trailers"),
        ];
        let mut head = head(Version::HTTP_11, "/", &headers);
        assert_eq!(purpose(&head), Purpose::Upgrade);
        strip_hop(&mut head.headers, Purpose::Upgrade);
        assert_eq!(head.headers["connection"], "upgrade");
        assert_eq!(head.headers["upgrade"], "websocket");
        assert_eq!(head.headers["te"], "trailers");
    }

    #[test]
    fn only_the_mesh_says_who_the_client_is() {
        let forged = [
            ("l5d-client-id", "admin"),
            ("weft-client-id", "admin"),
            ("weft-anything", "x"),
            ("weft_client_id", "admin"),
            ("l5d_client-id", "admin"),
        ];
        let mut headers = head(Version::HTTP_11, "/", &forged).headers;
        set_client(&mut headers, None);
        assert!(headers.is_empty());
        let identity = "spiffe://cluster.local/ns/shop/sa/web"
            .parse()
            .expect("valid");
        headers.insert(CLIENT_ID, HeaderValue::from_static("admin"));
        set_client(&mut headers, client_id(&identity).as_ref());
        assert_eq!(headers[CLIENT_ID], "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(headers.get_all(LINKERD_CLIENT_ID).iter().count(), 1);
    }

    #[test]
    fn calls_of_grpc() {
        for (kind, is) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;charset=x", true),
            ("application/grpc-web", false),
            ("text/html", false),
        ] {
            let head = head(Version::HTTP_2, "http://a/", &[("content-type", kind)]);
            assert_eq!(is_grpc(&head.headers), is, "{kind}");
        }
    }
}
