//! HTTP/1.

use super::Script;

/// What hostile clients of HTTP/1 do.
pub(super) fn scripts() -> Vec<Script> {
    let get = "GET / HTTP/1.1\r\nhost: shop\r\n";
    let post = "POST /sink HTTP/1.1\r\nhost: shop\r\n";
    let many_headers: String = (0..10_000).map(|it| format!("x-{it}: a\r\n")).collect();
    vec![
        Script::new("slow heads", get)
            .then("a", 20)
            .pause(200)
            .on(100),
        Script::new(
            "slow bodies",
            format!("{post}content-length: 1000000\r\n\r\n"),
        )
        .then("a", 20)
        .pause(200)
        .on(100),
        Script::new("a head of megabytes", get)
            .then(format!("x: {}\r\n", "a".repeat(1000)), 4000)
            .on(20),
        Script::new("a target of megabytes", "GET /")
            .then("a".repeat(10_000), 400)
            .on(20),
        Script::new("ten thousand headers", format!("{get}{many_headers}\r\n")).on(20),
        Script::new(
            "extensions of chunks without end",
            format!("{post}transfer-encoding: chunked\r\n\r\n1;a="),
        )
        .then("a".repeat(10_000), 400)
        .on(20),
        Script::new(
            "trailers without end",
            format!("{post}transfer-encoding: chunked\r\n\r\n0\r\n"),
        )
        .then(format!("x: {}\r\n", "a".repeat(1000)), 4000)
        .on(20),
        Script::new(
            "chunks of a byte, to a server that waits",
            "POST /sink?delay=3000 HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .then("1\r\na\r\n".repeat(1000), 20)
        .on(20),
        Script::new("a hundred thousand requests in a row", "")
            .then(format!("{get}\r\n").repeat(100), 1000),
        Script::new("the same, and nothing is read", "")
            .then(format!("{get}\r\n").repeat(100), 1000)
            .deaf(),
        Script::new(
            "answers that nobody reads",
            "GET /bytes/100000000 HTTP/1.1\r\nhost: shop\r\n\r\n",
        )
        .on(100)
        .deaf(),
        Script::new(
            "bodies that are broken off",
            format!("{post}content-length: 1000000\r\n\r\n{}", "a".repeat(1000)),
        )
        .on(50)
        .rounds(20, 0),
        Script::new(
            "answers that are broken off",
            "GET /bytes/10000000 HTTP/1.1\r\nhost: shop\r\n\r\n",
        )
        .on(50)
        .rounds(20, 5),
        Script::new(
            "hosts, paths, methods and names without end",
            (0..5000)
                .map(|it| {
                    format!(
                        "M{it} /{it}?{it} HTTP/1.1\r\nhost: shop-{it}\r\nx-{it}: {it}\r\n\
                         user-agent: {it}\r\n\r\n"
                    )
                })
                .collect::<String>(),
        ),
        Script::new(
            "upgrades without end",
            "GET / HTTP/1.1\r\nhost: shop\r\nconnection: upgrade, http2-settings\r\n\
             upgrade: h2c, websocket\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n",
        )
        .then("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 100)
        .on(50),
    ]
}
