//! What a client may begin with: any first bytes are something, and what is taken for HTTP/1 has a
//! request line, as far as it is there.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_agent::proxy::http::Version;
use weft_agent::proxy::http::sniff::{Sniffed, sniff};

fuzz_target!(|bytes: &[u8]| {
    match sniff(bytes) {
        Sniffed::Http(Version::Http1) => {
            let is_between = |it: &u8| it.is_ascii_whitespace() || it.is_ascii_control();
            assert!(bytes.iter().any(is_between));
            // Cutting it must not hide it.
            let most = bytes.len().min(MOST_CUT);
            assert!((1..most).all(|at| sniff(&bytes[..at]) != Sniffed::Opaque));
        }
        Sniffed::Http(Version::Http2) => assert!(bytes.starts_with(b"PRI * HTTP/2.0\r\n")),
        Sniffed::Tls { server_name } => {
            assert_eq!(bytes[0], 22);
            // It is compared with names from routes, which are in lower case.
            let name = server_name.unwrap_or_default();
            assert!(!name.bytes().any(|byte| byte.is_ascii_uppercase()));
        }
        Sniffed::More | Sniffed::Doubtful | Sniffed::Strange | Sniffed::Opaque => {}
    }
});

const MOST_CUT: usize = 64;
