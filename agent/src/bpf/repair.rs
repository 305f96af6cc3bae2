//! Putting back hooks that somebody else took away: a control group that was made anew, an
//! administrator who detached a link, a pin that was removed. Without its hook a pod would be in
//! plaintext, and nobody would know.

use std::os::fd::{AsFd, BorrowedFd};

use super::{Bpf, BpfError, links, load, sys};

impl Bpf {
    /// Attaches the hooks of the control groups again that are not where they should be, and says
    /// which those were.
    pub fn repair(&self) -> Result<Vec<String>, BpfError> {
        let _change = self.ownership.change_own()?;
        let mut broken = Vec::new();
        for hook in &self.hooks {
            let (_, wanted) = hook.target()?;
            let pin = self.links().join(&hook.pin);
            let attached = match links::open(&pin)? {
                Some(link) => {
                    let info = sys::link_info(link.as_fd());
                    info.is_ok_and(|it| it.target == wanted && it.attach_type == hook.attach_type)
                }
                None => false,
            };
            if !attached {
                broken.push(hook);
            }
        }
        if broken.is_empty() {
            return Ok(Vec::new());
        }
        let shared = self.pin_root.join(super::SHARED).join(load::OWN_SOCKETS);
        let maps = self.folder.join(super::MAPS);
        let programs = load::cgroup_programs(&maps, &shared, &self.constants)?;
        for hook in &broken {
            let program = load::descriptor(&programs, hook.program)?;
            hook.install(&self.links(), program.as_fd())?;
        }
        Ok(broken.into_iter().map(|it| it.pin.clone()).collect())
    }

    /// The same for the lookup program of a pod whose network namespace is alive.
    pub fn repair_pod(&self, cookie: u64, netns: BorrowedFd<'_>) -> Result<bool, BpfError> {
        let _change = self.ownership.change_own()?;
        let pin = self.links().join(links::lookup_pin(cookie));
        let broken = links::is_attached(&pin)? != Some(true);
        if broken {
            self.install_lookup(cookie, netns)?;
        }
        Ok(broken)
    }
}
