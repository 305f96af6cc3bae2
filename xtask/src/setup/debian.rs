//! Debian packages: which are missing, and their installation without starting services.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{SigSet, Signal},
    unistd::geteuid,
};

use crate::{process, ui};

/// A package, and why it is wanted.
#[derive(Clone, Copy)]
pub(crate) struct Package {
    pub(crate) name: &'static str,
    pub(crate) reason: &'static str,
    /// The service in it, which must not run at the next boot because of us.
    service: Option<&'static str>,
}

impl Package {
    pub(crate) const fn new(name: &'static str, reason: &'static str) -> Self {
        Self {
            name,
            reason,
            service: None,
        }
    }

    pub(crate) const fn with_service(mut self, service: &'static str) -> Self {
        self.service = Some(service);
        self
    }
}

/// Whether packages can be looked up and installed on this machine.
pub(crate) fn is_debian() -> bool {
    process::in_path("dpkg-query").is_some() && process::in_path("apt-get").is_some()
}

/// Those of `packages` that are not installed.
pub(crate) fn missing(packages: &[Package]) -> Vec<Package> {
    let installed = |package: &&Package| {
        process::output(Command::new("dpkg-query").args([
            "--show",
            "--showformat=${db:Status-Status}",
            package.name,
        ]))
        .is_ok_and(|status| status == "installed")
    };
    packages
        .iter()
        .filter(|package| !installed(package))
        .copied()
        .collect()
}

/// Installs those of `packages` that are not installed, and says so. The services among them are
/// not started, neither now nor at boot. Looks for a newer package list only where the present one
/// does not do.
pub(crate) fn install(packages: &[Package]) -> Result<()> {
    install_those(&missing(packages), Lists::AsTheyAre)
}

/// Installs all of `packages` in the newest version that there is, also those that are installed
/// in an older one: for what must be new, after lists that may be as old as the machine's image.
pub(crate) fn install_newest(packages: &[Package]) -> Result<()> {
    install_those(packages, Lists::New)
}

/// Which package lists are asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lists {
    /// Those that are there, unless they do not do.
    AsTheyAre,
    /// Such as are fetched first.
    New,
}

fn install_those(packages: &[Package], lists: Lists) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    ui::note("installing Debian packages:");
    for package in packages {
        ui::note(&format!("  {:<16} {}", package.name, package.reason));
    }
    let names: Vec<&str> = packages.iter().map(|package| package.name).collect();
    if !geteuid().is_root() {
        bail!(
            "installing packages needs root: run this command as root, or once `apt-get install {}`",
            names.join(" ")
        );
    }
    // An interrupt is kept until the services' policy is restored, then takes effect. apt-get
    // itself receives it at once: a child starts with an empty mask.
    let _interrupt = HeldInterrupt::hold()?;
    let _services = ServicesStayDown::begin(Path::new("/usr/sbin/policy-rc.d"))?;
    let known = lists == Lists::AsTheyAre && names.iter().all(|name| is_known(name));
    if !known || apt_get_install(&names).is_err() {
        apt_get_update()?;
        apt_get_install(&names)?;
    }
    for service in packages.iter().filter_map(|package| package.service) {
        ui::note(&format!("{service} stays off: only its program is wanted"));
        // Where there is no systemd there is nothing to keep off.
        process::succeeds(Command::new("systemctl").args(["disable", service]));
    }
    Ok(())
}

/// Whether the package lists offer a package, after fetching them once if they do not.
pub(crate) fn is_available(name: &str) -> bool {
    is_known(name) || geteuid().is_root() && apt_get_update().is_ok() && is_known(name)
}

fn is_known(name: &str) -> bool {
    process::succeeds(Command::new("apt-cache").args(["show", "--no-all-versions", name]))
}

fn apt_get_update() -> Result<()> {
    ui::note("fetching the list of packages (apt-get update)");
    process::run(Command::new("apt-get").args(["update", "-qq"]))
}

fn apt_get_install(names: &[&str]) -> Result<()> {
    process::run(
        Command::new("apt-get")
            // Another one may be at work, as on machines that keep themselves up to date.
            .args(["-o", "DPkg::Lock::Timeout=300"])
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(names)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(std::process::Stdio::null()),
    )
}

/// While it lives, package installation starts no service: `policy-rc.d` says no to all of them.
/// What was there before is put back, also after a run that was killed.
struct ServicesStayDown {
    policy: PathBuf,
    saved: PathBuf,
}

impl ServicesStayDown {
    fn begin(policy: &Path) -> Result<Self> {
        let guard = Self {
            policy: policy.to_path_buf(),
            saved: policy.with_extension("d.weft-saved"),
        };
        let ours = fs::read_to_string(policy).is_ok_and(|text| text == DENY_ALL_SERVICES);
        // If it is already ours, a killed run left it, and `saved` is what was there before.
        if !ours && policy.exists() {
            fs::rename(policy, &guard.saved)
                .with_context(|| format!("cannot move {} aside", policy.display()))?;
        }
        fs::write(policy, DENY_ALL_SERVICES)
            .and_then(|()| fs::set_permissions(policy, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("cannot write {}", policy.display()))?;
        Ok(guard)
    }
}

impl Drop for ServicesStayDown {
    fn drop(&mut self) {
        let restored = if self.saved.exists() {
            fs::rename(&self.saved, &self.policy)
        } else {
            fs::remove_file(&self.policy)
        };
        if let Err(error) = restored {
            ui::warning(&format!(
                "cannot restore {}: {error}",
                self.policy.display()
            ));
        }
    }
}

/// While it lives, an interrupt of this process waits.
struct HeldInterrupt(SigSet);

impl HeldInterrupt {
    fn hold() -> Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block().context("cannot hold interrupts")?;
        Ok(Self(signals))
    }
}

impl Drop for HeldInterrupt {
    fn drop(&mut self) {
        // Fails for an invalid mask only.
        let _ = self.0.thread_unblock();
    }
}

const DENY_ALL_SERVICES: &str = "#!/bin/sh\n\
    # Written by Weft's `cargo xtask` for the time of a package installation; removed after it.\n\
    exit 101\n";

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("weft-xtask-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn the_services_policy_is_put_back() {
        let folder = folder("policy-restored");
        let policy = folder.join("policy-rc.d");
        fs::write(&policy, "the administrator's").unwrap();
        {
            let _guard = ServicesStayDown::begin(&policy).unwrap();
            assert_eq!(fs::read_to_string(&policy).unwrap(), DENY_ALL_SERVICES);
        }
        assert_eq!(fs::read_to_string(&policy).unwrap(), "the administrator's");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_services_policy_left_by_a_killed_run_is_no_administrators() {
        let folder = folder("policy-left");
        let policy = folder.join("policy-rc.d");
        fs::write(&policy, "the administrator's").unwrap();
        std::mem::forget(ServicesStayDown::begin(&policy).unwrap());
        drop(ServicesStayDown::begin(&policy).unwrap());
        assert_eq!(fs::read_to_string(&policy).unwrap(), "the administrator's");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn without_a_services_policy_none_stays() {
        let folder = folder("policy-none");
        let policy = folder.join("policy-rc.d");
        drop(ServicesStayDown::begin(&policy).unwrap());
        assert!(!policy.exists());
        fs::remove_dir_all(folder).unwrap();
    }
}
