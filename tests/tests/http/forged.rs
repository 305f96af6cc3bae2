//! Who the client is, said by clients that do their best not to be looked at: they wait, cut what they say in
//! pieces, write methods that nobody knows, and have their own side leave them alone.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::curl_shop;
use weft_tests::manifests::{ServiceSpec, server};
use weft_tests::scenario::eventually;
use weft_tests::testapp::{Pulse, Server, say};
use weft_tests::webapp::{HttpServer, Raw, raw};
use weft_tests::{Checks, Pod, PodSpec};

use crate::stage::{CLIENT_ID, Pair, Stage, expect_code};

#[test]
fn http_forged() {
    run("http forged", &["--detect-timeout", "1s"]);
}

#[test]
fn http_forged_h2() {
    run(
        "http forged, by weft-h2/1",
        &["--detect-timeout", "1s", "--tunnel", "weft-h2"],
    );
}

fn run(name: &str, agent_args: &[&str]) {
    let scene = Scene::build(agent_args).expect("a cluster");
    let mut checks = Checks::new(name);
    for (place, pair) in scene.stage.meshed() {
        let mut check = |name: &str, run: fn(&Scene, Pair<'_>) -> Result<()>| {
            checks.check(&format!("{name}, {place}"), || run(&scene, pair));
        };
        check("a client that is silent for long", silent);
        check("a method that nobody knows", odd);
        check("a first line in pieces", pieces);
        check("a beginning that is waited for in vain", beginning);
        check("a client whose side leaves the port alone", skipped);
        check("a client outside of the mesh", outside);
        check("a Service that is declared opaque", by_service);
        check("what is declared to be HTTP", declared);
        check("a tunnel through what is declared to be HTTP", tunnelled);
        check("what is declared to be HTTP later", declared_later);
    }
    checks.finish();
}

struct Scene {
    stage: Stage,
    /// On node 0; it leaves ports of others alone.
    sly: Pod,
    servers: [HttpServer; 2],
}

impl Scene {
    fn build(agent_args: &[&str]) -> Result<Scene> {
        let stage = Stage::build_with(agent_args)?;
        let spec = PodSpec::new("sly").on(0);
        let spec = spec.annotation("weft.dev/skip-outbound-ports", "1-65535");
        Ok(Scene {
            sly: stage.cluster.add_pod(spec)?,
            servers: [
                HttpServer::start(&stage.far, HTTP, &[])?,
                HttpServer::start(&stage.near, HTTP, &[])?,
            ],
            stage,
        })
    }

    /// Whoever said so, no application was told of an admin.
    fn expect_nobody_was_fooled(&self) -> Result<()> {
        for server in &self.servers {
            for seen in server.requests()? {
                ensure!(!is_forged(&seen), "an application was told: {seen:?}");
            }
        }
        Ok(())
    }

    /// What was sent in these segments was refused and seen by nobody, or was served, with the headers made right.
    fn expect_harmless(
        &self,
        client: &Pod,
        pair: Pair<'_>,
        segments: &[&str],
        pause_ms: u64,
    ) -> Result<Raw> {
        let pause = pause_ms.to_string();
        let got = raw(client, pair.at(HTTP), segments, &["--pause-ms", &pause])?;
        ensure!(
            ["eof", "reset"].contains(&got.outcome.as_str()),
            "{segments:?}: {got:?}"
        );
        self.expect_nobody_was_fooled()?;
        Ok(got)
    }

    /// A Server that says what the port speaks, and lets everybody in.
    fn declare(&self, pair: Pair<'_>, port: u16, protocol: &str) -> Result<Value> {
        let app = pair.server.name();
        let name = format!("{app}-{port}");
        let mut declared = server("default", &name, app, port);
        declared["spec"]["proxyProtocol"] = json!(protocol);
        declared["spec"]["accessPolicy"] = json!("all-unauthenticated");
        self.stage.cluster.apply(&declared)?;
        Ok(declared)
    }

    fn refused(&self, reason: &str) -> Result<f64> {
        let mut all = 0.0;
        for node in [0, 1] {
            let metrics = self.stage.cluster.node(node).metrics()?;
            all += metrics.sum("weft_refused_total", &[("reason", reason)]);
        }
        Ok(all)
    }
}

fn is_forged(seen: &weft_tests::webapp::Seen) -> bool {
    let of_admin = |it: &&str| it.contains("admin");
    let told = CLIENT_ID.iter().flat_map(|name| seen.header(name));
    told.filter(of_admin).count() > 0
}

/// A request that says whom it is of.
fn request(method: &str) -> String {
    format!("{method}{}", &rest())
}

fn rest() -> String {
    let forged =
        CLIENT_ID.map(|name| format!("{name}: spiffe://cluster.local/ns/default/sa/admin"));
    format!(
        " / HTTP/1.1\\r\\nHost: shop\\r\\n{}\\r\\nConnection: close\\r\\n\\r\\n",
        forged.join("\\r\\n")
    )
}

/// It is served, as who it is.
fn silent(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    let before = timeouts(scene)?;
    let got = scene.expect_harmless(pair.client, pair, &["", &request("GET")], 3000)?;
    expect_told(&got, &pair.client.identity())?;
    let after = timeouts(scene)?;
    ensure!(after > before, "the time that it took is not counted");
    let (first, second) = ("GET / HT", &request("GET")["GET / HT".len()..]);
    let got = scene.expect_harmless(pair.client, pair, &[first, second], 100)?;
    expect_told(&got, &pair.client.identity())
}

fn expect_told(got: &Raw, identity: &str) -> Result<()> {
    ensure!(got.statuses == [200], "{got:?}");
    for name in CLIENT_ID {
        let told = format!("[\"{name}\",\"{identity}\"]");
        let received = got.received.replace('\\', "");
        ensure!(received.contains(&told), "not told {told}: {got:?}");
    }
    ensure!(!got.received.contains("admin"), "{got:?}");
    Ok(())
}

fn timeouts(scene: &Scene) -> Result<f64> {
    let metrics = scene.stage.cluster.node(0).metrics()?;
    Ok(metrics.sum("weft_protocol_detections_total", &[("how", "timeout")]))
}

/// As a whole it is a request like any other.
fn odd(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    for method in [
        "frob",
        "Get",
        "A-METHOD-THAT-IS-LONGER-THAN-ALL-THAT-THERE-ARE",
        "PRI",
    ] {
        let got = scene.expect_harmless(pair.client, pair, &[&request(method)], 0)?;
        expect_told(&got, &pair.client.identity())?;
    }
    for line in [
        "GET / HTTP/1.1 ",
        " GET / HTTP/1.1",
        "GET\\t/\\tHTTP/1.1",
        "GET / http/1.1",
        "GET / HTTP/1.9",
    ] {
        let bad = request("GET").replacen("GET / HTTP/1.1", line, 1);
        let got = scene.expect_harmless(pair.client, pair, &[&bad], 0)?;
        ensure!(
            got.statuses.iter().all(|it| *it == 400),
            "{line:?}: {got:?}"
        );
    }
    let blank = format!("{}{}", "\\r\\n".repeat(40), request("GET"));
    scene
        .expect_harmless(pair.client, pair, &[&blank], 0)
        .map(drop)
}

/// What was passed on already must not become a request.
fn pieces(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    let before = scene.refused("http_in_pieces")?;
    let rest = rest();
    let (target, end) = rest.split_at(2);
    let blank = "\\n".repeat(20);
    let very_blank = "\\r\\n".repeat(10_000);
    for (segments, pause) in [
        (&["\\x0b", &request("GET")][..], 300),
        (&["{", &rest], 300),
        (&[&very_blank, &request("GET")], 300),
        (&["frob", &rest], 300),
        (&["frob", target, end], 300),
        (&["Get /", end], 300),
        (&[&blank, "GET", &rest], 300),
        // A beginning that is waited for, but not for ever.
        (&["GET", &rest], 4000),
        (&["", "frob", &rest], 2500),
    ] {
        let mut pause = pause;
        loop {
            let got = scene.expect_harmless(pair.client, pair, segments, pause)?;
            // The application may have found its beginning bad by itself.
            if !got.statuses.contains(&200) {
                break;
            }
            // On a busy machine the pieces may be found together.
            pause *= 4;
            ensure!(pause < 10_000, "{segments:.20?}: {got:?}");
        }
    }
    eventually("it to be counted", || {
        let refused = scene.refused("http_in_pieces")? - before;
        ensure!(refused >= 7.0, "{refused} were counted");
        Ok(())
    })
}

/// Nobody waits for ever for what a client does not mean to say.
fn beginning(_: &Scene, pair: Pair<'_>) -> Result<()> {
    let _server = Server::start(pair.server, ECHO, "echo", &[])?;
    for beginning in ["GET", "PRI", "\\x16\\x03"] {
        let got = raw(
            pair.client,
            pair.at(ECHO),
            &[beginning],
            &["--until", beginning],
        )?;
        ensure!(got.outcome == "found", "{beginning:?}: {got:?}");
    }
    Ok(())
}

/// Where it arrives it is looked at all the same.
fn skipped(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    let got = scene.expect_harmless(&scene.sly, pair, &[&request("GET")], 0)?;
    expect_told(&got, &scene.sly.identity())?;
    let got = scene.expect_harmless(&scene.sly, pair, &["", &request("POST")], 3000)?;
    expect_told(&got, &scene.sly.identity())?;
    let got = scene.expect_harmless(&scene.sly, pair, &["frob", &rest()], 300)?;
    ensure!(got.statuses.is_empty(), "{got:?}");
    Ok(())
}

fn outside(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    let client = &scene.stage.plain_client;
    for segments in [&[&*request("GET")][..], &["", &request("GET")]] {
        let got = scene.expect_harmless(client, pair, segments, 3000)?;
        ensure!(
            got.statuses == [200] && !got.received.contains("client-id"),
            "{got:?}"
        );
    }
    let got = scene.expect_harmless(client, pair, &["frob", &rest()], 300)?;
    ensure!(got.statuses.is_empty(), "{got:?}");
    Ok(())
}

/// It is believed of its own pods, for those who come by it. So what they say is passed on as it is; who
/// comes by the pod's address is looked at.
fn by_service(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    let name = format!("opaque-{}", pair.server.name());
    let spec = ServiceSpec::new(&name)
        .select("app", pair.server.name())
        .port(9208, OPAQUE)
        .annotation("weft.dev/opaque-ports", "9208");
    let _server = HttpServer::start(pair.server, OPAQUE, &[])?;
    let [address, _] = scene.stage.cluster.add_service(&spec)?;
    let target = (address, 9208).into();
    eventually("the Service to leave alone what comes by it", || {
        let got = raw(pair.client, target, &[&request("GET")], &[])?;
        ensure!(
            got.statuses == [200] && got.received.contains("sa/admin"),
            "{got:?}"
        );
        Ok(())
    })?;
    for client in [pair.client, &scene.sly] {
        let got = raw(client, pair.at(OPAQUE), &[&request("GET")], &[])?;
        expect_told(&got, &client.identity())?;
    }
    Ok(())
}

/// What a Server declares is all that is taken.
fn declared(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    let before = scene.refused("not_http")?;
    let old = "--http1.1";
    let new = "--http2-prior-knowledge";
    for (port, protocol, good, bad) in [
        (8301, "HTTP/1", old, new),
        (8302, "HTTP/2", new, old),
        (8303, "gRPC", new, old),
    ] {
        let _server = HttpServer::start(pair.server, port, &[])?;
        scene.declare(pair, port, protocol)?;
        for client in [pair.client, &scene.sly] {
            let expect_reset = |bytes: &str| -> Result<()> {
                let got = raw(client, pair.at(port), &[bytes], &["--half-close"])?;
                ensure!(
                    got.outcome == "reset" && got.received.is_empty(),
                    "{protocol}, {bytes:?}: {got:?}"
                );
                Ok(())
            };
            eventually("the declaration to be in force", || {
                expect_reset("hello\\n")
            })?;
            expect_code(&curl_shop(client, pair.at(port), "/", &[good])?, 200)?;
            expect_code(&curl_shop(client, pair.at(port), "/", &[bad])?, 505)?;
            for bytes in ["hello\\n", "frob", "\\x16\\x03\\x01", "\\0"] {
                expect_reset(bytes)?;
            }
        }
    }
    eventually("it to be counted", || {
        let refused = scene.refused("not_http")? - before;
        ensure!(refused >= 30.0, "{refused} were counted");
        Ok(())
    })
}

/// An application that answers CONNECT like any other request would take what follows for its next one.
fn tunnelled(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    let server = HttpServer::start(pair.server, TUNNELLED, &[])?;
    scene.declare(pair, TUNNELLED, "HTTP/1")?;
    for client in [pair.client, &scene.sly] {
        let connect = "CONNECT shop:443 HTTP/1.1\\r\\nHost: shop:443\\r\\n\\r\\n";
        let segments = [connect, &request("GET")];
        eventually("the declaration to be in force", || {
            let got = raw(
                client,
                pair.at(TUNNELLED),
                &segments,
                &["--pause-ms", "100"],
            )?;
            ensure!(got.statuses.first() == Some(&405), "{got:?}");
            ensure!(got.received.contains("connect_not_allowed"), "{got:?}");
            Ok(())
        })?;
    }
    for seen in server.requests()? {
        ensure!(!is_forged(&seen), "the application was told: {seen:?}");
    }
    Ok(())
}

/// Connections that pass unseen do not outlive the declaration, and whoever has said nothing yet must say HTTP.
fn declared_later(scene: &Scene, pair: Pair<'_>) -> Result<()> {
    let _server = Server::start(pair.server, LATER, "echo", &[])?;
    for client in [pair.client, &scene.sly] {
        let mut pulse = Pulse::start(client, pair.at(LATER))?;
        let declared = scene.declare(pair, LATER, "HTTP/1")?;
        let ended = pulse.wait_broken(Duration::from_secs(20))?;
        ensure!(ended.outcome == "reset", "{ended:?}");
        scene.stage.cluster.remove(&declared)?;
        eventually("the declaration to be gone", || {
            let said = say(client, pair.at(LATER), "hello")?;
            ensure!(said.text == "hello", "{said:?}");
            Ok(())
        })?;
    }
    Ok(())
}

const HTTP: u16 = 8080;
const OPAQUE: u16 = 8208;
const ECHO: u16 = 8209;
const TUNNELLED: u16 = 8210;
const LATER: u16 = 8211;
