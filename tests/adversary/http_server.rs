//! Hostile servers of HTTP: what `weft_tests::hostile` has, on the client's node and on the other. A client of such a
//! server has an answer or an error, and no other pod notices.

use std::time::Duration;

use anyhow::{Result, ensure};
use weft_tests::apps::curl_shop;
use weft_tests::hostile::{Answer, answers};
use weft_tests::webapp::HttpServer;
use weft_tests::{Checks, Pod, testapp};

use crate::http_client::{
    Footprint, HTTP, beside_neighbours, is_bounded, memory, nothing_is_left, nothing_is_open,
};
use crate::stage::Stage;

/// Every answer, to a pod on the friend's node, who has requests to an honest server meanwhile.
pub(crate) fn all(stage: &Stage, checks: &mut Checks) {
    let _server = HttpServer::start(&stage.target, HTTP, &["--quiet"]).expect("a server");
    // What is needed by whoever speaks to anybody is there from now on.
    beside_neighbours(stage, || Ok(())).expect("requests");
    let before = Footprint::of(stage).expect("metrics");
    let began = memory(stage).expect("agents");
    // Not one of those whose requests go on meanwhile.
    let victim = stage.another("victim", 0).expect("a pod");
    for answer in answers() {
        checks.check(answer.name, || {
            let most = beside_neighbours(stage, || {
                for server in [&stage.near, &stage.far, &stage.outside] {
                    ask(&victim, server, &answer)?;
                }
                let honest = stage.target.sockets(HTTP)[0];
                let shown = curl_shop(&victim, honest, "/", &[])?;
                ensure!(shown.code() == 200, "the next request: {shown:?}");
                Ok(())
            })?;
            is_bounded(began, most)?;
            nothing_is_open(stage)?;
            stage.unharmed()
        });
    }
    checks.check("nothing is left", || nothing_is_left(stage, &before));
}

/// Asks a server thrice. Never does what it says beside an answer become somebody's answer.
fn ask(victim: &Pod, server: &Pod, answer: &Answer) -> Result<()> {
    let port = PORT.to_string();
    let mut process = testapp::command(server)?
        .named("hostile-server")
        .args(["attack", "http-server", &port, answer.name])
        .spawn()?;
    process.wait_listening(PORT)?;
    let version = match answer.is_http2 {
        true => "--http2-prior-knowledge",
        false => "--http1.1",
    };
    for _ in 0..3 {
        let target = server.sockets(PORT)[0];
        // The last limit wins. Some answers never end, and there is no timeout by default.
        let shown = curl_shop(victim, target, "/", &[version, "--max-time", "4"])?;
        let name = server.name();
        ensure!(!shown.body.contains("SPLITTED"), "{name}: {shown:?}");
        ensure!(shown.code() != 101, "{name}: {shown:?}");
        ensure!(!answer.is_none || shown.code() == 502, "{name}: {shown:?}");
        let told = shown.header("weft-error").unwrap_or_default().to_owned();
        eprintln!("  {name}: {} {told}", shown.status);
    }
    process.stop(Duration::from_secs(5))?;
    Ok(())
}

const PORT: u16 = 7090;
