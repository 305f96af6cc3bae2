//! `syn`: a TCP SYN with any source, also the destination itself, from a raw socket.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use clap::Args;
use socket2::{Domain, Protocol, Socket, Type};

/// Sends one SYN, or a row of them.
#[derive(Args)]
pub(crate) struct Syn {
    #[arg(long)]
    source: SocketAddr,
    #[arg(long)]
    destination: SocketAddr,
    /// How many, each from the next port.
    #[arg(long, default_value_t = 1)]
    count: u16,
}

impl Syn {
    pub(crate) fn run(mut self) -> Result<()> {
        let socket = Socket::new(
            Domain::for_address(self.destination),
            Type::RAW,
            Some(Protocol::from(libc::IPPROTO_RAW)),
        )?;
        if self.destination.is_ipv4() {
            socket.set_header_included_v4(true)?;
        } else {
            socket.set_header_included_v6(true)?;
        }
        // Raw sockets take no port.
        let target = SocketAddr::new(self.destination.ip(), 0);
        for _ in 0..self.count {
            socket.send_to(&self.packet()?, &target.into())?;
            self.source
                .set_port(self.source.port().wrapping_add(1).max(1));
        }
        Ok(())
    }

    fn packet(&self) -> Result<Vec<u8>> {
        let mut tcp = Vec::with_capacity(20);
        tcp.extend(self.source.port().to_be_bytes());
        tcp.extend(self.destination.port().to_be_bytes());
        tcp.extend(0x1234_5678_u32.to_be_bytes());
        tcp.extend(0_u32.to_be_bytes());
        tcp.extend([5 << 4, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
        let mut pseudo = Vec::new();
        let mut packet = Vec::new();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                pseudo.extend(source.octets());
                pseudo.extend(destination.octets());
                packet.extend([0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0]);
                packet.extend(&pseudo);
                let sum = checksum(&packet);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                pseudo.extend(source.octets());
                pseudo.extend(destination.octets());
                packet.extend([0x60, 0, 0, 0, 0, 20, 6, 64]);
                packet.extend(&pseudo);
            }
            _ => bail!("source and destination are of different families"),
        }
        pseudo.extend([0, 6, 0, 20]);
        pseudo.extend(&tcp);
        let sum = checksum(&pseudo);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        packet.extend(tcp);
        Ok(packet)
    }
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
