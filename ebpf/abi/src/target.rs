//! Where a redirected connect is sent instead: a loopback address and port picked by a hash of the
//! destination. The listener behind is one; many targets exist only so that local ports and
//! `TIME_WAIT` of different destinations do not get into each other's way.
//!
//! The port of a target is taken for as long as a connection to it is open: another socket of the
//! pod cannot listen on it, and the kernel does not choose it as a local port. So IPv4, with 16
//! million addresses, has one port that nobody uses, and IPv6, which has one address, the last
//! thousand.
//!
//! The targets are a range of their own, apart from what applications use, so that a SYN to this
//! range that nobody published can be refused: it is a redirected connect whose publication failed,
//! and must not reach an application that listens on all addresses.

use crate::Address;

/// A loopback address and port (host byte order) that stands in for a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The loopback address.
    pub address: Address,
    /// The port.
    pub port: u16,
}

impl Target {
    /// Another target if the port is the one that the connecting socket is bound to: on `::1` the
    /// socket would connect to itself.
    #[inline(always)]
    pub const fn apart_from(self, local_port: u16) -> Self {
        if self.address.is_ipv4() || self.port != local_port {
            return self;
        }
        let next = self.port + 1;
        let port = if next < REFUSING_V6.port {
            next
        } else {
            FIRST_TARGET_PORT_V6
        };
        Self {
            address: self.address,
            port,
        }
    }
}

/// A connect to here is refused at once: it is in the target range and nothing ever publishes it.
/// No destination hashes to it.
pub const REFUSING_V4: Target = Target {
    address: Address::from_ipv4_word(u32::from_ne_bytes([127, 255, 255, 254])),
    port: TARGET_PORT_V4,
};
/// The IPv6 counterpart of [`REFUSING_V4`].
pub const REFUSING_V6: Target = Target {
    address: LOCALHOST_V6,
    port: u16::MAX,
};

/// The target that refuses, in the family of the destination.
#[inline(always)]
pub const fn refusing(destination: &Address) -> Target {
    if destination.is_ipv4() {
        REFUSING_V4
    } else {
        REFUSING_V6
    }
}

/// The stand-in for a destination: `127.1.0.0` to `127.254.255.255` with one port for IPv4, `::1`
/// with one of a thousand ports for IPv6.
#[inline(always)]
pub const fn target(destination: &Address, port: u16) -> Target {
    let hash = hash(destination, port);
    if destination.is_ipv4() {
        let bytes = hash.to_ne_bytes();
        let second = 1 + (hash >> 32) as u32 % 254;
        Target {
            address: Address::from_ipv4_word(u32::from_ne_bytes([
                127,
                second as u8,
                bytes[0],
                bytes[1],
            ])),
            port: TARGET_PORT_V4,
        }
    } else {
        let span = (REFUSING_V6.port - FIRST_TARGET_PORT_V6) as u32;
        Target {
            address: LOCALHOST_V6,
            port: FIRST_TARGET_PORT_V6 + ((hash >> 32) as u32 % span) as u16,
        }
    }
}

/// Whether an address and port lie in the range of targets, where an unpublished SYN is refused.
#[inline(always)]
pub const fn is_target(address: &Address, port: u16) -> bool {
    if !address.is_loopback() {
        return false;
    }
    if address.is_ipv4() {
        port == TARGET_PORT_V4 && address.ipv4_word().to_ne_bytes()[1] != 0
    } else {
        port >= FIRST_TARGET_PORT_V6
    }
}

/// Multiply-and-fold over the words; only the spread matters, collisions are harmless.
#[inline(always)]
const fn hash(address: &Address, port: u16) -> u64 {
    let words = address.words();
    let mut hash = 0x9e37_79b9_7f4a_7c15u64 ^ port as u64;
    hash = mix(hash ^ ((words[0] as u64) << 32 | words[1] as u64));
    mix(hash ^ ((words[2] as u64) << 32 | words[3] as u64))
}

#[inline(always)]
const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let value = (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    value ^ (value >> 32)
}

const LOCALHOST_V6: Address = Address::from_words([0, 0, 0, 1u32.to_be()]);
/// Not assigned to anything by IANA, and below what the kernel and unprivileged processes use.
const TARGET_PORT_V4: u16 = 4;
/// Above the default range of local ports; 1024 with the one that refuses.
const FIRST_TARGET_PORT_V6: u16 = 64512;

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use std::collections::HashSet;

    use super::*;

    fn v4(n: u32) -> Address {
        Address::from(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n)))
    }

    fn v6(n: u128) -> Address {
        Address::from(IpAddr::V6(Ipv6Addr::from((0x2001_0db8 << 96) + n)))
    }

    #[test]
    fn every_target_lies_in_the_range_and_none_refuses() {
        for n in 0..20_000 {
            for destination in [v4(n), v6(u128::from(n))] {
                for port in [1, 80, 443, 8080, 65535] {
                    let chosen = target(&destination, port);
                    assert!(is_target(&chosen.address, chosen.port), "{destination:?}");
                    assert!(chosen.address.is_loopback());
                    assert_eq!(chosen.address.is_ipv4(), destination.is_ipv4());
                    assert_ne!(chosen, refusing(&destination));
                    if destination.is_ipv4() {
                        let IpAddr::V4(address) = chosen.address.into() else {
                            panic!()
                        };
                        assert!((1..=254).contains(&address.octets()[1]), "{address}");
                    }
                }
            }
        }
    }

    #[test]
    fn no_socket_connects_to_itself() {
        let first = Target {
            address: LOCALHOST_V6,
            port: FIRST_TARGET_PORT_V6,
        };
        let last = Target {
            port: REFUSING_V6.port - 1,
            ..first
        };
        assert_eq!(first.apart_from(0), first);
        assert_eq!(first.apart_from(first.port).port, first.port + 1);
        assert_eq!(last.apart_from(last.port), first);
        let v4 = target(&v4(1), 80);
        assert_eq!(v4.apart_from(v4.port), v4);
    }

    #[test]
    fn spreads() {
        let seen: HashSet<_> = (0..10_000)
            .map(|n| target(&v4(n), 80))
            .map(|t| (t.address, t.port))
            .collect();
        assert!(seen.len() > 9_990, "{} of 10000", seen.len());
        let seen: HashSet<_> = (0..1000).map(|port| target(&v4(1), port).address).collect();
        assert!(seen.len() > 990, "{}", seen.len());
        let ports: HashSet<_> = (0..10_000).map(|n| target(&v6(n), 80).port).collect();
        assert_eq!(ports.len(), 1023);
    }

    #[test]
    fn what_applications_use_is_outside() {
        let table = [
            ("127.0.0.1", 4, false),
            ("127.0.0.53", 53, false),
            ("127.0.1.1", 4, false),
            ("127.1.0.1", 80, false),
            ("127.1.0.1", 4, true),
            ("127.255.255.254", 4, true),
            ("::1", 4, false),
            ("::1", 64_511, false),
            ("::1", 64_512, true),
            ("::1", 65_535, true),
            ("10.1.0.1", 4, false),
            ("2001:db8::1", 65_000, false),
        ];
        for (text, port, expected) in table {
            let address = Address::from(text.parse::<IpAddr>().unwrap());
            assert_eq!(is_target(&address, port), expected, "{text} {port}");
        }
        assert!(is_target(&REFUSING_V4.address, REFUSING_V4.port));
        assert!(is_target(&REFUSING_V6.address, REFUSING_V6.port));
    }
}
