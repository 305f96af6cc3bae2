//! Who takes part in the mesh, for those who ask before there is anything to tell agents: of a pod that is just being
//! started, and of namespaces, of which agents keep a list for when they are away.

use weft_core::{Name, ObjectName};
use weft_proto::{Key, Kind, Resource};

use super::Index;
use super::pods::MeshChoice;
use crate::views::Audience;

impl Index {
    /// Whether a pod of a node takes part in the mesh. None: nobody has heard yet of it, or of what its namespace says.
    pub fn takes_part(&self, node: &Name, name: &ObjectName, uid: &str) -> Option<bool> {
        let pod = self.pods.get(name)?;
        let is_it = pod.uid == uid || pod.runtime.static_uid.as_deref() == Some(uid);
        // What it was once does not tell what it is started for again.
        if !is_it || pod.node.as_ref() != Some(node) || pod.completed {
            return None;
        }
        if pod.host_network || pod.mesh == MeshChoice::Disabled {
            return Some(false);
        }
        if opts_in(&pod.mesh) {
            return Some(true);
        }
        let namespace = self.namespaces.get(&name.namespace)?;
        Some(pod.is_meshed(&namespace.mesh))
    }

    /// A pod was another one, or none, before.
    pub(super) fn count_opted_in(
        &mut self,
        name: &ObjectName,
        (before, now): (Option<&MeshChoice>, Option<&MeshChoice>),
    ) {
        match (before.is_some_and(opts_in), now.is_some_and(opts_in)) {
            (false, true) => self.opted_in.add(name.namespace.clone()),
            (true, false) => {
                self.opted_in.remove(&name.namespace);
            }
            _ => return,
        }
        self.tell_namespace(&name.namespace);
    }

    /// Tells agents whether a namespace may hold meshed pods. What they know already is no change.
    pub(super) fn tell_namespace(&mut self, name: &Name) {
        let namespace = self.namespaces.get(name);
        let may_hold = namespace.is_some_and(|it| opts_in(&it.mesh)) || self.opted_in.of(name) > 0;
        let key = Key {
            kind: Kind::MeshNamespace,
            name: name.to_string(),
        };
        let resource = may_hold.then(|| Resource::MeshNamespace(name.clone()));
        self.changes.insert((Audience::All, key), resource);
    }
}

pub(super) fn opts_in(mesh: &MeshChoice) -> bool {
    matches!(mesh, MeshChoice::Enabled | MeshChoice::Unreadable)
}
