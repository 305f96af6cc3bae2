//! The kubelet's probes: connects from the agent's network namespace, by processes of the kubelet's
//! control group, to a port of a pod's probe specification. They are published, and so pass to the
//! application.

use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops},
    programs::SockOpsContext,
};
use weft_ebpf_abi::{Flow, FlowRole, PendingKind, ProbeKey, Reason, SPARE};

use crate::{
    context::{flow, netns_cookie, set_flow, sock_ops_ends, sock_ops_socket},
    maps::{HOST_NETNS_COOKIE, PROBES, count},
    sock_ops::{closed, is_closing, operation, publish},
};

/// The return value has no meaning for the callbacks used here.
const DONE: u32 = 1;

/// The program for the kubelet.
#[inline(always)]
pub fn sock_ops(context: &SockOpsContext) -> u32 {
    let ctx = context.ops;
    match operation(ctx) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_STATE_CB if is_closing(ctx) => closing(ctx),
        _ => {}
    }
    DONE
}

#[inline(always)]
fn connecting(ctx: *mut bpf_sock_ops) {
    if netns_cookie(ctx.cast()) != HOST_NETNS_COOKIE.load() {
        return;
    }
    let (_, (address, port)) = sock_ops_ends(ctx);
    // SAFETY: read at once.
    let Some(cookie) = (unsafe {
        PROBES.get(ProbeKey {
            address,
            port,
            padding: 0,
        })
    }) else {
        return;
    };
    let cookie = *cookie;
    let socket = sock_ops_socket(ctx);
    if socket.is_null() {
        return;
    }
    // The pod may be gone when the socket closes, so its cookie is kept here.
    let kept = set_flow(
        socket.cast(),
        Flow {
            cookie,
            address,
            port,
            role: FlowRole::Probe as u16,
            spare: SPARE,
        },
    );
    if !kept {
        count(Reason::Storage);
        return;
    }
    publish(ctx, cookie, PendingKind::Probe, address, port);
}

#[inline(always)]
fn closing(ctx: *mut bpf_sock_ops) {
    let socket = sock_ops_socket(ctx);
    if socket.is_null() {
        return;
    }
    let known = flow(socket.cast());
    // SAFETY: checked.
    if !known.is_null() && unsafe { (*known).role } == FlowRole::Probe as u16 {
        // SAFETY: as above.
        closed(ctx, unsafe { (*known).cookie });
    }
}
