//! What the plugin sends: read with bounds on everything, and checked.

use std::io::{self, ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, recvmsg};
use tokio::io::Interest;
use tokio::net::UnixStream;
use weft_cni::ask::{self, MAX_LINE_BYTES};
use weft_core::{ObjectName, WorkloadId};

/// A request, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Enroll a pod if it is meshed.
    Add(Attachment),
    /// Is it enrolled, if it is meshed?
    Check(Asked),
    /// A sandbox is taken down.
    Del(String),
    /// All sandboxes of a network but these were taken down.
    Gc(String, Vec<String>),
}

/// A pod that is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Its name.
    pub pod: WorkloadId,
    /// Its UID, by which the kubelet has it.
    pub uid: String,
}

/// A pod whose network has been set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The pod.
    pub asked: Asked,
    /// Its sandbox.
    pub container: String,
    /// The name of the network.
    pub network: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// How long the plugin waits.
    pub wait: Duration,
}

/// Why a request is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// It is no JSON of the right form.
    #[error("it cannot be read: {0}")]
    Form(String),
    /// A field cannot be used.
    #[error("{field}: {reason}")]
    Field {
        /// The field.
        field: &'static str,
        /// Why.
        reason: String,
    },
}

impl Request {
    /// Reads a line.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, Invalid> {
        let request: ask::Request =
            serde_json::from_slice(line).map_err(|error| Invalid::Form(error.to_string()))?;
        Ok(match request {
            ask::Request::Add(it) => Self::Add(Attachment {
                asked: Asked::of(&it.pod)?,
                container: container(it.container)?,
                network: network(it.network)?,
                addresses: addresses(&it.addresses)?,
                wait: Duration::from_millis(it.wait_ms).clamp(LEAST_WAIT, MOST_WAIT),
            }),
            ask::Request::Check { pod, container: id } => {
                container(id)?;
                Self::Check(Asked::of(&pod)?)
            }
            ask::Request::Del { container: id } => Self::Del(container(id)?),
            ask::Request::Gc {
                network: name,
                containers,
            } => {
                let containers = containers.into_iter().map(container);
                Self::Gc(network(name)?, containers.collect::<Result<_, _>>()?)
            }
        })
    }
}

impl Asked {
    fn of(pod: &ask::Pod) -> Result<Self, Invalid> {
        let name = ObjectName::parse(&pod.namespace, &pod.name);
        let name = name.map_err(|error| invalid("pod", error.to_string()))?;
        if pod.uid.is_empty() || pod.uid.len() > MAX_ID_BYTES {
            return Err(invalid("pod.uid", "empty, or too long"));
        }
        Ok(Self {
            pod: WorkloadId(name),
            uid: pod.uid.clone(),
        })
    }
}

fn container(id: String) -> Result<String, Invalid> {
    match id.is_empty() || id.len() > MAX_ID_BYTES {
        true => Err(invalid("container", "empty, or too long")),
        false => Ok(id),
    }
}

fn network(name: String) -> Result<String, Invalid> {
    match name.len() > MAX_NETWORK_BYTES {
        true => Err(invalid("network", "too long")),
        false => Ok(name),
    }
}

fn addresses(given: &[IpAddr]) -> Result<Vec<IpAddr>, Invalid> {
    if given.len() > weft_cni::result::MAX_ADDRESSES {
        return Err(invalid("addresses", "more than any pod has"));
    }
    let addresses: Vec<_> = given.iter().map(IpAddr::to_canonical).collect();
    match addresses
        .iter()
        .find(|it| !crate::discovery::is_reachable(**it))
    {
        Some(address) => Err(invalid("addresses", format!("{address} is no pod's"))),
        None => Ok(addresses),
    }
}

fn invalid(field: &'static str, reason: impl Into<String>) -> Invalid {
    Invalid::Field {
        field,
        reason: reason.into(),
    }
}

/// Reads a line, and the descriptor that came with it.
pub(super) async fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut line = Vec::new();
    let mut descriptor = None;
    let mut buffer = vec![0; 4096];
    loop {
        stream.readable().await?;
        let received = stream.try_io(Interest::READABLE, || {
            receive_some(stream, &mut buffer, &mut descriptor)
        });
        let count = match received {
            Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
            received => received?,
        };
        line.extend_from_slice(&buffer[..count]);
        if let Some(end) = line.iter().position(|it| *it == b'\n') {
            line.truncate(end);
            return Ok((line, descriptor));
        }
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if line.len() > MAX_LINE_BYTES {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                "the request is too long",
            ));
        }
    }
}

/// Descriptors beyond the first are closed.
fn receive_some(
    stream: &UnixStream,
    buffer: &mut [u8],
    descriptor: &mut Option<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let RecvMsg { bytes, .. } = recvmsg(stream, &mut slices, &mut ancillary, flags)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            for it in received {
                descriptor.get_or_insert(it);
            }
        }
    }
    Ok(bytes)
}

const LEAST_WAIT: Duration = Duration::from_millis(100);
const MOST_WAIT: Duration = Duration::from_secs(60);
const MAX_ID_BYTES: usize = 253;
const MAX_NETWORK_BYTES: usize = 1024;
const MAX_DESCRIPTORS: usize = 4;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    const ADD: &str = r#"{"command":"add","pod":{"namespace":"shop","name":"web","uid":"u1"},"container":"c1",
        "network":"pods","addresses":["10.0.0.5","::ffff:10.0.0.6"],"wait_ms":1000}"#;

    #[test]
    fn requests_are_read() {
        let asked = Asked {
            pod: "shop/web".parse().expect("valid"),
            uid: "u1".into(),
        };
        let attachment = Attachment {
            asked: asked.clone(),
            container: "c1".into(),
            network: "pods".into(),
            addresses: ["10.0.0.5", "10.0.0.6"]
                .map(|it| it.parse().expect("valid"))
                .into(),
            wait: Duration::from_secs(1),
        };
        let check = r#"{"command":"check","pod":{"namespace":"shop","name":"web","uid":"u1"},"container":"c1"}"#;
        for (line, expected) in [
            (ADD, Request::Add(attachment)),
            (check, Request::Check(asked)),
            (
                r#"{"command":"del","container":"c1"}"#,
                Request::Del("c1".into()),
            ),
            (
                r#"{"command":"gc","network":"pods","containers":["a"]}"#,
                Request::Gc("pods".into(), vec!["a".into()]),
            ),
            (
                r#"{"command":"gc","containers":["a"]}"#,
                Request::Gc(String::new(), vec!["a".into()]),
            ),
        ] {
            assert_eq!(Request::parse(line.as_bytes()), Ok(expected), "{line}");
        }
        // A newer plugin may say more.
        let more = ADD.replace("\"wait_ms\"", "\"more\":1,\"wait_ms\"");
        let more = more.replace("\"uid\"", "\"more\":1,\"uid\"");
        assert_eq!(
            Request::parse(more.as_bytes()),
            Request::parse(ADD.as_bytes())
        );
        let eternal = ADD.replace("1000", "18446744073709551615");
        let Ok(Request::Add(it)) = Request::parse(eternal.as_bytes()) else {
            panic!("refused");
        };
        assert_eq!(it.wait, MOST_WAIT);
    }

    #[test]
    fn what_cannot_be_used_is_refused() {
        for bad in [
            String::new(),
            "{}".to_owned(),
            r#"{"command":"add"}"#.to_owned(),
            ADD.replace("\"web\"", "\"../web\""),
            ADD.replace("\"u1\"", "\"\""),
            ADD.replace("\"c1\"", "\"\""),
            ADD.replace("10.0.0.5", "127.0.0.1"),
            ADD.replace("10.0.0.5", "10.0.0"),
            ADD.replace("\"u1\"", &format!("{:?}", "u".repeat(300))),
        ] {
            assert!(Request::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_line_comes_with_a_descriptor() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let sender = std::thread::spawn(move || {
            let mut theirs = theirs.into_std().expect("a socket");
            theirs.set_nonblocking(false).expect("set");
            let file = File::open("/proc/self/ns/net").expect("there");
            let descriptors = [file.as_fd(); 2];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
            let flags = rustix::net::SendFlags::empty();
            let slices = [std::io::IoSlice::new(b"ab")];
            rustix::net::sendmsg(&theirs, &slices, &mut ancillary, flags).expect("sent");
            theirs.write_all(b"c\nd").expect("sent");
        });
        let (line, descriptor) = receive(&ours).await.expect("received");
        assert_eq!(line, b"abc");
        assert!(ask::is_netns(descriptor.expect("one").as_fd()).expect("asked"));
        sender.join().expect("sent");
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        drop(theirs);
        assert!(receive(&ours).await.is_err());
    }
}
