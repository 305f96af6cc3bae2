//! What the mesh needs of the machine itself: root, namespaces, cgroup v2, eBPF. Checked without
//! loading a program: the agent probes each hook itself, and says which one the kernel refuses.

use std::{fs, path::Path, process::Command};

use anyhow::{Result, bail};
use nix::{sys::utsname::uname, unistd::geteuid};

use crate::{process, ui};

/// Fails with everything that is missing, not only the first of it.
pub(crate) fn check() -> Result<()> {
    let missing = missing();
    if !missing.is_empty() {
        bail!(
            "this machine cannot run the mesh:\n{}",
            missing
                .iter()
                .map(|what| format!("  - {what}"))
                .collect::<Vec<_>>()
                .join("\n")
        );
    }
    let kernel = uname().map_or_else(
        |_| String::new(),
        |name| name.release().display().to_string(),
    );
    ui::note(&format!(
        "root, kernel {kernel} with cgroup v2, namespaces, eBPF and IPv6"
    ));
    Ok(())
}

fn missing() -> Vec<String> {
    if !geteuid().is_root() {
        // What follows could not be told apart from its consequences.
        return vec![
            "root: it makes network namespaces and cgroups, and loads kernel programs. Run it as \
             root, for example by `sudo env \"PATH=$PATH\" cargo xtask ...`"
                .to_owned(),
        ];
    }
    [
        capabilities(),
        kernel_version(),
        hooks(),
        bpf_file_system(),
        cgroup2(),
        namespaces(),
        ipv6(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn capabilities() -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let missing = missing_capabilities(&status);
    (!missing.is_empty()).then(|| {
        format!(
            "capabilities {}: root has been stripped of them here. Is this an unprivileged \
             container?",
            missing.join(", ")
        )
    })
}

fn kernel_version() -> Option<String> {
    let release = uname().ok()?.release().to_string_lossy().into_owned();
    let version = parse_version(&release)?;
    (version < OLDEST_KERNEL).then(|| {
        let (major, minor) = OLDEST_KERNEL;
        format!("a kernel of {major}.{minor} or newer: this is {release}")
    })
}

fn hooks() -> Option<String> {
    let symbols = fs::read_to_string("/proc/kallsyms").ok()?;
    let missing = missing_hooks(&symbols);
    (!missing.is_empty()).then(|| format!("kernel features: {}", missing.join(", ")))
}

fn bpf_file_system() -> Option<String> {
    if !Path::new("/proc/sys/kernel/unprivileged_bpf_disabled").exists() {
        return Some("the bpf system call: the kernel is built without CONFIG_BPF_SYSCALL".into());
    }
    let mounts = process::succeeds(
        // In a mount namespace of its own: the machine's mounts stay as they are.
        Command::new("unshare").args(["--mount", "mount", "-t", "bpf", "bpf", "/sys/fs/bpf"]),
    );
    (!mounts).then(|| "the bpf file system: it cannot be mounted on /sys/fs/bpf".into())
}

fn cgroup2() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let Some(root) = cgroup2_mount(&mounts) else {
        return Some(
            "cgroup v2: no cgroup2 file system is mounted (`mount -t cgroup2 none <folder>`)"
                .into(),
        );
    };
    let probe = Path::new(root).join(format!("weft-xtask-probe-{}", std::process::id()));
    match fs::create_dir(&probe) {
        Ok(()) => {
            // A cgroup without processes: nothing can hold it.
            let _ = fs::remove_dir(&probe);
            None
        }
        Err(error) => Some(format!(
            "cgroup v2: cannot create a cgroup in {root}: {error}"
        )),
    }
}

fn namespaces() -> Option<String> {
    let can = process::succeeds(Command::new("unshare").args(["--net", "--mount", "true"]));
    (!can).then(|| "network and mount namespaces: `unshare --net --mount` is refused".into())
}

fn ipv6() -> Option<String> {
    (!Path::new("/proc/net/if_inet6").exists())
        .then(|| "IPv6: the kernel has none, or it is off (`ipv6.disable=1`)".into())
}

/// The names of the needed capabilities that are not in the effective set of a `/proc` status.
fn missing_capabilities(status: &str) -> Vec<&'static str> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    CAPABILITIES
        .into_iter()
        .filter(|(bit, _)| effective & (1 << bit) == 0)
        .map(|(_, name)| name)
        .collect()
}

/// The needed kernel options whose code is not among the kernel's symbols.
fn missing_hooks(symbols: &str) -> Vec<&'static str> {
    let present: Vec<&str> = symbols
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .filter(|name| HOOKS.iter().any(|(symbol, _)| symbol == name))
        .collect();
    HOOKS
        .into_iter()
        .filter(|(symbol, _)| !present.contains(symbol))
        .map(|(_, option)| option)
        .collect()
}

/// Where cgroup v2 is mounted, by a mount table.
fn cgroup2_mount(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let target = fields.next()?;
        (fields.next()? == "cgroup2").then_some(target)
    })
}

/// Major and minor version of a release such as `6.1.0-18-amd64`.
fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|byte: char| !byte.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// Bit numbers of `linux/capability.h`.
const CAPABILITIES: [(u32, &str); 5] = [
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (39, "CAP_BPF"),
];

/// A function of the kernel that exists only with the option that the hooks need.
const HOOKS: [(&str, &str); 3] = [
    (
        "__cgroup_bpf_run_filter_sock_addr",
        "programs on cgroups (CONFIG_CGROUP_BPF)",
    ),
    (
        "netns_bpf_link_create",
        "programs on network namespaces (CONFIG_BPF_SYSCALL with CONFIG_NET)",
    ),
    (
        "bpf_sk_storage_get",
        "storage on sockets (CONFIG_BPF_SYSCALL with CONFIG_NET)",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_kernels() {
        for (release, version) in [
            ("6.1.0-18-amd64", Some((6, 1))),
            ("5.15.0", Some((5, 15))),
            ("6.18-rc1+", Some((6, 18))),
            ("6", None),
            ("", None),
        ] {
            assert_eq!(parse_version(release), version, "{release}");
        }
    }

    #[test]
    fn cgroup2_is_found_where_it_is_mounted() {
        let hybrid = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(cgroup2_mount(hybrid), Some("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup2_mount("cgroup2 /somewhere tmpfs rw 0 0\n"), None);
        assert_eq!(cgroup2_mount(""), None);
    }

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        assert!(missing_capabilities("CapPrm:\t0\nCapEff:\t000001fffeffffff\n").is_empty());
        // The default set of a container engine.
        assert_eq!(
            missing_capabilities("CapEff:\t00000000a80425fb\n"),
            [
                "CAP_NET_ADMIN",
                "CAP_SYS_PTRACE",
                "CAP_SYS_ADMIN",
                "CAP_BPF"
            ]
        );
        assert_eq!(missing_capabilities("").len(), CAPABILITIES.len());
    }

    #[test]
    fn missing_hooks_are_named_by_their_option() {
        let symbols = "0000000000000000 T netns_bpf_link_create\n\
            0000000000000000 T bpf_sk_storage_get\t[module]\n";
        assert_eq!(
            missing_hooks(symbols),
            ["programs on cgroups (CONFIG_CGROUP_BPF)"]
        );
    }
}
