//! `connect(2)` of meshed pods: TCP goes to a loopback address that stands in for the destination,
//! and the destination is kept with the socket. Everything else is left alone or refused.

use core::mem::size_of;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr, sockaddr},
    helpers::generated::{bpf_bind, bpf_ktime_get_ns, bpf_setsockopt},
    programs::SockAddrContext,
};
use weft_ebpf_abi::{
    Address, Direction, Flow, FlowRole, OwnAddressKey, PROTOCOL_MPTCP, PROTOCOL_TCP, Pod, Reason,
    RefusedKey, SPARE, Stance, Target, refusing, target,
};

use crate::{
    context::{
        AF_INET6, SOCK_STREAM, flow, is_agents, netns_cookie, read_address, read_field, set_flow,
        set_user_address4, set_user_address6, set_user_port, sock_addr_socket, user_address4,
        user_address6, user_port,
    },
    log::decided,
    maps::{OWN_ADDRESSES, POD_STATE, PODS, REFUSED, count},
    pending,
};

/// The kernel goes on.
const PROCEED: i32 = 1;
/// `connect` fails with `EPERM`.
const REFUSE: i32 = 0;

/// The program for `AF_INET` sockets.
#[inline(always)]
pub fn connect4(context: &SockAddrContext) -> i32 {
    let ctx = context.sock_addr;
    let destination = user_address4(ctx);
    match decide(ctx, destination) {
        Verdict::Untouched => PROCEED,
        Verdict::Refused => REFUSE,
        Verdict::To(target) => {
            set_user_address4(ctx, &target.address);
            set_user_port(ctx, target.port);
            PROCEED
        }
    }
}

/// The program for `AF_INET6` sockets, which may connect to IPv4-mapped addresses.
#[inline(always)]
pub fn connect6(context: &SockAddrContext) -> i32 {
    let ctx = context.sock_addr;
    let destination = user_address6(ctx);
    match decide(ctx, destination) {
        Verdict::Untouched => PROCEED,
        Verdict::Refused => REFUSE,
        Verdict::To(target) => {
            set_user_address6(ctx, &target.address);
            set_user_port(ctx, target.port);
            PROCEED
        }
    }
}

enum Verdict {
    Untouched,
    Refused,
    To(Target),
}

#[inline(always)]
fn decide(ctx: *mut bpf_sock_addr, destination: Address) -> Verdict {
    let cookie = netns_cookie(ctx.cast());
    // SAFETY: read at once; the agent replaces values as a whole.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        return Verdict::Untouched;
    };
    let kind = read_field!(ctx, bpf_sock_addr, type_);
    let protocol = read_field!(ctx, bpf_sock_addr, protocol);
    if protocol == PROTOCOL_MPTCP {
        // Multipath TCP connects by subflows, which are plain TCP here.
        count(Reason::Mptcp);
        return Verdict::Refused;
    }
    if kind != SOCK_STREAM || protocol != PROTOCOL_TCP {
        return Verdict::Untouched;
    }
    let socket = sock_addr_socket(ctx);
    let known = flow(socket.cast());
    if !known.is_null() {
        // SAFETY: checked; the storage lives as long as the socket.
        let role = unsafe { (*known).role };
        if role == FlowRole::AgentDeliver as u16 {
            return Verdict::Untouched;
        }
        // Whatever it was before, it is now about to be something else.
        // SAFETY: as above.
        unsafe { (*known).role = FlowRole::None as u16 };
    }
    if pod.stance == Stance::Aside as u32 || is_agents(socket.cast()) {
        return Verdict::Untouched;
    }
    if destination.is_loopback() || destination.is_unspecified() {
        return Verdict::Untouched;
    }
    if !pending::has_room(cookie, Direction::Outbound) {
        return Verdict::Refused;
    }
    if is_own(cookie, destination) {
        return Verdict::Untouched;
    }
    redirect(ctx, socket, cookie, pod, destination)
}

#[inline(always)]
fn redirect(
    ctx: *mut bpf_sock_addr,
    socket: *mut bpf_sock,
    cookie: u64,
    pod: &Pod,
    destination: Address,
) -> Verdict {
    if !unbind_device(ctx, socket) {
        count(Reason::BoundDevice);
        return Verdict::Refused;
    }
    let port = user_port(ctx);
    if refused_recently(cookie, destination, port) {
        count(Reason::RecentlyRefused);
        decided!("connect refused recently", cookie, &destination, port);
        return Verdict::To(refusing(&destination));
    }
    let kept = set_flow(
        socket.cast(),
        Flow {
            cookie: 0,
            address: destination,
            port,
            role: FlowRole::Redirected as u16,
            spare: SPARE,
        },
    );
    if !kept {
        count(Reason::Storage);
        return Verdict::Refused;
    }
    if !destination.is_ipv4() {
        bind_source(ctx, socket, pod);
    }
    count_redirected(cookie);
    decided!("connect redirected", cookie, &destination, port);
    let local_port = read_field!(socket, bpf_sock, src_port) as u16;
    Verdict::To(target(&destination, port).apart_from(local_port))
}

/// Whether an address is one of the pod's own.
#[inline(always)]
pub fn is_own(cookie: u64, address: Address) -> bool {
    OWN_ADDRESSES
        .get_ptr(OwnAddressKey { cookie, address })
        .is_some()
}

/// Whether the agent found the destination refusing a moment ago.
#[inline(always)]
fn refused_recently(cookie: u64, address: Address, port: u16) -> bool {
    let key = RefusedKey {
        cookie,
        address,
        port,
        padding: [0; 3],
    };
    // SAFETY: read at once; a recycled value is a time too.
    match unsafe { REFUSED.get(key) } {
        // SAFETY: no arguments.
        Some(until) => unsafe { bpf_ktime_get_ns() < *until },
        None => false,
    }
}

/// A socket that is bound to a device does not reach the loopback device. False if it stays bound:
/// the SYN would then leave the pod.
#[inline(always)]
fn unbind_device(ctx: *mut bpf_sock_addr, socket: *mut bpf_sock) -> bool {
    if read_field!(socket, bpf_sock, bound_dev_if) == 0 {
        return true;
    }
    let mut none = [0u8; 4];
    // SAFETY: the option's value is on this stack.
    let result = unsafe {
        bpf_setsockopt(
            ctx.cast(),
            SOL_SOCKET,
            SO_BINDTODEVICE,
            none.as_mut_ptr().cast(),
            size_of::<[u8; 4]>() as i32,
        )
    };
    result == 0
}

/// Gives an unbound IPv6 socket the pod's address as source. All IPv6 targets are on `::1`; from
/// there a socket could get its target's port as local port and connect to itself. That it fails
/// (an address that is gone) is no reason to refuse.
#[inline(always)]
fn bind_source(ctx: *mut bpf_sock_addr, socket: *mut bpf_sock, pod: &Pod) {
    if pod.primary_v6.is_unspecified() {
        return;
    }
    let source = read_address!(socket, bpf_sock, src_ip6);
    if !source.is_unspecified() {
        return;
    }
    let mut address = SockAddrIn6 {
        family: AF_INET6 as u16,
        port: 0,
        flow_info: 0,
        address: pod.primary_v6,
        scope: 0,
    };
    // SAFETY: the address is on this stack, and complete.
    let _ = unsafe {
        bpf_bind(
            ctx,
            (&raw mut address).cast::<sockaddr>(),
            size_of::<SockAddrIn6>() as i32,
        )
    };
}

#[inline(always)]
fn count_redirected(cookie: u64) {
    if let Some(state) = POD_STATE.get_ptr_mut(cookie) {
        // SAFETY: checked by the lookup.
        pending::add(unsafe { (&raw mut (*state).redirected).cast() }, 1);
    }
}

/// `struct sockaddr_in6`.
#[repr(C)]
struct SockAddrIn6 {
    family: u16,
    port: u16,
    flow_info: u32,
    address: Address,
    scope: u32,
}

const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
