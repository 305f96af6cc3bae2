//! Files as they are on nodes, and what hostile pods make of theirs.

use proptest::prelude::*;

use super::*;

const UID: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";
const OTHER: &str = "11111111-2222-4333-8444-555555555555";
const STATIC: &str = "0123456789abcdef0123456789abcdef";

fn id(digit: char) -> String {
    digit.to_string().repeat(64)
}

fn underscored(uid: &str) -> String {
    uid.replace('-', "_")
}

fn pod(uid: &str, container: Option<char>) -> Option<Placement> {
    let container = container.map(|it| id(it).parse().expect("valid"));
    let uid = uid.parse().expect("valid");
    Some(Placement::Pod { uid, container })
}

fn container(digit: char) -> Option<Placement> {
    Some(Placement::Container(id(digit).parse().expect("valid")))
}

/// `U` is the UID with underscores, `D` with dashes, `S` that of a static pod, `O` another pod's with underscores, `P` the same
/// with dashes; `A` to `C` are IDs.
fn filled(text: &str) -> String {
    let mut out = String::new();
    for letter in text.chars() {
        match letter {
            'U' => out += &underscored(UID),
            'D' => out += UID,
            'S' => out += STATIC,
            'O' => out += &underscored(OTHER),
            'P' => out += OTHER,
            'A' | 'B' | 'C' => out += &id(letter.to_ascii_lowercase()),
            letter => out.push(letter),
        }
    }
    out
}

#[test]
fn layouts_of_version_2() {
    for (path, expected) in [
        // containerd, systemd driver: kubeadm, EKS, AKS, GKE.
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU.slice/cri-containerd-A.scope",
            pod(UID, Some('a')),
        ),
        (
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU.slice/cri-containerd-A.scope",
            pod(UID, Some('a')),
        ),
        (
            "/kubepods.slice/kubepods-podU.slice/cri-containerd-A.scope",
            pod(UID, Some('a')),
        ),
        // cgroupfs driver.
        ("/kubepods/burstable/podD/A", pod(UID, Some('a'))),
        ("/kubepods/podD/A", pod(UID, Some('a'))),
        // CRI-O, with either driver, and what watches a container there.
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU.slice/crio-A.scope",
            pod(UID, Some('a')),
        ),
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU.slice/crio-A.scope/container",
            pod(UID, Some('a')),
        ),
        ("/kubepods/besteffort/podD/crio-A", pod(UID, Some('a'))),
        (
            "/kubepods/besteffort/podD/crio-conmon-A",
            pod(UID, Some('a')),
        ),
        // Docker.
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU.slice/docker-A.scope",
            pod(UID, Some('a')),
        ),
        ("/kubepods/burstable/podD/A", pod(UID, Some('a'))),
        // containerd without SystemdCgroup below a kubelet with the systemd driver.
        (
            "/system.slice/containerd.service/kubepods-burstable-podU.slice:cri-containerd:A",
            pod(UID, Some('a')),
        ),
        (
            "/system.slice/containerd.service/kubepods-podS.slice:cri-containerd:A/sub",
            pod(STATIC, Some('a')),
        ),
        (
            "/kubelet-kubepods-besteffort-podU.slice:cri-containerd:A",
            pod(UID, Some('a')),
        ),
        ("/kubepods-podU.slice:cri-containerd:x", pod(UID, None)),
        // kind, k3s, RKE2, MicroK8s, and a kubelet with a root of its own.
        (
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-podU.slice/cri-containerd-A.scope",
            pod(UID, Some('a')),
        ),
        ("/kubelet/kubepods/besteffort/podD/A", pod(UID, Some('a'))),
        ("/k3s/kubepods/burstable/podD/A", pod(UID, Some('a'))),
        (
            "/actions_job/kubepods/burstable/podD/A",
            pod(UID, Some('a')),
        ),
        // Static pods.
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podS.slice/cri-containerd-A.scope",
            pod(STATIC, Some('a')),
        ),
        ("/kubepods/burstable/podS/A", pod(STATIC, Some('a'))),
        // systemd in a container, and what Kata puts beside containers.
        (
            "/kubepods/burstable/podD/A/system.slice/nginx.service",
            pod(UID, Some('a')),
        ),
        ("/kubepods/burstable/podD", pod(UID, None)),
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podU.slice/kata_A",
            pod(UID, None),
        ),
        // A kubelet without control groups for QoS.
        ("/k8s.io/A", container('a')),
        ("/system.slice/cri-containerd-A.scope", container('a')),
        ("/system.slice/docker-A.scope", container('a')),
        ("/docker/A", container('a')),
        ("/docker/A/sub", container('a')),
        // As an agent sees them that has a control group namespace of its own.
        (
            "/../../kubepods-burstable-podU.slice/cri-containerd-A.scope",
            pod(UID, Some('a')),
        ),
        (
            "/../../../kubepods-podU.slice/cri-containerd-A.scope",
            pod(UID, Some('a')),
        ),
        ("/../../podD/A", pod(UID, Some('a'))),
        ("/../A", container('a')),
        // Nobody's.
        ("/", None),
        ("", None),
        ("/init.scope", None),
        ("/../../../init.scope", None),
        ("/system.slice/kubelet.service", None),
        ("/system.slice/containerd.service", None),
        ("/kubepods.slice", None),
        ("/kubepods/burstable", None),
        (
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod.slice",
            None,
        ),
        ("/kata_overhead/A", container('a')),
    ] {
        let file = format!("0::{}\n", filled(path));
        assert_eq!(placement(&file, &NodeRoot::default()), expected, "{path}");
    }
}

#[test]
fn layouts_of_version_1_and_of_both() {
    for (file, expected) in [
        // Version 1, cgroupfs driver: a controller that the runtime does not know is left alone.
        (
            "12:misc:/\n11:memory:/kubepods/burstable/podD/A\n5:cpu,cpuacct:/kubepods/burstable/podD/A\n\
             1:name=systemd:/kubepods/burstable/podD/A\n0::/system.slice/containerd.service\n",
            pod(UID, Some('a')),
        ),
        // Version 1, systemd driver, beside version 2 (hybrid).
        (
            "8:memory:/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU.slice/cri-containerd-A.scope\n\
             1:name=systemd:/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU.slice/cri-containerd-A.scope\n\
             0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podU.slice/cri-containerd-A.scope\n",
            pod(UID, Some('a')),
        ),
        // dockershim.
        (
            "4:pids:/kubepods/podD/A\n3:devices:/kubepods/podD/A\n2:rdma:/\n",
            pod(UID, Some('a')),
        ),
        ("4:pids:/docker/A\n3:devices:/docker/A\n", container('a')),
        // One hierarchy says more than the other.
        (
            "4:pids:/kubepods/podD\n3:devices:/kubepods/podD/A\n",
            pod(UID, Some('a')),
        ),
        (
            "4:pids:/kubepods/podD\n3:devices:/docker/A\n",
            pod(UID, Some('a')),
        ),
        (
            "4:pids:/docker/A\n3:devices:/kubepods/podD/A\n",
            pod(UID, Some('a')),
        ),
        (
            "4:pids:/kubepods/podD/A\n3:devices:/kubepods/podD/B\n",
            pod(UID, None),
        ),
        // They say something else: it is nobody's.
        (
            "4:pids:/kubepods/podD/A\n3:devices:/kubepods/podP/A\n",
            None,
        ),
        ("4:pids:/kubepods/podD/A\n0::/kubepods/podP/A\n", None),
        ("4:pids:/docker/A\n3:devices:/docker/B\n", None),
        ("4:pids:/docker/B\n3:devices:/kubepods/podD/A\n", None),
        // Names may have colons.
        ("0::/kubepods/podD/A/a:b\n", pod(UID, Some('a'))),
        ("1:name=a:/x:/kubepods/podD/A\n", pod(UID, Some('a'))),
        ("no file of this kind\n", None),
        ("", None),
    ] {
        assert_eq!(
            placement(&filled(file), &NodeRoot::default()),
            expected,
            "{file}"
        );
    }
}

/// What is below a container is its own affair.
#[test]
fn a_pod_cannot_pass_for_another() {
    for (path, expected) in [
        (
            "/kubepods/burstable/podD/A/kubepods/podP/B",
            pod(UID, Some('a')),
        ),
        ("/kubepods/burstable/podD/podP/B", pod(UID, None)),
        ("/kubepods/burstable/podD/A/../podP/B", pod(UID, Some('a'))),
        (
            "/kubepods.slice/kubepods-podU.slice/cri-containerd-A.scope/kubepods.slice/kubepods-podO.slice/cri-containerd-B.scope",
            pod(UID, Some('a')),
        ),
        ("/k8s.io/A/podP/B", container('a')),
        (
            "/kubepods-podU.slice:cri-containerd:A/kubepods-podO.slice:cri-containerd:B",
            pod(UID, Some('a')),
        ),
        (
            "/kubepods/podD/kubepods-podO.slice:cri-containerd:B",
            pod(UID, None),
        ),
        ("/x/podU.slice:cri-containerd:A", None),
        ("/k8s.io/A/kubelet/kubepods/podP/B", container('a')),
        (
            "/system.slice/cri-containerd-A.scope/kubepods-podO.slice",
            container('a'),
        ),
        ("/docker/A/docker/B", container('a')),
        ("/../podD/A/podP", pod(UID, Some('a'))),
        // A user of the machine.
        ("/user.slice/user-1000.slice/user@1000.service/podP/A", None),
        // Of none of these forms.
        (
            "/kubepods/POD7c9e6679-7425-40de-944b-e07fc1f90ae7/A",
            container('a'),
        ),
        ("/x/podD0/x", None),
        ("/x/xpodD/x", None),
        ("/x/pod-D/x", None),
        ("/x-podU.slice/x", None),
        ("/podU.slice/x", None),
        ("/kubepods.slice/kubepods-podU.slice.d/x", None),
        ("/x/1-A/x", None),
        ("/x/cri-containerd-A.service/x", None),
        ("/x/cri-containerd-AA.scope/x", None),
    ] {
        let file = format!("0::{}\n", filled(path));
        assert_eq!(placement(&file, &NodeRoot::default()), expected, "{path}");
    }
}

/// kind and k3d without a namespace for control groups: all of the node is below a container's.
#[test]
fn a_node_may_be_a_container() {
    for (first, file, expected) in [
        (
            "0::/docker/C/init.scope\n",
            "0::/docker/C/kubelet/kubepods/podD/A\n",
            pod(UID, Some('a')),
        ),
        (
            "0::/docker/C\n",
            "0::/docker/C/kubepods/podD/A\n",
            pod(UID, Some('a')),
        ),
        ("0::/docker/C\n", "0::/docker/C/k8s.io/A\n", container('a')),
        ("0::/docker/C\n", "0::/docker/C\n", None),
        (
            "0::/docker/C\n",
            "0::/docker/C/system.slice/kubelet.service\n",
            None,
        ),
        (
            "0::/system.slice/docker-C.scope/init\n",
            "0::/system.slice/docker-C.scope/kubepods/podD/A/podP/B\n",
            pod(UID, Some('a')),
        ),
        // Of the machine around it.
        (
            "0::/docker/C\n",
            "0::/docker/B/kubepods/podD/A\n",
            container('b'),
        ),
        // Another hierarchy has another root.
        (
            "2:pids:/docker/C\n1:cpu:/\n",
            "2:pids:/docker/C/kubepods/podD/A\n1:cpu:/kubepods/podD/A\n",
            pod(UID, Some('a')),
        ),
        (
            "0::/init.scope\n",
            "0::/docker/C/kubepods/podD/A\n",
            container('c'),
        ),
    ] {
        let node = NodeRoot::of(&filled(first));
        assert_eq!(placement(&filled(file), &node), expected, "{first} {file}");
    }
}

#[test]
fn uids_have_three_forms_and_static_pods_are_apart() {
    let one: PodUid = UID.parse().expect("dashes");
    assert_eq!(underscored(UID).parse(), Ok(one));
    let of_static: PodUid = UID.replace('-', "").parse().expect("none");
    assert_ne!(of_static, one);
    assert!(of_static.is_static() && !one.is_static());
    for bad in [
        "",
        "7c9e6679",
        "name:shop/web",
        "7C9E6679-7425-40DE-944B-E07FC1F90AE7",
        "7c9e6679-7425_40de-944b-e07fc1f90ae7",
        "7c9e66790742504000944b0e07fc1f90ae7x",
        "7c9e6679-7425-40de-944b-e07fc1f90aeg",
        "7c9e6679x7425x40dex944bxe07fc1f90ae7",
        "ä0000000-0000-0000-0000-00000000000",
    ] {
        assert_eq!(bad.parse::<PodUid>(), Err(NotUid), "{bad}");
    }
}

#[test]
fn the_path_in_version_2() {
    assert_eq!(unified("3:a:/x\n0::/y:z\n"), Some("/y:z"));
    assert_eq!(unified("1:name=systemd:/x\n"), None);
}

proptest! {
    /// Whatever comes behind a container's control group, and before it as long as it is no such name, changes nothing.
    #[test]
    fn only_the_first_name_counts(before in "(/[a-z.]{1,8}){0,3}", behind in "(/[ -~]{0,70}){0,4}") {
        let path = format!("0::{before}/kubepods/pod{UID}/{}", id('a'));
        let plain = placement(&path, &NodeRoot::default());
        prop_assert_eq!(&plain, &pod(UID, Some('a')));
        prop_assert_eq!(placement(&format!("{path}{behind}"), &NodeRoot::default()), plain);
    }

    #[test]
    fn any_text_is_read(text in "\\PC{0,300}", first in "\\PC{0,100}") {
        let _ = placement(&text, &NodeRoot::of(&first));
    }
}
