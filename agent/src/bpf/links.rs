//! Links and their pins: attached once, replaced in place by later agents, and checked.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{error::BpfError, load, mounts, sys};

/// A cgroup hook: one program at one cgroup, pinned under a name.
#[derive(Clone, Debug)]
pub(crate) struct Hook {
    pub(crate) pin: String,
    pub(crate) program: &'static str,
    pub(crate) attach_type: u32,
    pub(crate) cgroup: PathBuf,
}

/// The hooks of an instance. `sock_ops` must see both ends: the pods' sockets and the agent's own,
/// which live in the agent's cgroup. Where one of the two contains the other, one hook there serves
/// both. Else each agent has a hook of its own: an older one that still runs, in another cgroup, needs
/// its own to the end.
pub(crate) fn hooks(cgroup: &Path, kubelet: Option<&Path>) -> Result<Vec<Hook>, BpfError> {
    let own = mounts::own_cgroup()?;
    let id = fs::metadata(&own).map_err(|source| BpfError::File {
        what: "looking at the cgroup",
        path: own.clone(),
        source,
    })?;
    let of_agent = format!("{AGENT_SUFFIX}{}", id.ino());
    let mut hooks = Vec::new();
    for (program, attach_type) in load::CGROUP_PROGRAMS {
        let places: Vec<(&Path, &str)> = match program {
            load::PROBE_SOCK_OPS => kubelet.into_iter().map(|path| (path, "")).collect(),
            load::SOCK_OPS if own.starts_with(cgroup) => vec![(cgroup, "")],
            load::SOCK_OPS if cgroup.starts_with(&own) => vec![(&own, "")],
            load::SOCK_OPS => vec![(cgroup, ""), (&own, &of_agent)],
            _ => vec![(cgroup, "")],
        };
        hooks.extend(places.into_iter().map(|(path, suffix)| Hook {
            pin: format!("{program}{suffix}"),
            program,
            attach_type: load::attach_number(attach_type),
            cgroup: path.to_owned(),
        }));
    }
    Ok(hooks)
}

impl Hook {
    /// Attaches the program, or puts it in the place of the one that a previous agent attached.
    pub(crate) fn install(&self, links: &Path, program: BorrowedFd<'_>) -> Result<(), BpfError> {
        let (cgroup, id) = self.target()?;
        install(
            &links.join(&self.pin),
            program,
            cgroup.as_fd(),
            id,
            self.attach_type,
            &self.pin,
        )
    }

    /// The cgroup and its id.
    pub(crate) fn target(&self) -> Result<(File, u64), BpfError> {
        let file = |source| BpfError::File {
            what: "opening the cgroup",
            path: self.cgroup.clone(),
            source,
        };
        let cgroup = File::open(&self.cgroup).map_err(file)?;
        let id = cgroup.metadata().map_err(file)?.ino();
        Ok((cgroup, id))
    }
}

/// The pins of the hooks that agents outside of the pods' cgroup have at their own.
pub(crate) fn agents_pins(links: &Path) -> Result<Vec<String>, BpfError> {
    let prefix = format!("{}{AGENT_SUFFIX}", load::SOCK_OPS);
    let mut names = names(links)?;
    names.retain(|name| name.starts_with(&prefix) && !name.ends_with(UNFINISHED));
    Ok(names)
}

/// The name of the pin of a namespace's lookup link.
pub(crate) fn lookup_pin(cookie: u64) -> String {
    format!("{LOOKUP_PREFIX}{cookie:016x}")
}

/// The cookies of the namespaces that have a lookup link pinned.
pub(crate) fn lookup_cookies(links: &Path) -> Result<Vec<u64>, BpfError> {
    let cookies = names(links)?
        .iter()
        .filter_map(|name| name.strip_prefix(LOOKUP_PREFIX))
        .filter_map(|cookie| u64::from_str_radix(cookie, 16).ok())
        .collect();
    Ok(cookies)
}

/// Installs a link under a pin: replaces the program if the pin is attached to that very target,
/// else attaches anew and puts the new link's pin in the place of the old one.
pub(crate) fn install(
    pin: &Path,
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    target_id: u64,
    attach_type: u32,
    name: &str,
) -> Result<(), BpfError> {
    let failed = |source| BpfError::Attach {
        program: name.to_owned(),
        source,
    };
    let present = open(pin)?;
    if let Some(link) = &present {
        let info = sys::link_info(link.as_fd()).map_err(failed)?;
        if info.target == target_id && info.attach_type == attach_type {
            return sys::link_update(link.as_fd(), program).map_err(failed);
        }
    }
    let link = sys::link_create(program, target, attach_type).map_err(failed)?;
    if present.is_none() {
        return sys::pin(link.as_fd(), pin).map_err(|source| BpfError::Pin {
            path: pin.into(),
            source,
        });
    }
    // A dot is not allowed in a name there.
    let aside = pin.with_file_name(format!("{name}{UNFINISHED}"));
    let _ = fs::remove_file(&aside);
    sys::pin(link.as_fd(), &aside).map_err(|source| BpfError::Pin {
        path: aside.clone(),
        source,
    })?;
    fs::rename(&aside, pin).map_err(|source| BpfError::Pin {
        path: pin.into(),
        source,
    })
}

/// Opens a pinned link, if there is one.
pub(crate) fn open(pin: &Path) -> Result<Option<OwnedFd>, BpfError> {
    match sys::open_pin(pin) {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(BpfError::Pin {
            path: pin.into(),
            source,
        }),
    }
}

/// Whether a pinned link is attached to something that still is there; `None` without a pin.
pub(crate) fn is_attached(pin: &Path) -> Result<Option<bool>, BpfError> {
    let Some(link) = open(pin)? else {
        return Ok(None);
    };
    let info = sys::link_info(link.as_fd()).map_err(|source| BpfError::Pin {
        path: pin.into(),
        source,
    })?;
    Ok(Some(info.target != 0))
}

/// Detaches a pinned link at once and removes the pin; nothing if there is none.
pub(crate) fn detach(pin: &Path) -> Result<(), BpfError> {
    let Some(link) = open(pin)? else {
        return Ok(());
    };
    // Of a cgroup or a namespace that is gone it is detached already; the pin must go all the same.
    if let Err(error) = sys::link_detach(link.as_fd()) {
        tracing::debug!(pin = %pin.display(), %error, "a link could not be detached");
    }
    fs::remove_file(pin).map_err(|source| BpfError::Pin {
        path: pin.into(),
        source,
    })
}

/// Detaches the links that an agent was putting in the place of others when it died.
pub(crate) fn detach_unfinished(links: &Path) -> Result<(), BpfError> {
    let names = names(links)?;
    let mut unfinished = names.iter().filter(|name| name.ends_with(UNFINISHED));
    unfinished.try_for_each(|name| detach(&links.join(name)))
}

/// Detaches all links pinned in a folder: connects first, so that nothing is redirected to where
/// nobody is, then the lookups, then the rest.
pub(crate) fn detach_all(links: &Path) -> Result<(), BpfError> {
    let mut names = names(links)?;
    names.sort_by_key(|name| match name {
        name if name.starts_with("weft_connect") => 0,
        name if name.starts_with(LOOKUP_PREFIX) => 1,
        _ => 2,
    });
    names.iter().try_for_each(|name| detach(&links.join(name)))
}

fn names(links: &Path) -> Result<Vec<String>, BpfError> {
    let failed = |source| BpfError::File {
        what: "reading",
        path: links.into(),
        source,
    };
    match fs::read_dir(links) {
        Ok(entries) => entries
            .map(|entry| {
                entry
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
                    .map_err(failed)
            })
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// Followed by the cgroup's id.
const AGENT_SUFFIX: &str = "-agent-";
const LOOKUP_PREFIX: &str = "sk_lookup-";
const UNFINISHED: &str = "-new";
