//! Where the control groups of the node's pods, and that of its kubelet, are, unless somebody says it.
//!
//! The pods' is the one that the kubelet has called `kubepods`, directly below the root or below a root of the kubelet's
//! own. The programs are attached there rather than at the root of the hierarchy, since those of a descendant run first:
//! before a CNI's, which exchanges the address of a Service. Where there is none, or processes of pods are elsewhere,
//! it is the root, which misses nobody.
//!
//! The kubelet's is that of its process. Whoever is in there too, as containerd is with k3s, may reach probed ports as the
//! kubelet may. So it is none that has pods in it, and the process must be root's, in the host's network, and of no pod:
//! everybody may be called `kubelet`.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::cgroup::{NodeRoot, Placement, placement, unified};
use super::process::Process;
use super::scan::Host;

/// Where the kernel programs are to be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    /// To the pods' processes.
    pub pods: PathBuf,
    /// To the kubelet.
    pub kubelet: Option<PathBuf>,
}

/// The pods' control group is not to be found.
#[derive(Debug, thiserror::Error)]
pub enum CgroupsError {
    /// There is nothing of a kubelet.
    #[error(
        "neither a kubelet nor a control group kubepods in {}: is this the host's hierarchy, and its /proc (hostPID, --proc)? Else say where pods are (--cgroup)",
        .0.display()
    )]
    NoKubelet(PathBuf),
    /// It cannot be looked for.
    #[error("looking for the pods' control group below {}", .0.display())]
    File(PathBuf, #[source] io::Error),
}

/// Finds those of both that are not given, in the hierarchy of version 2 that is mounted at `root`.
///
/// # Errors
/// It cannot be said where pods are.
pub fn cgroups(
    proc: &Path,
    root: &Path,
    pods: Option<&Path>,
    kubelet: Option<&Path>,
) -> Result<Cgroups, CgroupsError> {
    if let (Some(pods), Some(kubelet)) = (pods, kubelet) {
        return Ok(Cgroups {
            pods: pods.to_owned(),
            kubelet: Some(kubelet.to_owned()),
        });
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| CgroupsError::File(path, error)
    };
    let seen = Seen::look(proc).map_err(failed(proc))?;
    let pods = match pods {
        Some(pods) => pods.to_owned(),
        None => {
            let mut kubepods = Vec::new();
            collect(root, LEVELS, &mut kubepods).map_err(failed(root))?;
            seen.pods(root, &kubepods)?
        }
    };
    let kubelet = match kubelet {
        Some(kubelet) => Some(kubelet.to_owned()),
        None => seen.kubelet(root, &pods),
    };
    Ok(Cgroups { pods, kubelet })
}

/// What processes tell, by their paths in the hierarchy of version 2.
#[derive(Debug, Default)]
struct Seen {
    /// How many levels the agent's namespace of control groups is below the root.
    depth: usize,
    /// Of processes of pods.
    pods: Vec<String>,
    /// The kubelet's, and how well its name fits and how long it has run.
    kubelet: Option<(usize, u64, String)>,
}

impl Seen {
    fn look(proc: &Path) -> io::Result<Self> {
        let host = Host::look(proc)?;
        let mut seen = Self::default();
        for pid in host.pids()? {
            // Those that end meanwhile are of no interest.
            if let Ok(process) = Process::open(proc, pid)
                && let Ok(cgroup) = process.read("cgroup")
                && let Some(path) = unified(&cgroup)
            {
                seen.add(&host, &process, &cgroup, path);
            }
        }
        Ok(seen)
    }

    fn add(&mut self, host: &Host, process: &Process, cgroup: &str, path: &str) {
        if process.pid == 1 {
            self.depth = levels_up(path);
        }
        if let Some(placement) = host.placement(cgroup) {
            // There may be containers on a node that are not Kubernetes'.
            let is_pods = matches!(placement, Placement::Pod { .. })
                || path.split('/').any(|it| it == CONTAINERD);
            if is_pods && !self.pods.iter().any(|it| it == path) {
                self.pods.push(path.to_owned());
            }
            return;
        }
        let name = process.comm().unwrap_or_default();
        let Some(fit) = KUBELETS.iter().position(|it| *it == name) else {
            return;
        };
        let is_hosts = process.netns_inode().is_ok_and(|it| host.has_netns(it));
        let folder = host.proc().join(process.pid.to_string());
        let is_roots = fs::metadata(folder).is_ok_and(|it| it.uid() == 0);
        let (true, true, Ok(started)) = (is_hosts, is_roots, process.started()) else {
            return;
        };
        let found = (fit, started, path.to_owned());
        if self.kubelet.as_ref().is_none_or(|it| found < *it) {
            self.kubelet = Some(found);
        }
    }

    fn pods(&self, root: &Path, kubepods: &[PathBuf]) -> Result<PathBuf, CgroupsError> {
        let [only] = kubepods else {
            if kubepods.is_empty() && self.kubelet.is_none() && self.pods.is_empty() {
                return Err(CgroupsError::NoKubelet(root.to_owned()));
            }
            tracing::info!(
                ?kubepods,
                "pods have no control group of their own: the root serves"
            );
            return Ok(root.to_owned());
        };
        let paths = self.pods.iter().filter_map(|it| self.below(root, it));
        let mut outside = paths.filter(|it| !it.starts_with(only));
        if let Some(outside) = outside.next() {
            let (kubepods, outside) = (only.display(), outside.display());
            tracing::info!(%kubepods, %outside, "processes of pods are elsewhere, too: the root serves");
            return Ok(root.to_owned());
        }
        Ok(only.clone())
    }

    fn kubelet(&self, root: &Path, pods: &Path) -> Option<PathBuf> {
        let Some((_, _, path)) = &self.kubelet else {
            tracing::warn!(
                "no kubelet is found: its probes are treated as anybody's connections, unless its control group is given (--kubelet-cgroup)"
            );
            return None;
        };
        let found = self.below(root, path).filter(|it| it.is_dir());
        let has_no_pods = |it: &PathBuf| !pods.starts_with(it) && it != root;
        let own = found.filter(has_no_pods);
        if own.is_none() {
            tracing::warn!(
                path,
                "the kubelet has no control group of its own: its probes are treated as anybody's connections, unless one is given (--kubelet-cgroup)"
            );
        }
        own
    }

    /// Where a path is that a process has, as far as it can be told from inside of a namespace.
    fn below(&self, root: &Path, path: &str) -> Option<PathBuf> {
        let up = levels_up(path);
        if up != 0 && up != self.depth {
            return None;
        }
        let rest = Path::new(path).components().filter_map(|it| match it {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        Some(root.join(rest.collect::<PathBuf>()))
    }
}

fn levels_up(path: &str) -> usize {
    path.split('/').skip(1).take_while(|it| *it == "..").count()
}

/// The groups called so that have processes; not those inside of one, nor of a container.
fn collect(folder: &Path, levels: usize, found: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !entry.file_type()?.is_dir() || is_others(&name) {
            continue;
        }
        let is_kubepods = name == "kubepods" || name == "kubepods.slice";
        if is_kubepods || name.ends_with("-kubepods.slice") {
            let events = fs::read_to_string(entry.path().join("cgroup.events"));
            // What it does not tell may be.
            let is_empty = events.is_ok_and(|it| it.contains("populated 0"));
            if !is_empty && entry.path().is_dir() {
                found.push(entry.path());
            }
        } else if levels > 1 {
            match collect(&entry.path(), levels - 1, found) {
                Err(error) if has_vanished(&error) => {}
                outcome => outcome?,
            }
        }
    }
    Ok(())
}

/// Whether an error says that a group was removed while it was looked at, as groups come and go.
fn has_vanished(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// Whether a group may be divided by somebody else than the node.
fn is_others(name: &str) -> bool {
    let of_container = || {
        let file = format!("0::/{name}");
        matches!(
            placement(&file, &NodeRoot::default()),
            Some(Placement::Container(_) | Placement::Pod { .. })
        )
    };
    name == "user.slice" || of_container()
}

/// What has a kubelet in it, the best first: kubelets, and k3s and MicroK8s, which are one.
const KUBELETS: [&str; 5] = ["kubelet", "k3s-server", "k3s-agent", "k3s", "kubelite"];
/// Where containerd has Kubernetes' containers that are in no pod's group.
const CONTAINERD: &str = "k8s.io";
/// `/a/kubelet.slice/kubelet-kubepods.slice` is as deep as any.
const LEVELS: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    /// A hierarchy of these groups.
    fn hierarchy(groups: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("made");
        for group in groups {
            fs::create_dir_all(root.path().join(group)).expect("made");
        }
        root
    }

    fn seen(pods: &[&str], kubelet: Option<&str>, depth: usize) -> Seen {
        Seen {
            depth,
            pods: pods.iter().map(|it| (*it).to_owned()).collect(),
            kubelet: kubelet.map(|it| (0, 1, it.to_owned())),
        }
    }

    #[test]
    fn layouts_of_nodes() {
        let container = "a".repeat(64);
        let in_docker = format!("docker-{container}.scope/kubepods");
        let system = "system.slice/kubelet.service";
        for (groups, seen, pods, kubelet) in [
            // kubeadm; EKS has the kubelet in /runtime.slice, GKE and AKS in /system.slice.
            (
                &["kubepods.slice", system][..],
                seen(
                    &["/kubepods.slice/kubepods-pod1.slice/x"],
                    Some("/system.slice/kubelet.service"),
                    0,
                ),
                Some("kubepods.slice"),
                Some(system),
            ),
            (
                &["kubepods.slice", "podruntime.slice/kubelet.service"],
                seen(&[], Some("/podruntime.slice/kubelet.service"), 0),
                Some("kubepods.slice"),
                Some("podruntime.slice/kubelet.service"),
            ),
            // kind.
            (
                &[
                    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice",
                    "kubelet.slice/kubelet.service",
                ],
                seen(&[], Some("/kubelet.slice/kubelet.service"), 0),
                Some("kubelet.slice/kubelet-kubepods.slice"),
                Some("kubelet.slice/kubelet.service"),
            ),
            (
                &["kubelet/kubepods/burstable", system],
                seen(
                    &["/kubelet/kubepods/burstable/x"],
                    Some("/system.slice/kubelet.service"),
                    0,
                ),
                Some("kubelet/kubepods"),
                Some(system),
            ),
            // k3s.
            (
                &["kubepods.slice", "system.slice/k3s.service"],
                seen(&[], Some("/system.slice/k3s.service"), 0),
                Some("kubepods.slice"),
                Some("system.slice/k3s.service"),
            ),
            // Without control groups for QoS.
            (
                &["k8s.io", system],
                seen(&["/k8s.io/x"], Some("/system.slice/kubelet.service"), 0),
                Some(""),
                Some(system),
            ),
            (
                &["kubepods.slice", "k8s.io", system],
                seen(
                    &["/kubepods.slice/x", "/k8s.io/x"],
                    Some("/system.slice/kubelet.service"),
                    0,
                ),
                Some(""),
                Some(system),
            ),
            // After its driver was changed.
            (
                &["kubepods.slice", "kubepods"],
                seen(&["/kubepods/x"], None, 0),
                Some(""),
                None,
            ),
            // From inside of a namespace.
            (
                &["kubepods.slice", system],
                seen(
                    &["/../../x", "/../../../kubepods.slice/x"],
                    Some("/../../../system.slice/kubelet.service"),
                    3,
                ),
                Some("kubepods.slice"),
                Some(system),
            ),
            (
                &["kubepods.slice", system],
                seen(&[], Some("/../kubelet.service"), 3),
                Some("kubepods.slice"),
                None,
            ),
            // The kubelet has all others in its group.
            (
                &["kubepods.slice"],
                seen(&[], Some("/"), 0),
                Some("kubepods.slice"),
                None,
            ),
            (
                &["kubelet/kubepods"],
                seen(&[], Some("/kubelet"), 0),
                Some("kubelet/kubepods"),
                None,
            ),
            // Somebody else's.
            (
                &[&in_docker, "user.slice/a/kubepods"],
                seen(&[], None, 0),
                None,
                None,
            ),
            (&["system.slice"], seen(&[], None, 0), None, None),
        ] {
            let root = hierarchy(groups);
            let root = root.path();
            let mut kubepods = vec![];
            collect(root, LEVELS, &mut kubepods).expect("listed");
            let found = seen.pods(root, &kubepods).ok();
            assert_eq!(found, pods.map(|it| root.join(it)), "{groups:?}");
            let found = seen.kubelet(root, &found.unwrap_or_default());
            assert_eq!(found, kubelet.map(|it| root.join(it)), "{groups:?}");
        }
    }

    #[test]
    fn groups_come_and_go() {
        let root = hierarchy(&["kubepods.slice"]);
        let (stop, path) = (std::sync::atomic::AtomicBool::new(false), root.path());
        let stopped = || stop.load(std::sync::atomic::Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stopped() {
                    for name in ["a", "b", "c"] {
                        fs::create_dir_all(path.join(name).join("d")).expect("made");
                    }
                    for name in ["a", "b", "c"] {
                        fs::remove_dir_all(path.join(name)).expect("removed");
                    }
                }
            });
            let outcomes: Vec<_> = (0..3000)
                .map(|_| {
                    let mut found = vec![];
                    collect(path, LEVELS, &mut found).map(|()| found)
                })
                .collect();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            for outcome in outcomes {
                assert_eq!(outcome.expect("looked"), [path.join("kubepods.slice")]);
            }
        });
        let gone = collect(&path.join("none"), LEVELS, &mut vec![]).expect_err("none");
        assert!(has_vanished(&gone));
        assert!(!has_vanished(&io::Error::from_raw_os_error(libc::EACCES)));
    }

    #[test]
    fn what_is_given_is_taken() {
        let (pods, kubelet) = (Path::new("/a"), Path::new("/b"));
        let found = cgroups(
            Path::new("/none"),
            Path::new("/none"),
            Some(pods),
            Some(kubelet),
        );
        let expected = Cgroups {
            pods: pods.to_owned(),
            kubelet: Some(kubelet.to_owned()),
        };
        assert_eq!(found.ok(), Some(expected));
        let root = hierarchy(&["kubepods.slice"]);
        let found = cgroups(Path::new("/proc"), root.path(), Some(pods), None);
        assert_eq!(found.expect("found").pods, pods);
        let none = cgroups(Path::new("/none"), root.path(), None, None);
        assert!(matches!(none, Err(CgroupsError::File(..))));
    }

    /// A process of this name that is root's, in the host's network and of no pod.
    #[test]
    fn the_kubelet_is_a_process_of_the_host() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let proc = tempfile::tempdir().expect("made");
        let first = proc.path().join("1");
        fs::create_dir(&first).expect("made");
        std::os::unix::fs::symlink("/proc/self/ns", first.join("ns")).expect("made");
        fs::write(first.join("cgroup"), "0::/init.scope\n").expect("written");
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("started");
        let folder = proc.path().join(child.id().to_string());
        fs::create_dir(&folder).expect("made");
        for name in ["ns", "stat"] {
            let target = format!("/proc/{}/{name}", child.id());
            std::os::unix::fs::symlink(target, folder.join(name)).expect("made");
        }
        let pod = format!("/kubepods/pod{}/x", "0".repeat(32));
        let other = format!("/docker/{}", "0".repeat(64));
        let no_qos = format!("/k8s.io/{}", "0".repeat(64));
        for (comm, cgroup, expected) in [
            ("kubelet", "/system.slice/kubelet.service", true),
            ("k3s-server", "/system.slice/k3s.service", true),
            ("kubelite", "/snap.microk8s/x", true),
            ("kubelet-x", "/system.slice/kubelet.service", false),
            ("kubelet", &pod, false),
            ("kubelet", &other, false),
            ("kubelet", &no_qos, false),
        ] {
            fs::write(folder.join("comm"), format!("{comm}\n")).expect("written");
            fs::write(folder.join("cgroup"), format!("0::{cgroup}\n")).expect("written");
            let seen = Seen::look(proc.path()).expect("looked");
            let is_pods = cgroup == pod || cgroup == no_qos;
            assert_eq!(!seen.pods.is_empty(), is_pods, "{cgroup}");
            let found = seen.kubelet.map(|it| it.2);
            assert_eq!(
                found,
                expected.then(|| cgroup.to_owned()),
                "{comm} {cgroup}"
            );
        }
        child.kill().and_then(|()| child.wait()).expect("ended");
    }
}
