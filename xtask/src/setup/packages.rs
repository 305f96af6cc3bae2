//! The Debian packages of the demo, the end-to-end tests and the benchmark: real applications, and
//! the tools that build the virtual nodes, watch the wire and make load.

use anyhow::{Result, bail};

use crate::{
    process,
    setup::debian::{self, Package},
    ui,
};

/// A package, and a program of it that is looked for.
type Wanted = (Package, &'static str);

/// Makes sure that the programs of the demo and the tests are there: by packages on Debian, by
/// asking for them elsewhere. A program that is there already may come from wherever its owner
/// wants.
pub(crate) fn ensure() -> Result<()> {
    ensure_all(&PACKAGES)
}

/// The same for what the benchmark runs.
pub(crate) fn ensure_for_bench() -> Result<()> {
    ensure_all(&BENCH_PACKAGES)
}

fn ensure_all(wanted: &[Wanted]) -> Result<()> {
    if debian::is_debian() {
        let packages: Vec<Package> = missing(wanted).map(|(package, _)| package).collect();
        debian::install(&packages)?;
    }
    let missing: Vec<String> = missing(wanted)
        .map(|(package, program)| {
            format!(
                "  - {program} (Debian's package {}): {}",
                package.name, package.reason
            )
        })
        .collect();
    if !missing.is_empty() {
        bail!("programs are missing:\n{}", missing.join("\n"));
    }
    ui::note("all programs that will be run are there");
    Ok(())
}

fn missing(wanted: &[Wanted]) -> impl Iterator<Item = Wanted> {
    wanted
        .iter()
        .copied()
        .filter(|(_, program)| process::in_path(program).is_none())
}

const PACKAGES: [Wanted; 18] = [
    (
        package("iproute2", "network namespaces, veth pairs, bridges"),
        "ip",
    ),
    (
        package("tcpdump", "captures the wire between the nodes"),
        "tcpdump",
    ),
    (
        package(
            "containernetworking-plugins",
            "CNI plugins that ours is chained to",
        ),
        "/usr/lib/cni/bridge",
    ),
    (
        package("containerd", "runs real containers").with_service("containerd"),
        "containerd",
    ),
    (package("runc", "what containerd runs them by"), "runc"),
    (
        package(
            "busybox-static",
            "a shell without libraries, for containers",
        ),
        "busybox",
    ),
    (package("curl", "an HTTP client"), "curl"),
    (
        package("nginx-light", "an HTTP server").with_service("nginx"),
        "nginx",
    ),
    (
        package("redis-server", "a server with long connections").with_service("redis-server"),
        "redis-server",
    ),
    (package("redis-tools", "its client"), "redis-cli"),
    (
        // Not mariadb-server: that one only adds the service.
        package(
            "mariadb-server-core",
            "a database whose server speaks first",
        ),
        "mariadbd",
    ),
    (package("mariadb-client", "its client"), "mariadb"),
    (
        package("socat", "half-closed and slow connections"),
        "socat",
    ),
    (
        package("netcat-openbsd", "connections that a person types into"),
        "nc",
    ),
    (
        package("openssl", "an independent TLS implementation"),
        "openssl",
    ),
    (
        package("python3", "small servers and clients of odd behaviour"),
        "python3",
    ),
    (
        package("nghttp2-client", "h2load and nghttp: clients of HTTP/2"),
        "h2load",
    ),
    (
        package(
            "prometheus",
            "scrapes the agents, and is asked what a canary asks",
        )
        .with_service("prometheus"),
        "prometheus",
    ),
];

const BENCH_PACKAGES: [Wanted; 5] = [
    (
        package("iproute2", "network namespaces, veth pairs, bridges"),
        "ip",
    ),
    (
        package("nginx-light", "an HTTP server").with_service("nginx"),
        "nginx",
    ),
    (
        package("iperf3", "sends as much as a connection takes").with_service("iperf3"),
        "iperf3",
    ),
    (
        package("wrk", "sends requests as fast as they are answered"),
        "wrk",
    ),
    (
        package("nghttp2-client", "h2load: the same by HTTP/2"),
        "h2load",
    ),
];

const fn package(name: &'static str, reason: &'static str) -> Package {
    Package::new(name, reason)
}
