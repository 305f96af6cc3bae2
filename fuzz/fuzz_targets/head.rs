//! What is passed on of a head that a client or a server wrote: any that the library would take is refused, or has one
//! host, nothing that belongs to one hop, and asks for no other version of HTTP.
//!
//! The input is a head as it is written, with LF between its lines; what no head could have is left out of it.
#![no_main]

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version, request};
use libfuzzer_sys::fuzz_target;
use weft_agent::proxy::http::head::{Purpose, accept, check_response, strip_hop, upgrades_to_http};

fuzz_target!(|bytes: &[u8]| {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let first = lines.next().unwrap_or_default();
    let headers = headers(lines);
    match first.strip_prefix(b"HTTP/1.1 ") {
        Some(status) => answer(status, headers),
        None => asked(first, headers),
    }
});

fn headers<'a>(lines: impl Iterator<Item = &'a [u8]>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in lines {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = parts.next().and_then(|it| HeaderName::from_bytes(it).ok());
        let value = parts.next().unwrap_or_default().trim_ascii();
        if let (Some(name), Ok(value)) = (name, HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    headers
}

fn asked(line: &[u8], headers: HeaderMap) {
    let mut words = line.split(|byte| *byte == b' ');
    let mut word = || words.next().unwrap_or_default();
    let request = Request::builder().method(word()).uri(word());
    let request = request.version(match word() {
        b"HTTP/1.0" => Version::HTTP_10,
        b"HTTP/2" => Version::HTTP_2,
        _ => Version::HTTP_11,
    });
    let Ok(request) = request.body(()) else {
        return;
    };
    let (mut head, ()) = request.into_parts();
    head.headers = headers;
    let before = head.headers.clone();
    let Ok(purpose) = accept(&mut head) else {
        return;
    };
    has_one_host(&head);
    is_of_no_hop(&before, &head.headers);
    let says_te = head.headers.contains_key(TE) && head.version != Version::HTTP_2;
    let with_te = |with: &'static str, without: &'static str| if says_te { with } else { without };
    let asks = before.contains_key(UPGRADE) && names(&before, b"upgrade");
    let may_ask = head.version == Version::HTTP_11 && head.method != Method::CONNECT && asks;
    match head.headers.get(UPGRADE) {
        Some(_) => {
            assert!(purpose == Purpose::Upgrade && may_ask);
            assert!(!upgrades_to_http(&head.headers));
            assert_eq!(head.headers.get_all(CONNECTION).iter().count(), 1);
            assert_eq!(head.headers[CONNECTION], with_te("upgrade, te", "upgrade"));
        }
        None => {
            let connection = head.headers.get(CONNECTION);
            assert_eq!(
                connection.map_or("", |it| it.to_str().expect("text")),
                with_te("te", "")
            );
            assert_eq!(purpose == Purpose::Upgrade, head.method == Method::CONNECT);
        }
    }
    // Nothing is left for a second look.
    let (once, kept) = (head.headers.clone(), head.method.clone());
    assert_eq!(accept(&mut head), Ok(purpose));
    assert_eq!((head.headers, head.method), (once, kept));
}

fn answer(status: &[u8], headers: HeaderMap) {
    let Ok(answer) = Response::builder().status(status).body(()) else {
        return;
    };
    let (mut head, ()) = answer.into_parts();
    head.headers = headers;
    let before = head.headers.clone();
    let checked = check_response(&mut head);
    let has_coding = before.contains_key(TRANSFER_ENCODING);
    assert!(head.status != 101 || checked.is_err());
    if checked.is_ok() {
        assert!(!(has_coding && head.headers.contains_key(CONTENT_LENGTH)));
        strip_hop(&mut head.headers, Purpose::Exchange);
        is_of_no_hop(&before, &head.headers);
        assert!(!head.headers.contains_key(UPGRADE) && !head.headers.contains_key(CONNECTION));
    }
}

fn has_one_host(head: &request::Parts) {
    let hosts = head.headers.get_all(HOST).iter().count();
    let (version, target) = (head.version, head.uri.authority());
    assert!(hosts == 1 || hosts == 0 && (version != Version::HTTP_11));
    assert!(hosts == 1 || target.is_some() || version != Version::HTTP_2);
    // Of CONNECT the target is where to, and the host whose.
    if let Some(target) = target.filter(|_| hosts == 1 && head.method != Method::CONNECT) {
        let host = head.headers[HOST].as_bytes().trim_ascii();
        assert!(host.eq_ignore_ascii_case(target.as_str().as_bytes()));
    }
}

/// What is of one hop by its name, and what `Connection` named.
fn is_of_no_hop(before: &HeaderMap, after: &HeaderMap) {
    for name in HOP {
        assert!(!after.contains_key(name), "{name}");
    }
    let trailers = |it: &HeaderValue| it.as_bytes().eq_ignore_ascii_case(b"trailers");
    assert!(after.get_all(TE).iter().all(trailers));
    let may_be_named = |it: &&HeaderName| !KEPT.contains(&it.as_str());
    for name in after.keys().filter(may_be_named) {
        assert!(!names(before, name.as_str().as_bytes()), "{name}");
    }
}

/// Whether `Connection` has it among its options.
fn names(headers: &HeaderMap, option: &[u8]) -> bool {
    let mut values = headers.get_all(CONNECTION).iter();
    values.any(|it| {
        let mut options = it.as_bytes().split(|byte| *byte == b',');
        options.any(|it| it.trim_ascii().eq_ignore_ascii_case(option))
    })
}

const HOP: [&str; 4] = [
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "http2-settings",
];
/// What a message means, and what says by itself whether it is of the hop.
const KEPT: [&str; 10] = [
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "host",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "upgrade",
];
