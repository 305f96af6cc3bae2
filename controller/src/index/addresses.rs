//! Which addresses an object may have, and how many.

use std::net::IpAddr;

use crate::objects::Fault;

/// An object with more addresses than this is a mistake, or an attack on everybody who must know
/// them: each family has one, and a few more where networks are attached.
pub(super) const MAX_ADDRESSES: usize = 16;

/// Refuses more addresses than an object can sensibly have.
pub(super) fn few(field: &str, count: usize) -> Result<(), Fault> {
    if count <= MAX_ADDRESSES {
        return Ok(());
    }
    let reason = format!("{count} addresses, more than {MAX_ADDRESSES}");
    Err(Fault::new(field, reason))
}

/// Reads an address that may be a workload's or a service's. Loopback and the like would redirect
/// what is not the mesh's.
pub(super) fn address(field: &str, text: &str) -> Result<IpAddr, Fault> {
    let refuse = |reason: &str| {
        let shown: String = text.chars().take(64).collect();
        Err(Fault::new(field, format!("{shown:?} {reason}")))
    };
    let Ok(address) = text.parse::<IpAddr>() else {
        return refuse("is no IP address");
    };
    let address = address.to_canonical();
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_loopback() || address.is_unspecified() || address.is_multicast() || link_local {
        return refuse(
            "can be no pod's or service's: loopback, unspecified, multicast, link-local",
        );
    }
    Ok(address)
}
