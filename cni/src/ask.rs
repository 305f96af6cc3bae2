//! What the plugin and the agent say to each other: one line of JSON there, with the descriptor of the pod's network
//! namespace, and one line back.
//!
//! The plugin opens the namespace, as it runs on the host like the runtime that names it: in the agent's container the
//! same path may lead elsewhere, or nowhere.
//!
//! Both may be of different versions during an upgrade: fields that are not known are passed over.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};
use serde::{Deserialize, Serialize};

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    /// Enroll a pod if it is meshed. The descriptor of its namespace comes with it.
    Add(Attachment),
    /// Is the pod enrolled, if it is meshed?
    Check {
        /// The pod.
        pod: Pod,
        /// Its sandbox.
        container: String,
    },
    /// A pod's network is taken down.
    Del {
        /// Its sandbox.
        container: String,
    },
    /// All other sandboxes of the network are gone.
    Gc {
        /// Its name. Older plugins do not say it.
        #[serde(default)]
        network: String,
        /// Those that are there.
        containers: Vec<String>,
    },
}

/// A pod's network that has been set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The pod.
    pub pod: Pod,
    /// Its sandbox.
    pub container: String,
    /// The name of the network. Older plugins do not say it.
    #[serde(default)]
    pub network: String,
    /// What the plugins before this one gave it.
    pub addresses: Vec<IpAddr>,
    /// How many milliseconds the plugin waits for an answer.
    pub wait_ms: u64,
}

/// A pod, as the kubelet has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID; of a static pod, that by which the kubelet has it.
    pub uid: String,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// It is done, or there is nothing to be done: of all but ADD and CHECK.
    Done,
    /// The pod is no matter of the mesh.
    NotMeshed,
    /// The pod is in the mesh.
    Enrolled,
    /// Not yet, or the pod must not be: try again later.
    Wait {
        /// Why.
        reason: String,
    },
    /// The agent cannot know: it has no controller, or none that says it. The plugin decides by the agent's list.
    Away {
        /// Why.
        reason: String,
    },
}

/// The agent did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("the agent does not listen at {path}: {error}")]
    Absent {
        /// The socket.
        path: String,
        /// What the system says.
        error: io::Error,
    },
    /// Somebody listens, and says nothing.
    #[error("the agent did not answer within {} s", .0.as_secs_f32())]
    Silent(Duration),
    /// The connection broke.
    #[error("the agent went away: {0}")]
    Broken(io::Error),
    /// What came is no answer.
    #[error("the agent's answer cannot be read: {0}")]
    Garbled(String),
}

/// Asks the agent, and waits. One that goes away without an answer is started again, or a newer one serves the node in its
/// place: that is asked then, for as long as there is time.
///
/// # Errors
/// There is no answer.
pub fn ask(
    path: &Path,
    request: &Request,
    netns: Option<&File>,
    wait: Duration,
) -> Result<Answer, AskError> {
    let began = Instant::now();
    let (mut gone, mut absent_since) = (None, None);
    loop {
        let left = wait.saturating_sub(began.elapsed());
        match ask_once(path, &request.after(began.elapsed()), netns, left) {
            Err(error @ AskError::Broken(_)) => (gone, absent_since) = (Some(error), None),
            // None comes in its place: what is decided without an agent is better than to hold up every pod of the node.
            Err(error @ AskError::Absent { .. }) if gone.is_some() => {
                let since: &mut Instant = absent_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= NEWER_COMES {
                    return Err(error);
                }
            }
            answered => return answered,
        }
        if let Some(error) = gone.take_if(|_| began.elapsed() + ASK_AGAIN >= wait) {
            return Err(error);
        }
        std::thread::sleep(ASK_AGAIN);
    }
}

fn ask_once(
    path: &Path,
    request: &Request,
    netns: Option<&File>,
    wait: Duration,
) -> Result<Answer, AskError> {
    let until = Instant::now() + wait;
    let absent = |error| AskError::Absent {
        path: path.display().to_string(),
        error,
    };
    let mut stream = connected(path).map_err(absent)?;
    let failed = |error: io::Error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => AskError::Silent(wait),
        _ => AskError::Broken(error),
    };
    stream.set_write_timeout(Some(wait)).map_err(failed)?;
    let mut line = serde_json::to_vec(request).map_err(|it| AskError::Garbled(it.to_string()))?;
    line.push(b'\n');
    send(&mut stream, &line, netns).map_err(failed)?;
    let answer = read_line(&mut stream, until).map_err(failed)?;
    serde_json::from_slice(&answer).map_err(|error| AskError::Garbled(error.to_string()))
}

impl Request {
    /// The same when some of the time has passed.
    fn after(&self, passed: Duration) -> Self {
        let mut request = self.clone();
        if let Self::Add(attachment) = &mut request {
            let passed = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
            attachment.wait_ms = attachment.wait_ms.saturating_sub(passed);
        }
        request
    }
}

/// Without waiting: an agent that accepts nothing, because it stands still, is none.
fn connected(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The descriptor goes with the first byte.
fn send(stream: &mut UnixStream, line: &[u8], netns: Option<&File>) -> io::Result<()> {
    let descriptors: Vec<_> = netns.iter().map(|it| it.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let rights = if netns.is_some() { &rights[..] } else { &[] };
    let slices = [IoSlice::new(line)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    let sent = loop {
        match sendmsg::<()>(stream.as_raw_fd(), &slices, rights, flags, None) {
            Err(Errno::EINTR) => {}
            sent => break sent?,
        }
    };
    stream.write_all(&line[sent..])
}

fn read_line(stream: &mut UnixStream, until: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let count = match stream.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            read => read?,
        };
        line.extend_from_slice(&buffer[..count]);
        if let Some(end) = line.iter().position(|it| *it == b'\n') {
            line.truncate(end);
            return Ok(line);
        }
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if line.len() > MAX_LINE_BYTES {
            return Err(io::Error::other("the answer is too long"));
        }
    }
}

/// Whether a descriptor is a network namespace's: of the file system that these are of.
///
/// # Errors
/// What the system says.
pub fn is_netns(descriptor: BorrowedFd<'_>) -> io::Result<bool> {
    use nix::sys::statfs::{FsType, fstatfs};
    /// `NSFS_MAGIC` in the kernel's `magic.h`.
    const NSFS_MAGIC: FsType = FsType(0x6e73_6673);
    Ok(fstatfs(descriptor)?.filesystem_type() == NSFS_MAGIC)
}

/// How soon the next agent is asked.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// How long there may be none at all.
const NEWER_COMES: Duration = Duration::from_secs(3);
/// Requests and answers are at most as long.
pub const MAX_LINE_BYTES: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn attachment() -> Request {
        Request::Add(Attachment {
            pod: Pod {
                namespace: "shop".into(),
                name: "web".into(),
                uid: "u1".into(),
            },
            container: "c1".into(),
            network: "n".into(),
            addresses: vec!["10.0.0.5".parse().expect("valid")],
            wait_ms: 1000,
        })
    }

    fn socket_in(folder: &tempfile::TempDir) -> std::path::PathBuf {
        folder.path().join("s")
    }

    const SHORT: Duration = Duration::from_millis(300);

    #[test]
    fn a_request_is_read_as_it_was_written() {
        for request in [
            attachment(),
            Request::Del {
                container: "c".into(),
            },
            Request::Gc {
                network: "n".into(),
                containers: vec!["c".into()],
            },
        ] {
            let text = serde_json::to_string(&request).expect("written");
            assert_eq!(
                serde_json::from_str::<Request>(&text).expect("read"),
                request
            );
        }
    }

    #[test]
    fn an_answer_comes_in_pieces() {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(socket_in(&folder)).expect("listens");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accepts");
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte).expect("a request");
            }
            for part in [&b"{\"answer\":"[..], b"\"wait\",\"reason\":\"a\"}", b"\n"] {
                stream.write_all(part).expect("written");
            }
        });
        let netns = File::open("/proc/self/ns/net").expect("there");
        let answer = ask(&socket_in(&folder), &attachment(), Some(&netns), SHORT * 30);
        let reason = "a".to_owned();
        assert_eq!(answer.expect("an answer"), Answer::Wait { reason });
        server.join().expect("served");
    }

    #[test]
    fn an_agent_that_is_away_is_told_from_one_that_is_slow() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = socket_in(&folder);
        let ask = || ask(&path, &attachment(), None, SHORT).expect_err("nobody");
        assert!(matches!(ask(), AskError::Absent { .. }));
        let listener = UnixListener::bind(&path).expect("listens");
        let before = Instant::now();
        assert!(matches!(ask(), AskError::Silent(_)));
        assert!(before.elapsed() >= SHORT);
        let ended = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the one from before");
            let _ = stream.write_all(b"no JSON\n");
            let (mut stream, _) = listener.accept().expect("accepts");
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"no JSON\n");
            let (mut stream, _) = listener.accept().expect("accepts");
            let _ = stream.read(&mut [0; 4096]);
        });
        assert!(matches!(ask(), AskError::Garbled(_)));
        // One that goes away is waited for.
        let before = Instant::now();
        assert!(matches!(ask(), AskError::Broken(_)));
        assert!(before.elapsed() + ASK_AGAIN >= SHORT);
        ended.join().expect("served");
        assert!(matches!(ask(), AskError::Absent { .. }));
    }

    /// An upgrade: the older one breaks off, nobody listens for a moment, and the newer one answers.
    #[test]
    fn the_next_agent_is_asked() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = socket_in(&folder);
        let older = UnixListener::bind(&path).expect("listens");
        let socket = path.clone();
        let agents = std::thread::spawn(move || {
            let asked = |listener: UnixListener| {
                let (mut stream, _) = listener.accept().expect("accepts");
                let mut line = vec![];
                while line.last() != Some(&b'\n') {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).expect("a request");
                    line.extend(byte);
                }
                let request: Request = serde_json::from_slice(&line).expect("a request");
                (stream, request)
            };
            let (stream, first) = asked(older);
            std::fs::remove_file(&socket).expect("removed");
            drop(stream);
            std::thread::sleep(ASK_AGAIN * 2);
            let (mut stream, second) = asked(UnixListener::bind(&socket).expect("listens"));
            stream
                .write_all(b"{\"answer\":\"enrolled\"}\n")
                .expect("written");
            (first, second)
        });
        let netns = File::open("/proc/self/ns/net").expect("there");
        let answer = ask(&path, &attachment(), Some(&netns), SHORT * 30);
        assert_eq!(answer.expect("an answer"), Answer::Enrolled);
        let (first, second) = agents.join().expect("served");
        let wait = |it: &Request| match it {
            Request::Add(attachment) => attachment.wait_ms,
            other => panic!("{other:?}"),
        };
        assert!(wait(&second) < wait(&first), "{first:?} {second:?}");
    }

    #[test]
    fn a_namespace_is_told_from_a_file() {
        use std::os::fd::AsFd;
        let netns = File::open("/proc/self/ns/net").expect("there");
        assert!(is_netns(netns.as_fd()).expect("asked"));
        let file = tempfile::tempfile().expect("a file");
        assert!(!is_netns(file.as_fd()).expect("asked"));
    }
}
