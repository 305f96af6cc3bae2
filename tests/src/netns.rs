//! Network namespaces with names, as iproute2 keeps them under `/run/netns`.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

/// A named network namespace, removed when this is dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes the namespace, brings its loopback up, and switches off what would make addresses
    /// wait (duplicate address detection) or packets disappear (reverse path filters).
    pub fn create(name: &str) -> Result<Netns> {
        ip(&["netns", "add", name])?;
        let netns = Netns {
            name: name.to_owned(),
        };
        netns.ip(&["link", "set", "lo", "up"])?;
        for (key, value) in [
            ("ipv6/conf/all/disable_ipv6", "0"),
            ("ipv6/conf/default/disable_ipv6", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ] {
            netns.sysctl(key, value)?;
        }
        Ok(netns)
    }

    /// Its name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is bound: what the `weft.dev/netns` annotation says.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// Runs `ip` for this namespace.
    pub fn ip(&self, args: &[&str]) -> Result<String> {
        let mut all = vec!["-n", &self.name];
        all.extend_from_slice(args);
        ip(&all)
    }

    /// Writes `/proc/sys/net/<key>` as this namespace sees it.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| std::fs::write(format!("/proc/sys/net/{key}"), value))?
            .with_context(|| format!("setting net/{key} in {}", self.name))
    }

    /// Runs `work` on a thread of its own in this namespace; sockets that it opens belong there.
    ///
    /// Start no processes in it: they would die with the thread.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = self.open()?;
        std::thread::scope(|scope| {
            let entered = scope.spawn(move || -> Result<T> {
                setns(&file, CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
                Ok(work())
            });
            match entered.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Removes it now instead of at the end. Processes and open descriptors keep it alive without
    /// its name.
    pub fn delete(self) -> Result<()> {
        let name = self.name.clone();
        std::mem::forget(self);
        ip(&["netns", "del", &name]).map(drop)
    }

    pub(crate) fn open(&self) -> Result<File> {
        let path = self.path();
        File::open(&path).with_context(|| format!("opening {}", path.display()))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Gone already when the run was removed first.
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .output();
    }
}

/// Runs `ip` and gives what it printed.
pub(crate) fn ip(args: &[&str]) -> Result<String> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .context("running ip")?;
    if !output.status.success() {
        bail!(
            "ip {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
