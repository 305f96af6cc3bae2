//! What arrives at a meshed pod: to the application only what was published in this very namespace,
//! everything else to one of the agent's listeners, or nowhere.

use aya_ebpf::{
    bindings::{bpf_sk_lookup, sk_action::SK_DROP, sk_action::SK_PASS},
    programs::SkLookupContext,
};
use weft_ebpf_abi::{
    Address, ListenerKey, ListenerRole, PROTOCOL_TCP, PendingKind, Reason, SPARE, Stance,
    TUNNEL_PORT, TupleKey, is_target,
};

use crate::{
    connect::is_own,
    context::{read_field, sk_lookup_ends},
    log::decided,
    maps::{LISTENERS, NETNS_COOKIE, PENDING, PODS, count},
};

/// The program. For TCP, `SK_DROP` makes the kernel answer with a reset: the client is refused at
/// once.
#[inline(always)]
pub fn sk_lookup(context: &SkLookupContext) -> u32 {
    let ctx = context.lookup;
    if read_field!(ctx, bpf_sk_lookup, protocol) != PROTOCOL_TCP {
        return SK_PASS;
    }
    let cookie = NETNS_COOKIE.load();
    let ((server, server_port), (client, client_port)) = sk_lookup_ends(ctx);
    let key = TupleKey {
        cookie,
        client,
        server,
        client_port,
        server_port,
        spare: SPARE,
    };
    // SAFETY: read at once.
    if let Some(found) = unsafe { PENDING.get(key) } {
        decided!(
            "lookup of a published connection",
            cookie,
            &client,
            client_port
        );
        return if found.kind == PendingKind::Redirect as u16 {
            assign(context, cookie, ListenerRole::Outbound)
        } else {
            SK_PASS
        };
    }
    if server.is_loopback() {
        return to_loopback(cookie, &server, server_port, client);
    }
    if client.is_loopback() {
        // The agent's deliveries come from there: one that could not be published must not come
        // back to it.
        count(Reason::UnpublishedLoopback);
        return SK_DROP;
    }
    decided!(
        "lookup of an inbound connection",
        cookie,
        &client,
        client_port
    );
    let role = if server_port == TUNNEL_PORT {
        ListenerRole::Tunnel
    } else {
        ListenerRole::Plaintext
    };
    assign(context, cookie, role)
}

/// What the pod says to itself, as it always could, and nothing else: a namespace that is told to
/// (`route_localnet`) takes packets for its loopback from outside.
#[inline(always)]
fn to_loopback(cookie: u64, server: &Address, server_port: u16, client: Address) -> u32 {
    // Redirects that could not be published must not reach an application on all addresses.
    if is_target(server, server_port) {
        count(Reason::UnpublishedTarget);
        decided!(
            "lookup of an unpublished target",
            cookie,
            server,
            server_port
        );
        return SK_DROP;
    }
    // Who forges one of these from outside gets no answer: it stays in the pod.
    if client.is_loopback() || is_own(cookie, client) {
        return SK_PASS;
    }
    count(Reason::UnpublishedLoopback);
    SK_DROP
}

#[inline(always)]
fn assign(context: &SkLookupContext, cookie: u64, role: ListenerRole) -> u32 {
    let key = ListenerKey {
        cookie,
        role: role as u32,
        padding: 0,
    };
    match LISTENERS.redirect_sk_lookup(context, key, 0) {
        Ok(()) => SK_PASS,
        // The program of another layout, whose agent has the pod or had it until now, came first.
        Err(EXISTS) => SK_PASS,
        // The same, and this program comes first: the other one's socket counts.
        Err(NOT_FOUND) if is_aside(cookie) => SK_DROP,
        Err(error) => {
            count(if error == NOT_FOUND {
                Reason::NoListener
            } else {
                Reason::Assign
            });
            SK_DROP
        }
    }
}

#[inline(always)]
fn is_aside(cookie: u64) -> bool {
    // SAFETY: read at once.
    let pod = unsafe { PODS.get(cookie) };
    pod.is_some_and(|it| it.stance == Stance::Aside as u32)
}

const NOT_FOUND: i32 = -2;
const EXISTS: i32 = -17;
