//! The classic pcap file, Ethernet, IPv4 and IPv6, TCP and UDP: as much as searching needs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};

use super::find;

/// What carries a packet's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Anything else; addresses are unspecified where there are none.
    Other,
}

/// One captured packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// TCP, UDP or else.
    pub transport: Transport,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes to.
    pub destination: SocketAddr,
    /// The TCP sequence number.
    pub sequence: u32,
    /// TCP: it opens a connection, or answers that.
    pub syn: bool,
    /// TCP: it acknowledges something.
    pub ack: bool,
    /// TCP: it is a reset.
    pub rst: bool,
    /// How many routers it may still pass: the time to live, or the hop limit.
    pub hops: u8,
    /// What is behind the TCP or UDP header, as far as captured.
    pub payload: Vec<u8>,
    frame: Vec<u8>,
}

impl Packet {
    /// Whether these bytes are anywhere in the frame.
    pub fn contains(&self, needle: &[u8]) -> bool {
        find(&self.frame, needle).is_some()
    }

    fn other(frame: &[u8]) -> Packet {
        let nowhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        Packet {
            transport: Transport::Other,
            source: nowhere,
            destination: nowhere,
            sequence: 0,
            syn: false,
            ack: false,
            rst: false,
            hops: 0,
            payload: Vec::new(),
            frame: frame.to_vec(),
        }
    }
}

/// All packets of a file. A record cut at the end of the file is left out.
pub(super) fn read(bytes: &[u8]) -> Result<Vec<Packet>> {
    ensure!(bytes.len() >= FILE_HEADER, "too short for a capture");
    let magic = u32_at(bytes, 0);
    ensure!(
        magic == MICROSECONDS || magic == NANOSECONDS,
        "not a capture: {magic:08x}"
    );
    let link = u32_at(bytes, 20);
    ensure!(link == ETHERNET, "the link type {link} is not Ethernet");
    let mut packets = Vec::new();
    let mut at = FILE_HEADER;
    while at + RECORD_HEADER <= bytes.len() {
        let captured = u32_at(bytes, at + 8) as usize;
        let start = at + RECORD_HEADER;
        let Some(frame) = bytes.get(start..start + captured) else {
            break;
        };
        packets.push(parse(frame).unwrap_or_else(|| Packet::other(frame)));
        at = start + captured;
    }
    Ok(packets)
}

fn parse(frame: &[u8]) -> Option<Packet> {
    let (kind, rest) = (u16_be(frame, 12)?, frame.get(14..)?);
    let (protocol, hops, source, destination, segment): (u8, u8, IpAddr, IpAddr, &[u8]) = match kind
    {
        0x0800 => {
            let header = usize::from(rest.first()? & 0x0f) * 4;
            let source = Ipv4Addr::from(<[u8; 4]>::try_from(rest.get(12..16)?).ok()?);
            let destination = Ipv4Addr::from(<[u8; 4]>::try_from(rest.get(16..20)?).ok()?);
            let total = usize::from(u16_be(rest, 2)?);
            // Zero: longer than the field can say, as hosts see their own offloaded segments.
            let end = if total == 0 {
                rest.len()
            } else {
                total.min(rest.len())
            };
            (
                *rest.get(9)?,
                *rest.get(8)?,
                source.into(),
                destination.into(),
                rest.get(header..end)?,
            )
        }
        0x86dd => {
            let source = Ipv6Addr::from(<[u8; 16]>::try_from(rest.get(8..24)?).ok()?);
            let destination = Ipv6Addr::from(<[u8; 16]>::try_from(rest.get(24..40)?).ok()?);
            let length = usize::from(u16_be(rest, 4)?);
            let end = if length == 0 {
                rest.len()
            } else {
                (40 + length).min(rest.len())
            };
            (
                *rest.get(6)?,
                *rest.get(7)?,
                source.into(),
                destination.into(),
                rest.get(40..end)?,
            )
        }
        _ => return None,
    };
    let mut packet = Packet::other(frame);
    packet.hops = hops;
    packet.source = SocketAddr::new(source, u16_be(segment, 0)?);
    packet.destination = SocketAddr::new(destination, u16_be(segment, 2)?);
    match protocol {
        6 => {
            let header = usize::from(segment.get(12)? >> 4) * 4;
            let flags = segment.get(13)?;
            packet.transport = Transport::Tcp;
            packet.sequence = u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?);
            packet.syn = flags & 0x02 != 0;
            packet.ack = flags & 0x10 != 0;
            packet.rst = flags & 0x04 != 0;
            packet.payload = segment.get(header..)?.to_vec();
        }
        17 => {
            packet.transport = Transport::Udp;
            packet.payload = segment.get(8..)?.to_vec();
        }
        _ => return None,
    }
    Some(packet)
}

/// Files are written here in the machine's own byte order.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|word| word.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn u16_be(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;
const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
