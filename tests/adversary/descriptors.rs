//! Sockets that change hands.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use weft_tests::command::Process;
use weft_tests::testapp::{self, Connected};
use weft_tests::{DEADLINE, Pod};

use crate::stage::{Stage, connected, expect_all, expect_nothing};

/// Sockets go from pod to pod by `SCM_RIGHTS`. Whoever uses one is who made it: an accomplice outside of the
/// mesh lends no identity, an attacker's socket is an attacker's in whoever's hands, and the friend's is the
/// friend's, who could have passed on the bytes as well.
pub(crate) fn lent(stage: &Stage) -> Result<()> {
    for v6 in [false, true] {
        let family = usize::from(v6);
        // Made outside of the mesh, used inside.
        let lender = Lender::start(stage, &stage.outside, v6, &[])?;
        let said = lender.connect(&stage.near, stage.guarded()[family])?;
        expect_nothing("an unmeshed pod's, at the guarded port", &said)?;
        expect_all(
            "an unmeshed pod's",
            &lender.connect(&stage.near, stage.open()[family])?,
            "borrowed",
        )?;
        last_visitor_is(stage, &stage.outside, family)?;
        // Made by the attacker, used by the friend.
        let lender = Lender::start(stage, &stage.near, v6, &[])?;
        let said = lender.connect(&stage.friend, stage.guarded()[family])?;
        expect_nothing("an attacker's, in the friend's hands", &said)?;
        expect_all(
            "an attacker's",
            &lender.connect(&stage.friend, stage.open()[family])?,
            "borrowed",
        )?;
        last_visitor_is(stage, &stage.near, family)?;
        // Made by the friend: the control, and the friend's own responsibility.
        let lender = Lender::start(stage, &stage.friend, v6, &[])?;
        stage.expect_visits(1);
        let said = lender.connect(&stage.near, stage.guarded()[family])?;
        expect_all("the friend's, lent by the friend", &said, "borrowed")?;
    }
    Ok(())
}

/// The target lends a listening socket of its own to the attacker, who answers instead. Who gets to it is
/// decided by the target's policy, as the socket is the target's.
pub(crate) fn lent_listener(stage: &Stage) -> Result<()> {
    let port = 7019;
    let name = "lent-listener";
    stage.cluster.apply(&weft_tests::manifests::server(
        "default", name, "target", port,
    ))?;
    let rule = weft_tests::manifests::authorization("default", name, name, &["friend"]);
    stage.cluster.apply(&rule)?;
    let target = stage.target.sockets(port)[0];
    // Nobody listens yet: that it is policy which refuses can be seen in what it counts.
    let denied = [("srv_name", name)];
    weft_tests::scenario::eventually("the policy to be in effect", || {
        testapp::say(&stage.far, target, "before")?;
        let metrics = stage.cluster.node(1).metrics()?;
        ensure!(metrics.sum("inbound_tcp_authz_deny_total", &denied) > 0.0);
        Ok(())
    })?;
    let listen = ["--listen", &port.to_string()];
    let lender = Lender::start(stage, &stage.target, false, &listen)?;
    let mut borrower = testapp::command(&stage.near)?
        .args(["attack", "borrow", "--accept"])
        .arg(&lender.path)
        .spawn()?;
    borrower.wait_for_line("waiting", DEADLINE)?;
    for from in [&stage.far, &stage.near] {
        let said = testapp::say(from, target, "through the borrower")?;
        expect_nothing("the lent listener", &said)?;
    }
    ensure!(
        !borrower.stdout().contains("accepted"),
        "{}",
        borrower.stdout()
    );
    // The control: the friend gets there, and the attacker has what it was given.
    weft_tests::scenario::eventually("the friend to get through", || {
        weft_tests::scenario::expect_echo(&stage.friend, target, "to whom it is lent").map(drop)
    })?;
    borrower.wait_for_line("accepted", DEADLINE)?;
    stage.cluster.remove(&rule)?;
    stage.cluster.remove(&weft_tests::manifests::server(
        "default", name, "target", port,
    ))
}

fn last_visitor_is(stage: &Stage, pod: &Pod, family: usize) -> Result<()> {
    let seen = stage.seen_at_open()?;
    let last = seen.last().map(|it| it.accepted.ip());
    ensure!(
        last == Some(pod.addresses()[family]),
        "seen as {last:?}, not as {}",
        pod.name()
    );
    Ok(())
}

struct Lender {
    path: PathBuf,
    _process: Process,
}

impl Lender {
    fn start(stage: &Stage, pod: &Pod, v6: bool, more: &[&str]) -> Result<Lender> {
        let path = stage
            .cluster
            .dir()
            .join(format!("lend-{}-{v6}", pod.name()));
        let mut process = testapp::command(pod)?
            .args(["attack", "lend", &path.display().to_string()])
            .args(if v6 { &["--v6"][..] } else { &[] })
            .args(more)
            .spawn()?;
        process.wait_for_line("lending", DEADLINE)?;
        Ok(Lender {
            path,
            _process: process,
        })
    }

    /// The borrower connects the lender's socket.
    fn connect(&self, borrower: &Pod, target: std::net::SocketAddr) -> Result<Connected> {
        let out = testapp::command(borrower)?
            .args(["attack", "borrow", &self.path.display().to_string()])
            .args(["--connect", &target.to_string()])
            .run()?;
        connected(&out)
    }
}
