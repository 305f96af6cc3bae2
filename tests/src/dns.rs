//! A name server for a network namespace: what a cluster's has of one Service, in the records that programs ask for.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Netns;

/// A name server that runs until it is dropped.
#[derive(Debug)]
pub struct NameServer {
    stop: Arc<AtomicBool>,
    serving: Option<JoinHandle<()>>,
}

impl NameServer {
    /// Serves the IPv4 addresses of a name; there are no other names.
    pub fn start(netns: &Netns, name: &str, addresses: Vec<Ipv4Addr>) -> Result<NameServer> {
        let socket = netns.run(|| UdpSocket::bind(ADDRESS))?;
        let socket = socket.context("listening for questions about names")?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (Arc::clone(&stop), name.to_ascii_lowercase());
        let serving = std::thread::spawn(move || {
            let mut packet = [0; 512];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut packet) else {
                    continue;
                };
                if let Some(answer) = answer(&packet[..length], &name, &addresses) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(NameServer {
            stop,
            serving: Some(serving),
        })
    }

    /// What a kubelet writes for a pod of the host's network that is to have the cluster's names.
    pub fn resolv_conf(namespace: &str) -> String {
        format!(
            "search {namespace}.svc.cluster.local svc.cluster.local cluster.local\nnameserver {}\noptions ndots:5\n",
            ADDRESS.ip()
        )
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(serving) = self.serving.take() {
            let _ = serving.join();
        }
    }
}

/// The answer to one question (RFC 1035, section 4).
fn answer(question: &[u8], name: &str, addresses: &[Ipv4Addr]) -> Option<Vec<u8>> {
    let mut asked = Vec::new();
    let mut at = HEADER;
    loop {
        let length = usize::from(*question.get(at)?);
        if length == 0 {
            break;
        }
        let label = question.get(at + 1..at + 1 + length)?;
        asked.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        at += 1 + length;
    }
    let kind = u16::from_be_bytes([*question.get(at + 1)?, *question.get(at + 2)?]);
    let known = asked.join(".") == name;
    let addresses = if known && kind == A { addresses } else { &[] };
    // A response, that recursion was wanted and is there, and whether the name exists.
    let flags: u16 = 0x8180 | if known { 0 } else { NO_SUCH_NAME };
    let mut reply = question.get(..2)?.to_vec();
    for number in [flags, 1, u16::try_from(addresses.len()).ok()?, 0, 0] {
        reply.extend(number.to_be_bytes());
    }
    reply.extend(question.get(HEADER..at + 5)?);
    for address in addresses {
        // The name of the question, A, IN, five seconds, four bytes.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        reply.extend(address.octets());
    }
    Some(reply)
}

const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)), 53);
const HEADER: usize = 12;
const A: u16 = 1;
const NO_SUCH_NAME: u16 = 3;
