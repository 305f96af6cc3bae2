//! How kubelets and container runtimes lay out control groups, for pods that are to be found by their processes.

use std::sync::atomic::{AtomicU32, Ordering};

/// Who makes the control groups of a pod. All of them are of version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// containerd and systemd, as by kubeadm and in most clouds.
    Systemd,
    /// containerd and plain control groups.
    Cgroupfs,
    /// CRI-O and systemd: no process keeps the sandbox.
    Crio,
    /// Docker.
    Docker,
    /// kind: a kubelet with a root of its own.
    Kind,
    /// k3s with plain control groups.
    K3s,
    /// A kubelet without control groups for QoS: no path has the pod's UID.
    NoQos,
}

/// The control groups of one pod, as paths below that of all pods.
#[derive(Clone, Debug)]
pub(crate) struct Laid {
    /// That of the pod; without one, that of all such containers.
    pub(crate) pod: Option<String>,
    /// That of the sandbox, unless it has none.
    pub(crate) sandbox: Option<String>,
    /// That of its only container.
    pub(crate) container: String,
    /// The container's ID.
    pub(crate) id: String,
    /// What is before the ID in the pod's status.
    pub(crate) runtime: &'static str,
}

impl Layout {
    /// Those of which paths have the pod's UID.
    pub const ALL: [Layout; 7] = [
        Layout::Systemd,
        Layout::Cgroupfs,
        Layout::Crio,
        Layout::Docker,
        Layout::Kind,
        Layout::K3s,
        Layout::NoQos,
    ];

    pub(crate) fn of(self, uid: &str) -> Laid {
        let slice = uid.replace('-', "_");
        let systemd = |above: &str, slices: &str| {
            format!(
                "{above}{slices}kubepods.slice/{slices}kubepods-burstable.slice/{slices}kubepods-burstable-pod{slice}.slice"
            )
        };
        let (pod, before, behind) = match self {
            Layout::Systemd => (systemd("", ""), "cri-containerd-", ".scope"),
            Layout::Crio => (systemd("", ""), "crio-", ".scope"),
            Layout::Kind => (
                systemd("kubelet.slice/", "kubelet-"),
                "cri-containerd-",
                ".scope",
            ),
            Layout::Cgroupfs | Layout::Docker => (format!("kubepods/burstable/pod{uid}"), "", ""),
            Layout::K3s => (format!("k3s/kubepods/burstable/pod{uid}"), "", ""),
            Layout::NoQos => ("k8s.io".to_owned(), "", ""),
        };
        let of = |id: &str| format!("{pod}/{before}{id}{behind}");
        let id = container_id();
        Laid {
            sandbox: (self != Layout::Crio).then(|| of(&container_id())),
            container: of(&id),
            id,
            runtime: match self {
                Layout::Crio => "cri-o",
                Layout::Docker => "docker",
                _ => "containerd",
            },
            pod: (self != Layout::NoQos).then_some(pod),
        }
    }
}

/// Another one each time.
fn container_id() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{:032x}{count:032x}", std::process::id())
}
