//! What a peer may ask of a tunnel: any authority, port and headers are read or refused, and what is
//! accepted names the very address that the peer connected to.
#![no_main]

use std::net::{IpAddr, SocketAddr};

use http::{HeaderValue, Method, Request, Uri};
use libfuzzer_sys::fuzz_target;
use weft_agent::proxy::tunnel::wire::{
    OPAQUE_SERVICE, REFUSAL, SOURCE_PORT, parse_authority, parse_port, read_reason, read_request,
};

fuzz_target!(|input: (&str, bool, Vec<&[u8]>)| {
    let (text, ours, values) = input;
    let _ = parse_port(text);
    if let Ok((address, port)) = parse_authority(text) {
        // What is read is canonical already: reading it again changes nothing.
        let socket = SocketAddr::from((address, port.get()));
        assert_eq!(parse_authority(&socket.to_string()), Ok((address, port)));
    }
    let Ok(uri) = Uri::builder().authority(text).build() else {
        return;
    };
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    for value in &values {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(SOURCE_PORT, value.clone());
            headers.append(OPAQUE_SERVICE, value.clone());
            headers.append(REFUSAL, value);
        }
    }
    if let Some(reason) = read_reason(headers) {
        assert!(reason.len() <= 40);
        assert!(
            reason
                .bytes()
                .all(|it| it == b'_' || it.is_ascii_lowercase())
        );
    }
    let (head, ()) = request.into_parts();
    for connected in ["10.1.2.3", "fd00::1"] {
        let connected: IpAddr = connected.parse().expect("an address");
        if let Ok(flow) = read_request(&head, connected, ours) {
            let asked = parse_authority(text).expect("it was read before");
            assert_eq!(asked, (connected, flow.port));
            assert!(ours || flow.source_port.is_none());
            assert!(ours || flow.opaque_by.is_none());
        }
    }
});
