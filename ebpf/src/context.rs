//! Reading and writing the kernel's context structures. The verifier allows only accesses of the size of a field,
//! so every one is a volatile one of exactly that: the compiler may neither widen, merge nor copy.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_SK_STORAGE_GET_F_CREATE, bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get},
};
use weft_ebpf_abi::{Address, Flow};

use crate::maps::FLOWS;

/// `AF_INET`.
pub const AF_INET: u32 = 2;
/// `AF_INET6`.
pub const AF_INET6: u32 = 10;
/// `SOCK_STREAM`.
pub const SOCK_STREAM: u32 = 1;

/// Reads one field.
#[inline(always)]
pub fn read<T: Copy>(field: *const T) -> T {
    // SAFETY: callers pass fields of context structures, which are valid while a program runs.
    unsafe { field.read_volatile() }
}

/// Writes one field.
#[inline(always)]
pub fn write<T: Copy>(field: *mut T, value: T) {
    // SAFETY: as for `read`.
    unsafe { field.write_volatile(value) }
}

/// Reads the four words of an IPv6 field one by one.
#[inline(always)]
pub fn read_words(field: *const [u32; 4]) -> Address {
    let first = field.cast::<u32>();
    // SAFETY: within the field.
    let (second, third, fourth) = unsafe { (first.add(1), first.add(2), first.add(3)) };
    Address::from_words([read(first), read(second), read(third), read(fourth)])
}

/// Writes the four words of an IPv6 field one by one.
#[inline(always)]
pub fn write_words(field: *mut [u32; 4], address: &Address) {
    let first = field.cast::<u32>();
    // SAFETY: within the field.
    let (second, third, fourth) = unsafe { (first.add(1), first.add(2), first.add(3)) };
    let [a, b, c, d] = address.words();
    write(first, a);
    write(second, b);
    write(third, c);
    write(fourth, d);
}

/// The cookie of the network namespace of a context's socket.
#[inline(always)]
pub fn netns_cookie(context: *mut c_void) -> u64 {
    // SAFETY: the helper takes any context of the program types here.
    unsafe { bpf_get_netns_cookie(context.cast()) }
}

/// The socket of a socket address program.
#[inline(always)]
pub fn sock_addr_socket(context: *mut bpf_sock_addr) -> *mut bpf_sock {
    // SAFETY: a valid context; the union has this one member.
    read(unsafe { &raw const (*context).__bindgen_anon_1.sk })
}

/// The socket of a `sock_ops` program; may be null.
#[inline(always)]
pub fn sock_ops_socket(context: *mut bpf_sock_ops) -> *mut bpf_sock {
    // SAFETY: a valid context; the union has this one member.
    read(unsafe { &raw const (*context).__bindgen_anon_2.sk })
}

/// What is known of a socket; null if nothing.
#[inline(always)]
pub fn flow(socket: *mut c_void) -> *mut Flow {
    // SAFETY: the verifier checks that it is a socket.
    unsafe { bpf_sk_storage_get(flows(), socket.cast(), core::ptr::null_mut(), 0).cast() }
}

/// Keeps a flow with a socket; false if the kernel has no memory for it.
#[inline(always)]
#[must_use]
pub fn set_flow(socket: *mut c_void, mut value: Flow) -> bool {
    // SAFETY: as above; the value is copied if the storage is new.
    let stored: *mut Flow = unsafe {
        bpf_sk_storage_get(
            flows(),
            socket.cast(),
            (&raw mut value).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
        .cast()
    };
    if stored.is_null() {
        return false;
    }
    // SAFETY: the storage lives as long as the socket, whose lock the hook holds.
    unsafe { *stored = value };
    true
}

/// The local and the remote end of a `sock_ops` context, ports in host byte order.
#[inline(always)]
pub fn sock_ops_ends(context: *mut bpf_sock_ops) -> ((Address, u16), (Address, u16)) {
    // SAFETY: a valid context.
    unsafe {
        let (local, remote) = if read(&raw const (*context).family) == AF_INET {
            (
                Address::from_ipv4_word(read(&raw const (*context).local_ip4)),
                Address::from_ipv4_word(read(&raw const (*context).remote_ip4)),
            )
        } else {
            // An IPv4 connection of an `AF_INET6` socket has IPv4-mapped addresses here.
            (
                read_words(&raw const (*context).local_ip6),
                read_words(&raw const (*context).remote_ip6),
            )
        };
        // The local port is in host order, the remote one in network order in the upper half.
        let local_port = read(&raw const (*context).local_port) as u16;
        let remote_port = u32::from_be(read(&raw const (*context).remote_port)) as u16;
        ((local, local_port), (remote, remote_port))
    }
}

/// The server's and the client's end of a `sk_lookup` context, ports in host byte order.
#[inline(always)]
pub fn sk_lookup_ends(context: *mut bpf_sk_lookup) -> ((Address, u16), (Address, u16)) {
    // SAFETY: a valid context.
    unsafe {
        let (local, remote) = if read(&raw const (*context).family) == AF_INET {
            (
                Address::from_ipv4_word(read(&raw const (*context).local_ip4)),
                Address::from_ipv4_word(read(&raw const (*context).remote_ip4)),
            )
        } else {
            (
                read_words(&raw const (*context).local_ip6),
                read_words(&raw const (*context).remote_ip6),
            )
        };
        let local_port = read(&raw const (*context).local_port) as u16;
        let remote_port = u16::from_be(read(&raw const (*context).remote_port));
        ((local, local_port), (remote, remote_port))
    }
}

#[inline(always)]
fn flows() -> *mut aya_ebpf::cty::c_void {
    (&raw const FLOWS).cast_mut().cast()
}
