//! What is on a wire: `tcpdump` on an interface, and a search through all it got.

mod pcap;
mod stream;

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

pub use pcap::{Packet, Transport};
pub use stream::{Stream, TlsRecords};

use crate::command::{Process, Program};
use crate::netns::Netns;
use crate::wait::wait_for;

/// A running capture; [`Capture::finish`] gives what it saw.
#[derive(Debug)]
pub struct Capture<'a> {
    process: Process,
    file: PathBuf,
    netns: &'a Netns,
    interface: String,
}

impl<'a> Capture<'a> {
    /// Starts capturing whole packets on an interface of a namespace, and waits until it does.
    pub fn start(netns: &'a Netns, interface: &str, dir: &std::path::Path) -> Result<Capture<'a>> {
        Capture::start_with(netns, interface, dir, 262_144)
    }

    /// Captures the first `snapshot_bytes` of every packet only, for flows of gigabytes.
    pub fn start_with(
        netns: &'a Netns,
        interface: &str,
        dir: &std::path::Path,
        snapshot_bytes: u32,
    ) -> Result<Capture<'a>> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        std::fs::create_dir_all(dir)?;
        let file = dir.join(format!("{}-{interface}-{count}.pcap", netns.name()));
        let snapshot = snapshot_bytes.to_string();
        let mut process = Program::new("tcpdump", Some(netns), None, dir)?
            .args([
                "-i",
                interface,
                "-s",
                &snapshot,
                "-U",
                "--immediate-mode",
                "-n",
            ])
            // A buffer of 64 MiB: a burst must not be lost while the writer waits for its turn.
            .args(["-B", "65536", "-Z", "root", "-w"])
            .arg(&file)
            .spawn()?;
        process.wait_for_line("listening on", Duration::from_secs(10))?;
        Ok(Capture {
            process,
            file,
            netns,
            interface: interface.to_owned(),
        })
    }

    /// Ends the capture when everything sent so far is in it: a marker sent now is waited for.
    pub fn finish(mut self) -> Result<Captured> {
        let marker = format!(
            "weft-capture-end-{}-{}",
            std::process::id(),
            self.file.display()
        );
        wait_for("the capture to catch up", Duration::from_secs(20), || {
            self.send_marker(&marker)?;
            let bytes = read_end(&self.file)?;
            Ok(find(&bytes, marker.as_bytes()).map(drop))
        })?;
        self.process.signal(Signal::SIGINT)?;
        self.process.wait(Duration::from_secs(10))?;
        let dropped = dropped_by_kernel(&self.process.stderr());
        ensure!(
            dropped == 0,
            "the capture lost {dropped} packets: it proves nothing"
        );
        let bytes = std::fs::read(&self.file)?;
        let mut packets = pcap::read(&bytes)?;
        packets.retain(|packet| !packet.contains(marker.as_bytes()));
        Ok(Captured { packets })
    }

    /// A datagram that leaves by this interface whatever its routes are: a broadcast.
    fn send_marker(&self, marker: &str) -> Result<()> {
        self.netns.run(|| -> Result<()> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_broadcast(true)?;
            socket2::SockRef::from(&socket).bind_device(Some(self.interface.as_bytes()))?;
            let target = if self.interface == "lo" {
                "127.0.0.1:9"
            } else {
                "255.255.255.255:9"
            };
            // On a loopback the port's refusal may come back; the packet was seen all the same.
            let _ = socket.send_to(marker.as_bytes(), target);
            Ok(())
        })?
    }
}

/// All packets of a capture.
#[derive(Clone, Debug)]
pub struct Captured {
    packets: Vec<Packet>,
}

impl Captured {
    /// The packets in order.
    pub fn packets(&self) -> &[Packet] {
        &self.packets
    }

    /// The TCP packets.
    pub fn tcp_packets(&self) -> impl Iterator<Item = &Packet> {
        self.packets
            .iter()
            .filter(|packet| packet.transport == Transport::Tcp)
    }

    /// The TCP packets from or to this port.
    pub fn to_or_from_port(&self, port: u16) -> impl Iterator<Item = &Packet> {
        self.tcp_packets()
            .filter(move |packet| packet.source.port() == port || packet.destination.port() == port)
    }

    /// Whether these bytes are anywhere: in a packet, or split over the segments of a stream.
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.packets.iter().any(|packet| packet.contains(needle))
            || self.streams().iter().any(|stream| stream.contains(needle))
    }

    /// Fails if the text is anywhere on the wire.
    pub fn ensure_without(&self, needle: &str) -> Result<()> {
        ensure!(
            !self.packets.is_empty(),
            "nothing was captured: that proves nothing"
        );
        ensure!(
            !self.contains(needle.as_bytes()),
            "{needle:?} is on the wire in the clear"
        );
        Ok(())
    }

    /// Each direction of each TCP connection, its payload in order.
    pub fn streams(&self) -> Vec<Stream> {
        stream::assemble(self.tcp_packets())
    }

    /// The TLS records of all streams to and from a port, summed up.
    pub fn tls(&self, port: u16) -> TlsRecords {
        let streams = self.streams();
        let matching = streams
            .iter()
            .filter(|stream| stream.source.port() == port || stream.destination.port() == port);
        matching
            .map(Stream::tls_records)
            .fold(TlsRecords::default(), TlsRecords::plus)
    }

    /// Fails if a TCP packet with payload goes to or from one of these addresses on another port
    /// than the tunnel's.
    pub fn ensure_only_tunnels(&self, addresses: &[std::net::IpAddr]) -> Result<()> {
        for packet in self
            .tcp_packets()
            .filter(|packet| !packet.payload.is_empty())
        {
            let ours = |side: &SocketAddr| addresses.contains(&side.ip());
            let tunnel =
                packet.source.port() == TUNNEL_PORT || packet.destination.port() == TUNNEL_PORT;
            ensure!(
                tunnel || !(ours(&packet.source) && ours(&packet.destination)),
                "{} bytes went from {} to {} outside of a tunnel",
                packet.payload.len(),
                packet.source,
                packet.destination
            );
        }
        for stream in self.streams().iter().filter(|stream| stream.is_tunnel()) {
            ensure!(
                stream.is_tls(),
                "the tunnel from {} to {} carries something else than TLS records",
                stream.source,
                stream.destination
            );
        }
        Ok(())
    }
}

/// Where the first occurrence of `needle` starts.
pub(crate) fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    while let Some(at) = bytes.get(from..)?.iter().position(|byte| *byte == first) {
        let at = from + at;
        if bytes[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// The last mebibyte of a file.
fn read_end(file: &std::path::Path) -> Result<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(file)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(1 << 20)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn dropped_by_kernel(report: &str) -> u64 {
    let line = report
        .lines()
        .find(|line| line.contains("dropped by kernel"));
    let count = line.and_then(|line| line.split_whitespace().next());
    count
        .context("no count")
        .and_then(|count| Ok(count.parse()?))
        .unwrap_or(0)
}

/// The port of tunnels between nodes.
pub const TUNNEL_PORT: u16 = 15008;

#[cfg(test)]
mod tests {
    use super::find;

    #[test]
    fn finds_bytes() {
        assert_eq!(find(b"aab", b"ab"), Some(1));
        assert_eq!(find(b"aab", b"abc"), None);
        assert_eq!(find(b"", b"a"), None);
        assert_eq!(find(b"x", b""), None);
    }
}
