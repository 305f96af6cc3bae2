//! What hostile servers answer.

use super::frames::*;

/// What a hostile server says to each request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What it is.
    pub name: &'static str,
    /// By HTTP/2.
    pub is_http2: bool,
    /// What it says first.
    pub start: Vec<u8>,
    /// What it says then, again and again,
    pub then: Vec<u8>,
    /// so many times.
    pub times: usize,
    /// It is no answer: its client hears that from the mesh.
    pub is_none: bool,
}

/// All that hostile servers answer.
pub fn answers() -> Vec<Answer> {
    let mut all = http1();
    all.extend(http2());
    all
}

fn http1() -> Vec<Answer> {
    let answer = |name, start: &str, then: &str, times| Answer {
        name,
        is_http2: false,
        start: start.as_bytes().to_vec(),
        then: then.as_bytes().to_vec(),
        times,
        is_none: false,
    };
    let none = |name, fields: &str| Answer {
        is_none: true,
        ..answer(
            name,
            &format!("HTTP/1.1 200 OK\r\n{fields}content-length: 8\r\n\r\nSPLITTED"),
            "",
            0,
        )
    };
    let ok = "HTTP/1.1 200 OK\r\n";
    let long = format!("x: {}\r\n", "a".repeat(1000));
    let hint = format!(
        "HTTP/1.1 103 Early Hints\r\nlink: {}\r\n\r\n",
        "a".repeat(1000)
    );
    vec![
        answer("a head without end", ok, &long, 64_000),
        answer("ten thousand headers", ok, "x: a\r\n", 10_000),
        answer(
            "a status line without end",
            "HTTP/1.1 200 ",
            &"a".repeat(10_000),
            6400,
        ),
        answer(
            "100 Continue without end",
            "",
            "HTTP/1.1 100 Continue\r\n\r\n",
            1_000_000,
        ),
        answer("early hints without end", "", &hint, 64_000),
        answer(
            "an extension of a chunk without end",
            &format!("{ok}transfer-encoding: chunked\r\n\r\n1;a="),
            &"a".repeat(10_000),
            6400,
        ),
        answer(
            "trailers without end",
            &format!("{ok}transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"),
            &long,
            64_000,
        ),
        answer(
            "a length of a chunk without end",
            &format!("{ok}transfer-encoding: chunked\r\n\r\n"),
            &"0".repeat(10_000),
            6400,
        ),
        answer(
            "an answer behind the answer",
            &format!("{ok}content-length: 2\r\n\r\nok"),
            "HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nSPLITTED",
            1000,
        ),
        answer(
            "two lengths",
            &format!("{ok}content-length: 2\r\ncontent-length: 40\r\n\r\nok"),
            "HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nSPLITTED",
            1,
        ),
        answer(
            "more than its length",
            &format!("{ok}content-length: 2\r\n\r\nok"),
            &"SPLITTED".repeat(1000),
            1000,
        ),
        answer(
            "less than its length",
            &format!("{ok}content-length: 1000\r\n\r\nok"),
            "",
            0,
        ),
        answer("no HTTP", "\x16\x03\x01 SPLITTED", "SPLITTED", 1000),
        answer(
            "an upgrade that nobody asked for",
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
            "SPLITTED",
            1000,
        ),
        answer(
            "a line break in a field",
            &format!("{ok}x: a\r\r\n\r\nSPLITTED"),
            "",
            0,
        ),
        none("a field in two lines", "x: a\r\n b\r\n"),
        none("a first field in two lines", " x: a\r\n"),
        none("a space before the colon", "x : a\r\n"),
        none("a space in a field's name", "x y: a\r\n"),
        none("a control character in a field's name", "x\x01: a\r\n"),
        none("a field without a name", ": a\r\n"),
        none("a field without a colon", "x\r\n"),
    ]
}

fn http2() -> Vec<Answer> {
    let settings = frame(SETTINGS, 0, 0, &[]);
    let answer = |name, start: Vec<u8>, then: Vec<u8>, times| Answer {
        name,
        is_http2: true,
        start: [settings.clone(), start].concat(),
        then,
        times,
        is_none: false,
    };
    let status = |it: &str| literal(":status", it);
    let ok = head(1, 0, &status("200"));
    let hint = [status("103"), literal("link", &"a".repeat(1000))].concat();
    let bomb = [
        status("200"),
        remembered("x", &"a".repeat(4000)),
        vec![0xbe; 16_000],
    ]
    .concat();
    let trailers = literal("x", &"a".repeat(1000)).repeat(1000);
    let promised = [&2_u32.to_be_bytes()[..], &request("GET", "/")].concat();
    vec![
        answer(
            "by HTTP/2, early hints without end",
            vec![],
            head(1, 0, &hint),
            64_000,
        ),
        answer(
            "by HTTP/2, 100 Continue without end",
            vec![],
            head(1, 0, &status("100")).repeat(100),
            10_000,
        ),
        answer(
            "continuations without end",
            frame(HEADERS, 0, 1, &status("200")),
            frame(CONTINUATION, 0, 1, &literal("x", &"a".repeat(16_000))),
            4000,
        ),
        answer(
            "one field for sixteen thousand",
            head(1, 0, &bomb),
            vec![],
            0,
        ),
        answer(
            "trailers of a megabyte",
            [ok.clone(), head(1, END_STREAM, &trailers)].concat(),
            vec![],
            0,
        ),
        answer(
            "data of nothing",
            ok.clone(),
            frame(DATA, 0, 1, &[]).repeat(100),
            10_000,
        ),
        answer(
            "pings",
            vec![],
            frame(PING, 0, 0, &[7; 8]).repeat(100),
            10_000,
        ),
        answer(
            "settings",
            vec![],
            frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]).repeat(100),
            10_000,
        ),
        answer(
            "pushes",
            vec![],
            frame(PUSH_PROMISE, END_HEADERS, 1, &promised),
            1000,
        ),
        answer(
            "more than the window",
            ok,
            frame(DATA, 0, 1, &[0; 16_000]),
            1000,
        ),
        answer(
            "data before the head",
            vec![],
            frame(DATA, 0, 1, b"SPLITTED"),
            1,
        ),
        answer(
            "no HTTP/2",
            b"HTTP/1.1 200 OK\r\n\r\nSPLITTED".to_vec(),
            vec![],
            0,
        ),
        answer("leaving at once", frame(GOAWAY, 0, 0, &[0; 8]), vec![], 0),
    ]
}
