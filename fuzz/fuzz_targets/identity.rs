//! Names and identities: what a certificate's URI, a manifest or a message may hold.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls_pki_types::CertificateDer;
use weft_core::{Identity, Name, ObjectName};

fuzz_target!(|bytes: &[u8]| {
    let _ = weft_agent::identity::peer_identity(&[CertificateDer::from(bytes)]);
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(identity) = text.parse::<Identity>() {
        assert_eq!(identity.to_string(), text);
    }
    let _ = text.parse::<Name>();
    let _ = text.parse::<ObjectName>();
});
