//! The embedded objects: what the kernel must offer for them, their constants, and loading them
//! onto the pinned maps.

use std::{fmt, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    maps::MapType,
    programs::{CgroupSockAddr, Program, ProgramError, ProgramFd, ProgramType, SkLookup, SockOps},
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET4_GETSOCKNAME,
    BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_INET6_GETSOCKNAME,
    BPF_CGROUP_SOCK_OPS,
};

use weft_ebpf_abi::NETNS_COOKIE_MARKER;

use super::{error::BpfError, log};

/// The names of the pinned maps.
pub(crate) const MAPS: [&str; 9] = [
    "PODS",
    "OWN_ADDRESSES",
    "POD_STATE",
    "FLOWS",
    "PENDING",
    "LISTENERS",
    "PROBES",
    "REFUSED",
    "COUNTERS",
];

/// The map that agents of all layouts share, pinned apart from the others.
pub(crate) const OWN_SOCKETS: &str = "OWN_SOCKETS";

/// The program of `weft-lookup`.
pub(crate) const LOOKUP: &str = "weft_sk_lookup";

/// The cgroup programs and where they are attached, those that read first: a connect is redirected
/// only when all else is there to handle it.
pub(crate) const CGROUP_PROGRAMS: [(&str, bpf_attach_type); 8] = [
    ("weft_getpeername4", BPF_CGROUP_INET4_GETPEERNAME),
    ("weft_getpeername6", BPF_CGROUP_INET6_GETPEERNAME),
    ("weft_getsockname4", BPF_CGROUP_INET4_GETSOCKNAME),
    ("weft_getsockname6", BPF_CGROUP_INET6_GETSOCKNAME),
    (SOCK_OPS, BPF_CGROUP_SOCK_OPS),
    (PROBE_SOCK_OPS, BPF_CGROUP_SOCK_OPS),
    ("weft_connect4", BPF_CGROUP_INET4_CONNECT),
    ("weft_connect6", BPF_CGROUP_INET6_CONNECT),
];
/// Attached where the pods and the agent are.
pub(crate) const SOCK_OPS: &str = "weft_sock_ops";
/// Attached where the kubelet is.
pub(crate) const PROBE_SOCK_OPS: &str = "weft_probe_sock_ops";

/// Constants of the cgroup programs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Constants {
    pub(crate) host_netns_cookie: u64,
    pub(crate) pending_quota: i64,
    pub(crate) max_pending: u32,
    pub(crate) has_mptcp: bool,
    pub(crate) log: bool,
}

/// What the kernel offers beyond what is required.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    pub(crate) mptcp: bool,
}

/// Probes the kernel, not its version, for what the programs need.
pub(crate) fn probe() -> Result<Features, BpfError> {
    let mut missing = Vec::new();
    for (kind, name) in [
        (
            ProgramType::CgroupSockAddr,
            "cgroup/connect programs (CONFIG_CGROUP_BPF)",
        ),
        (
            ProgramType::SockOps,
            "sock_ops programs (CONFIG_CGROUP_BPF)",
        ),
        (ProgramType::SkLookup, "sk_lookup programs (Linux 5.9)"),
    ] {
        if matches!(is_program_supported(kind), Ok(false)) {
            missing.push(name.to_owned());
        }
    }
    for (kind, name) in [
        (MapType::SkStorage, "socket storage maps (Linux 5.2)"),
        (
            MapType::SockHash,
            "sockhash maps (CONFIG_BPF_STREAM_PARSER)",
        ),
        (MapType::LruHash, "LRU hash maps"),
    ] {
        if matches!(is_map_supported(kind), Ok(false)) {
            missing.push(name.to_owned());
        }
    }
    for (kind, helper, name) in [
        (
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_get_netns_cookie,
            "bpf_get_netns_cookie in connect (Linux 5.7)",
        ),
        (
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_sk_storage_get,
            "bpf_sk_storage_get in connect (Linux 5.8)",
        ),
        (
            ProgramType::SockOps,
            BpfHelper::BPF_FUNC_get_netns_cookie,
            "bpf_get_netns_cookie in sock_ops (Linux 5.15)",
        ),
        (
            ProgramType::SockOps,
            BpfHelper::BPF_FUNC_sk_storage_get,
            "bpf_sk_storage_get in sock_ops (Linux 5.2)",
        ),
        (
            ProgramType::SkLookup,
            BpfHelper::BPF_FUNC_sk_assign,
            "bpf_sk_assign in sk_lookup (Linux 5.9)",
        ),
    ] {
        if matches!(is_helper_supported(kind, helper), Ok(false)) {
            missing.push(name.to_owned());
        }
    }
    if !missing.is_empty() {
        return Err(BpfError::Unsupported { missing });
    }
    let mptcp = is_helper_supported(ProgramType::SockOps, BpfHelper::BPF_FUNC_skc_to_mptcp_sock);
    Ok(Features {
        mptcp: matches!(mptcp, Ok(true)),
    })
}

/// Loads the cgroup programs. Maps that are pinned already are used, the others are made and
/// pinned.
pub(crate) fn cgroup_programs(
    maps: &Path,
    own_sockets: &Path,
    constants: &Constants,
) -> Result<Ebpf, BpfError> {
    let object = object(CGROUP_OBJECT)?;
    let has_mptcp = u8::from(constants.has_mptcp);
    let mut loader = EbpfLoader::new();
    loader
        .override_global("HOST_NETNS_COOKIE", &constants.host_netns_cookie, true)
        .override_global("PENDING_QUOTA", &constants.pending_quota, true)
        .override_global("HAS_MPTCP", &has_mptcp, true)
        .map_max_entries("PENDING", constants.max_pending);
    loader.override_global(aya_log::LEVEL, log::level(constants.log), false);
    pin_maps(&mut loader, maps);
    loader.map_pin_path(OWN_SOCKETS, own_sockets);
    let mut ebpf = load(&mut loader, object, "weft-cgroup")?;
    for (name, _) in CGROUP_PROGRAMS {
        let failed = |source| BpfError::Program {
            program: name,
            source: Box::new(source),
        };
        let program = ebpf.program_mut(name).ok_or_else(|| {
            failed(ProgramError::InvalidName {
                name: name.to_owned(),
            })
        })?;
        match program {
            Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
            Program::SockOps(program) => SockOps::load(program),
            _ => Err(ProgramError::UnexpectedProgramType),
        }
        .map_err(failed)?;
    }
    Ok(ebpf)
}

/// Loads the lookup program, once per network namespace.
///
/// aya's loader borrows constants for its own life, and making a loader parses the kernel's BTF,
/// which takes longer than all else. So one loader serves all namespaces, and the cookie is written
/// into a copy of the object.
pub(crate) struct Lookups {
    loader: EbpfLoader<'static>,
    object: Vec<u8>,
    cookie_at: usize,
}

impl Lookups {
    pub(crate) fn new(maps: &Path, log: bool) -> Result<Self, BpfError> {
        let object = object(LOOKUP_OBJECT)?.to_vec();
        let marker = NETNS_COOKIE_MARKER.to_ne_bytes();
        let mut places = object
            .windows(marker.len())
            .enumerate()
            .filter(|(_, bytes)| *bytes == marker);
        let (Some((cookie_at, _)), None) = (places.next(), places.next()) else {
            return Err(BpfError::Marker);
        };
        let mut loader = EbpfLoader::new();
        pin_maps(&mut loader, maps);
        loader
            .btf(None)
            .override_global(aya_log::LEVEL, log::level(log), false);
        Ok(Self {
            loader,
            object,
            cookie_at,
        })
    }

    pub(crate) fn load(&mut self, cookie: u64) -> Result<Ebpf, BpfError> {
        let place = self.cookie_at..self.cookie_at + size_of::<u64>();
        self.object[place].copy_from_slice(&cookie.to_ne_bytes());
        let mut ebpf = load(&mut self.loader, &self.object, "weft-lookup")?;
        let failed = |source| BpfError::Program {
            program: LOOKUP,
            source: Box::new(source),
        };
        match ebpf.program_mut(LOOKUP) {
            Some(Program::SkLookup(program)) => SkLookup::load(program),
            _ => Err(ProgramError::UnexpectedProgramType),
        }
        .map_err(failed)?;
        Ok(ebpf)
    }
}

impl fmt::Debug for Lookups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lookups").finish_non_exhaustive()
    }
}

/// The descriptor of a loaded program.
pub(crate) fn descriptor<'a>(
    ebpf: &'a Ebpf,
    name: &'static str,
) -> Result<&'a ProgramFd, BpfError> {
    let failed = |source| BpfError::Program {
        program: name,
        source: Box::new(source),
    };
    let program = ebpf
        .program(name)
        .ok_or_else(|| failed(ProgramError::NotLoaded))?;
    program.fd().map_err(failed)
}

/// The number of a cgroup attach type in `bpf(2)`.
pub(crate) fn attach_number(attach_type: bpf_attach_type) -> u32 {
    attach_type as u32
}

fn load(loader: &mut EbpfLoader<'_>, object: &[u8], name: &'static str) -> Result<Ebpf, BpfError> {
    loader.load(object).map_err(|source| BpfError::Load {
        object: name,
        source: Box::new(source),
    })
}

/// Maps that are pinned already are used, the others are made and pinned.
fn pin_maps(loader: &mut EbpfLoader<'_>, maps: &Path) {
    for map in MAPS.into_iter().chain([log::MAP]) {
        loader.map_pin_path(map, maps.join(map));
    }
}

/// An embedded object; empty if the agent was built without (see `build.rs`).
fn object(bytes: &'static [u8]) -> Result<&'static [u8], BpfError> {
    if bytes.is_empty() {
        Err(BpfError::NotBuilt)
    } else {
        Ok(bytes)
    }
}

static CGROUP_OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weft-cgroup.o"));
static LOOKUP_OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/weft-lookup.o"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_without_programs_says_what_to_do() {
        let error = object(&[]).unwrap_err();
        assert!(
            error.to_string().contains("cargo xtask build-ebpf"),
            "{error}"
        );
    }

    #[test]
    fn connects_are_redirected_last() {
        let connects = CGROUP_PROGRAMS
            .iter()
            .position(|(name, _)| name.contains("connect"));
        assert_eq!(connects, Some(CGROUP_PROGRAMS.len() - 2));
    }
}
