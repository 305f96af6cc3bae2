//! Which pod a process is of, by its `/proc/<pid>/cgroup` (cgroups(7)): pure.
//!
//! **What is trusted.** The kubelet and the container runtime make the control group of a pod and, directly below it,
//! those of its containers. What comes below these may be anybody's: a container may have been given its control group
//! to divide it (as for systemd inside, or by being privileged), and may call the parts like another pod's. So the
//! first name from the root that is a pod's or a container's counts, and nothing behind it. Names end at a slash, and
//! the kernel lets none have a newline.
//!
//! | who makes it | a process of a container is in |
//! |---|---|
//! | systemd driver | `…/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/cri-containerd-<id>.scope` |
//! | cgroupfs driver | `…/kubepods/burstable/pod<uid>/<id>` |
//! | CRI-O, Docker | the same with `crio-<id>.scope` or `crio-<id>`, `docker-<id>.scope` |
//! | either, misconfigured | `/system.slice/containerd.service/kubepods-burstable-pod<uid>.slice:cri-containerd:<id>` |
//! | kind, k3s | the same below `/kubelet.slice/kubelet-`, `/kubelet`, `/k3s` |
//! | a kubelet without QoS | `/k8s.io/<id>`, `/system.slice/cri-containerd-<id>.scope`, `/docker/<id>` |
//!
//! With version 1 there is a line for each hierarchy. Those that name a pod must agree. Seen from inside of another
//! control group namespace a path begins with `/..` for each level that is above, and may lack what the two have in
//! common. A node that is itself a container (kind, k3d) may have all of its processes below a control group that looks
//! like a container's: it is known by the first process, and left out.

use std::fmt;
use std::str::FromStr;

use weft_core::ContainerId;

/// The UID of a pod, with dashes or underscores, or that of a static pod, without. These are never the same one, whatever
/// their digits: whoever writes a static pod's into annotations must not name another pod by it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PodUid {
    number: u128,
    is_static: bool,
}

/// A text is no UID of a pod.
#[derive(Debug, PartialEq, Eq)]
pub struct NotUid;

/// Of what a process is, as the kubelet and the runtime put it there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Of a pod, and of one of its containers, unless it is beside them.
    Pod {
        /// Which.
        uid: PodUid,
        /// Its container or sandbox.
        container: Option<ContainerId>,
    },
    /// Of a container or sandbox in no control group of a pod.
    Container(ContainerId),
}

/// What all processes of the node have in common, where it is a container itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRoot(Vec<(String, String)>);

impl NodeRoot {
    /// By the file of the first process.
    pub fn of(first_process: &str) -> Self {
        let roots = lines(first_process).filter_map(|(hierarchy, path)| {
            let mut end = 0;
            for part in path.split('/') {
                end += part.len() + 1;
                if container_of(part).is_some() {
                    // Without the slash behind it.
                    return Some((hierarchy.to_owned(), path.get(..end - 1)?.to_owned()));
                }
            }
            None
        });
        Self(roots.collect())
    }

    fn without<'a>(&self, hierarchy: &str, path: &'a str) -> &'a str {
        let root = self.0.iter().find(|(it, _)| it == hierarchy);
        let below = root.and_then(|(_, root)| path.strip_prefix(root.as_str()));
        below
            .filter(|it| it.is_empty() || it.starts_with('/'))
            .unwrap_or(path)
    }
}

/// Of what the process with this file is. None: of nothing that the kubelet runs, or it cannot be told, as one hierarchy
/// names another pod than the other.
pub fn placement(file: &str, node: &NodeRoot) -> Option<Placement> {
    let mut agreed: Option<Placement> = None;
    for (hierarchy, path) in lines(file) {
        let Some(placed) = placed(node.without(hierarchy, path)) else {
            continue;
        };
        agreed = Some(match agreed {
            None => placed,
            Some(before) => both(before, placed)?,
        });
    }
    agreed
}

/// The path in the hierarchy of version 2.
pub(super) fn unified(file: &str) -> Option<&str> {
    lines(file).find_map(|(hierarchy, path)| hierarchy.is_empty().then_some(path))
}

/// The hierarchies, by their controllers, of which version 2 names none, and the path in each.
fn lines(file: &str) -> impl Iterator<Item = (&str, &str)> {
    file.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.split_once(':')
    })
}

fn placed(path: &str) -> Option<Placement> {
    let mut parts = path.split('/').filter(|it| !it.is_empty());
    while let Some(part) = parts.next() {
        if part == USERS {
            return None;
        }
        if let Some((uid, container)) = together(part) {
            return Some(Placement::Pod { uid, container });
        }
        if let Some(uid) = pod_of(part) {
            let container = parts.next().and_then(container_of);
            return Some(Placement::Pod { uid, container });
        }
        if let Some(container) = container_of(part) {
            return Some(Placement::Container(container));
        }
    }
    None
}

/// What two hierarchies say together.
fn both(one: Placement, other: Placement) -> Option<Placement> {
    use Placement::{Container, Pod};
    match (one, other) {
        (
            Pod { uid, container },
            Pod {
                uid: other,
                container: same,
            },
        ) if uid == other => {
            let container = match (container, same) {
                (Some(one), Some(other)) if one != other => None,
                (one, other) => one.or(other),
            };
            Some(Pod { uid, container })
        }
        (Container(one), Container(other)) if one == other => Some(Container(one)),
        (Pod { uid, container }, Container(same)) | (Container(same), Pod { uid, container })
            if container.as_ref().is_none_or(|it| *it == same) =>
        {
            let container = Some(same);
            Some(Pod { uid, container })
        }
        _ => None,
    }
}

/// `pod<uid>`, or the slice of that: the names of the slices above it come before it, as systemd has it.
fn pod_of(part: &str) -> Option<PodUid> {
    if let Some(slice) = part.strip_suffix(".slice") {
        let (above, uid) = slice.rsplit_once("-pod")?;
        return above
            .split('-')
            .any(|it| it == "kubepods")
            .then(|| uid.parse().ok())?;
    }
    part.strip_prefix("pod")?.parse().ok()
}

/// The slice of a pod, the name of the runtime, and an ID, by colons: one name where containerd is not told of systemd,
/// which the kubelet means it to ask.
fn together(part: &str) -> Option<(PodUid, Option<ContainerId>)> {
    let end = part.find(".slice:")? + ".slice".len();
    let uid = pod_of(part.get(..end)?)?;
    let (_, id) = part.get(end..)?.rsplit_once(':')?;
    Some((uid, id.parse().ok()))
}

/// An ID, alone or behind the name of the runtime, and as a scope.
fn container_of(part: &str) -> Option<ContainerId> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let (runtime, id) = name.rsplit_once('-').unwrap_or(("", name));
    let is_word = |it: u8| matches!(it, b'a'..=b'z' | b'-');
    match runtime.bytes().all(is_word) {
        true => id.parse().ok(),
        false => None,
    }
}

impl FromStr for PodUid {
    type Err = NotUid;

    /// As in objects, with dashes; as in the names of slices, with underscores, since dashes mean something there; or
    /// without, as those of static pods.
    fn from_str(text: &str) -> Result<Self, NotUid> {
        let bytes = text.as_bytes();
        let separator = match bytes.len() {
            32 => None,
            36 if matches!(bytes[8], b'-' | b'_') => Some(bytes[8]),
            _ => return Err(NotUid),
        };
        let mut number = 0_u128;
        for (index, byte) in bytes.iter().enumerate() {
            if let (Some(separator), 8 | 13 | 18 | 23) = (separator, index) {
                if *byte != separator {
                    return Err(NotUid);
                }
                continue;
            }
            let digit = match byte {
                b'0'..=b'9' => byte - b'0',
                b'a'..=b'f' => byte - b'a' + 10,
                _ => return Err(NotUid),
            };
            number = number << 4 | u128::from(digit);
        }
        Ok(Self {
            number,
            is_static: separator.is_none(),
        })
    }
}

impl PodUid {
    /// Whether it is one that a kubelet gives to a static pod.
    pub(super) fn is_static(self) -> bool {
        self.is_static
    }
}

impl fmt::Debug for PodUid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_static { "static " } else { "" };
        write!(formatter, "{kind}{:032x}", self.number)
    }
}

/// What users of the machine may divide as they like.
const USERS: &str = "user.slice";

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
