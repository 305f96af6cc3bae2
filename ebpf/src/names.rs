//! `getpeername(2)` and `getsockname(2)`, which also give `accept(2)` its address: the applications
//! see the addresses that they would see without a mesh.

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use weft_ebpf_abi::{Address, Flow, FlowRole};

use crate::{
    context::{
        flow, netns_cookie, set_user_address4, set_user_address6, set_user_port, sock_addr_socket,
        user_address4, user_address6,
    },
    maps::PODS,
};

/// These programs cannot refuse.
const DONE: i32 = 1;

/// The peer of an `AF_INET` socket.
#[inline(always)]
pub fn getpeername4(context: &SockAddrContext) -> i32 {
    let ctx = context.sock_addr;
    if let Some(peer) = peer(ctx)
        && peer.address.is_ipv4()
    {
        set_user_address4(ctx, &peer.address);
        set_user_port(ctx, peer.port);
    }
    DONE
}

/// The peer of an `AF_INET6` socket.
#[inline(always)]
pub fn getpeername6(context: &SockAddrContext) -> i32 {
    let ctx = context.sock_addr;
    if let Some(peer) = peer(ctx) {
        set_user_address6(ctx, &peer.address);
        set_user_port(ctx, peer.port);
    }
    DONE
}

/// The own address of a redirected `AF_INET` socket is the pod's, not the loopback's.
#[inline(always)]
pub fn getsockname4(context: &SockAddrContext) -> i32 {
    let ctx = context.sock_addr;
    if let Some(address) = source(ctx, &user_address4(ctx)) {
        set_user_address4(ctx, &address);
    }
    DONE
}

/// The own address of a redirected `AF_INET6` socket.
#[inline(always)]
pub fn getsockname6(context: &SockAddrContext) -> i32 {
    let ctx = context.sock_addr;
    if let Some(address) = source(ctx, &user_address6(ctx)) {
        set_user_address6(ctx, &address);
    }
    DONE
}

#[inline(always)]
fn peer(ctx: *mut bpf_sock_addr) -> Option<Flow> {
    let flow = flow(sock_addr_socket(ctx).cast());
    if flow.is_null() {
        return None;
    }
    // SAFETY: checked.
    let flow = unsafe { *flow };
    (flow.role == FlowRole::Redirected as u16 || flow.role == FlowRole::Delivered as u16)
        .then_some(flow)
}

/// What to show instead of a loopback source that only redirection brought about.
#[inline(always)]
fn source(ctx: *mut bpf_sock_addr, local: &Address) -> Option<Address> {
    if !local.is_loopback() {
        return None;
    }
    let flow = flow(sock_addr_socket(ctx).cast());
    // SAFETY: checked.
    if flow.is_null() || unsafe { (*flow).role } != FlowRole::Redirected as u16 {
        return None;
    }
    // SAFETY: read at once.
    let pod = unsafe { PODS.get(netns_cookie(ctx.cast())) }?;
    let address = if local.is_ipv4() {
        pod.primary_v4
    } else {
        pod.primary_v6
    };
    (!address.is_unspecified()).then_some(address)
}
