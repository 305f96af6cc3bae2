//! The life of a connection that is being opened: `TCP_CONNECT_CB` comes before the SYN and has the
//! local port; `PASSIVE_ESTABLISHED_CB` comes on the accepted socket before `accept` can return it;
//! `STATE_CB` clears what failed.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock, bpf_sock_ops,
    },
    helpers::generated::{bpf_get_socket_cookie, bpf_skc_to_mptcp_sock, bpf_sock_ops_cb_flags_set},
    programs::SockOpsContext,
};
use weft_ebpf_abi::{
    Address, Flow, FlowRole, Pending, PendingKind, REFUSING_V4, REFUSING_V6, Reason, SPARE,
    TupleKey, is_target,
};

use crate::{
    connect::is_own,
    context::{
        flow, is_agents, netns_cookie, read_field, set_flow, sock_ops_ends, sock_ops_socket,
    },
    log::decided,
    maps::{HAS_MPTCP, PENDING, PODS, count},
    pending,
};

/// The return value has no meaning for the callbacks used here.
const DONE: u32 = 1;
/// `TCP_CLOSE`.
const CLOSED: u32 = 7;

/// The program for pods and for the agent.
#[inline(always)]
pub fn sock_ops(context: &SockOpsContext) -> u32 {
    let ctx = context.ops;
    match operation(ctx) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ctx),
        BPF_SOCK_OPS_STATE_CB if is_closing(ctx) => {
            closed(ctx, netns_cookie(ctx.cast()));
        }
        _ => {}
    }
    DONE
}

/// Which callback it is.
#[inline(always)]
pub fn operation(ctx: *mut bpf_sock_ops) -> u32 {
    read_field!(ctx, bpf_sock_ops, op)
}

/// Whether a `STATE_CB` says that the socket is closed now.
#[inline(always)]
pub fn is_closing(ctx: *mut bpf_sock_ops) -> bool {
    // The second argument is the new state.
    read_field!(ctx, bpf_sock_ops, __bindgen_anon_1.args, 1) == CLOSED
}

/// Publishes the tuple of a connecting socket and asks to be told when it closes.
#[inline(always)]
pub fn publish(
    ctx: *mut bpf_sock_ops,
    cookie: u64,
    kind: PendingKind,
    address: Address,
    port: u16,
) {
    let ((client, client_port), (server, server_port)) = sock_ops_ends(ctx);
    let key = TupleKey {
        cookie,
        client,
        server,
        client_port,
        server_port,
        spare: SPARE,
    };
    let value = Pending {
        // SAFETY: a valid context.
        owner: unsafe { bpf_get_socket_cookie(ctx.cast()) },
        address,
        port,
        kind: kind as u16,
        spare: SPARE,
    };
    pending::publish(&key, &value);
    // Others' flags stay.
    let flags = read_field!(ctx, bpf_sock_ops, bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
    // SAFETY: a valid context.
    let _ = unsafe { bpf_sock_ops_cb_flags_set(ctx, flags as i32) };
}

/// Clears what a socket published, if it still is there and still is its own.
#[inline(always)]
pub fn closed(ctx: *mut bpf_sock_ops, cookie: u64) {
    let ((client, client_port), (server, server_port)) = sock_ops_ends(ctx);
    let key = TupleKey {
        cookie,
        client,
        server,
        client_port,
        server_port,
        spare: SPARE,
    };
    // SAFETY: read at once.
    let Some(found) = (unsafe { PENDING.get(key) }) else {
        return;
    };
    // SAFETY: a valid context.
    if found.owner == unsafe { bpf_get_socket_cookie(ctx.cast()) } {
        pending::remove(&key, found.kind);
    }
}

#[inline(always)]
fn connecting(ctx: *mut bpf_sock_ops) {
    let socket = sock_ops_socket(ctx);
    if socket.is_null() {
        return;
    }
    let cookie = netns_cookie(ctx.cast());
    let known = flow(socket.cast());
    if !known.is_null() {
        // SAFETY: checked.
        let flow = unsafe { *known };
        if flow.role == FlowRole::Redirected as u16 {
            tell_mptcp(socket, flow);
            return publish(ctx, cookie, PendingKind::Redirect, flow.address, flow.port);
        }
        if flow.role == FlowRole::AgentDeliver as u16 {
            return publish(ctx, cookie, PendingKind::Deliver, flow.address, flow.port);
        }
    }
    if PODS.get_ptr(cookie).is_some() && !is_agents(socket.cast()) {
        connecting_unknown(ctx, cookie);
    }
}

/// What connects, and what the hooks see, is a subflow. The socket that the application asks for
/// its peer is another one, which must know as well.
#[inline(always)]
fn tell_mptcp(subflow: *mut bpf_sock, flow: Flow) {
    if HAS_MPTCP.load() == 0 {
        return;
    }
    // SAFETY: the verifier knows the socket.
    let connection: *mut c_void = unsafe { bpf_skc_to_mptcp_sock(subflow.cast()).cast() };
    if !connection.is_null() && !set_flow(connection, flow) {
        count(Reason::Mptcp);
    }
}

/// A connect of a meshed pod that was left alone. To the pod itself, or to an address that looks
/// like a redirect's target, it would be stopped at the lookup unless it is published.
#[inline(always)]
fn connecting_unknown(ctx: *mut bpf_sock_ops, cookie: u64) {
    let (_, (server, port)) = sock_ops_ends(ctx);
    let refusing = (server.same(&REFUSING_V4.address) && port == REFUSING_V4.port)
        || (server.same(&REFUSING_V6.address) && port == REFUSING_V6.port);
    if !refusing && (is_target(&server, port) || is_own(cookie, server)) {
        publish(ctx, cookie, PendingKind::SelfConnect, server, port);
    }
}

#[inline(always)]
fn accepted(ctx: *mut bpf_sock_ops) {
    let socket = sock_ops_socket(ctx);
    if socket.is_null() {
        return;
    }
    let ((server, server_port), (client, client_port)) = sock_ops_ends(ctx);
    let cookie = netns_cookie(ctx.cast());
    let key = TupleKey {
        cookie,
        client,
        server,
        client_port,
        server_port,
        spare: SPARE,
    };
    // SAFETY: copied at once. That the copy is this tuple's is known when it can be taken out.
    let Some(found) = (unsafe { PENDING.get(key) }) else {
        return;
    };
    let found = *found;
    if !pending::remove(&key, found.kind) {
        return;
    }
    let role = if found.kind == PendingKind::Redirect as u16 {
        FlowRole::Accepted
    } else if found.kind == PendingKind::Deliver as u16 {
        FlowRole::Delivered
    } else {
        return;
    };
    decided!("connection accepted", cookie, &found.address, found.port);
    let kept = set_flow(
        socket.cast(),
        Flow {
            cookie: 0,
            address: found.address,
            port: found.port,
            role: role as u16,
            spare: SPARE,
        },
    );
    if !kept {
        // The agent finds an accepted socket without a destination and rejects it.
        count(Reason::AcceptedStorage);
    }
}
