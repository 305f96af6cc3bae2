//! `nested`: a network namespace below the pod's, which no program of Weft knows, with the pod's own
//! interface in it. Whatever it sends goes to the network as it is.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getgid, getuid};

/// Moves the pod's `eth0` to a new network namespace and connects from there.
#[derive(Args)]
pub(crate) struct Nested {
    /// Where to connect to; each is one connection, reported as by `connect`.
    #[arg(required = true)]
    targets: Vec<SocketAddr>,
    /// The address to take, with the length of its network's prefix: the pod's own, or another's.
    #[arg(long)]
    address: String,
    /// The way to all else.
    #[arg(long)]
    gateway: IpAddr,
    /// What to say.
    #[arg(long, default_value = "nested")]
    send: String,
    /// In a new user namespace too.
    #[arg(long)]
    user: bool,
    /// Leaves the interface where it is.
    #[arg(long)]
    without_interface: bool,
    /// Is the process inside.
    #[arg(long, hide = true)]
    inside: bool,
}

impl Nested {
    pub(crate) fn run(self) -> Result<()> {
        if self.inside {
            self.inside()
        } else {
            self.outside()
        }
    }

    /// In the pod's namespace, with its rights: gives the interface away.
    fn outside(&self) -> Result<()> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .arg("--inside")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = BufReader::new(child.stdout.take().context("its output")?).lines();
        let first = said.next().context("it said nothing")??;
        ensure!(first == READY, "{first}");
        if !self.without_interface {
            ip(&["link", "set", "eth0", "netns", &child.id().to_string()])?;
        }
        let mut go_on = child.stdin.take().context("its input")?;
        go_on.write_all(b"\n")?;
        drop(go_on);
        for line in said {
            println!("{}", line?);
        }
        ensure!(child.wait()?.success(), "the process inside failed");
        Ok(())
    }

    fn inside(&self) -> Result<()> {
        let (user, group) = (getuid(), getgid());
        let mut spaces = CloneFlags::CLONE_NEWNET;
        if self.user {
            spaces |= CloneFlags::CLONE_NEWUSER;
        }
        unshare(spaces).context("new namespaces")?;
        if self.user {
            // Root inside, itself outside.
            std::fs::write("/proc/self/setgroups", "deny")?;
            std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
            std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
        }
        println!("{READY}");
        std::io::stdin().read_line(&mut String::new())?;
        ip(&["link", "set", "lo", "up"])?;
        if !self.without_interface {
            let family = if self.gateway.is_ipv6() { "-6" } else { "-4" };
            let mut add = vec![family, "addr", "add", &self.address, "dev", "eth0"];
            if self.gateway.is_ipv6() {
                add.push("nodad");
            }
            let gateway = self.gateway.to_string();
            ip(&["link", "set", "eth0", "up"])?;
            ip(&add)?;
            ip(&[family, "route", "add", "default", "via", &gateway])?;
        }
        for target in &self.targets {
            let done = Command::new(std::env::current_exe()?)
                .args(["connect", &target.to_string(), "--send", &self.send])
                .args(["--half-close", "--timeout-ms", "2000"])
                .status()?;
            ensure!(done.success(), "connecting failed: {done}");
        }
        Ok(())
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let done = Command::new("ip").args(args).output()?;
    if !done.status.success() {
        let why = String::from_utf8_lossy(&done.stderr);
        bail!("ip {}: {why}", args.join(" "));
    }
    Ok(())
}

const READY: &str = "inside";
