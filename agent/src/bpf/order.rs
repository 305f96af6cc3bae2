//! Which programs see a connect, and in which order: this instance's and others', from the pods' cgroup up to the root.
//! The kernel runs those of a descendant first, and what one exchanges is what the next one sees.

use std::{fs::File, os::fd::AsFd, path::PathBuf};

use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET6_CONNECT,
};
use serde::Serialize;

use super::{Bpf, BpfError, links, load, mounts, sys};

/// The programs at one cgroup that see connects of one family, in the order in which they run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConnectHook {
    /// `connect4` or `connect6`.
    pub hook: &'static str,
    /// The cgroup.
    pub cgroup: PathBuf,
    /// What is attached there.
    pub programs: Vec<ConnectProgram>,
}

/// A program that sees connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConnectProgram {
    /// Its id in the kernel.
    pub id: u32,
    /// Its name, as far as the kernel keeps it.
    pub name: String,
    /// Whether this instance of Weft attached it.
    pub is_own: bool,
}

impl Bpf {
    /// All programs that see connects of the pods, the first to run first. Cgroups that have none are left out.
    pub fn connect_hooks(&self) -> Result<Vec<ConnectHook>, BpfError> {
        let root = mounts::cgroup2_root()?;
        let mut found = Vec::new();
        for (hook, attach_type) in CONNECTS {
            let number = load::attach_number(attach_type);
            let Some(own) = self.hooks.iter().find(|it| it.attach_type == number) else {
                continue;
            };
            let own_program = match links::open(&self.links().join(&own.pin))? {
                Some(link) => Some(sys::link_info(link.as_fd()).map_err(failed)?.program),
                None => None,
            };
            for cgroup in own
                .cgroup
                .ancestors()
                .take_while(|it| it.starts_with(&root))
            {
                let folder = File::open(cgroup).map_err(|source| BpfError::File {
                    what: "opening the cgroup",
                    path: cgroup.to_owned(),
                    source,
                })?;
                let ids = sys::attached_programs(folder.as_fd(), number).map_err(failed)?;
                let mut programs = Vec::new();
                for id in ids {
                    // It may be gone by now.
                    if let Some(program) = sys::program_by_id(id).map_err(failed)? {
                        let name = sys::program_info(program.as_fd()).map_err(failed)?.name;
                        let is_own = own_program == Some(id);
                        programs.push(ConnectProgram { id, name, is_own });
                    }
                }
                if !programs.is_empty() {
                    let cgroup = cgroup.to_owned();
                    found.push(ConnectHook {
                        hook,
                        cgroup,
                        programs,
                    });
                }
            }
        }
        Ok(found)
    }
}

fn failed(source: std::io::Error) -> BpfError {
    BpfError::System {
        what: "asking which programs are attached to cgroups",
        source,
    }
}

const CONNECTS: [(&str, bpf_attach_type); 2] = [
    ("connect4", BPF_CGROUP_INET4_CONNECT),
    ("connect6", BPF_CGROUP_INET6_CONNECT),
];
