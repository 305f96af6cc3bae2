//! What an agent may send to be signed: any bytes are signed for the identity that the controller
//! chose and no other, or refused.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use weft_agent::identity::peer_identity;
use weft_controller::authority::Authority;
use weft_controller::problems::Problems;
use weft_core::Identity;

static AUTHORITY: LazyLock<(Authority, TempDir)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let domain = "cluster.local".parse().expect("a trust domain");
    let day = Duration::from_secs(24 * 3600);
    let path = folder.path().join("ca");
    let authority = Authority::open(path, domain, day, Problems::default()).expect("a root");
    (authority, folder)
});

fuzz_target!(|bytes: &[u8]| {
    let identity: Identity = "spiffe://cluster.local/ns/shop/sa/web"
        .parse()
        .expect("an identity");
    if let Ok(signed) = AUTHORITY.0.sign(bytes, &identity) {
        let named = peer_identity(&signed.chain).expect("an identity");
        assert_eq!(named, identity);
    }
});
