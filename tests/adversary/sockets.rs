//! Ways to connect that are not `connect`, or not TCP as it was.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use weft_tests::checks::report;
use weft_tests::scenario::{expect_echo, expect_refusal};
use weft_tests::testapp;

use crate::stage::{Stage, connected, expect_all, expect_nothing};

/// Connects as any client. It is refused where only the friend may, served where everybody may, with its
/// own identity: what all other attacks are measured against.
pub(crate) fn plainly(stage: &Stage) -> Result<()> {
    for attacker in stage.attackers() {
        for family in 0..2 {
            expect_refusal(attacker, stage.guarded()[family], "let me in")?;
            let before = stage.seen_at_open()?.len();
            expect_echo(attacker, stage.open()[family], "hello")?;
            let seen = stage.seen_at_open()?.split_off(before);
            ensure!(
                seen.len() == 1 && seen[0].accepted.ip() == attacker.addresses()[family],
                "{seen:?}"
            );
        }
    }
    Ok(())
}

/// Connects by MPTCP, whose sockets connect by sockets of their own, and announces further addresses for
/// subflows. It must be as with TCP.
pub(crate) fn mptcp(stage: &Stage) -> Result<()> {
    for attacker in stage.attackers() {
        for (index, address) in attacker.addresses().iter().enumerate() {
            let add = [
                "mptcp",
                "endpoint",
                "add",
                &address.to_string(),
                "dev",
                "eth0",
            ];
            let kind = [["subflow", "fullmesh"], ["subflow", "backup"]][index];
            attacker.netns().ip(&[&add[..], &kind[..]].concat())?;
        }
        for family in 0..2 {
            let args = ["--mptcp", "--send", "many ways", "--half-close"];
            let said = testapp::connect(attacker, stage.guarded()[family], &args)?;
            expect_nothing("the guarded port", &said)?;
            let said = testapp::connect(attacker, stage.open()[family], &args)?;
            expect_all("the open port", &said, "many ways")?;
        }
        attacker.netns().ip(&["mptcp", "endpoint", "flush"])?;
    }
    Ok(())
}

/// Sends with the SYN, by both interfaces of Fast Open, with and without a cookie of the server. It must be
/// as with `connect`.
pub(crate) fn fast_open(stage: &Stage) -> Result<()> {
    for attacker in stage.attackers() {
        // Without cookies too: bits 1 (client) and 4 (data without a cookie).
        for setting in ["1", "5"] {
            attacker.netns().sysctl("ipv4/tcp_fastopen", setting)?;
            for how in [&["--sendto"][..], &[]] {
                for family in 0..2 {
                    let open = |target: std::net::SocketAddr| {
                        let program = testapp::command(attacker)?;
                        let program = program.args(["fast-open", &target.to_string(), "early"]);
                        let out = program.args(how).run()?;
                        let value: Value = serde_json::from_str(out.trim())?;
                        Ok::<_, anyhow::Error>(value["outcome"] == "ok" && value["text"] == "early")
                    };
                    ensure!(!open(stage.guarded()[family])?, "the guarded port answered");
                    ensure!(open(stage.open()[family])?, "the open port did not");
                }
            }
        }
    }
    Ok(())
}

/// Makes the socket, connects, sends and receives by `io_uring`, also with a thread of the kernel that
/// takes the requests. It must be as with system calls.
pub(crate) fn ring(stage: &Stage) -> Result<()> {
    for attacker in stage.attackers() {
        for polled in [&[][..], &["--polled"]] {
            for family in 0..2 {
                let ring = |target: std::net::SocketAddr| {
                    let program = testapp::command(attacker)?;
                    let program = program.args(["attack", "ring", &target.to_string(), "by ring"]);
                    connected(&program.args(polled).run()?)
                };
                let said = ring(stage.open()[family])?;
                if said.stage == "io_uring_setup" {
                    report(&format!(
                        "hostile_pod: absent on this kernel: io_uring ({})",
                        said.text
                    ));
                    return Ok(());
                }
                expect_all("the open port", &said, "by ring")?;
                ensure!(said.peer == Some(stage.open()[family]), "{said:?}");
                expect_nothing("the guarded port", &ring(stage.guarded()[family])?)?;
            }
        }
    }
    Ok(())
}

/// Binds its socket to a device, an address and a port before it connects. It must be as without.
pub(crate) fn bound(stage: &Stage) -> Result<()> {
    for attacker in stage.attackers() {
        for family in 0..2 {
            let own = attacker.addresses()[family].to_string();
            for (port, how) in [
                ("45001", vec!["--device", "eth0"]),
                ("45002", vec!["--bind", &own]),
                ("15008", vec!["--bind", &own]),
                ("4", vec!["--bind", &own, "--device", "eth0"]),
            ] {
                let args = [
                    &how[..],
                    &["--source-port", port, "--send", "bound", "--half-close"],
                ]
                .concat();
                let said = testapp::connect(attacker, stage.guarded()[family], &args)?;
                expect_nothing(&format!("the guarded port, by {args:?}"), &said)?;
            }
            let args = ["--device", "eth0", "--send", "bound", "--half-close"];
            let said = testapp::connect(attacker, stage.open()[family], &args)?;
            expect_all("the open port", &said, "bound")?;
        }
    }
    Ok(())
}

/// Looks for protocols that no hook of TCP sees. What the kernel does not have is said to be absent; a
/// datagram passes, as documented, and reaches what listens for datagrams and nothing of TCP.
pub(crate) fn families(stage: &Stage) -> Result<()> {
    let out = testapp::command(&stage.near)?
        .args(["attack", "families"])
        .run()?;
    for line in out.lines() {
        let family: Value = serde_json::from_str(line)?;
        let (name, why) = (&family["name"], &family["why"]);
        if family["there"] == true {
            report(&format!(
                "hostile_pod: on this kernel, and not enforced: {name}"
            ));
        } else {
            report(&format!(
                "hostile_pod: absent on this kernel: {name}: {why}"
            ));
        }
    }
    ensure!(out.lines().count() > 5, "{out}");
    for target in stage.guarded() {
        // To the guarded port's number: TCP's policy is no policy of datagrams.
        let mut echo = testapp::command(&stage.target)?
            .args(["udp-echo", "--listen", &target.to_string()])
            .spawn()?;
        echo.wait_for_line("listening", Duration::from_secs(5))?;
        // Who stole addresses before may still be believed to have them: nobody answers there, and datagrams
        // find that out by themselves only after eight seconds.
        for pod in [&stage.near, &stage.target] {
            pod.netns().ip(&["neigh", "flush", "all"])?;
        }
        weft_tests::scenario::eventually("datagrams to pass, as documented", || {
            let reply = testapp::command(&stage.near)?
                .args(["udp-ping", &target.to_string(), "datagram"])
                .run()?;
            let reply: Value = serde_json::from_str(reply.lines().next().context("no reply")?)?;
            ensure!(reply["outcome"] == "ok", "{reply}");
            Ok(())
        })?;
    }
    Ok(())
}
