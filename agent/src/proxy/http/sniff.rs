//! What protocol a client speaks, from the first bytes that it sends. Pure.

use std::borrow::Cow;

use rustls::server::Acceptor;

use super::Version;

/// What first bytes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sniffed {
    /// They may still become several things.
    More,
    /// Requests of HTTP.
    Http(Version),
    /// A TLS client hello (RFC 8446, section 4.1.2), with the name that it asks for.
    Tls {
        /// `server_name`, lower-case.
        server_name: Option<String>,
    },
    /// Something else.
    Opaque,
}

/// Looks at the first bytes of a connection.
pub fn sniff(bytes: &[u8]) -> Sniffed {
    match bytes.first() {
        None => Sniffed::More,
        Some(&TLS_HANDSHAKE) => sniff_tls(bytes),
        Some(_) if bytes.starts_with(PREFACE) => Sniffed::Http(Version::Http2),
        Some(_) if PREFACE.starts_with(bytes) => Sniffed::More,
        Some(_) => sniff_http1(bytes),
    }
}

/// A request line as RFC 9112, section 3 has it: a method, which is a token, a target, and the version.
/// Until the line is there as a whole, it is HTTP if it looks so far beyond what other protocols
/// begin with.
fn sniff_http1(bytes: &[u8]) -> Sniffed {
    // Empty lines before it are to be ignored (section 2.2).
    let blank = bytes.iter().take_while(|it| matches!(it, b'\r' | b'\n'));
    let blank = blank.count();
    if blank > MOST_BLANK_BYTES {
        return Sniffed::Opaque;
    }
    let line = &bytes[blank..];
    let method = line.iter().take_while(|it| is_token(**it)).count();
    if method > LONGEST_METHOD_BYTES {
        return Sniffed::Opaque;
    }
    let Some(after) = line.get(method) else {
        // A word that may be all that is said for now: worth waiting only if it may become a method.
        let may_be = method == 0 || METHODS.iter().any(|it| it.starts_with(line));
        return if may_be {
            Sniffed::More
        } else {
            Sniffed::Opaque
        };
    };
    if method == 0 || *after != b' ' {
        return Sniffed::Opaque;
    }
    let rest = &line[method + 1..];
    match rest.iter().position(|it| *it == b'\n') {
        Some(end) => {
            let end = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
            let version = end.rsplit(|it| *it == b' ').next().unwrap_or_default();
            match version {
                b"HTTP/1.1" | b"HTTP/1.0" => Sniffed::Http(Version::Http1),
                _ => Sniffed::Opaque,
            }
        }
        None if !METHODS.contains(&&line[..method]) => Sniffed::Opaque,
        None if rest.iter().any(|it| !is_of_target(*it)) => Sniffed::Opaque,
        None if rest.len() >= LONG_TARGET_BYTES => Sniffed::Http(Version::Http1),
        None => Sniffed::More,
    }
}

fn sniff_tls(bytes: &[u8]) -> Sniffed {
    // Record type, version 3.x, a length; then a handshake message of the type client hello.
    for (at, fits) in [
        (1, (|it: u8| it == 3) as fn(u8) -> bool),
        (2, |it| it <= 4),
        (5, |it| it == CLIENT_HELLO),
    ] {
        match bytes.get(at) {
            None => return Sniffed::More,
            Some(byte) if !fits(*byte) => return Sniffed::Opaque,
            Some(_) => {}
        }
    }
    let nameless = Sniffed::Tls { server_name: None };
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        match acceptor.read_tls(&mut rest) {
            Ok(count) if count > 0 => {}
            _ => return nameless,
        }
    }
    match acceptor.accept() {
        Ok(Some(accepted)) => Sniffed::Tls {
            server_name: accepted
                .client_hello()
                .server_name()
                .map(|it| it.to_ascii_lowercase()),
        },
        Ok(None) if bytes.len() < MOST_BYTES => Sniffed::More,
        Ok(None) | Err(_) => nameless,
    }
}

/// `tchar` of RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What may stand between the method and the line's end.
fn is_of_target(byte: u8) -> bool {
    byte == b' ' || byte == b'\r' || byte.is_ascii_graphic() || byte >= 0x80
}

impl Sniffed {
    /// As metrics and logs name it.
    pub fn as_str(&self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::More => "unknown",
            Self::Http(Version::Http1) => "http1",
            Self::Http(Version::Http2) => "http2",
            Self::Tls { .. } => "tls",
            Self::Opaque => "opaque",
        })
    }
}

/// How many bytes are looked at.
pub const MOST_BYTES: usize = 16 * 1024;
/// The start of HTTP/2's preface (RFC 9113, section 3.4), as far as nothing else begins so.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const TLS_HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const MOST_BLANK_BYTES: usize = 16;
/// Methods that are waited for when only a part of them is there: those of RFC 9110, PATCH, and WebDAV's
/// most common. Others are known when the whole line comes at once.
const METHODS: [&[u8]; 16] = [
    b"GET",
    b"HEAD",
    b"POST",
    b"PUT",
    b"DELETE",
    b"CONNECT",
    b"OPTIONS",
    b"TRACE",
    b"PATCH",
    b"PROPFIND",
    b"PROPPATCH",
    b"MKCOL",
    b"COPY",
    b"MOVE",
    b"LOCK",
    b"REPORT",
];
/// Longer than any method there is (UPDATEREDIRECTREF).
const LONGEST_METHOD_BYTES: usize = 24;
/// A method and so much of a target without anything that does not belong there.
const LONG_TARGET_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn first_bytes() {
        let http1 = Sniffed::Http(Version::Http1);
        let long = format!("GET /{} HTTP/1.1", "a".repeat(2000));
        for (bytes, is) in [
            (&b""[..], Sniffed::More),
            (b"G", Sniffed::More),
            (b"PROPF", Sniffed::More),
            (b"hello", Sniffed::Opaque),
            (b"hello world", Sniffed::Opaque),
            (b"GET /a", Sniffed::More),
            (b"HELO", Sniffed::Opaque),
            (b"GET / HTTP/1.1", Sniffed::More),
            (b"GET / HTTP/1.1\r\n", http1.clone()),
            (b"GET / HTTP/1.0\n", http1.clone()),
            (b"\r\nPOST /a HTTP/1.1\r\nhost: x\r\n\r\n", http1.clone()),
            (b"CONNECT a:1 HTTP/1.1\r\n", http1.clone()),
            (b"FROB * HTTP/1.1\r\n", http1.clone()),
            (b"P", Sniffed::More),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", Sniffed::More),
            (PREFACE, Sniffed::Http(Version::Http2)),
            (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", Sniffed::Opaque),
            (b"GET key\r\n", Sniffed::Opaque),
            (b"EHLO example.org\r\n", Sniffed::Opaque),
            (b"OPTIONS rtsp://a RTSP/1.0\r\n", Sniffed::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Sniffed::Opaque),
            (b"\0\0\0\x08", Sniffed::Opaque),
            (b"GET\0/", Sniffed::Opaque),
            (b"GET /\x01", Sniffed::Opaque),
            (b"THISISNOMETHODOFANYKINDATALL", Sniffed::Opaque),
            (b"\x16\x03\x01", Sniffed::More),
            (b"\x16\x03\x01\x00\x05\x02", Sniffed::Opaque),
            (b"\x16\x00", Sniffed::Opaque),
            (long.as_bytes(), http1),
        ] {
            assert_eq!(sniff(bytes), is, "{:?}", bytes.escape_ascii().to_string());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_something(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = sniff(&bytes);
        }

        #[test]
        fn every_request_line_is_http(method in "[A-Z]{1,12}", path in "/[a-z0-9/?=%.-]{0,40}") {
            let line = format!("{method} {path} HTTP/1.1\r\n");
            prop_assert_eq!(sniff(line.as_bytes()), Sniffed::Http(Version::Http1));
        }

        #[test]
        fn a_line_that_comes_in_pieces(at in 0..METHODS.len(), path in "/[a-z0-9/?=%.-]{0,40}") {
            let method = String::from_utf8_lossy(METHODS[at]);
            let line = format!("{method} {path} HTTP/1.1\r\n");
            prop_assert_eq!(sniff(line.as_bytes()), Sniffed::Http(Version::Http1));
            for at in 0..line.len() {
                prop_assert_eq!(sniff(&line.as_bytes()[..at]), Sniffed::More);
            }
        }
    }
}
