//! Clients that wait for their server do not wait for the mesh: what was found out at a port is remembered.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use weft_tests::apps::curl_shop;
use weft_tests::manifests::{ServiceSpec, backend};
use weft_tests::scenario::eventually;
use weft_tests::testapp::Server;
use weft_tests::webapp::raw;
use weft_tests::{Checks, Pod};

use crate::stage::{Pair, Stage, expect_code};

#[test]
fn servers_that_speak_first() {
    let timeout = format!("{}ms", TIMEOUT.as_millis());
    let stage = Stage::build_with(&["--detect-timeout", &timeout]).expect("a cluster");
    let mut checks = Checks::new("servers that speak first");
    stage.check_meshed(&mut checks, "a port that speaks HTTP too", shared_port);
    checks.check("a port with a TLSRoute", || tls_routed(&stage));
    checks.check("a name that comes late", || late_names(&stage));
    checks.finish();
}

/// Whoever says nothing there is greeted.
fn shared_port(_: &Stage, pair: Pair<'_>) -> Result<()> {
    let answer = "HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok";
    let args = [
        "--greet-after-ms",
        "100",
        "--greeting",
        "220 shop\r\n",
        "--reply",
        answer,
    ];
    let _server = Server::start(pair.server, SHARED, "reply", &args)?;
    let target = pair.at(SHARED);
    let greeted = || greeted_within(pair.client, target, "220 shop\\r\\n", TIMEOUT / 2);
    for _ in 0..2 {
        // Its connection to the server is kept.
        expect_code(&curl_shop(pair.client, target, "/", &[])?, 200)?;
        for _ in 0..3 {
            greeted()?;
        }
    }
    expect_code(&curl_shop(pair.client, target, "/", &[])?, 200)
}

fn greeted_within(client: &Pod, target: SocketAddr, greeting: &str, limit: Duration) -> Result<()> {
    let got = raw(client, target, &[], &["--until", greeting])?;
    let first = got.first_byte_ms.with_context(|| format!("{got:?}"))?;
    ensure!(
        got.outcome == "found" && first < limit.as_secs_f64() * 1e3,
        "{got:?}"
    );
    Ok(())
}

/// Where a connection goes depends on the name that its client asks for, so that the first which says nothing waits. No
/// name is ignored for what is remembered.
fn tls_routed(stage: &Stage) -> Result<()> {
    let banner = ["--greeting", "SSH-2.0-shop\r\n"];
    let scene = Routed::build(stage, 0, "greet", &banner)?;
    let first = scene.greeted()?;
    ensure!(
        first >= TIMEOUT,
        "nothing was remembered yet, and it took {first:?}"
    );
    for _ in 0..2 {
        for _ in 0..3 {
            let again = scene.greeted()?;
            ensure!(again < TIMEOUT / 2, "it took {again:?}");
        }
        scene.expect_named(Duration::ZERO)?;
        let after = scene.greeted()?;
        ensure!(after >= TIMEOUT, "the last one had a name: {after:?}");
    }
    Ok(())
}

/// Who says nothing is connected in the end, and who says a name then is led by it all the same.
fn late_names(stage: &Stage) -> Result<()> {
    let scene = Routed::build(stage, 1, "echo", &[])?;
    scene.expect_named(TIMEOUT + Duration::from_secs(1))
}

/// A Service whose clients are led to another server by one name.
struct Routed<'a> {
    stage: &'a Stage,
    target: SocketAddr,
    _own: Server,
    named: Server,
    hello: String,
}

impl<'a> Routed<'a> {
    fn build(stage: &'a Stage, number: u16, mode: &str, args: &[&str]) -> Result<Routed<'a>> {
        let (port, at) = (PORT + number, SHELL + number);
        let own = Server::start(&stage.far, at, mode, args)?;
        let named = Server::start(&stage.near, at, "echo", &[])?;
        let [service, other] = ["own", "named"].map(|it| format!("{it}-{number}"));
        let spec = |name: &str, app| ServiceSpec::new(name).select("app", app).port(port, at);
        let [address, _] = stage.cluster.add_service(&spec(&service, "far"))?;
        stage.cluster.add_service(&spec(&other, "near"))?;
        stage.cluster.apply(&json!({
            "apiVersion": "gateway.networking.k8s.io/v1alpha2",
            "kind": "TLSRoute",
            "metadata": {"name": other, "namespace": "default"},
            "spec": {
                "parentRefs": [{"group": "", "kind": "Service", "name": service, "port": port}],
                "hostnames": ["named.example"],
                "rules": [{"backendRefs": [backend(&other, port, 1)]}],
            },
        }))?;
        let file = stage.client.dir().join("client-hello");
        std::fs::write(&file, client_hello("named.example")?)?;
        let scene = Routed {
            stage,
            target: SocketAddr::new(address, port),
            _own: own,
            named,
            hello: file.display().to_string(),
        };
        eventually("the route to be in force", || {
            scene.expect_named(Duration::ZERO)
        })?;
        Ok(scene)
    }

    /// How long the banner takes.
    fn greeted(&self) -> Result<Duration> {
        let args = ["--until", "SSH-2.0-shop\\r\\n"];
        let got = raw(&self.stage.client, self.target, &[], &args)?;
        let first = got.first_byte_ms.with_context(|| format!("{got:?}"))?;
        ensure!(got.outcome == "found", "{got:?}");
        Ok(Duration::from_secs_f64(first / 1e3))
    }

    /// What a client says comes back from the server that the name is of, also after such a pause.
    fn expect_named(&self, pause: Duration) -> Result<()> {
        let before = self.named.accepted()?.len();
        let pause = pause.as_millis().to_string();
        let args = ["--file", &self.hello, "--pause-ms", &pause];
        let args = [
            &args[..],
            &["--quiet-ms", "6000"],
            &["--until", "\\x16\\x03\\x01"],
        ]
        .concat();
        let got = raw(&self.stage.client, self.target, &[""], &args)?;
        ensure!(got.outcome == "found", "{got:?}");
        let after = self.named.accepted()?.len();
        ensure!(after > before, "it went elsewhere");
        Ok(())
    }
}

/// What a client of TLS says first (RFC 8446, section 4.1.2), with the name of a server.
fn client_hello(name: &str) -> Result<Vec<u8>> {
    let extension = |kind: u16, body: &[u8]| [&kind.to_be_bytes()[..], &sized(body)].concat();
    let of_name = sized(&[&[0][..], &sized(name.as_bytes())].concat());
    let extensions = [
        extension(0, &of_name),
        // Signature schemes, groups and versions: one of each.
        extension(13, &sized(&[4, 3])),
        extension(10, &sized(&[0, 29])),
        extension(43, &[2, 3, 4]),
    ];
    let body = [
        &[3, 3][..],
        &[7; 32],
        &[0],
        &sized(&[0x13, 0x01]),
        &[1, 0],
        &sized(&extensions.concat()),
    ];
    let body = body.concat();
    let length = u32::try_from(body.len())?.to_be_bytes();
    let message = [&[1][..], &length[1..], &body].concat();
    Ok([&[22, 3, 1][..], &sized(&message)].concat())
}

/// With its length in front.
fn sized(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], bytes].concat()
}

/// How long a client that says nothing is waited for.
const TIMEOUT: Duration = Duration::from_secs(3);
const SHARED: u16 = 2600;
const SHELL: u16 = 2622;
const PORT: u16 = 2222;
