//! The harness by itself, without a mesh: what it builds must be a network in which everything
//! works and is seen in the clear, or the other tests prove nothing.

use anyhow::{Result, ensure};
use weft_tests::apps::{MariaDb, Nginx, Redis, curl};
use weft_tests::capture::Capture;
use weft_tests::testapp::{self, Server};
use weft_tests::{Checks, Cluster, Pod, PodSpec, run};

#[test]
fn a_cluster_without_a_mesh() {
    let name = {
        let cluster = Cluster::without_mesh().expect("a cluster");
        let a = cluster.add_pod(PodSpec::new("a").on(0)).expect("a pod");
        let b = cluster.add_pod(PodSpec::new("b").on(1)).expect("a pod");
        let c = cluster.add_pod(PodSpec::new("c").on(0)).expect("a pod");
        let mut checks = Checks::new("harness");
        checks.check("nginx and curl over the wire, in the clear", || {
            nginx(&cluster, &a, &b)
        });
        checks.check("pods of a node reach each other beside the wire", || {
            same_node(&cluster, &a, &c)
        });
        checks.check("redis", || redis(&a, &b));
        checks.check("mariadb", || mariadb(&a, &b));
        checks.check("programs are in their pod's cgroup", || {
            cgroups(&a, &cluster)
        });
        checks.check("testapp: ports, half-close, reset", || connections(&a, &b));
        checks.check("testapp: a megabyte each way", || bulk(&a, &b));
        checks.check("a capture of a flow puts it in order", || {
            reassembly(&cluster, &a, &b)
        });
        checks.finish();
        cluster.name().to_owned()
    };
    assert_eq!(
        run::remains(&name),
        Vec::<String>::new(),
        "nothing may be left"
    );
}

#[test]
fn dead_runs_are_cleaned_up() {
    // A process id that cannot exist: ids end at 4 194 304.
    let dead = "weft-99999999-0";
    let netns = weft_tests::netns::Netns::create(&format!("{dead}-x")).expect("a namespace");
    std::mem::forget(netns);
    let root = weft_tests::cgroup::run_root(dead).expect("a hierarchy");
    weft_tests::cgroup::Cgroup::create(root.join("a/b")).expect("a cgroup");
    assert_eq!(run::remains(dead).len(), 2);
    let _run = run::Run::start().expect("a run");
    assert_eq!(run::remains(dead), Vec::<String>::new());
}

fn nginx(cluster: &Cluster, a: &Pod, b: &Pod) -> Result<()> {
    let nginx = Nginx::start(b, 80)?;
    for (round, server) in b.sockets(80).into_iter().enumerate() {
        let needle = format!("in-the-clear-{round}");
        let page = format!("page-{round}");
        nginx.add_file(&page, &needle)?;
        let capture = Capture::start(cluster.node(0).netns(), "eth0", cluster.dir())?;
        let reply = curl(a, server, &page)?;
        let captured = capture.finish()?;
        ensure!(
            reply.status == 200 && reply.body == needle,
            "curl got {reply:?}"
        );
        ensure!(captured.contains(needle.as_bytes()), "the capture is blind");
        ensure!(captured.ensure_without(&needle).is_err());
        ensure!(
            captured
                .ensure_only_tunnels(&[a.addresses(), b.addresses()].concat())
                .is_err()
        );
        let line = nginx.wait_for_request(&page)?;
        ensure!(
            line.client.ip() == a.addresses()[round],
            "nginx saw {line:?}"
        );
        ensure!(line.server == server, "nginx saw {line:?}");
    }
    nginx.stop()
}

fn same_node(cluster: &Cluster, a: &Pod, c: &Pod) -> Result<()> {
    let _server = Server::start(c, 7000, "echo", &[])?;
    let wire = Capture::start(cluster.node(0).netns(), "eth0", cluster.dir())?;
    let bridge = Capture::start(cluster.node(0).netns(), "br0", cluster.dir())?;
    let pod = Capture::start(c.netns(), "eth0", cluster.dir())?;
    let said = testapp::say(a, c.sockets(7000)[0], "beside the wire")?.expect(&["ok"])?;
    ensure!(said.text == "beside the wire", "{said:?}");
    let (wire, pod, _bridge) = (wire.finish()?, pod.finish()?, bridge.finish()?);
    ensure!(!wire.contains(b"beside the wire"), "it went over the wire");
    ensure!(
        pod.contains(b"beside the wire"),
        "it did not come by the pod's interface"
    );
    Ok(())
}

fn redis(a: &Pod, b: &Pod) -> Result<()> {
    let _server = Redis::start(b, 6379)?;
    for address in b.addresses() {
        let pong = Redis::command(a, address, 6379, &["ping"])?.success()?;
        ensure!(pong.trim() == "PONG", "redis says {pong}");
    }
    Ok(())
}

fn mariadb(a: &Pod, b: &Pod) -> Result<()> {
    let _server = MariaDb::start(b, 3306)?;
    for address in b.addresses() {
        let answer = MariaDb::query(a, address, 3306, "select 6 * 7")?.success()?;
        ensure!(answer.trim() == "42", "mariadb says {answer}");
        let client = MariaDb::client_seen(a, address, 3306)?;
        let expected = if address.is_ipv4() {
            a.addresses()[0]
        } else {
            a.addresses()[1]
        };
        ensure!(
            client.contains(&expected.to_string()),
            "mariadb saw {client}"
        );
    }
    Ok(())
}

fn cgroups(a: &Pod, cluster: &Cluster) -> Result<()> {
    let sleeper = a.command("sleep")?.arg("60").spawn()?;
    ensure!(
        a.cgroup().pids()? == [sleeper.pid()],
        "the pod's cgroup has {:?}",
        a.cgroup().pids()?
    );
    ensure!(
        a.cgroup()
            .path()
            .starts_with(cluster.node(0).cgroup().path())
    );
    let kubelet = cluster
        .node(0)
        .kubelet_command("sleep")?
        .arg("60")
        .spawn()?;
    ensure!(cluster.node(0).kubelet_cgroup().pids()? == [kubelet.pid()]);
    Ok(())
}

fn connections(a: &Pod, b: &Pod) -> Result<()> {
    let server = Server::start(b, 7001, "echo", &[])?;
    for (round, target) in b.sockets(7001).into_iter().enumerate() {
        let got = testapp::connect(
            a,
            target,
            &[
                "--source-port",
                "33333",
                "--send",
                "hello",
                "--half-close",
                "--nonblocking",
            ],
        )?;
        let got = got.expect(&["ok"])?;
        ensure!(got.text == "hello" && got.eof, "{got:?}");
        ensure!(
            got.peer == Some(target) && got.local == Some(a.sockets(33333)[round]),
            "{got:?}"
        );
        let accepted = server.wait_accepted(round + 1)?;
        ensure!(
            accepted[round].accepted == a.sockets(33333)[round],
            "{accepted:?}"
        );
    }
    testapp::connect(a, b.sockets(7999)[0], &[])?.expect(&["refused"])?;
    let reset = testapp::connect(
        a,
        b.sockets(7001)[0],
        &["--reset", "--send", "x", "--receive-bytes", "1"],
    )?;
    reset.expect(&["ok"])?;
    let closed = server.wait_closed(3)?;
    ensure!(closed[2].outcome == "reset", "{closed:?}");
    let counts = testapp::churn(a, b.sockets(7001)[1], 200, &["--parallel", "4"])?;
    ensure!(counts.of("ok") == 200, "{counts:?}");
    Ok(())
}

fn bulk(a: &Pod, b: &Pod) -> Result<()> {
    let bytes = (1 << 20).to_string();
    let server = Server::start(b, 7002, "exchange", &["--bytes", &bytes])?;
    let got = testapp::connect(
        a,
        b.sockets(7002)[0],
        &["--send-bytes", &bytes, "--half-close", "--expect-pattern"],
    )?;
    ensure!(
        got.received == 1 << 20 && got.intact && got.outcome == "ok",
        "{got:?}"
    );
    let closed = server.wait_closed(1)?;
    ensure!(
        closed[0].received == 1 << 20 && closed[0].intact,
        "{closed:?}"
    );
    Ok(())
}

fn reassembly(cluster: &Cluster, a: &Pod, b: &Pod) -> Result<()> {
    let _server = Server::start(b, 7003, "echo", &[])?;
    let capture = Capture::start(cluster.node(1).netns(), "eth0", cluster.dir())?;
    testapp::connect(
        a,
        b.sockets(7003)[1],
        &["--send", "split-needle", "--split", "--half-close"],
    )?
    .expect(&["ok"])?;
    let captured = capture.finish()?;
    let whole = captured
        .packets()
        .iter()
        .any(|packet| packet.contains(b"split-needle"));
    ensure!(
        captured.contains(b"split-needle"),
        "the split needle was not found"
    );
    ensure!(!whole || captured.to_or_from_port(7003).count() > 0);
    ensure!(captured.tls(7003).not_tls > 0);
    Ok(())
}
