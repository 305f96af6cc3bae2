//! Unmodified programs through the mesh: across nodes and on one, by address and by Service, on
//! IPv4 and IPv6.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Result, ensure};
use weft_tests::apps::{MariaDb, Nginx, Redis, curl};
use weft_tests::manifests::ServiceSpec;
use weft_tests::scenario::{Watch, eventually};
use weft_tests::{Checks, Cluster, Pod, PodSpec};

#[test]
fn applications() {
    let cluster = Cluster::start().expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let client = add(PodSpec::new("client").on(0));
    let far = add(PodSpec::new("far").on(1));
    let near = add(PodSpec::new("near").on(0));
    let mut checks = Checks::new("apps");
    for (place, server) in [("across nodes", &far), ("on one node", &near)] {
        checks.check(&format!("nginx and curl {place}"), || {
            nginx(&cluster, &client, server)
        });
        checks.check(&format!("redis {place}"), || {
            redis(&cluster, &client, server)
        });
        checks.check(&format!("mariadb {place}"), || {
            mariadb(&cluster, &client, server)
        });
        checks.check(&format!("netcat and socat {place}"), || {
            netcat(&cluster, &client, server)
        });
    }
    checks.finish();
}

/// The server's own addresses, and those of a Service for it.
fn ways(cluster: &Cluster, server: &Pod, port: u16) -> Result<Vec<IpAddr>> {
    let name = format!("{}-{port}", server.name());
    let spec = ServiceSpec::new(&name)
        .select("app", server.name())
        .port(port, port);
    Ok([server.addresses(), cluster.add_service(&spec)?].concat())
}

fn nginx(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let nginx = Nginx::start(server, 8080)?;
    let ways = ways(cluster, server, 8080)?;
    let watch = Watch::start(cluster, &[client, server])?;
    for (round, address) in ways.into_iter().enumerate() {
        let target = SocketAddr::new(address, 8080);
        let secret = format!("secret-page-{round}");
        nginx.add_file(&secret, &secret.repeat(2000))?;
        eventually("the Service to be there", || {
            let reply = curl(client, target, "")?;
            ensure!(reply.status == 200, "{reply:?}");
            Ok(())
        })?;
        let reply = curl(client, target, &secret)?;
        ensure!(
            reply.status == 200 && reply.body == secret.repeat(2000),
            "curl got {}",
            reply.status
        );
        let line = nginx.wait_for_request(&secret)?;
        ensure!(
            line.client.ip() == client.addresses()[round % 2],
            "nginx saw {line:?}"
        );
    }
    watch.finish(&["secret-page", "HTTP/1.1", "hello from"])?;
    nginx.stop()
}

fn redis(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let _redis = Redis::start(server, 6379)?;
    let ways = ways(cluster, server, 6379)?;
    let watch = Watch::start(cluster, &[client, server])?;
    for address in ways {
        eventually("redis to answer", || {
            let pong = Redis::command(client, address, 6379, &["ping"])?.success()?;
            ensure!(pong.trim() == "PONG", "redis says {pong}");
            Ok(())
        })?;
        Redis::command(client, address, 6379, &["set", "key", "redis-secret"])?.success()?;
        let value = Redis::command(client, address, 6379, &["get", "key"])?.success()?;
        ensure!(value.trim() == "redis-secret", "redis says {value}");
        let list = Redis::command(client, address, 6379, &["client", "list"])?.success()?;
        let own = if address.is_ipv4() {
            client.addresses()[0]
        } else {
            client.addresses()[1]
        };
        ensure!(list.contains(&own.to_string()), "redis saw {list}");
    }
    watch.finish(&["redis-secret", "PONG"]).map(drop)
}

fn mariadb(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let _database = MariaDb::start(server, 3306)?;
    let ways = ways(cluster, server, 3306)?;
    let watch = Watch::start(cluster, &[client, server])?;
    for address in ways {
        eventually("mariadb to answer", || {
            let answer = MariaDb::query(client, address, 3306, "select 'db-secret'")?.success()?;
            ensure!(answer.trim() == "db-secret", "mariadb says {answer}");
            Ok(())
        })?;
        let start = Instant::now();
        let seen = MariaDb::client_seen(client, address, 3306)?;
        let own = if address.is_ipv4() {
            client.addresses()[0]
        } else {
            client.addresses()[1]
        };
        ensure!(seen.contains(&own.to_string()), "mariadb saw {seen}");
        // A server that speaks first must not be waited for.
        ensure!(
            start.elapsed().as_secs_f64() < 2.0,
            "the query took {:?}",
            start.elapsed()
        );
    }
    watch
        .finish(&["db-secret", "MariaDB", "mysql_native_password"])
        .map(drop)
}

fn netcat(cluster: &Cluster, client: &Pod, server: &Pod) -> Result<()> {
    let watch = Watch::start(cluster, &[client, server])?;
    for (round, target) in server.sockets(9000).into_iter().enumerate() {
        let (port, listen) = if target.is_ipv4() {
            (9000, "TCP4-LISTEN:9000,reuseaddr,fork")
        } else {
            (9001, "TCP6-LISTEN:9001,ipv6only=1,reuseaddr,fork")
        };
        let mut socat = server
            .command("socat")?
            .args([listen, "EXEC:cat"])
            .spawn()?;
        socat.wait_listening(port)?;
        let address = target.ip().to_string();
        let mut nc = client
            .command("nc")?
            .args(["-N", "-w", "5", &address, &port.to_string()])
            .with_stdin()
            .spawn()?;
        let text = format!("netcat-secret-{round}\n");
        nc.write_stdin(&text)?;
        let echoed = nc.finish(std::time::Duration::from_secs(10))?;
        ensure!(echoed == text, "nc got {echoed:?}");
    }
    watch.finish(&["netcat-secret"]).map(drop)
}
