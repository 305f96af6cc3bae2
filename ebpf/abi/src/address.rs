//! One form for all addresses: 16 bytes in network order, IPv4 as IPv4-mapped IPv6. An IPv4
//! connection has the same key whether the application used an `AF_INET` or an `AF_INET6` socket.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IP address as four words in memory order, as the kernel's context structures hold them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address {
    words: [u32; 4],
}

impl Address {
    /// From the four words of a context structure (network byte order).
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// From the word of an IPv4 context field (network byte order).
    #[inline(always)]
    pub const fn from_ipv4_word(word: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, word],
        }
    }

    /// The words in memory order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// The IPv4 word in memory order; meaningless unless [`Self::is_ipv4`].
    #[inline(always)]
    pub const fn ipv4_word(&self) -> u32 {
        self.words[3]
    }

    /// Whether this stands for an IPv4 address.
    #[inline(always)]
    pub const fn is_ipv4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// 127.0.0.0/8 (also mapped) or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_ipv4() {
            return self.words[3].to_ne_bytes()[0] == 127;
        }
        self.words[0] == 0
            && self.words[1] == 0
            && self.words[2] == 0
            && self.words[3] == 1u32.to_be()
    }

    /// `0.0.0.0` (also mapped) or `::`, which the kernel takes as "this host" in a connect.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
            && self.words[3] == 0
    }

    /// Word by word: a comparison of arrays would become a call of `memcmp`.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.words[0] == other.words[0]
            && self.words[1] == other.words[1]
            && self.words[2] == other.words[2]
            && self.words[3] == other.words[3]
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let octets = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let word = |at: usize| {
            u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]])
        };
        Self {
            words: [word(0), word(4), word(8), word(12)],
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        if address.is_ipv4() {
            return Self::V4(Ipv4Addr::from(address.words[3].to_ne_bytes()));
        }
        let mut octets = [0; 16];
        for (at, word) in address.words.iter().enumerate() {
            octets[at * 4..at * 4 + 4].copy_from_slice(&word.to_ne_bytes());
        }
        Self::V6(Ipv6Addr::from(octets))
    }
}

const MAPPED: u32 = 0x0000_ffffu32.to_be();

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        Address::from(text.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn classifies() {
        let table = [
            // address, ipv4, loopback, unspecified
            ("10.1.2.3", true, false, false),
            ("127.0.0.1", true, true, false),
            ("127.255.255.255", true, true, false),
            ("126.255.255.255", true, false, false),
            ("128.0.0.1", true, false, false),
            ("0.0.0.0", true, false, true),
            ("::ffff:127.0.0.1", true, true, false),
            ("::ffff:0.0.0.0", true, false, true),
            ("::ffff:10.0.0.1", true, false, false),
            ("::", false, false, true),
            ("::1", false, true, false),
            ("::2", false, false, false),
            ("1::1", false, false, false),
            ("::1:0:1", false, false, false),
            // IPv4-compatible, not IPv4-mapped: the kernel treats these as IPv6.
            ("::127.0.0.1", false, false, false),
            ("fe80::1", false, false, false),
            ("2001:db8::7f00:1", false, false, false),
        ];
        for (text, ipv4, loopback, unspecified) in table {
            let address = address(text);
            assert_eq!(address.is_ipv4(), ipv4, "{text} ipv4");
            assert_eq!(address.is_loopback(), loopback, "{text} loopback");
            assert_eq!(address.is_unspecified(), unspecified, "{text} unspecified");
        }
    }

    #[test]
    fn mapped_and_plain_ipv4_are_one_key() {
        assert_eq!(address("10.1.2.3"), address("::ffff:10.1.2.3"));
        assert_eq!(
            address("10.1.2.3"),
            Address::from_ipv4_word(u32::from_ne_bytes([10, 1, 2, 3]))
        );
        assert!(address("10.1.2.3").same(&address("10.1.2.3")));
        assert!(!address("10.1.2.3").same(&address("10.1.2.4")));
    }

    #[test]
    fn converts_both_ways() {
        for text in [
            "10.1.2.3",
            "::1",
            "2001:db8::42",
            "::",
            "0.0.0.0",
            "fe80::1234",
        ] {
            let parsed: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(parsed)), parsed);
        }
    }
}
