//! Ways to connect: families, ports, kinds of sockets, and destinations that are oneself.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use weft_tests::Cluster;
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::{REFUSED, Watch, eventually, expect_echo};
use weft_tests::testapp::{self, Connected, Server};

use crate::Pods;

pub(crate) fn mapped(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.server, 7003, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    let target = SocketAddr::new(IpAddr::V6(pods.server.v4().to_ipv6_mapped()), 7003);
    let said = expect_echo(&pods.client, target, "mapped-address")?;
    ensure!(said.peer == Some(target), "{said:?}");
    let local = said.local.context("no getsockname")?;
    ensure!(
        local.ip().to_canonical() == pods.client.addresses()[0],
        "{said:?}"
    );
    let accepted = server.wait_accepted(1)?.remove(0);
    ensure!(
        accepted.accepted.ip() == pods.client.addresses()[0],
        "{accepted:?}"
    );
    watch.finish_encrypted(&["mapped-address"]).map(drop)
}

pub(crate) fn source_ports(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _a = Server::start(&pods.server, 7004, "echo", &[])?;
    let _b = Server::start(&pods.server, 7005, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for family in 0..2 {
        let own = pods.client.addresses()[family].to_string();
        for round in 0..4 {
            for port in [7004, 7005] {
                let target = pods.server.sockets(port)[family];
                let mut args = vec![
                    "--source-port",
                    "31000",
                    "--send",
                    "same-port",
                    "--half-close",
                ];
                // Half of the rounds bind the address as well.
                if round % 2 == 1 {
                    args.extend(["--bind", &own]);
                }
                let got = testapp::connect(&pods.client, target, &args)?;
                ensure!(
                    got.outcome == "ok" && got.text == "same-port",
                    "round {round} to {target}: {got:?}"
                );
            }
        }
    }
    watch.finish_encrypted(&["same-port"]).map(drop)
}

pub(crate) fn nonblocking(_: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7006, "echo", &[])?;
    for target in pods.server.sockets(7006) {
        let args = ["--nonblocking", "--send", "later", "--half-close"];
        let got = testapp::connect(&pods.client, target, &args)?.expect(&["ok"])?;
        ensure!(got.text == "later" && got.peer == Some(target), "{got:?}");
    }
    Ok(())
}

pub(crate) fn device(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7007, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for target in pods.server.sockets(7007) {
        let args = [
            "--device",
            "eth0",
            "--send",
            "bound-to-device",
            "--half-close",
            "--timeout-ms",
            "3000",
        ];
        let got = testapp::connect(&pods.client, target, &args)?;
        let worked = got.outcome == "ok" && got.text == "bound-to-device";
        ensure!(worked || REFUSED.contains(&got.outcome.as_str()), "{got:?}");
    }
    watch.finish(&["bound-to-device"]).map(drop)
}

pub(crate) fn mptcp(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7008, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for target in pods.server.sockets(7008) {
        let got = testapp::connect(
            &pods.client,
            target,
            &["--mptcp", "--send", "many-paths", "--half-close"],
        )?;
        ensure!(got.stage != "socket", "this kernel has no MPTCP: {got:?}");
        ensure!(got.outcome == "ok" && got.text == "many-paths", "{got:?}");
    }
    watch.finish_encrypted(&["many-paths"]).map(drop)
}

pub(crate) fn fast_open(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let _server = Server::start(&pods.server, 7009, "echo", &[])?;
    let watch = Watch::start(cluster, &[&pods.client, &pods.server])?;
    for target in pods.server.sockets(7009) {
        for option in [&[][..], &["--sendto"]] {
            let target = target.to_string();
            let out = testapp::command(&pods.client)?
                .args(["fast-open", &target, "fast-open-data"])
                .args(option)
                .run()?;
            let got: Connected = serde_json::from_str(&out)?;
            ensure!(got.text == "fast-open-data", "{option:?}: {got:?}");
        }
    }
    watch.finish_encrypted(&["fast-open-data"]).map(drop)
}

pub(crate) fn hairpin(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.client, 7010, "echo", &[])?;
    for (family, target) in pods.client.sockets(7010).into_iter().enumerate() {
        let said = expect_echo(&pods.client, target, "myself")?;
        ensure!(said.peer == Some(target), "{said:?}");
        let accepted = server.wait_accepted(family + 1)?.remove(family);
        ensure!(accepted.accepted.ip() == target.ip(), "{accepted:?}");
    }
    let spec = ServiceSpec::new("myself")
        .select("app", "client")
        .port(80, 7010);
    for address in cluster.add_service(&spec)? {
        let target = SocketAddr::new(address, 80);
        eventually("the pod's own Service", || {
            expect_echo(&pods.client, target, "by-service").map(drop)
        })?;
    }
    Ok(())
}

pub(crate) fn loopback(_: &Cluster, pods: &Pods) -> Result<()> {
    let server = Server::start(&pods.client, 7011, "echo", &[])?;
    for (count, address) in ["127.0.0.1:7011", "127.9.8.7:7011", "[::1]:7011"]
        .iter()
        .enumerate()
    {
        let target: SocketAddr = address.parse()?;
        let said = expect_echo(&pods.client, target, "home")?;
        ensure!(said.peer == Some(target), "{said:?}");
        let accepted = server.wait_accepted(count + 1)?.remove(count);
        ensure!(
            Some(accepted.accepted) == said.local,
            "{accepted:?} {said:?}"
        );
    }
    testapp::connect(&pods.client, "127.0.0.1:7999".parse()?, &[])?
        .expect(&["refused"])
        .map(drop)
}
