//! HTTP/2.

use super::Script;
use super::frames::*;

/// What hostile clients of HTTP/2 do.
pub(super) fn scripts() -> Vec<Script> {
    let mut all = floods();
    all.extend(windows());
    all.extend(heads());
    all
}

/// A connection that has begun as it should, with settings.
fn begun(settings: &[u8]) -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, settings)].concat()
}

fn get(stream: u32, path: &str) -> Vec<u8> {
    head(stream, END_STREAM, &request("GET", path))
}

fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|it| 2 * it + 1)
}

fn script(name: &'static str, settings: &[u8], bytes: impl IntoIterator<Item = Vec<u8>>) -> Script {
    let rest: Vec<u8> = bytes.into_iter().flatten().collect();
    Script::new(name, [begun(settings), rest].concat())
}

/// What is small and costs much.
fn floods() -> Vec<Script> {
    let reset = |stream| {
        [
            get(stream, "/"),
            frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()),
        ]
        .concat()
    };
    let posts = |stream| head(stream, 0, &request("POST", "/sink?delay=3000"));
    vec![
        script("streams opened and reset", &[], streams(50_000).map(reset)).on(4),
        script("ten thousand streams", &[], streams(10_000).map(posts)).on(4),
        script(
            "ten thousand requests",
            &[],
            streams(10_000).map(|it| get(it, "/")),
        )
        .on(4),
        script("pings", &[], [])
            .then(frame(PING, 0, 0, &[7; 8]).repeat(100), 2000)
            .on(4)
            .deaf(),
        script("settings", &[], [])
            .then(
                frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]).repeat(100),
                2000,
            )
            .on(4)
            .deaf(),
        script(
            "settings of windows, back and forth",
            &[],
            streams(200).map(|it| get(it, "/bytes/1000000")),
        )
        .then(
            [
                frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]),
                frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 1]),
            ]
            .concat()
            .repeat(50),
            500,
        ),
        script("priorities", &[], [])
            .then(frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1]).repeat(100), 2000),
        script("frames of unknown kinds", &[], [])
            .then(frame(200, 0, 0, &[0; 100]).repeat(100), 200),
        script("data of nothing", &[], [posts(1)]).then(frame(DATA, 0, 1, &[]).repeat(100), 1000),
        script("credit for a byte", &[], [posts(1)]).then(
            frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes()).repeat(100),
            1000,
        ),
        script(
            "requests that end by GOAWAY",
            &[],
            streams(100).map(|it| get(it, "/delay/3000")),
        )
        .then(frame(GOAWAY, 0, 0, &[0; 8]), 1000)
        .on(20),
    ]
}

/// What fills windows and buffers.
fn windows() -> Vec<Script> {
    let large = 0x7fff_0000_u32.to_be_bytes();
    let all_of = |bytes: [u8; 4]| [&[0, 4][..], &bytes].concat();
    let post = |stream| head(stream, 0, &request("POST", "/sink?delay=3000"));
    let one = |byte: &[u8]| frame(DATA, 0, 1, byte);
    let interleaved: Vec<u8> = streams(64)
        .flat_map(|it| frame(DATA, 0, it, b"a"))
        .collect();
    vec![
        script(
            "windows of nothing",
            &all_of([0; 4]),
            streams(256).map(|it| get(it, "/bytes/10000000")),
        )
        .on(8),
        script(
            "windows of a byte",
            &all_of([0, 0, 0, 1]),
            streams(256).map(|it| get(it, "/bytes/10000000")),
        )
        .on(8),
        script(
            "large windows, and nothing is read",
            &all_of(large),
            [frame(WINDOW_UPDATE, 0, 0, &large)]
                .into_iter()
                .chain(streams(256).map(|it| get(it, "/bytes/100000000"))),
        )
        .on(8)
        .deaf(),
        script(
            "large windows, chunks of little, and nothing is read",
            &all_of(large),
            [frame(WINDOW_UPDATE, 0, 0, &large)]
                .into_iter()
                .chain(streams(256).map(|it| get(it, "/stream?chunks=20000&interval=0"))),
        )
        .on(4)
        .deaf(),
        script(
            "bodies that the server does not read",
            &[],
            streams(256).map(post),
        )
        .then(
            streams(256)
                .flat_map(|it| frame(DATA, 0, it, &[b'a'; 8000]))
                .collect::<Vec<u8>>(),
            40,
        )
        .on(4),
        script("data of a byte", &[], [post(1)])
            .then(one(b"a").repeat(1000), 250)
            .on(8),
        script("data of a byte, by turns", &[], streams(64).map(post))
            .then(interleaved, 4000)
            .on(8),
        script("padding", &[], [post(1)])
            .then(
                frame(DATA, 8, 1, &[&[255][..], b"a", &[0; 255]].concat()).repeat(10),
                500,
            )
            .on(8),
    ]
}

/// What fills heads.
fn heads() -> Vec<Script> {
    let endless = frame(HEADERS, 0, 1, &request("GET", "/"));
    let bomb: Vec<u8> = {
        let big = remembered("x", &"a".repeat(4000));
        let mut fields = [request("GET", "/"), big].concat();
        fields.extend([0xbe; 16_000]);
        fields
    };
    let again = |stream| {
        let mut fields = request("GET", "/");
        fields.extend([0xbe; 16_000]);
        head(stream, END_STREAM, &fields)
    };
    let many: Vec<u8> = (0..10_000)
        .flat_map(|it| literal(&format!("x-{it}"), "a"))
        .collect();
    let many = [request("GET", "/"), many].concat();
    let large = |stream| {
        let value = literal("x", &"a".repeat(60_000));
        let fields = [request("GET", "/delay/3000"), value].concat();
        head(stream, END_STREAM, &fields)
    };
    let grpc = [
        request("POST", "/shop.Shop/Buy"),
        literal("content-type", "application/grpc"),
        literal("te", "trailers"),
    ]
    .concat();
    let mut message = vec![0, 0x10, 0, 0, 0];
    message.extend([0; 16_000]);
    let trailers: Vec<u8> = literal("x", &"a".repeat(1000)).repeat(1000);
    vec![
        script("continuations without end", &[], [endless])
            .then(
                frame(CONTINUATION, 0, 1, &literal("x", &"a".repeat(16_000))),
                2000,
            )
            .on(8),
        script(
            "continuations of nothing",
            &[],
            [frame(HEADERS, 0, 1, &request("GET", "/"))],
        )
        .then(frame(CONTINUATION, 0, 1, &[]).repeat(100), 1000)
        .on(8),
        script(
            "one field for sixteen thousand",
            &[],
            [head(1, END_STREAM, &bomb)]
                .into_iter()
                .chain(streams(256).skip(1).map(again)),
        )
        .on(8),
        script("ten thousand fields", &[], [head(1, END_STREAM, &many)]).on(8),
        script("large heads, all at once", &[], streams(256).map(large)).on(4),
        script(
            "a call with a message of 256 MiB",
            &[],
            [head(1, 0, &grpc), frame(DATA, 0, 1, &message)],
        )
        .then(frame(DATA, 0, 1, &[0; 16_000]), 1000)
        .on(4),
        script(
            "a call with trailers of a megabyte",
            &[],
            [
                head(1, 0, &grpc),
                frame(DATA, 0, 1, &message),
                head(1, END_STREAM, &trailers),
            ],
        )
        .on(8),
        script(
            "hosts, paths and names without end, by HTTP/2",
            &[],
            streams(5000).map(|it| {
                let fields = [
                    literal(":method", &format!("M{it}")),
                    literal(":scheme", "http"),
                    literal(":authority", &format!("shop-{it}")),
                    literal(":path", &format!("/{it}")),
                    literal(&format!("x-{it}"), "a"),
                ];
                head(it, END_STREAM, &fields.concat())
            }),
        )
        .pause(1),
    ]
}
