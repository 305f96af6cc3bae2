//! Pods that are nobody's and still are in the kernel's maps: everything they connect, and all
//! that is connected to them, is refused.
//!
//! A pod whose object is deleted, that is replaced, or that a previous agent left may have processes
//! that live on, and those must not be in plaintext. So it stays closed until its network namespace
//! is dead, or until the cluster says that it takes no part in the mesh. That something is *not*
//! known of a pod never opens it.

use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use weft_core::{Mesh, WorkloadId};

use super::LocalPod;
use crate::bpf::{Bpf, BpfError, Namespace};
use crate::discovery::Store;

/// The closed pods, by the cookie of their network namespace.
#[derive(Debug, Default)]
pub(super) struct Closed(BTreeMap<u64, Left>);

/// What is known of a closed pod.
#[derive(Debug)]
struct Left {
    /// Its name; not known of what a previous agent left.
    id: Option<WorkloadId>,
    addresses: Vec<IpAddr>,
    /// Where its namespace was, and its inode.
    place: Option<(PathBuf, u64)>,
}

impl Closed {
    /// Closes a pod that this agent had.
    pub(super) fn close(&mut self, bpf: &Bpf, pod: &LocalPod, path: Option<&Path>) {
        // Its listeners are closed anyway, and the kernel takes them out of the map then.
        if let Err(error) = bpf.close(pod.cookie) {
            tracing::error!(pod = %pod.id, %error, "closing a pod");
        }
        let left = Left {
            id: Some(pod.id.clone()),
            addresses: pod.record.load().addresses.clone(),
            place: path.map(|path| (path.to_owned(), pod.netns_inode)),
        };
        self.0.insert(pod.cookie, left);
    }

    /// Finds what is in the kernel's maps and is nobody's: what a previous agent left, and pods
    /// that could not be enrolled.
    pub(super) fn find(&mut self, bpf: &Bpf, ours: &HashSet<u64>) -> Result<(), BpfError> {
        for cookie in bpf.enrolled()? {
            if !ours.contains(&cookie) && !self.0.contains_key(&cookie) {
                let addresses = bpf.addresses(cookie);
                tracing::info!(cookie, ?addresses, "refusing a pod that nobody serves");
                let left = Left {
                    id: None,
                    addresses,
                    place: None,
                };
                self.0.insert(cookie, left);
            }
        }
        Ok(())
    }

    /// Takes out the cookies of pods that may leave the kernel's maps, and forgets those that are
    /// served again.
    pub(super) fn take_removable(
        &mut self,
        bpf: &Bpf,
        store: &Store,
        ours: &HashSet<u64>,
    ) -> Vec<u64> {
        self.0.retain(|cookie, _| !ours.contains(cookie));
        let removable = self.0.extract_if(.., |cookie, left| {
            let why = if left.is_gone(bpf, *cookie) {
                "its network namespace is gone"
            } else if is_opted_out(store, left.id.as_ref(), &left.addresses) {
                "it takes no part in the mesh"
            } else {
                return false;
            };
            tracing::info!(cookie, pod = ?left.id, why, "removing a pod from the kernel's maps");
            true
        });
        removable.map(|(cookie, _)| cookie).collect()
    }
}

impl Left {
    /// Whether its namespace was taken away. Where its place is known, that tells: connections that
    /// nobody answers any more keep a namespace without processes for minutes. Else the link's
    /// target does; a link that is not there says nothing.
    fn is_gone(&self, bpf: &Bpf, cookie: u64) -> bool {
        if let Some((path, inode)) = &self.place {
            return is_gone(path, *inode);
        }
        bpf.namespace(cookie).map_or_else(
            |error| {
                tracing::warn!(cookie, %error, "looking for a pod's network namespace");
                false
            },
            |namespace| namespace == Namespace::Gone,
        )
    }
}

/// Whether a pod's record says that it is not meshed. A record of that name with other addresses may
/// be a successor's, so one must be the pod's; a record that is missing says nothing.
pub(super) fn is_opted_out(store: &Store, id: Option<&WorkloadId>, addresses: &[IpAddr]) -> bool {
    addresses.iter().any(|address| {
        let owner = store.workload_at(*address);
        owner.is_some_and(|it| it.mesh == Mesh::Unmeshed && id.is_none_or(|id| it.id == *id))
    })
}

/// Whether a network namespace is no longer at a path. Asked without a descriptor, and only a clear
/// answer counts: when descriptors or memory run out, nothing is gone.
pub(super) fn is_gone(path: &Path, inode: u64) -> bool {
    match std::fs::metadata(path) {
        Ok(found) => found.ino() != inode,
        Err(error) => error.kind() == ErrorKind::NotFound,
    }
}
