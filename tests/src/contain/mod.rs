//! Makes a process a container, as a runtime does on behalf of a kubelet: a root with nothing in it but the image's files
//! and the mounts that a manifest gives, exactly the capabilities it gives, no new privileges, the runtime's default
//! filter of system calls; then becomes the program.
//!
//! Not a container runtime, as none can be had here without a cluster: it is a model of what containerd and runc do for the
//! fields that Weft's manifests have. Network namespace and control group are the caller's, and process ids always
//! the host's.

#![allow(unsafe_code)]

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, chdir, execve, pivot_root, setgroups, setresgid, setresuid};
use serde::{Deserialize, Serialize};

mod seccomp;

/// What a container is made of.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Container {
    /// A folder to build its root over; what is in it is hidden meanwhile.
    pub root: PathBuf,
    /// The image's files, which are in its root.
    pub image: Vec<PathBuf>,
    /// What is mounted besides what every container has, in this order.
    pub mounts: Vec<Mount>,
    /// Whether its root cannot be written to.
    pub read_only_root: bool,
    /// The names of all capabilities that it may have, without `CAP_`.
    pub capabilities: Vec<String>,
    /// Whether nothing that it executes gains any.
    pub no_new_privileges: bool,
    /// Whether system calls are filtered as runtimes do it by default.
    pub default_seccomp: bool,
    /// Its user
    pub user: u32,
    /// and group.
    pub group: u32,
    /// The program, as it is called inside, and its arguments.
    pub command: Vec<String>,
    /// All its environment.
    pub environment: Vec<(String, String)>,
}

/// A file or folder of the host.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Mount {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it is in the container.
    pub target: PathBuf,
    /// Whether it cannot be written to there.
    pub read_only: bool,
}

impl Container {
    /// Turns the calling process, which must have one thread, into the container's program.
    ///
    /// # Errors
    /// What could not be done; the process is good for nothing then.
    pub fn enter(&self) -> Result<Infallible> {
        let bounding = self.capability_bits()?;
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP).context("unsharing")?;
        let nothing = None::<&str>;
        let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(nothing, "/", nothing, flags, nothing).context("keeping mounts to itself")?;
        self.build_root()?;
        chdir(&self.root)?;
        pivot_root(".", ".").context("changing the root")?;
        umount2(".", MntFlags::MNT_DETACH).context("leaving the old root")?;
        chdir("/")?;
        if self.read_only_root {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_BIND;
            mount(nothing, "/", nothing, flags, nothing).context("making the root read-only")?;
        }
        self.drop_rights(bounding)?;
        let text = |it: &str| CString::new(it).context("a zero in an argument");
        let command = self.command.iter().map(|it| text(it));
        let command = command.collect::<Result<Vec<_>>>()?;
        let environment = self.environment.iter();
        let environment = environment.map(|(name, value)| text(&format!("{name}={value}")));
        let environment = environment.collect::<Result<Vec<_>>>()?;
        let program = command.first().context("no command")?;
        if self.default_seccomp {
            seccomp::install(bounding)?;
        }
        execve(program, &command, &environment)
            .with_context(|| format!("running {}", self.command[0]))
    }

    fn build_root(&self) -> Result<()> {
        let root = &self.root;
        let options = Some("mode=0755");
        let kind = Some("tmpfs");
        mount(kind, root, kind, MsFlags::empty(), options).context("making a root")?;
        for file in &self.image {
            let name = file.file_name().context("a file of the image")?;
            bind(file, &root.join(name), true)?;
        }
        let none = None::<&str>;
        fs::create_dir_all(root.join("proc"))?;
        let kind = Some("proc");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(kind, &root.join("proc"), kind, flags, none).context("mounting /proc")?;
        for name in ["bus", "fs", "irq", "sys", "sysrq-trigger"] {
            let path = root.join("proc").join(name);
            if path.exists() {
                bind(&path, &path, true)?;
            }
        }
        bind_one(Path::new("/sys"), &root.join("sys"), true)?;
        for name in ["null", "zero", "full", "random", "urandom"] {
            let path = Path::new("/dev").join(name);
            bind(&path, &root.join("dev").join(name), false)?;
        }
        for it in &self.mounts {
            let inside = it.target.strip_prefix("/").context("no absolute path")?;
            bind(&it.source, &root.join(inside), it.read_only)
                .with_context(|| format!("mounting {}", it.target.display()))?;
        }
        Ok(())
    }

    fn drop_rights(&self, bounding: u64) -> Result<()> {
        for capability in (0..64).filter(|it| bounding & (1 << it) == 0) {
            // SAFETY: a call with integers; numbers that the kernel does not know fail.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        }
        setgroups(&[]).context("setgroups")?;
        let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.group));
        setresgid(group, group, group).context("setresgid")?;
        setresuid(user, user, user).context("setresuid")?;
        if user.is_root() {
            set_capabilities(bounding)?;
        }
        if self.no_new_privileges {
            prctl::set_no_new_privs().context("no new privileges")?;
        }
        Ok(())
    }

    fn capability_bits(&self) -> Result<u64> {
        let bit = |name: &String| match CAPABILITIES.iter().position(|it| it == name) {
            Some(number) => Ok(1 << number),
            None => bail!("{name} is no capability"),
        };
        let bits: Result<Vec<u64>> = self.capabilities.iter().map(bit).collect();
        Ok(bits?.into_iter().fold(0, |all, it| all | it))
    }
}

/// Mounts a file or folder with all that is mounted below it.
fn bind(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    bind_with(source, target, read_only, MsFlags::MS_REC)
}

/// Without what is mounted below it.
fn bind_one(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    bind_with(source, target, read_only, MsFlags::empty())
}

fn bind_with(source: &Path, target: &Path, read_only: bool, further: MsFlags) -> Result<()> {
    let failed = || format!("{} to {}", source.display(), target.display());
    if !target.exists() {
        if source.is_dir() {
            fs::create_dir_all(target).with_context(failed)?;
        } else {
            target.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(target, "").with_context(failed)?;
        }
    }
    let none = None::<&str>;
    let flags = MsFlags::MS_BIND | further;
    mount(Some(source), target, none, flags, none).with_context(failed)?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, target, none, flags, none).with_context(failed)?;
    }
    Ok(())
}

/// Permitted and effective, as runtimes set them: inheritable ones would stay with programs of other users.
fn set_capabilities(bits: u64) -> Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    let half = |bits: u64| {
        let bits = (bits & u64::from(u32::MAX)) as u32;
        Data {
            effective: bits,
            permitted: bits,
            inheritable: 0,
        }
    };
    let data = [half(bits), half(bits >> 32)];
    // SAFETY: version 3 of capset(2) reads one header and two of the other structure.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if done != 0 {
        return Err(std::io::Error::last_os_error()).context("capset");
    }
    Ok(())
}

/// By their numbers (`linux/capability.h`).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The bits of capabilities by their names, as in `/proc/PID/status`.
///
/// # Errors
/// A name that is none.
pub fn capability_bits(names: &[String]) -> Result<u64> {
    let capabilities = names.to_vec();
    let container = Container {
        capabilities,
        ..Container::default()
    };
    container.capability_bits()
}
