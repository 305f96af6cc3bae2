//! MariaDB: a server that speaks first.

use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::command::{Finished, Process};
use crate::pod::Pod;

/// A running mariadbd, on all addresses, for a user `root` without a password from anywhere.
#[derive(Debug)]
pub struct MariaDb {
    process: Process,
}

impl MariaDb {
    /// Makes an empty database and starts the server.
    pub fn start(pod: &Pod, port: u16) -> Result<MariaDb> {
        let data = pod.dir().join("mariadb");
        fs::create_dir_all(&data)?;
        let datadir = format!("--datadir={}", data.display());
        let installed = pod
            .command("mariadb-install-db")?
            .args(["--no-defaults", &datadir, "--user=root"])
            .args(["--auth-root-authentication-method=normal", "--skip-test-db"])
            .output(Duration::from_secs(60))?;
        installed.success()?;
        let file = |name: &str| data.join(name).display().to_string();
        let users = data.join("users.sql");
        fs::write(
            &users,
            "create user root@'%';\ngrant all on *.* to root@'%';\n",
        )?;
        let mut process = pod
            .command("mariadbd")?
            .args(["--no-defaults", &datadir, "--user=root", "--bind-address=*"])
            .args(["--skip-networking=0", "--skip-name-resolve"])
            .args(["--innodb-buffer-pool-size=16M", "--innodb-log-file-size=4M"])
            .arg(format!("--init-file={}", users.display()))
            .arg(format!("--port={port}"))
            .arg(format!("--socket={}", file("socket")))
            .arg(format!("--pid-file={}", file("pid")))
            .spawn()?;
        process.wait_for_line("ready for connections", Duration::from_secs(60))?;
        process.wait_listening(port)?;
        Ok(MariaDb { process })
    }

    /// Runs a statement with the `mariadb` client in a pod, unencrypted as far as it knows.
    pub fn query(client: &Pod, server: IpAddr, port: u16, statement: &str) -> Result<Finished> {
        client
            .command("mariadb")?
            .args(["--no-defaults", "--skip-ssl", "--user=root", "--batch"])
            .args([
                "--skip-column-names",
                "--connect-timeout=10",
                "--protocol=tcp",
            ])
            .args(["--host", &server.to_string(), "--port", &port.to_string()])
            .args(["--execute", statement])
            .output(Duration::from_secs(20))
    }

    /// The client's address and port as the server has it, from inside a query.
    pub fn client_seen(client: &Pod, server: IpAddr, port: u16) -> Result<String> {
        let statement =
            "select user(), host from information_schema.processlist where id = connection_id()";
        let finished = MariaDb::query(client, server, port, statement)?;
        let seen = finished.clone().success()?;
        ensure!(
            !seen.trim().is_empty(),
            "the server shows no client: {finished:?}"
        );
        Ok(seen.trim().to_owned())
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
