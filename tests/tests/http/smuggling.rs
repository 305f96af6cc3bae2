//! Requests that two readers would read differently: never does the server see two of one, and never
//! does another client get an answer that is not its own.

use anyhow::{Context, Result, ensure};
use weft_tests::Checks;
use weft_tests::apps::{Nginx, curl_shop};
use weft_tests::hostile::{Ambiguous, PREFACE, ambiguous, frame, request};
use weft_tests::testapp::Server;
use weft_tests::webapp::{HttpServer, Raw, Transcript, raw};

use crate::stage::{Pair, Stage, expect_code, seen};

#[test]
fn http_smuggling() {
    let stage = Stage::build().expect("a cluster");
    let mut checks = Checks::new("http smuggling");
    for (place, pair) in stage.meshed() {
        let scene = Scene::start(pair).expect("servers");
        for attack in ambiguous("/", "/smuggled") {
            checks.check(&format!("{}, {place}", attack.name), || {
                scene.attack(&attack)
            });
        }
        checks.check(
            &format!("what was passed on is unambiguous, {place}"),
            || scene.unambiguous(),
        );
        checks.check(
            &format!("the control: requests as they should be, {place}"),
            || scene.control(),
        );
        checks.check(&format!("limits of heads, {place}"), || scene.limits());
        checks.check(&format!("heads at the limits, {place}"), || {
            scene.exact_limits()
        });
        checks.check(&format!("limits of HTTP/2, {place}"), || {
            scene.limits_of_http2()
        });
        checks.check(&format!("lines that end with LF, {place}"), || {
            scene.line_feeds()
        });
        checks.check(&format!("a length beside a coding, {place}"), || {
            scene.two_lengths()
        });
        checks.check(&format!("answers that are no good, {place}"), || {
            answers(pair)
        });
    }
    stage.check_meshed(
        &mut checks,
        "fields of HTTP/2 that HTTP/1 could not carry",
        forged_fields,
    );
    checks.finish();
}

/// Servers that read with different care.
struct Scene<'a> {
    pair: Pair<'a>,
    hyper: HttpServer,
    nginx: Nginx,
    /// One believes lengths, the other chunks.
    careless: [Transcript; 2],
}

impl<'a> Scene<'a> {
    fn start(pair: Pair<'a>) -> Result<Scene<'a>> {
        let careless = |port, trust| Transcript::start(pair.server, port, &["--trust", trust]);
        Ok(Scene {
            pair,
            hyper: HttpServer::start(pair.server, HYPER, &[])?,
            nginx: Nginx::start(pair.server, NGINX)?,
            careless: [
                careless(CARELESS, "length")?,
                careless(CARELESS + 1, "chunks")?,
            ],
        })
    }

    fn send(&self, port: u16, bytes: &str) -> Result<Raw> {
        let further = ["--half-close", "--quiet-ms", "3000"];
        raw(self.pair.client, self.pair.at(port), &[bytes], &further)
    }

    /// One that is rejected is answered with 400 or nothing; one that is made unambiguous is one
    /// request. Neither does a second one come of it, nor does the next client see anything of it.
    fn attack(&self, attack: &Ambiguous) -> Result<()> {
        let bytes = attack.bytes.escape_ascii().to_string();
        for port in [HYPER, NGINX, CARELESS, CARELESS + 1] {
            let got = self.send(port, &bytes)?;
            ensure!(
                got.statuses.len() <= 1,
                "port {port} answers {:?}",
                got.statuses
            );
            let fine = got
                .statuses
                .iter()
                .all(|code| [200, 400, 404, 405, 413, 431, 501, 505].contains(code));
            ensure!(fine, "port {port} answers {:?}", got.statuses);
        }
        self.nobody_saw(&attack.hidden)?;
        for port in [HYPER, NGINX, CARELESS, CARELESS + 1] {
            let shown = curl_shop(self.pair.client, self.pair.at(port), "/", &[])?;
            expect_code(&shown, 200).with_context(|| format!("the next client, at port {port}"))?;
        }
        let mine = seen(&curl_shop(
            self.pair.client,
            self.pair.at(HYPER),
            "/mine",
            &[],
        )?)?;
        ensure!(
            mine.path == "/mine",
            "the next client was answered for {}",
            mine.path
        );
        self.nobody_saw(&attack.hidden)
    }

    fn nobody_saw(&self, path: &str) -> Result<()> {
        let requests = self.hyper.requests()?;
        ensure!(
            requests.iter().all(|it| it.path != path),
            "hyper's server saw it"
        );
        let lines = self.nginx.access_log()?;
        ensure!(lines.iter().all(|it| it.path != path), "nginx saw it");
        for server in &self.careless {
            let heads = server.heads()?;
            let saw = heads
                .iter()
                .any(|head| head.starts_with(&format!("GET {path} ")));
            ensure!(!saw, "a careless server saw it");
        }
        Ok(())
    }

    /// Of all heads that ever reached the servers that write them down.
    fn unambiguous(&self) -> Result<()> {
        for server in &self.careless {
            for head in server.heads()? {
                check_head(&head).with_context(|| format!("this was passed on: {head}"))?;
            }
        }
        Ok(())
    }

    /// What the attacks differ from: two requests that are two, in one segment.
    fn control(&self) -> Result<()> {
        let first = "POST /first HTTP/1.1\\r\\nHost: shop\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n3\\r\\nabc\\r\\n0\\r\\n\\r\\n";
        let second = "GET /second HTTP/1.1\\r\\nHost: shop\\r\\nConnection: close\\r\\n\\r\\n";
        for port in [HYPER, CARELESS, CARELESS + 1] {
            let got = self.send(port, &format!("{first}{second}"))?;
            ensure!(got.statuses == [200, 200], "port {port}: {got:?}");
        }
        let both = |paths: &[&str]| ["/first", "/second"].iter().all(|it| paths.contains(it));
        let requests = self.hyper.requests()?;
        let paths: Vec<&str> = requests.iter().map(|it| it.path.as_str()).collect();
        ensure!(both(&paths), "hyper's server saw {paths:?}");
        for server in &self.careless {
            let heads = server.heads()?;
            let paths: Vec<&str> = heads
                .iter()
                .filter_map(|head| head.split(' ').nth(1))
                .collect();
            ensure!(both(&paths), "a careless server saw {paths:?}");
        }
        Ok(())
    }

    /// Refused wherever a head is, and what was before it is served; in a body it is a byte like all others.
    fn line_feeds(&self) -> Result<()> {
        let get = "GET /lines HTTP/1.1\\r\\nHost: shop\\r\\n\\r\\n";
        let post =
            "POST /lines HTTP/1.1\\r\\nHost: shop\\r\\nContent-Length: 5\\r\\n\\r\\na\\nb\\nc";
        let chunked = "POST /lines HTTP/1.1\\r\\nHost: shop\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n\
            2\\r\\n\\n\\n\\r\\n0\\r\\n\\r\\n";
        let upgrade = "GET /lines HTTP/1.1\\r\\nHost: shop\\r\\nUpgrade: x\\r\\nConnection: upgrade\\r\\n\\r\\n";
        let bad = get.replace("/lines", "/bad");
        for (before, served) in [("", 0), (get, 1), (post, 1), (chunked, 1), (upgrade, 1)] {
            for (place, line) in [
                ("the request line", bad.replacen("\\r\\n", "\\n", 1)),
                ("a header", bad.replace("shop\\r\\n", "shop\\n")),
                (
                    "the last line",
                    format!("{}\\n", bad.trim_end_matches("\\r\\n")),
                ),
                ("all lines", bad.replace("\\r\\n", "\\n")),
                ("an empty line before it", format!("\\n{bad}")),
            ] {
                let mut expected = vec![200; served];
                expected.push(400);
                let (client, target) = (self.pair.client, self.pair.at(HYPER));
                let args = ["--pause-ms", "200"];
                let segments: &[&str] = match before {
                    "" => &[&line],
                    before => &[before, &line],
                };
                let got = raw(client, target, segments, &args)?;
                ensure!(
                    got.statuses == expected && got.outcome == "eof",
                    "{place} behind {before:?}: {got:?}"
                );
            }
        }
        let trailers = chunked.replace("0\\r\\n\\r\\n", "0\\r\\nt: 1\\n\\r\\n");
        let got = self.send(HYPER, &trailers)?;
        ensure!(
            got.statuses.iter().all(|it| *it == 400),
            "trailers: {got:?}"
        );
        self.nobody_saw("/bad")
    }

    /// A head of a megabyte, or of ten thousand lines, is not taken, whoever the server is.
    fn limits(&self) -> Result<()> {
        let file = self.pair.client.dir().join("large-head");
        let large = format!("X-Large: {}\r\n", "x".repeat(1 << 20));
        for further in [large, "X-Many: x\r\n".repeat(10_000)] {
            let request = format!("GET /limits HTTP/1.1\r\nHost: shop\r\n{further}\r\n");
            std::fs::write(&file, request)?;
            let name = file.display().to_string();
            let got = raw(
                self.pair.client,
                self.pair.at(HYPER),
                &[],
                &["--file", &name],
            )?;
            let refused = got
                .statuses
                .iter()
                .all(|code| [400, 413, 431].contains(code));
            ensure!(
                refused && ["eof", "reset"].contains(&got.outcome.as_str()),
                "{:?}",
                got.statuses
            );
        }
        Ok(())
    }
}

impl Scene<'_> {
    /// Refused, in whichever order they are, and though both may say the same.
    fn two_lengths(&self) -> Result<()> {
        let fields = [
            "Content-Length: 8\\r\\n",
            "Transfer-Encoding: chunked\\r\\n",
        ];
        let request = |fields: &str| {
            format!(
                "POST /lengths HTTP/1.1\\r\\nHost: shop\\r\\n{fields}\\r\\n3\\r\\nabc\\r\\n0\\r\\n\\r\\n"
            )
        };
        for fields in [fields.concat(), [fields[1], fields[0]].concat()] {
            for port in [HYPER, NGINX, CARELESS, CARELESS + 1] {
                let got = self.send(port, &request(&fields))?;
                ensure!(got.statuses == [400], "{fields} at port {port}: {got:?}");
            }
        }
        self.nobody_saw("/lengths")?;
        let got = self.send(HYPER, &request(fields[1]))?;
        ensure!(got.statuses == [200], "the control: {got:?}");
        Ok(())
    }

    /// By the numbers that the documentation gives: what is just within them is served.
    fn exact_limits(&self) -> Result<()> {
        let begun = "GET /exactly HTTP/1.1\r\nHost: shop\r\n";
        let headers = |count: usize| format!("{begun}{}\r\n", "X-Many: x\r\n".repeat(count - 1));
        let bytes = |count: usize| {
            let rest = count - begun.len() - "X-Large: \r\n\r\n".len();
            format!("{begun}X-Large: {}\r\n\r\n", "x".repeat(rest))
        };
        let endless = bytes(MOST_HEAD_BYTES + 4);
        for (what, head, code) in [
            ("96 headers", headers(MOST_HEADERS), 200),
            ("97 headers", headers(MOST_HEADERS + 1), 431),
            ("a head of 64 KiB", bytes(MOST_HEAD_BYTES), 200),
            // The limit is reached, and it has no end yet.
            (
                "the beginning of a longer one",
                endless.trim_end().to_owned(),
                431,
            ),
            ("a head of 65 KiB", bytes(65 << 10), 431),
        ] {
            let got = self.send_file(CARELESS, head.as_bytes(), &["--until", "\\r\\n\\r\\n"])?;
            ensure!(got.statuses == [code], "{what}: {got:?}");
        }
        let heads = self.careless[0].heads()?;
        let served = heads.iter().filter(|it| it.starts_with("GET /exactly "));
        let served = served.count();
        ensure!(served == 2, "{served} were passed on");
        Ok(())
    }

    /// What is announced, and what ends a connection.
    fn limits_of_http2(&self) -> Result<()> {
        let begun = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
        // SETTINGS_MAX_CONCURRENT_STREAMS (RFC 9113, section 6.5.2) is 256.
        let announced = ["--until", "\\0\\x03\\0\\0\\x01\\0"];
        let got = self.send_file(HYPER, &begun, &announced)?;
        ensure!(got.outcome == "found", "{got:?}");
        let request = request("GET", "/reset");
        let resets = |count: u32| {
            let streams = (0..count).map(|it| 2 * it + 1);
            let pair = streams.flat_map(|it| {
                let opened = frame(HEADERS, END_STREAM | END_HEADERS, it, &request);
                [opened, frame(RST_STREAM, 0, it, &CANCEL)].concat()
            });
            [begun.clone(), pair.collect()].concat()
        };
        // GOAWAY's code is ENHANCE_YOUR_CALM (RFC 9113, section 7).
        let calm = ["--until", "\\0\\0\\0\\x0btoo_many_resets"];
        let got = self.send_file(HYPER, &resets(2000), &calm)?;
        ensure!(got.outcome == "found", "{got:?}");
        // The control: a few may be reset.
        let few = [&calm[..], &["--quiet-ms", "1000"]].concat();
        let got = self.send_file(HYPER, &resets(UNSEEN_RESETS), &few)?;
        ensure!(got.outcome == "quiet", "{got:?}");
        let (client, target) = (self.pair.client, self.pair.at(HYPER));
        let fine = curl_shop(client, target, "/", &["--http2-prior-knowledge"])?;
        expect_code(&fine, 200)
    }

    fn send_file(&self, port: u16, bytes: &[u8], further: &[&str]) -> Result<Raw> {
        let file = self.pair.client.dir().join("bytes-to-send");
        std::fs::write(&file, bytes)?;
        let name = file.display().to_string();
        let further = [&["--file", &name], further].concat();
        raw(self.pair.client, self.pair.at(port), &[], &further)
    }
}

/// A server's lines may end with LF, and its coding counts before a length; what the client sees is written anew. A head that is
/// longer than a request's may be is none.
fn answers(pair: Pair<'_>) -> Result<()> {
    let fields = "Content-Length: 3\\r\\nTransfer-Encoding: chunked\\r\\n";
    let both = format!("HTTP/1.1 200 OK\\r\\n{fields}\\r\\n4\\r\\nbody\\r\\n0\\r\\n\\r\\n");
    let head = |bytes: usize| {
        let (start, end) = ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX: ", "\r\n\r\n");
        let value = "x".repeat(bytes - start.len() - end.len());
        format!("{start}{value}{end}body")
            .replace('\r', "\\r")
            .replace('\n', "\\n")
    };
    for (number, (name, reply, code)) in [
        ("two lengths", both, 200),
        (
            "LF",
            "HTTP/1.1 200 OK\\nContent-Length: 4\\n\\nbody".into(),
            200,
        ),
        ("a head of 64 KiB", head(MOST_HEAD_BYTES), 200),
        ("a head of a byte more", head(MOST_HEAD_BYTES + 1), 502),
        ("a head of 70 KiB", head(70 << 10), 502),
    ]
    .into_iter()
    .enumerate()
    {
        let port = ANSWERS + u16::try_from(number)?;
        let _server = Server::start(pair.server, port, "reply", &["--reply", &reply])?;
        let shown = curl_shop(pair.client, pair.at(port), "/", &[])?;
        ensure!(shown.code() == code, "{name}: {}", shown.status);
        ensure!(
            code != 200 || shown.body == "body",
            "{name}: {:?}",
            shown.body
        );
        let lengths = ["content-length", "transfer-encoding"].map(|it| shown.header(it).is_some());
        ensure!(lengths != [true, true], "{name}: {:?}", shown.headers);
    }
    Ok(())
}

/// RFC 9112: one Host, one way to tell the body's length, and nothing but CR LF between lines.
fn check_head(head: &str) -> Result<()> {
    let unescaped = head.replace("\\r\\n", "\n");
    ensure!(
        !unescaped.contains("\\r") && !unescaped.contains("\\n"),
        "a lone CR or LF"
    );
    ensure!(
        !unescaped.contains("\\x0") && !unescaped.contains("\\t"),
        "a control character"
    );
    let mut lines = unescaped.lines();
    let first: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    ensure!(first.len() == 3, "a request line of {} words", first.len());
    let mut names = Vec::new();
    for line in lines.filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':').context("a line without a colon")?;
        let token = |it: char| it.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(it);
        ensure!(
            !name.is_empty() && name.chars().all(token),
            "the name {name:?}"
        );
        let name = name.to_ascii_lowercase();
        if name == "content-length" {
            let digits = value.trim();
            ensure!(
                !digits.is_empty() && digits.chars().all(|it| it.is_ascii_digit()),
                "the length {value:?}"
            );
        }
        if name == "transfer-encoding" {
            ensure!(
                value.trim().eq_ignore_ascii_case("chunked"),
                "the encoding {value:?}"
            );
        }
        names.push(name);
    }
    let count = |wanted: &str| names.iter().filter(|name| *name == wanted).count();
    ensure!(count("host") == 1, "{} hosts", count("host"));
    ensure!(
        count("content-length") + count("transfer-encoding") <= 1,
        "several lengths"
    );
    Ok(())
}

/// Values that HTTP/2 can carry and HTTP/1 cannot: none makes a line of its own at the server.
fn forged_fields(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let server = HttpServer::start(pair.server, FORGED, &["--speaks", "http2"])?;
    let script = include_str!("h2_forger.py");
    let target = pair.at(FORGED);
    for case in [
        "crlf-value",
        "lf-value",
        "crlf-name",
        "crlf-path",
        "space-path",
        "connection",
        "te",
        "chunked",
        "length",
        "two-authorities",
        "host-differs",
        "no-path",
    ] {
        let forger = pair.client.command("python3")?;
        let printed = forger
            .args([
                "-c",
                script,
                &target.ip().to_string(),
                &target.port().to_string(),
                case,
            ])
            .output(std::time::Duration::from_secs(20))?;
        let said = printed.stdout.trim().to_owned();
        ensure!(printed.status.success(), "{case}: {printed:?}");
        ensure!(
            ["reset", "goaway", "closed", "400"].contains(&said.as_str()),
            "{case} is answered with {said}"
        );
    }
    let requests = server.requests()?;
    ensure!(requests.is_empty(), "the server saw {requests:?}");
    let fine = curl_shop(pair.client, target, "/", &["--http2-prior-knowledge"])?;
    expect_code(&fine, 200)
}

const HYPER: u16 = 8100;
const NGINX: u16 = 8101;
const CARELESS: u16 = 8102;
const ANSWERS: u16 = 8110;
const FORGED: u16 = 8104;
/// As documented.
const MOST_HEADERS: usize = 96;
const MOST_HEAD_BYTES: usize = 64 << 10;
const UNSEEN_RESETS: u32 = 64;
/// Frames of HTTP/2, flags, and a reason to reset.
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const CANCEL: [u8; 4] = [0, 0, 0, 8];

#[test]
fn heads_are_judged() {
    let good = "GET / HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 3\\r\\n\\r\\n";
    assert!(check_head(good).is_ok());
    for bad in [
        good.replace("Host: a", "Host: a\\r\\nHost: b"),
        good.replace("Host", "Ho st"),
        good.replace("3\\r", "+3\\r"),
        good.replace("a\\r\\n", "a\\n"),
        good.replace("Host: a", "Host: a\\r\\nTransfer-Encoding: chunked"),
        good.replace("GET / ", "GET / / "),
    ] {
        assert!(check_head(&bad).is_err(), "{bad}");
    }
}
