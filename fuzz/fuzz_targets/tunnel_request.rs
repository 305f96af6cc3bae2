//! What a peer may ask of a tunnel: any authority and port text is read or refused.
#![no_main]

use std::net::SocketAddr;

use libfuzzer_sys::fuzz_target;
use weft_agent::proxy::tunnel::wire::{parse_authority, parse_port};

fuzz_target!(|text: &str| {
    let _ = parse_port(text);
    if let Ok((address, port)) = parse_authority(text) {
        // What is read is canonical already: reading it again changes nothing.
        let socket = SocketAddr::from((address, port.get()));
        assert_eq!(parse_authority(&socket.to_string()), Ok((address, port)));
    }
});
