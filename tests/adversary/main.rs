//! What somebody who means harm can do to a mesh, done to this one: the shipped programs, on the real
//! kernel, with pods that have `NET_ADMIN` and `NET_RAW` as the attackers.
//!
//! Each attack is one function. Its comment says what is tried and what must hold; `docs/security.md`
//! refers to them by name. After each, [`stage::Stage::unharmed`] checks what must hold after any:
//! who may reach the target still does, nobody else has, no identity but the true one was seen, and the
//! agents are the processes that they were. An attack that could not succeed against anything would
//! prove nothing, so each has a control beside it: the same with permission, or without a mesh.
//!
//! `WEFT_ONLY=<text>` runs the attacks whose name contains the text.

mod control;
mod descriptors;
mod exhaustion;
mod flood;
mod http2;
mod http_client;
mod http_peer;
mod http_server;
mod namespaces;
mod peer;
mod ports;
mod reuse;
mod slow;
mod sockets;
mod spoof;
mod stage;

use anyhow::Result;
use stage::Stage;
use weft_tests::Checks;

/// An attack.
type Attack = fn(&Stage) -> Result<()>;

/// Runs attacks on one cluster, each followed by the check that nobody was harmed.
fn attacks(name: &str, stage: &Stage, attacks: &[(&str, Attack)]) {
    let mut checks = Checks::new(name);
    for (what, attack) in attacks {
        checks.check(what, || {
            attack(stage)?;
            stage.unharmed()
        });
    }
    checks.finish();
}

/// A pod attacks its neighbours, on its node and on the other.
#[test]
fn hostile_pod() {
    let stage = Stage::build(&[]).expect("a cluster");
    attacks(
        "hostile_pod",
        &stage,
        &[
            ("simply connecting", sockets::plainly),
            ("a source that is another's, by bind", spoof::transparent),
            ("forged packets", spoof::forged_packets),
            ("loopback addresses from outside", spoof::loopback),
            (
                "the target's own address, on the attacker",
                spoof::taken_address,
            ),
            ("a nested network namespace", namespaces::nested),
            (
                "a nested one with the friend's address",
                namespaces::nested_as_friend,
            ),
            ("a new user namespace", namespaces::user),
            ("control groups of its own", namespaces::cgroups),
            ("its own network broken", namespaces::sabotage),
            ("an accomplice at the stand-ins", namespaces::accomplice),
            ("MPTCP", sockets::mptcp),
            ("Fast Open", sockets::fast_open),
            ("io_uring", sockets::ring),
            ("bound to devices and ports", sockets::bound),
            ("protocols that are not TCP", sockets::families),
            ("sockets passed between pods", descriptors::lent),
            ("a listener passed between pods", descriptors::lent_listener),
            ("the agent's ports, taken before", ports::taken_before),
            ("the agent's ports, taken after", ports::taken_after),
            ("the agent's listeners, from all sides", ports::agents_own),
            ("a dead pod's address", reuse::dead_pods_address),
            ("a dead agent's process id", reuse::dead_agents_pid),
        ],
    );
}

/// A pod opens and leaves as much as it can.
#[test]
fn flood() {
    let limits = [flood::FLOWS, flood::QUOTA].map(|it| it.to_string());
    let args = [
        "--max-flows-per-pod",
        &limits[0],
        "--pending-quota",
        &limits[1],
    ];
    let stage = Stage::build(&args).expect("a cluster");
    attacks(
        "flood",
        &stage,
        &[
            ("refused destinations", flood::refusals),
            ("half-open connects", flood::half_open),
            ("connections held", flood::held),
            ("forged SYNs to the target", flood::syns),
        ],
    );
}

/// Somebody holds another workload's valid certificate, or none.
#[test]
fn hostile_peer() {
    let stage = Stage::build(&[]).expect("a cluster");
    attacks(
        "hostile_peer",
        &stage,
        &[
            ("its own identity, and forged headers", peer::headers),
            ("another address than the connection's", peer::authorities),
            ("certificates of nobody", peer::certificates),
            ("weft/1 frames out of order", peer::frames),
            ("records of a byte", peer::tiny_records),
            ("frames of every size", peer::huge),
            ("never reading", peer::never_reading),
            ("connections left half-open", peer::half_open),
            ("tunnels without end", peer::tunnels),
            ("HTTP/2 out of order", peer::http2),
            ("frames of HTTP/2 without end", http2::floods),
            ("frames of HTTP/2 that are none", http2::broken),
            (
                "frames of HTTP/2 that are none, by pods",
                http2::broken_requests,
            ),
        ],
    );
}

/// Nothing is ever finished, on any listener.
#[test]
fn slow_loris() {
    let stage = Stage::build(&[]).expect("a cluster");
    attacks(
        "slow_loris",
        &stage,
        &[
            ("silence at port 15008", slow::tunnel_silent),
            ("a hello byte by byte", slow::tunnel_hello),
            ("nothing after the handshake", slow::tunnel_after),
            ("the agent's listeners inside a pod", slow::in_pod),
            ("the agent's admin port", slow::agent_admin),
            ("the controller's port", slow::controller),
            ("the controller's admin port", slow::controller_admin),
        ],
    );
}

/// Strangers come from everywhere, and a node has few places for handshakes.
#[test]
fn many_strangers() {
    let handshakes = slow::HANDSHAKES.to_string();
    let stage = Stage::build(&["--max-handshakes", &handshakes]).expect("a cluster");
    let attack: Attack = slow::many_addresses;
    attacks(
        "many_strangers",
        &stage,
        &[("silence from many addresses", attack)],
    );
}

/// A node's join token is stolen.
#[test]
fn stolen_token() {
    let stage = Stage::build(&[]).expect("a cluster");
    attacks(
        "stolen_token",
        &stage,
        &[
            ("certificates of other nodes' pods", control::certificates),
            ("requests that name others", control::requests),
            ("a hello in another node's name", control::hello),
            ("what other nodes are told", control::secrets),
            ("no token and wrong ones", control::no_token),
            ("connections without end", control::connections),
        ],
    );
}

/// Clients of HTTP that mean harm.
#[test]
fn hostile_http_client() {
    let stage = Stage::build(&http_client::LIMITS).expect("a cluster");
    let mut checks = Checks::new("hostile_http_client");
    http_client::all(&stage, &mut checks);
    checks.finish();
}

/// A peer that speaks HTTP as no agent would pass it on.
#[test]
fn hostile_http_peer() {
    let stage = Stage::build(&[]).expect("a cluster");
    let mut checks = Checks::new("hostile_http_peer");
    http_peer::all(&stage, &mut checks);
    checks.finish();
}

/// Servers of HTTP that mean harm.
#[test]
fn hostile_http_server() {
    let stage = Stage::build(&http_client::LIMITS).expect("a cluster");
    let mut checks = Checks::new("hostile_http_server");
    http_server::all(&stage, &mut checks);
    checks.finish();
}

/// The agent has no more of something.
#[test]
fn exhaustion() {
    let stage = Stage::build(&[]).expect("a cluster");
    attacks(
        "exhaustion",
        &stage,
        &[
            ("no descriptors left", exhaustion::descriptors),
            ("the last descriptors, shared out", exhaustion::shares),
            ("bytes that nobody reads", exhaustion::memory),
        ],
    );
}
