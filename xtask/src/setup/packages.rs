//! The Debian packages of the demo and of the end-to-end tests: real applications, and the tools
//! that build the virtual nodes and watch the wire.

use anyhow::{Result, bail};

use crate::{
    process,
    setup::debian::{self, Package},
    ui,
};

/// Makes sure that the programs are there: by packages on Debian, by asking for them elsewhere. A
/// program that is there already may come from wherever its owner wants.
pub(crate) fn ensure() -> Result<()> {
    if debian::is_debian() {
        let packages: Vec<Package> = missing().map(|(package, _)| package).collect();
        debian::install(&packages)?;
    }
    let missing: Vec<String> = missing()
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
    ui::note("all programs that the demo and the tests run are there");
    Ok(())
}

fn missing() -> impl Iterator<Item = (Package, &'static str)> {
    PACKAGES
        .into_iter()
        .filter(|(_, program)| process::in_path(program).is_none())
}

/// Each package, with a program of it that is looked for.
const PACKAGES: [(Package, &str); 12] = [
    (
        package("iproute2", "network namespaces, veth pairs, bridges"),
        "ip",
    ),
    (
        package("tcpdump", "captures the wire between the nodes"),
        "tcpdump",
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
];

const fn package(name: &'static str, reason: &'static str) -> Package {
    Package::new(name, reason)
}
