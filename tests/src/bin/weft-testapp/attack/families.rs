//! `families`: protocols that a pod could use besides TCP and UDP, if the kernel has them.

use anyhow::Result;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::client::outcome;
use crate::emit;

/// Tries to make a socket of each.
pub(crate) fn run() -> Result<()> {
    for (name, domain, kind, protocol) in FAMILIES {
        let protocol = Some(Protocol::from(protocol));
        let (there, why) = match Socket::new(Domain::from(domain), kind, protocol) {
            Ok(_) => (true, "ok".to_owned()),
            Err(error) => (false, format!("{} ({error})", outcome(&error))),
        };
        emit(&json!({"event": "family", "name": name, "there": there, "why": why}));
    }
    Ok(())
}

const FAMILIES: [(&str, i32, Type, i32); 9] = [
    ("SCTP, one to one", libc::AF_INET, Type::STREAM, 132),
    ("SCTP, one to many", libc::AF_INET, Type::SEQPACKET, 132),
    ("SMC over IPv4", 43, Type::STREAM, 0),
    ("SMC over IPv6", 43, Type::STREAM, 1),
    ("DCCP", libc::AF_INET, Type::DCCP, 33),
    ("TIPC", 30, Type::STREAM, 0),
    ("RDS", 21, Type::SEQPACKET, 0),
    ("L2TP over IP", libc::AF_INET, Type::DGRAM, 115),
    ("vsock", libc::AF_VSOCK, Type::STREAM, 0),
];
