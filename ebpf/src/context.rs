//! Reading and writing the kernel's context structures. The verifier allows only accesses of the
//! size of a field at a constant offset. A volatile access is not enough: the compiler makes one of
//! two in the arms of a branch, with a computed address. So every access is one instruction of
//! assembly.

use core::{arch::asm, ffi::c_void, mem::offset_of};

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops},
    helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get},
};
use weft_ebpf_abi::{Address, Flow};

use crate::maps::{FLOWS, OWN_SOCKETS};

/// `AF_INET`.
pub const AF_INET: u32 = 2;
/// `AF_INET6`.
pub const AF_INET6: u32 = 10;
/// `SOCK_STREAM`.
pub const SOCK_STREAM: u32 = 1;

/// Reads the `u32` at an offset of a context or socket.
#[inline(always)]
pub fn read32<const OFFSET: usize, T>(from: *const T) -> u32 {
    let value: u64;
    // SAFETY: callers pass valid structures and offsets of fields of that size, as the verifier
    // checks.
    unsafe {
        asm!(
            "{value} = *(u32 *)({from} + {offset})",
            value = out(reg) value,
            from = in(reg) from,
            offset = const OFFSET,
        );
    }
    value as u32
}

/// Reads the `u16` at an offset of a context.
#[inline(always)]
pub fn read16<const OFFSET: usize, T>(from: *const T) -> u16 {
    let value: u64;
    // SAFETY: as for `read32`.
    unsafe {
        asm!(
            "{value} = *(u16 *)({from} + {offset})",
            value = out(reg) value,
            from = in(reg) from,
            offset = const OFFSET,
        );
    }
    value as u16
}

/// Reads the socket at an offset of a context.
#[inline(always)]
fn read_socket<const OFFSET: usize, T>(from: *const T) -> *mut bpf_sock {
    let value: *mut bpf_sock;
    // SAFETY: as for `read32`.
    unsafe {
        asm!(
            "{value} = *(u64 *)({from} + {offset})",
            value = out(reg) value,
            from = in(reg) from,
            offset = const OFFSET,
        );
    }
    value
}

/// Writes the `u32` at an offset of a context.
#[inline(always)]
pub fn write32<const OFFSET: usize, T>(to: *mut T, value: u32) {
    // SAFETY: as for `read32`.
    unsafe {
        asm!(
            "*(u32 *)({to} + {offset}) = {value}",
            to = in(reg) to,
            value = in(reg) u64::from(value),
            offset = const OFFSET,
        );
    }
}

/// Reads one `u32` field, or word of a field.
macro_rules! read_field {
    ($context:expr, $type:ty, $($field:tt).+) => {
        $crate::context::read32::<{ core::mem::offset_of!($type, $($field).+) }, $type>($context)
    };
    ($context:expr, $type:ty, $($field:tt).+, $word:literal) => {
        $crate::context::read32::<{ core::mem::offset_of!($type, $($field).+) + 4 * $word }, $type>($context)
    };
}

/// Reads an IPv6 field.
macro_rules! read_address {
    ($context:expr, $type:ty, $field:ident) => {
        weft_ebpf_abi::Address::from_words([
            $crate::context::read_field!($context, $type, $field, 0),
            $crate::context::read_field!($context, $type, $field, 1),
            $crate::context::read_field!($context, $type, $field, 2),
            $crate::context::read_field!($context, $type, $field, 3),
        ])
    };
}

/// Writes one `u32` field, or word of a field.
macro_rules! write_field {
    ($context:expr, $type:ty, $field:ident, $value:expr) => {
        $crate::context::write32::<{ core::mem::offset_of!($type, $field) }, $type>(
            $context, $value,
        )
    };
    ($context:expr, $type:ty, $field:ident, $word:literal, $value:expr) => {
        $crate::context::write32::<{ core::mem::offset_of!($type, $field) + 4 * $word }, $type>(
            $context, $value,
        )
    };
}

pub(crate) use {read_address, read_field};

/// The destination of a connect, or the address of a name, of an `AF_INET` socket.
#[inline(always)]
pub fn user_address4(context: *mut bpf_sock_addr) -> Address {
    Address::from_ipv4_word(read_field!(context, bpf_sock_addr, user_ip4))
}

/// The same of an `AF_INET6` socket.
#[inline(always)]
pub fn user_address6(context: *mut bpf_sock_addr) -> Address {
    read_address!(context, bpf_sock_addr, user_ip6)
}

/// Sets it, for an `AF_INET` socket.
#[inline(always)]
pub fn set_user_address4(context: *mut bpf_sock_addr, address: &Address) {
    write_field!(context, bpf_sock_addr, user_ip4, address.ipv4_word());
}

/// Sets it, for an `AF_INET6` socket.
#[inline(always)]
pub fn set_user_address6(context: *mut bpf_sock_addr, address: &Address) {
    let [first, second, third, fourth] = address.words();
    write_field!(context, bpf_sock_addr, user_ip6, 0, first);
    write_field!(context, bpf_sock_addr, user_ip6, 1, second);
    write_field!(context, bpf_sock_addr, user_ip6, 2, third);
    write_field!(context, bpf_sock_addr, user_ip6, 3, fourth);
}

/// The port that goes with it, in host byte order.
#[inline(always)]
pub fn user_port(context: *mut bpf_sock_addr) -> u16 {
    u16::from_be(read_field!(context, bpf_sock_addr, user_port) as u16)
}

/// Sets it.
#[inline(always)]
pub fn set_user_port(context: *mut bpf_sock_addr, port: u16) {
    write_field!(context, bpf_sock_addr, user_port, u32::from(port.to_be()));
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
    read_socket::<{ offset_of!(bpf_sock_addr, __bindgen_anon_1) }, _>(context)
}

/// The socket of a `sock_ops` program; may be null.
#[inline(always)]
pub fn sock_ops_socket(context: *mut bpf_sock_ops) -> *mut bpf_sock {
    read_socket::<{ offset_of!(bpf_sock_ops, __bindgen_anon_2) }, _>(context)
}

/// What is known of a socket; null if nothing.
#[inline(always)]
pub fn flow(socket: *mut c_void) -> *mut Flow {
    // SAFETY: the verifier checks that it is a socket.
    unsafe { bpf_sk_storage_get(flows(), socket.cast(), core::ptr::null_mut(), 0).cast() }
}

/// Whether it is a socket of an agent, of whichever layout, to be left alone.
#[inline(always)]
pub fn is_agents(socket: *mut c_void) -> bool {
    let own = (&raw const OWN_SOCKETS).cast_mut().cast();
    // SAFETY: as above.
    let mark = unsafe { bpf_sk_storage_get(own, socket.cast(), core::ptr::null_mut(), 0) };
    !mark.is_null()
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
    let (local, remote) = if read_field!(context, bpf_sock_ops, family) == AF_INET {
        (
            Address::from_ipv4_word(read_field!(context, bpf_sock_ops, local_ip4)),
            Address::from_ipv4_word(read_field!(context, bpf_sock_ops, remote_ip4)),
        )
    } else {
        // An IPv4 connection of an `AF_INET6` socket has IPv4-mapped addresses here.
        (
            read_address!(context, bpf_sock_ops, local_ip6),
            read_address!(context, bpf_sock_ops, remote_ip6),
        )
    };
    // The local port is in host order, the remote one in network order in the upper half.
    let local_port = read_field!(context, bpf_sock_ops, local_port) as u16;
    let remote_port = u32::from_be(read_field!(context, bpf_sock_ops, remote_port)) as u16;
    ((local, local_port), (remote, remote_port))
}

/// The server's and the client's end of a `sk_lookup` context, ports in host byte order.
#[inline(always)]
pub fn sk_lookup_ends(context: *mut bpf_sk_lookup) -> ((Address, u16), (Address, u16)) {
    let (local, remote) = if read_field!(context, bpf_sk_lookup, family) == AF_INET {
        (
            Address::from_ipv4_word(read_field!(context, bpf_sk_lookup, local_ip4)),
            Address::from_ipv4_word(read_field!(context, bpf_sk_lookup, remote_ip4)),
        )
    } else {
        (
            read_address!(context, bpf_sk_lookup, local_ip6),
            read_address!(context, bpf_sk_lookup, remote_ip6),
        )
    };
    let local_port = read_field!(context, bpf_sk_lookup, local_port) as u16;
    let remote_port = read16::<{ offset_of!(bpf_sk_lookup, remote_port) }, _>(context);
    ((local, local_port), (remote, u16::from_be(remote_port)))
}

#[inline(always)]
fn flows() -> *mut aya_ebpf::cty::c_void {
    (&raw const FLOWS).cast_mut().cast()
}
