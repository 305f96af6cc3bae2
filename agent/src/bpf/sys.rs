//! `bpf(2)`, as far as aya has no public way to it or needs exclusive access for what the kernel
//! does atomically: maps by descriptor, pins, links and their replacement in place.

#![allow(unsafe_code)]

use std::{
    ffi::CString,
    io,
    mem::{size_of, zeroed},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    time::Duration,
};

use aya_obj::generated::{bpf_cmd, bpf_map_info, bpf_prog_info};

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    pub(crate) id: u32,
    pub(crate) program: u32,
    /// Cgroup id or network namespace inode; 0 if that is gone.
    pub(crate) target: u64,
    pub(crate) attach_type: u32,
}

/// What the kernel says of a program.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProgramInfo {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) verified_instructions: u32,
    pub(crate) maps: Vec<u32>,
}

/// What the kernel says of a map.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MapInfo {
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
}

/// `BPF_MAP_UPDATE_ELEM`. `K` and `V` have the sizes of the map's keys and values (checked by
/// [`super::table::Table`]).
pub(crate) fn map_update<K, V: ?Sized>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
    flags: u64,
) -> io::Result<()> {
    element(
        bpf_cmd::BPF_MAP_UPDATE_ELEM,
        map,
        (&raw const *key).addr_u64(),
        (&raw const *value).cast::<u8>().addr_u64(),
        flags,
    )
}

/// `BPF_MAP_LOOKUP_ELEM` into `value`; false if there is no such key.
pub(crate) fn map_lookup<K, V: ?Sized>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &mut V,
) -> io::Result<bool> {
    found(element(
        bpf_cmd::BPF_MAP_LOOKUP_ELEM,
        map,
        (&raw const *key).addr_u64(),
        (&raw mut *value).cast::<u8>().addr() as u64,
        0,
    ))
}

/// `BPF_MAP_DELETE_ELEM`; false if there is no such key.
pub(crate) fn map_delete<K>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    found(element(
        bpf_cmd::BPF_MAP_DELETE_ELEM,
        map,
        (&raw const *key).addr_u64(),
        0,
        0,
    ))
}

/// `BPF_MAP_GET_NEXT_KEY`; false at the end. Starts over if the previous key is gone.
pub(crate) fn map_next_key<K>(
    map: BorrowedFd<'_>,
    previous: Option<&K>,
    next: &mut K,
) -> io::Result<bool> {
    found(element(
        bpf_cmd::BPF_MAP_GET_NEXT_KEY,
        map,
        previous.map_or(0, |key| (&raw const *key).addr_u64()),
        (&raw mut *next).addr() as u64,
        0,
    ))
}

/// How many entries a hash map has, by `BPF_MAP_LOOKUP_BATCH` (Linux 5.6): a call for thousands of
/// them, where a walk makes one for each.
pub(crate) fn map_count(map: BorrowedFd<'_>, info: &MapInfo) -> io::Result<usize> {
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: i32,
        element_flags: u64,
        flags: u64,
    }
    const BATCH: u32 = 4096;
    let mut keys = vec![0u8; (BATCH * info.key_size) as usize];
    let mut values = vec![0u8; (BATCH * info.value_size.next_multiple_of(8)) as usize];
    let mut position = 0u32;
    let mut next = 0u32;
    let mut found = 0;
    let mut begun = false;
    loop {
        let mut attributes = Attributes {
            in_batch: if begun {
                (&raw const position).addr_u64()
            } else {
                0
            },
            out_batch: (&raw mut next).addr() as u64,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: BATCH,
            map: map.as_raw_fd(),
            ..Attributes::default()
        };
        let result = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attributes);
        match result {
            Ok(_) => found += attributes.count as usize,
            // The end; what was found before it counts.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(found + attributes.count as usize);
            }
            Err(error) => return Err(error),
        }
        (position, begun) = (next, true);
    }
}

/// `BPF_OBJ_PIN`.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    object_path(bpf_cmd::BPF_OBJ_PIN, path, object.as_raw_fd()).map(drop)
}

/// `BPF_OBJ_GET`.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    object_path(bpf_cmd::BPF_OBJ_GET, path, 0).map(descriptor)
}

/// `BPF_LINK_CREATE` to a cgroup or a network namespace.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: i32,
        target: i32,
        attach_type: u32,
        flags: u32,
    }
    let mut attributes = Attributes {
        program: program.as_raw_fd(),
        target: target.as_raw_fd(),
        attach_type,
        flags: 0,
    };
    bpf(bpf_cmd::BPF_LINK_CREATE, &mut attributes).map(descriptor)
}

/// `BPF_LINK_UPDATE`: the link runs another program from now on, without a moment of none.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        link: i32,
        program: i32,
        flags: u32,
        old_program: u32,
    }
    let mut attributes = Attributes {
        link: link.as_raw_fd(),
        program: program.as_raw_fd(),
        flags: 0,
        old_program: 0,
    };
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attributes).map(drop)
}

/// `BPF_LINK_DETACH`: done when it returns, whoever else holds the link.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = link.as_raw_fd();
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attributes).map(drop)
}

/// `BPF_OBJ_GET_INFO_BY_FD` of a link.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    /// `struct bpf_link_info` with the union of cgroup and network namespace links.
    #[repr(C)]
    struct Info {
        kind: u32,
        id: u32,
        program: u32,
        padding: u32,
        target: u64,
        attach_type: u32,
        rest: [u32; 21],
    }
    // SAFETY: integers only.
    let mut raw: Info = unsafe { zeroed() };
    info(link, &mut raw)?;
    let (target, attach_type) = if raw.kind == LINK_TYPE_NETNS {
        // Two u32: inode and attach type.
        (
            (raw.target & u64::from(u32::MAX)),
            (raw.target >> 32) as u32,
        )
    } else {
        (raw.target, raw.attach_type)
    };
    Ok(LinkInfo {
        id: raw.id,
        program: raw.program,
        target,
        attach_type,
    })
}

/// `BPF_OBJ_GET_INFO_BY_FD` of a map.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // SAFETY: integers only.
    let mut raw: bpf_map_info = unsafe { zeroed() };
    info(map, &mut raw)?;
    Ok(MapInfo {
        id: raw.id,
        key_size: raw.key_size,
        value_size: raw.value_size,
        max_entries: raw.max_entries,
    })
}

/// `BPF_OBJ_GET_INFO_BY_FD` of a program.
pub(crate) fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    let mut maps = [0u32; 64];
    // SAFETY: integers only.
    let mut raw: bpf_prog_info = unsafe { zeroed() };
    raw.nr_map_ids = maps.len() as u32;
    raw.map_ids = maps.as_mut_ptr().addr() as u64;
    info(program, &mut raw)?;
    let name = raw
        .name
        .iter()
        .take_while(|c| **c != 0)
        .map(|c| char::from(*c as u8))
        .collect();
    Ok(ProgramInfo {
        id: raw.id,
        name,
        verified_instructions: raw.verified_insns,
        maps: maps.into_iter().take(raw.nr_map_ids as usize).collect(),
    })
}

/// All links of the kernel, by `BPF_LINK_GET_NEXT_ID`. Those that vanish meanwhile are left out.
pub(crate) fn links() -> io::Result<Vec<OwnedFd>> {
    let mut found = Vec::new();
    let mut id = 0;
    loop {
        let mut attributes = IdAttributes {
            id,
            next: 0,
            flags: 0,
        };
        match bpf(bpf_cmd::BPF_LINK_GET_NEXT_ID, &mut attributes) {
            Ok(_) => id = attributes.next,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(error),
        }
        if let Some(link) = by_id(bpf_cmd::BPF_LINK_GET_FD_BY_ID, id)? {
            found.push(link);
        }
    }
}

/// The ids of the programs that are attached to a cgroup itself, in the order in which they run: `BPF_PROG_QUERY`.
pub(crate) fn attached_programs(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    #[repr(C)]
    struct Attributes {
        target: i32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
    }
    // The kernel allows 64 of a type at a cgroup.
    let mut ids = [0u32; 64];
    let mut attributes = Attributes {
        target: cgroup.as_raw_fd(),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr().addr() as u64,
        count: ids.len() as u32,
        padding: 0,
    };
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attributes)?;
    let found = ids.into_iter().take(attributes.count as usize);
    Ok(found.collect())
}

/// A program by its id, unless it is gone.
pub(crate) fn program_by_id(id: u32) -> io::Result<Option<OwnedFd>> {
    by_id(bpf_cmd::BPF_PROG_GET_FD_BY_ID, id)
}

/// The clock of `bpf_ktime_get_ns`.
pub(crate) fn monotonic() -> Duration {
    // SAFETY: integers only; the call fills it and cannot fail for this clock.
    unsafe {
        let mut now: libc::timespec = zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now);
        Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
    }
}

fn by_id(command: bpf_cmd, id: u32) -> io::Result<Option<OwnedFd>> {
    let mut attributes = IdAttributes {
        id,
        next: 0,
        flags: 0,
    };
    match bpf(command, &mut attributes) {
        Ok(fd) => Ok(Some(descriptor(fd))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // Somebody is just making it.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn element(
    command: bpf_cmd,
    map: BorrowedFd<'_>,
    key: u64,
    value: u64,
    flags: u64,
) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: i32,
        padding: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let mut attributes = Attributes {
        map: map.as_raw_fd(),
        padding: 0,
        key,
        value,
        flags,
    };
    bpf(command, &mut attributes).map(drop)
}

fn object_path(command: bpf_cmd, path: &Path, object: i32) -> io::Result<i32> {
    #[repr(C)]
    struct Attributes {
        path: u64,
        object: i32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Attributes {
        path: path.as_ptr().addr() as u64,
        object,
        flags: 0,
    };
    bpf(command, &mut attributes)
}

fn info<T>(object: BorrowedFd<'_>, value: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        object: i32,
        length: u32,
        info: u64,
    }
    let mut attributes = Attributes {
        object: object.as_raw_fd(),
        length: size_of::<T>() as u32,
        info: (&raw mut *value).addr() as u64,
    };
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes).map(drop)
}

fn bpf<T>(command: bpf_cmd, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: every `Attributes` above is the beginning of the kernel's `union bpf_attr` for its
    // command, and what its addresses point to outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            &raw mut *attributes,
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as i32)
}

fn descriptor(fd: i32) -> OwnedFd {
    // SAFETY: the kernel just made it for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn found(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

trait AddrU64 {
    fn addr_u64(self) -> u64;
}

impl<T> AddrU64 for *const T {
    fn addr_u64(self) -> u64 {
        self.addr() as u64
    }
}

#[repr(C)]
struct IdAttributes {
    id: u32,
    next: u32,
    flags: u32,
}

const LINK_TYPE_NETNS: u32 = 5;
