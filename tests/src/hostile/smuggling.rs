//! Requests that two readers would read differently.

/// What they are, and their bytes. Each has in it, under one of its readings, a request of `SMUGGLED` or for
/// the path itself. Without a mesh nearly all of them succeed with one of those servers that there are.
const AMBIGUOUS: [(&str, &str); 32] = [
    (
        "length and chunks",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "chunks and length",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\nContent-Length: 60\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "two lengths",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\nContent-Length: 53\r\n\r\nSMUGGLED",
    ),
    (
        "a list of lengths",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 0, 53\r\n\r\nSMUGGLED",
    ),
    (
        "a length with a sign",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: +0\r\n\r\nSMUGGLED",
    ),
    (
        "a negative length",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: -1\r\n\r\nSMUGGLED",
    ),
    (
        "a hexadecimal length",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 0x0\r\n\r\nSMUGGLED",
    ),
    (
        "a length beyond all numbers",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 18446744073709551616\r\n\r\nSMUGGLED",
    ),
    (
        "a length with a space before the colon",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length : 0\r\n\r\nSMUGGLED",
    ),
    (
        "chunks with a space before the colon",
        "POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 53\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "chunks that are misspelt",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "chunks, then something else",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "chunks twice",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "chunks after a vertical tab",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: \x0bchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "chunks by HTTP/1.0",
        "POST / HTTP/1.0\r\nHost: shop\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "a folded line",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "a first line that is folded",
        "POST / HTTP/1.1\r\n Transfer-Encoding: chunked\r\nHost: shop\r\nContent-Length: 5\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "a header that ends with LF",
        "POST / HTTP/1.1\r\nHost: shop\r\nX: y\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "a header with CR in it",
        "POST / HTTP/1.1\r\nHost: shop\r\nX: y\rTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "a header with NUL in it",
        "POST / HTTP/1.1\r\nHost: shop\r\nX: y\0\r\nContent-Length: 0\r\n\r\nSMUGGLED",
    ),
    (
        "a name with a space",
        "POST / HTTP/1.1\r\nHost: shop\r\nBad Name: y\r\nContent-Length: 0\r\n\r\nSMUGGLED",
    ),
    (
        "a name that is empty",
        "POST / HTTP/1.1\r\nHost: shop\r\n: y\r\nContent-Length: 0\r\n\r\nSMUGGLED",
    ),
    (
        "a line without a colon",
        "POST / HTTP/1.1\r\nHost: shop\r\nnothing\r\nContent-Length: 0\r\n\r\nSMUGGLED",
    ),
    (
        "two hosts",
        "GET /smuggled HTTP/1.1\r\nHost: shop\r\nHost: admin\r\n\r\n",
    ),
    ("no host", "GET /smuggled HTTP/1.1\r\nX: y\r\n\r\n"),
    (
        "a host that is none",
        "GET /smuggled HTTP/1.1\r\nHost: shop/admin@x\r\n\r\n",
    ),
    (
        "two targets",
        "GET / /other HTTP/1.1\r\nHost: shop\r\n\r\nSMUGGLED",
    ),
    (
        "a chunk's size that is none",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n0x0\r\n\r\nSMUGGLED",
    ),
    (
        "a chunk's size beyond all numbers",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\nSMUGGLED",
    ),
    (
        "a chunk that ends with LF",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n1\nx\n0\n\nSMUGGLED",
    ),
    (
        "a chunk longer than it says",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxyz\r\n0\r\n\r\nSMUGGLED",
    ),
    (
        "an extension with LF",
        "POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n1;a\nb\r\nx\r\n0\r\n\r\nSMUGGLED",
    ),
];

/// What stands for `SMUGGLED`: what an attacker would have another client's request become.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: shop\r\nX-Rest: of\r\n\r\n";

/// One of them, to be sent.
#[derive(Clone, Debug)]
pub struct Ambiguous {
    /// What it is.
    pub name: &'static str,
    /// The path that nobody should understand it to be for: another one for each, so that what one has achieved does not
    /// count for the next.
    pub hidden: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// All of them. What should not be understood is a request for a path that begins with `hidden`; all else is for
/// `open`.
pub fn ambiguous(open: &str, hidden: &str) -> Vec<Ambiguous> {
    let all = AMBIGUOUS.into_iter().enumerate();
    all.map(|(number, (name, bytes))| {
        let hidden = format!("{hidden}-{number}");
        let bytes = bytes
            .replace("SMUGGLED", SMUGGLED)
            .replace(" / ", &format!(" {open} "))
            .replace("/smuggled", &hidden)
            .into_bytes();
        Ambiguous {
            name,
            hidden,
            bytes,
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_hides_something() {
        for (number, attack) in ambiguous("/open", "/hidden").into_iter().enumerate() {
            let name = attack.name;
            let text = String::from_utf8(attack.bytes).expect("ASCII");
            assert_eq!(attack.hidden, format!("/hidden-{number}"));
            let asked = format!("GET /hidden-{number} HTTP/1.");
            assert!(text.contains(&asked), "{name}: {text:?}");
            assert!(
                !text.contains("SMUGGLED") && !text.contains(" / HTTP"),
                "{name}: {text:?}"
            );
        }
    }
}
