//! Whether the hooks in the kernel are what they should be: exactly one program of this instance
//! per hook.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::AsFd,
    path::Path,
};

use super::{
    error::BpfError,
    links::{self, Hook},
    sys,
};

/// What is attached for an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HookReport {
    /// One entry per hook, cgroup hooks first.
    pub hooks: Vec<AttachedHook>,
}

/// One program at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedHook {
    /// The name of its pin: the program's, or `sk_lookup-<cookie>`.
    pub name: String,
    /// The link's id in the kernel.
    pub link: u32,
    /// The program's id in the kernel.
    pub program: u32,
    /// Cgroup id, or inode of the network namespace.
    pub target: u64,
    /// How many instructions the verifier looked at when it loaded.
    pub verified_instructions: u32,
}

/// Checks the hooks of the instance whose programs use one of `maps`.
pub(crate) fn verify(
    folder: &Path,
    hooks: &[Hook],
    cookies: &BTreeSet<u64>,
    maps: &[u32],
) -> Result<HookReport, BpfError> {
    let mut problems = Vec::new();
    let mut report = HookReport::default();
    let mut expected = BTreeMap::new();
    for hook in hooks {
        let (_, id) = hook.target()?;
        expected.insert(hook.pin.clone(), Some(id));
    }
    expected.extend(
        cookies
            .iter()
            .map(|cookie| (links::lookup_pin(*cookie), None)),
    );
    for (name, target) in expected {
        match pinned(folder, &name)? {
            // Of a namespace that died since anybody looked.
            Some(hook) if hook.target == 0 && target.is_none() => {}
            None => problems.push(format!("{name} is not pinned")),
            Some(hook) if hook.target == 0 => problems.push(format!("{name} is not attached")),
            Some(hook) if target.is_some_and(|id| id != hook.target) => {
                problems.push(format!("{name} is attached to another cgroup"));
            }
            Some(hook) => report.hooks.push(hook),
        }
    }
    let mut known: BTreeSet<u32> = report.hooks.iter().map(|hook| hook.link).collect();
    // Those of other agents.
    for name in links::agents_pins(folder)? {
        known.extend(pinned(folder, &name)?.map(|hook| hook.link));
    }
    problems.extend(strangers(&known, maps)?);
    if problems.is_empty() {
        Ok(report)
    } else {
        Err(BpfError::Hooks { problems })
    }
}

fn pinned(folder: &Path, name: &str) -> Result<Option<AttachedHook>, BpfError> {
    let Some(link) = links::open(&folder.join(name))? else {
        return Ok(None);
    };
    let info = sys::link_info(link.as_fd()).map_err(system("reading a link"))?;
    let program = sys::program_by_id(info.program).map_err(system("opening a program"))?;
    let verified = match program {
        Some(program) => {
            sys::program_info(program.as_fd())
                .map_err(system("reading a program"))?
                .verified_instructions
        }
        None => 0,
    };
    Ok(Some(AttachedHook {
        name: name.to_owned(),
        link: info.id,
        program: info.program,
        target: info.target,
        verified_instructions: verified,
    }))
}

/// Links in the kernel that run a program on this instance's maps but are none of its pins.
fn strangers(known: &BTreeSet<u32>, maps: &[u32]) -> Result<Vec<String>, BpfError> {
    let mut found = Vec::new();
    for link in sys::links().map_err(system("listing links"))? {
        let info = sys::link_info(link.as_fd()).map_err(system("reading a link"))?;
        if known.contains(&info.id) || info.target == 0 {
            continue;
        }
        let Some(program) =
            sys::program_by_id(info.program).map_err(system("opening a program"))?
        else {
            continue;
        };
        let program = sys::program_info(program.as_fd()).map_err(system("reading a program"))?;
        if program.maps.iter().any(|id| maps.contains(id)) {
            found.push(format!(
                "a second {} is attached (link {}, program {})",
                program.name, info.id, program.id
            ));
        }
    }
    Ok(found)
}

fn system(what: &'static str) -> impl Fn(std::io::Error) -> BpfError {
    move |source| BpfError::System { what, source }
}
