//! What the end-to-end tests have in common: the wire under watch, and words for outcomes.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::capture::{Capture, Captured};
use crate::cluster::Cluster;
use crate::pod::Pod;
use crate::testapp::{self, Connected};
use crate::wait::wait_for;

/// The wire between nodes, captured while flows of meshed pods go on.
#[derive(Debug)]
pub struct Watch<'a> {
    capture: Capture<'a>,
    meshed: Vec<IpAddr>,
}

impl<'a> Watch<'a> {
    /// Starts watching the wire of node 0; `pods` are those whose flows belong into tunnels.
    pub fn start(cluster: &'a Cluster, pods: &[&Pod]) -> Result<Watch<'a>> {
        let capture = Capture::start(cluster.node(0).netns(), "eth0", cluster.dir())?;
        Ok(Watch::over(capture, pods))
    }

    /// Keeps only the start of each packet, for gigabytes.
    pub fn start_short(cluster: &'a Cluster, pods: &[&Pod]) -> Result<Watch<'a>> {
        let capture = Capture::start_with(cluster.node(0).netns(), "eth0", cluster.dir(), 200)?;
        Ok(Watch::over(capture, pods))
    }

    fn over(capture: Capture<'a>, pods: &[&Pod]) -> Watch<'a> {
        let meshed = pods.iter().flat_map(|pod| pod.addresses()).collect();
        Watch { capture, meshed }
    }

    /// Ends it; fails if one of the needles was seen, or a byte between the pods outside of a
    /// tunnel.
    pub fn finish(self, needles: &[&str]) -> Result<Captured> {
        let captured = self.capture.finish()?;
        for needle in needles {
            ensure!(
                !captured.contains(needle.as_bytes()),
                "{needle:?} is on the wire in the clear"
            );
        }
        captured.ensure_only_tunnels(&self.meshed)?;
        Ok(captured)
    }

    /// Ends it without judging, for captures of the start of packets only.
    pub fn capture_only(self) -> Result<Captured> {
        self.capture.finish()
    }

    /// [`Watch::finish`], failing too if the wire has no encrypted data at all.
    pub fn finish_encrypted(self, needles: &[&str]) -> Result<Captured> {
        let captured = self.finish(needles)?;
        let records = captured.tls(crate::capture::TUNNEL_PORT);
        ensure!(
            records.application_data > 0,
            "nothing encrypted was on the wire: {records:?}"
        );
        Ok(captured)
    }
}

/// Repeats until it succeeds; changes are in effect within a second, a busy machine gets more.
pub fn eventually(what: &str, mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    wait_for(what, Duration::from_secs(30), || attempt().map(Some))
}

/// Sends a text to an echo server and fails unless it comes back, all of it, and then the end.
pub fn expect_echo(from: &Pod, target: std::net::SocketAddr, text: &str) -> Result<Connected> {
    let said = testapp::say(from, target, text)?.expect(&["ok"])?;
    ensure!(
        said.text == text && said.eof,
        "the echo of {text:?} is {said:?}"
    );
    Ok(said)
}

/// Fails unless the connection is refused or reset before a byte came.
pub fn expect_refusal(from: &Pod, target: std::net::SocketAddr, text: &str) -> Result<Connected> {
    let said = testapp::say(from, target, text)?.expect(&REFUSED)?;
    ensure!(
        said.received == 0,
        "a refused connection got bytes: {said:?}"
    );
    Ok(said)
}

/// How a client sees that it may not.
pub const REFUSED: [&str; 3] = ["refused", "reset", "denied"];
