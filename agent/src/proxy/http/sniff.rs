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
    /// Nothing worth waiting for; but a generous server may take it for a request once its first line is there.
    Doubtful,
    /// The same of what has bytes that belong into no first line: a strict server never takes it.
    Strange,
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

/// A request line (RFC 9112, section 3): a method, a target, and the version. A line that is there as a whole is
/// one if it ends as one does, however badly the rest of it is written: to answer that it is bad is better than
/// to pass it on to somebody who takes it. Until then it is HTTP if it looks so far beyond what other
/// protocols begin with.
fn sniff_http1(bytes: &[u8]) -> Sniffed {
    let blank = blank(bytes);
    let line = &bytes[blank..];
    if line.is_empty() {
        return match blank > MOST_BLANK_BYTES {
            true => Sniffed::Doubtful,
            false => Sniffed::More,
        };
    }
    match line.iter().position(|it| *it == b'\n') {
        Some(end) if ends_with_version(&line[..end]) => Sniffed::Http(Version::Http1),
        Some(_) => Sniffed::Opaque,
        None => sniff_beginning(line),
    }
}

/// How many bytes of empty lines it begins with: those before a request are to be ignored (RFC 9112, section 2.2).
pub fn blank(bytes: &[u8]) -> usize {
    let blank = bytes.iter().take_while(|it| matches!(it, b'\r' | b'\n'));
    blank.count()
}

/// Whether a line has several words, and the last is a version of HTTP.
fn ends_with_version(line: &[u8]) -> bool {
    // Some servers read it as Latin-1, which has spaces beyond ASCII.
    let mut words = line
        .split(|it| it.is_ascii_whitespace() || it.is_ascii_control() || !it.is_ascii())
        .filter(|it| !it.is_empty());
    let last = words.next_back().unwrap_or_default();
    let Some((name, number)) = last.split_at_checked(HTTP_SLASH.len()) else {
        return false;
    };
    let is_number = |it: &&[u8]| !it.is_empty() && it.iter().all(u8::is_ascii_digit);
    let numbers: Vec<&[u8]> = number.split(|it| *it == b'.').collect();
    words.next().is_some()
        && name.eq_ignore_ascii_case(HTTP_SLASH)
        && numbers.len() == 2
        && numbers.iter().all(is_number)
}

/// The same of a line that has no end yet, and is not empty. Never [`Sniffed::Opaque`]: how a line ends
/// decides what it is, so that cutting it changes nothing.
fn sniff_beginning(line: &[u8]) -> Sniffed {
    if !line.iter().copied().all(is_of_line) {
        return Sniffed::Strange;
    }
    let method = line.iter().take_while(|it| is_token(**it)).count();
    let (method, after) = line.split_at(method);
    match after.first() {
        // A word that may be all that is said for now: worth waiting only if it may become a method.
        None if METHODS.iter().any(|it| it.starts_with(method)) => return Sniffed::More,
        None => return Sniffed::Doubtful,
        // Servers that skip what is before a request begin with what no other protocol does.
        Some(b' ' | b'\t') => {}
        Some(_) => return Sniffed::Strange,
    }
    let target = &after[1..];
    let is_known = METHODS.contains(&method) && after[0] == b' ';
    let word = target.split(u8::is_ascii_whitespace).next();
    let word = word.unwrap_or_default();
    let is_target = word.first() == Some(&b'/') || word.windows(3).any(|it| it == b"://");
    let is_tabbed = target.contains(&b'\t');
    if is_known && !is_tabbed && target.len() >= LONG_TARGET_BYTES
        || is_target && word.len() >= LONG_TARGET_BYTES
    {
        Sniffed::Http(Version::Http1)
    } else if is_known && !is_tabbed {
        Sniffed::More
    } else {
        Sniffed::Doubtful
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

/// What may stand in a line.
fn is_of_line(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r') || byte.is_ascii_graphic() || byte >= 0x80
}

impl Sniffed {
    /// The name that a client hello asks for.
    pub fn server_name(&self) -> Option<&str> {
        match self {
            Self::Tls { server_name } => server_name.as_deref(),
            _ => None,
        }
    }

    /// As metrics and logs name it.
    pub fn as_str(&self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::More => "unknown",
            Self::Http(Version::Http1) => "http1",
            Self::Http(Version::Http2) => "http2",
            Self::Tls { .. } => "tls",
            Self::Doubtful | Self::Strange | Self::Opaque => "opaque",
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
const HTTP_SLASH: &[u8] = b"HTTP/";
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
            (b"hello", Sniffed::Doubtful),
            (b"hello world", Sniffed::Doubtful),
            (b"hello world\n", Sniffed::Opaque),
            (b"GET /a", Sniffed::More),
            (b"HELO", Sniffed::Doubtful),
            (b"FROB / HTTP/1.1", Sniffed::Doubtful),
            (b"\tGET / HTTP/1.1", Sniffed::Doubtful),
            (b"GET\t/", Sniffed::Doubtful),
            (b"GET / HTTP/1.1", Sniffed::More),
            (b"GET / HTTP/1.1\r\n", http1.clone()),
            (b"GET / HTTP/1.0\n", http1.clone()),
            (b"\r\nPOST /a HTTP/1.1\r\nhost: x\r\n\r\n", http1.clone()),
            (b"CONNECT a:1 HTTP/1.1\r\n", http1.clone()),
            (b"FROB * HTTP/1.1\r\n", http1.clone()),
            (b"frob / http/1.1 \t\r\n", http1.clone()),
            (b" GET\t/\tHTTP/1.1\r\n", http1.clone()),
            (b"GET / HTTP/1.10\n", http1.clone()),
            (b"{} / HTTP/1.1\n", http1.clone()),
            (b"HTTP/1.1\n", Sniffed::Opaque),
            (b"HTTP/1.1 200 OK\r\n", Sniffed::Opaque),
            (b"let us talk about http/2\n", Sniffed::Opaque),
            (b"P", Sniffed::More),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", Sniffed::More),
            (PREFACE, Sniffed::Http(Version::Http2)),
            (b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", http1.clone()),
            (b"GET key\r\n", Sniffed::Opaque),
            (b"EHLO example.org\r\n", Sniffed::Opaque),
            (b"OPTIONS rtsp://a RTSP/1.0\r\n", Sniffed::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Sniffed::Opaque),
            (b"\0\0\0\x08", Sniffed::Strange),
            (b"GET\0/", Sniffed::Strange),
            (b"GET /\x01", Sniffed::Strange),
            (b"\x0b", Sniffed::Strange),
            (b"\x0bGET / HTTP/1.1\r\n", http1.clone()),
            (b"GET\x0b/ HTTP/1.1\r\n", http1.clone()),
            (b"GET / HTTP/1.1\xa0\r\n", http1.clone()),
            (b"{\"a\":", Sniffed::Strange),
            (b"{\"a\": 1}\n", Sniffed::Opaque),
            (b"THISISNOMETHODOFANYKINDATALL", Sniffed::Doubtful),
            (&[b'\n'; 40], Sniffed::Doubtful),
            (b"\x16\x03\x01", Sniffed::More),
            (b"\x16\x03\x01\x00\x05\x02", Sniffed::Opaque),
            (b"\x16\x00", Sniffed::Opaque),
            (long.as_bytes(), http1.clone()),
            (long.replace("GET", "frob").as_bytes(), http1),
            (
                long.replace('a', "a ").replace("GET", "frob").as_bytes(),
                Sniffed::Doubtful,
            ),
        ] {
            assert_eq!(sniff(bytes), is, "{:?}", bytes.escape_ascii().to_string());
        }
    }

    /// What is not taken for HTTP at first and passed on must never have been worth more.
    fn is_told_from_whole(line: &str) -> bool {
        let whole = line.as_bytes();
        sniff(whole) == Sniffed::Http(Version::Http1)
            && (1..whole.len()).all(|at| sniff(&whole[..at]) != Sniffed::Opaque)
    }

    proptest! {
        #[test]
        fn a_request_line_is_never_taken_for_something_else(
            method in "[A-Za-z0-9!#$%&'*+.^_`|~-]{1,40}",
            path in "/[!-~]{0,40}",
            minor in 0..10,
        ) {
            let line = format!("{method} {path} HTTP/1.{minor}\n");
            prop_assert!(is_told_from_whole(&line), "{line:?}");
        }

        #[test]
        fn nor_is_an_odd_one(
            before in prop::collection::vec(any::<u8>(), 0..4),
            between in prop::collection::vec(any::<u8>(), 1..4),
            after in prop::collection::vec(any::<u8>(), 0..4),
        ) {
            let mut line = [&before[..], b"GET", &between, b"/", &between, b"HTTP/1.1", &after, b"\n"].concat();
            // Bytes of a line's end make two of it.
            line.truncate(line.iter().position(|it| *it == b'\n').map_or(0, |it| it + 1));
            if sniff(&line) == Sniffed::Http(Version::Http1) {
                for at in 1..line.len() {
                    prop_assert_ne!(sniff(&line[..at]), Sniffed::Opaque, "{:?}", line.escape_ascii().to_string());
                }
            }
        }

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
