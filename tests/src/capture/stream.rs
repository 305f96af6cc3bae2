//! The payload of TCP connections put in order, and the TLS records in it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use super::pcap::Packet;
use super::{TUNNEL_PORT, find};

/// One direction of one TCP connection.
#[derive(Clone, Debug)]
pub struct Stream {
    /// The sender.
    pub source: SocketAddr,
    /// The receiver.
    pub destination: SocketAddr,
    /// The payload without repetitions, in pieces: a new one where something is missing.
    pub pieces: Vec<Vec<u8>>,
}

impl Stream {
    /// Whether these bytes are in it.
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.pieces
            .iter()
            .any(|piece| find(piece, needle).is_some())
    }

    /// Whether it belongs to a tunnel.
    pub fn is_tunnel(&self) -> bool {
        self.source.port() == TUNNEL_PORT || self.destination.port() == TUNNEL_PORT
    }

    /// Whether it starts with a TLS record, and has nothing else as far as it is without gaps.
    /// Without payload it is.
    pub fn is_tls(&self) -> bool {
        self.pieces
            .first()
            .is_none_or(|piece| self.tls_records().not_tls == 0 || piece.is_empty())
    }

    /// The TLS records up to the first gap.
    pub fn tls_records(&self) -> TlsRecords {
        let mut records = TlsRecords::default();
        let Some(mut rest) = self.pieces.first().map(Vec::as_slice) else {
            return records;
        };
        while let [kind, 3, 0..=4, high, low, after @ ..] = rest {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            match (*kind, after.first()) {
                (HANDSHAKE, Some(&CLIENT_HELLO)) => records.client_hellos += 1,
                (HANDSHAKE, Some(&SERVER_HELLO)) => records.server_hellos += 1,
                (APPLICATION_DATA, _) => {
                    records.application_data += 1;
                    records.application_bytes += length as u64;
                }
                (CHANGE_CIPHER_SPEC..=APPLICATION_DATA, _) => {}
                _ => break,
            }
            // The last record may still be on its way.
            rest = after.get(length..).unwrap_or_default();
        }
        records.not_tls = if rest.len() >= RECORD_HEADER {
            rest.len() as u64
        } else {
            0
        };
        records
    }
}

/// How many TLS records there are, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlsRecords {
    /// ClientHello messages that start a record.
    pub client_hellos: u64,
    /// ServerHello messages that start a record.
    pub server_hellos: u64,
    /// Records of application data: all that is encrypted in TLS 1.3.
    pub application_data: u64,
    /// The bytes in those.
    pub application_bytes: u64,
    /// Bytes that are not in any record.
    pub not_tls: u64,
}

impl TlsRecords {
    /// Both together.
    pub fn plus(self, other: TlsRecords) -> TlsRecords {
        TlsRecords {
            client_hellos: self.client_hellos + other.client_hellos,
            server_hellos: self.server_hellos + other.server_hellos,
            application_data: self.application_data + other.application_data,
            application_bytes: self.application_bytes + other.application_bytes,
            not_tls: self.not_tls + other.not_tls,
        }
    }
}

/// Puts the segments in order; a SYN starts a new stream where ports are used again.
pub(super) fn assemble<'a>(packets: impl Iterator<Item = &'a Packet>) -> Vec<Stream> {
    let mut directions: BTreeMap<(SocketAddr, SocketAddr), Vec<Segments<'_>>> = BTreeMap::new();
    for packet in packets {
        let streams = directions
            .entry((packet.source, packet.destination))
            .or_default();
        let repeated = streams
            .last()
            .is_some_and(|last| last.first == packet.sequence.wrapping_add(1));
        if streams.is_empty() || (packet.syn && !repeated) {
            // The SYN itself takes one number.
            let first = packet.sequence.wrapping_add(u32::from(packet.syn));
            streams.push(Segments {
                first,
                offset: 0,
                segments: Vec::new(),
            });
        }
        if let Some(stream) = streams.last_mut() {
            stream.add(packet);
        }
    }
    let mut assembled = Vec::new();
    for ((source, destination), streams) in directions {
        for segments in streams {
            assembled.push(Stream {
                source,
                destination,
                pieces: segments.join(),
            });
        }
    }
    assembled
}

/// The segments of one direction, by their place in it.
struct Segments<'a> {
    first: u32,
    /// The place of the newest segment, beyond what 32 bits can say.
    offset: i64,
    segments: Vec<(i64, &'a [u8])>,
}

impl<'a> Segments<'a> {
    fn add(&mut self, packet: &'a Packet) {
        if packet.payload.is_empty() {
            return;
        }
        // The difference to the newest place is small, whichever way round it wraps.
        let newest = self.first.wrapping_add(self.offset as u32);
        let place = self.offset + i64::from(packet.sequence.wrapping_sub(newest) as i32);
        self.offset = self.offset.max(place);
        self.segments.push((place, &packet.payload));
    }

    fn join(mut self) -> Vec<Vec<u8>> {
        self.segments.sort_by_key(|(place, _)| *place);
        let mut pieces: Vec<Vec<u8>> = Vec::new();
        let mut end = i64::MIN;
        for (place, payload) in self.segments {
            let known = usize::try_from(end.saturating_sub(place).max(0)).unwrap_or(usize::MAX);
            match pieces.last_mut() {
                Some(piece) if place <= end => {
                    piece.extend(payload.get(known..).unwrap_or_default());
                }
                _ => pieces.push(payload.to_vec()),
            }
            end = end.max(place + payload.len() as i64);
        }
        pieces
    }
}

const RECORD_HEADER: usize = 5;
const CHANGE_CIPHER_SPEC: u8 = 20;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn join(first: u32, segments: &[(u32, &[u8])]) -> Vec<Vec<u8>> {
        let mut place = 0_i64;
        let mut all = Segments {
            first,
            offset: 0,
            segments: Vec::new(),
        };
        for (sequence, payload) in segments {
            let newest = first.wrapping_add(place as u32);
            let at = place + i64::from(sequence.wrapping_sub(newest) as i32);
            place = place.max(at);
            all.segments.push((at, payload));
        }
        all.join()
    }

    #[test]
    fn segments_are_ordered_and_repetitions_left_out() {
        assert_eq!(
            join(10, &[(13, b"def"), (10, b"abc"), (12, b"cd")]),
            [b"abcdef".to_vec()]
        );
        assert_eq!(
            join(10, &[(10, b"ab"), (14, b"ef")]),
            [b"ab".to_vec(), b"ef".to_vec()]
        );
        let near_the_end = u32::MAX - 1;
        assert_eq!(
            join(near_the_end, &[(near_the_end, b"abcd"), (2, b"ef")]),
            [b"abcdef".to_vec()]
        );
    }

    #[test]
    fn records_are_counted() {
        let bytes = [
            &[22, 3, 1, 0, 2, 1, 0][..],
            &[23, 3, 3, 0, 1, 9],
            &[23, 3, 3, 0, 1, 9],
        ]
        .concat();
        let side: SocketAddr = "10.0.0.1:15008".parse().expect("an address");
        let mut stream = Stream {
            source: side,
            destination: side,
            pieces: vec![bytes],
        };
        let records = stream.tls_records();
        assert_eq!((records.client_hellos, records.application_data), (1, 2));
        assert!(stream.is_tls());
        stream.pieces = vec![b"GET / HTTP/1.1\r\n".to_vec()];
        assert!(!stream.is_tls());
    }
}
