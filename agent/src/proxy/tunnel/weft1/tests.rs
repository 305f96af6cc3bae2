//! Both ends in one process, with real TLS over real sockets. Keys are changed every 50 records.

mod early;
mod pool;

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::channel::Channel;
use super::client::{Answer, Dialed, Limits, Pool, Taken};
use super::frame::{self, Open, Refuse};
use super::stream::ChannelIo;
use super::{copy, handshake, server};
use crate::identity::testing::{Authority, WEB, weft_configs};
use crate::proxy::error::TunnelError;
use crate::proxy::tcp::tests::{is_reset, pair, reset, soon};
use crate::proxy::tcp::{Broken, FlowSocket, Moved, Side};
use crate::proxy::tunnel::Watch;
use crate::proxy::tunnel::client::Key;
use crate::proxy::usage::Usage;

/// The far end: every flow is joined with a socket whose other side comes out of `applications`.
struct Far {
    address: SocketAddr,
    client: Arc<ClientConfig>,
    connections: AtomicUsize,
    refusal: Mutex<Option<Refuse>>,
    hold: Mutex<Option<Arc<tokio::sync::Notify>>>,
    stopping: CancellationToken,
    changed: watch::Sender<u64>,
    trusted: AtomicBool,
    valid_until: Mutex<SystemTime>,
    /// Both sides must keep little: as [`Usage::tight`] says.
    tight: Mutex<Option<bool>>,
    applications: mpsc::UnboundedSender<TcpStream>,
}

struct Near {
    far: Arc<Far>,
    pool: Arc<Pool>,
    applications: mpsc::UnboundedReceiver<TcpStream>,
}

type Copied = JoinHandle<Result<(), Broken>>;

impl Near {
    async fn new(limits: Limits) -> Self {
        let authority = Authority::new();
        let (client, config) = weft_configs(&authority, WEB);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let (sender, applications) = mpsc::unbounded_channel();
        let far = Arc::new(Far {
            address: listener.local_addr().expect("bound"),
            client,
            connections: AtomicUsize::new(0),
            refusal: Mutex::new(None),
            hold: Mutex::new(None),
            stopping: CancellationToken::new(),
            changed: watch::Sender::new(0),
            trusted: AtomicBool::new(true),
            valid_until: Mutex::new(SystemTime::now() + Duration::from_secs(3600)),
            tight: Mutex::new(None),
            applications: sender,
        });
        tokio::spawn(Arc::clone(&far).listen(listener, config));
        Self {
            far,
            pool: Pool::new(limits),
            applications,
        }
    }

    async fn take(&self) -> Result<Taken, Arc<TunnelError>> {
        let far = Arc::clone(&self.far);
        let dial = move || Arc::clone(&far).dial();
        soon(self.pool.take(&key(), dial)).await
    }

    async fn lent(&self) -> Box<super::client::Lent> {
        match self.take().await.expect("connects") {
            Taken::Lent(lent) => lent,
            Taken::Http => panic!("HTTP"),
        }
    }

    /// A flow from a client's socket to an application's, on a connection of the pool.
    async fn flow(&mut self) -> (TcpStream, TcpStream, Copied) {
        let (client, client_side) = pair().await;
        let copying = self.start(client_side).await;
        let application = soon(self.applications.recv()).await.expect("connects");
        (client, application, copying)
    }

    async fn start(&self, client_side: TcpStream) -> Copied {
        let mut lent = self.lent().await;
        let far = Arc::clone(&self.far);
        tokio::spawn(async move {
            let socket = FlowSocket::new(client_side).expect("options");
            let early = match lent.ask(&open(), Some(socket.socket())).await {
                Answer::Accepted { early } => early,
                other => panic!("{other:?}"),
            };
            let (channel, watch, give_back) = lent.part();
            let moved = far.moved();
            let channel = copy::join(socket, Side::Client, channel, &moved, early).await?;
            give_back.give(channel, watch);
            Ok(())
        })
    }

    fn connections(&self) -> usize {
        self.far.connections.load(Ordering::SeqCst)
    }
}

impl Far {
    fn moved(&self) -> Moved {
        match *self.tight.lock().expect("not poisoned") {
            Some(beginning) => Moved::metered(vec![], &Usage::tight(beginning)),
            None => Moved::default(),
        }
    }

    fn watch(self: &Arc<Self>) -> Watch {
        let far = Arc::clone(self);
        let valid_until = *self.valid_until.lock().expect("not poisoned");
        Watch {
            pod_gone: CancellationToken::new(),
            changed: self.changed.subscribe(),
            trusted: Box::new(move || far.trusted.load(Ordering::SeqCst)),
            valid_until,
        }
    }

    async fn dial(self: Arc<Self>) -> Result<Dialed, TunnelError> {
        let mut socket = TcpStream::connect(self.address).await.expect("connects");
        let name = ServerName::IpAddress(self.address.ip().into());
        let greeted = handshake::connect(Arc::clone(&self.client), name, &mut socket).await;
        let greeted = greeted.map_err(TunnelError::Handshake)?;
        assert_eq!(greeted.alpn.as_deref(), Some(&b"weft/1"[..]));
        assert_eq!(greeted.chain.len(), 1);
        let channel = Box::new(Channel::new(socket, greeted, false).expect("options"));
        let watch = self.watch();
        Ok(Dialed::Channel {
            channel,
            generation: watch.generation(),
            watch,
        })
    }

    async fn listen(self: Arc<Self>, listener: TcpListener, config: Arc<ServerConfig>) {
        while let Ok((socket, _)) = listener.accept().await {
            self.connections.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(Arc::clone(&self).serve(socket, Arc::clone(&config)));
        }
    }

    async fn serve(self: Arc<Self>, mut socket: TcpStream, config: Arc<ServerConfig>) {
        assert!(handshake::offers(&socket, b"weft/1").await.expect("peeks"));
        let greeted = handshake::accept(config, &mut socket)
            .await
            .expect("greets");
        let mut channel = Box::new(Channel::new(socket, greeted, true).expect("options"));
        loop {
            let asked = tokio::select! {
                asked = server::next(&mut channel) => asked,
                () = self.stopping.cancelled() => return server::leave(channel).await,
            };
            let Ok(Some(open)) = asked else { return };
            assert_eq!(
                (open.port.get(), open.source_port.map(u16::from)),
                (80, Some(4711))
            );
            let hold = self.hold.lock().expect("no panic").clone();
            if let Some(hold) = hold {
                hold.notified().await;
            }
            let refusal = self.refusal.lock().expect("no panic").clone();
            if let Some(refuse) = refusal {
                server::refuse(&mut channel, &refuse).await.expect("ends");
                continue;
            }
            server::accept(&mut channel).expect("says");
            let (application, socket) = pair().await;
            let _ = self.applications.send(application);
            let socket = FlowSocket::new(socket).expect("options");
            match copy::join(socket, Side::Server, channel, &self.moved(), 0).await {
                Ok(back) => channel = back,
                Err(_) => return,
            }
        }
    }
}

fn key() -> Key {
    Key {
        source: "shop/curl".parse().expect("valid"),
        source_uid: "1".into(),
        destination: "127.0.0.1".parse().expect("valid"),
        identity: WEB.parse().expect("valid"),
        alpn: crate::identity::Alpn::Weft,
    }
}

fn open() -> Open {
    Open {
        port: NonZeroU16::new(80).expect("a port"),
        source_port: NonZeroU16::new(4711),
        opaque_by: None,
    }
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not happen");
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 251 + at) as u8).collect()
}

/// Sends and closes on one side, reads all on the other.
async fn cross(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    let mut read = Vec::new();
    let write = async {
        from.write_all(bytes).await.expect("writes");
        from.shutdown().await.expect("closes one way");
    };
    let (_, received) = soon(async { tokio::join!(write, to.read_to_end(&mut read)) }).await;
    received.expect("reads");
    assert!(read == bytes, "{} of {} bytes", read.len(), bytes.len());
}

#[tokio::test]
async fn flows_cross_one_after_the_other_on_one_connection() {
    let mut near = Near::new(Limits::default()).await;
    for length in [0, 1, 5, 16_380, 16_381, 100_000, 9 << 20] {
        let (mut client, mut application, copying) = near.flow().await;
        let bytes = pattern(length);
        cross(&mut client, &mut application, &bytes).await;
        cross(&mut application, &mut client, &bytes).await;
        soon(copying).await.expect("no panic").expect("ends well");
        assert_eq!(near.pool.connections(), 1);
    }
    assert_eq!(
        near.connections(),
        1,
        "the keys have changed many times by now"
    );
}

#[tokio::test]
async fn both_directions_at_once() {
    let mut near = Near::new(Limits::default()).await;
    let (client, application, copying) = near.flow().await;
    let (mut client_read, mut client_write) = client.into_split();
    let (mut far_read, mut far_write) = application.into_split();
    let bytes = pattern(20 << 20);
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let all = async {
        tokio::join!(
            async {
                client_write.write_all(&bytes).await.expect("writes");
                client_write.shutdown().await.expect("closes");
            },
            async {
                far_write.write_all(&bytes).await.expect("writes");
                far_write.shutdown().await.expect("closes");
            },
            far_read.read_to_end(&mut up),
            client_read.read_to_end(&mut down),
        )
    };
    let (_, _, read_up, read_down) = soon(all).await;
    read_up.and(read_down).expect("reads");
    assert!(up == bytes && down == bytes);
    soon(copying).await.expect("no panic").expect("ends well");
}

/// Where little may be kept, all bytes cross nevertheless, to receivers that read nothing at first too.
#[tokio::test]
async fn little_is_kept() {
    let mut near = Near::new(Limits::default()).await;
    for direction in 0..8 {
        *near.far.tight.lock().expect("not poisoned") = Some(direction < 4);
        let (client, application, copying) = near.flow().await;
        let (mut from, mut to) = match direction % 2 {
            0 => (client, application),
            _ => (application, client),
        };
        let bytes = pattern(16 << 20);
        let copy = bytes.clone();
        let writing = tokio::spawn(async move {
            // Of all sizes, so that records are cut everywhere.
            for (number, part) in copy.chunks(70_001).enumerate() {
                let (one, other) = part.split_at(part.len().min(number * 37 % 4000));
                from.write_all(one).await.expect("writes");
                from.write_all(other).await.expect("writes");
            }
            from.shutdown().await.expect("closes one way");
            from
        });
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (mut read, mut part) = (Vec::new(), vec![0; 50_000]);
        loop {
            match soon(to.read(&mut part)).await.expect("reads") {
                0 => break,
                count => read.extend_from_slice(&part[..count]),
            }
            // Now quick, now slow: reads grow, and must then shrink again.
            if read.len() % 7 == 0 || (read.len() >> 20) % 4 == 3 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert!(read == bytes, "{} bytes", read.len());
        to.shutdown().await.expect("closes");
        let _from = soon(writing).await.expect("no panic");
        soon(copying).await.expect("no panic").expect("ends well");
    }
}

/// More records than are passed on at once wait for a receiver that does not read at first.
#[tokio::test]
async fn records_of_middling_size_wait_for_a_receiver() {
    let mut near = Near::new(Limits::default()).await;
    for direction in 0..2 {
        let (client, application, copying) = near.flow().await;
        let (from, mut to) = match direction {
            0 => (client, application),
            _ => (application, client),
        };
        let bytes = pattern(8 << 20);
        let copy = bytes.clone();
        let from = from.into_std().expect("taken out");
        from.set_nonblocking(false).expect("blocking");
        let writing = tokio::task::spawn_blocking(move || {
            for part in copy.chunks(2000) {
                std::io::Write::write_all(&mut &from, part).expect("writes");
                std::thread::sleep(Duration::from_micros(50));
            }
            from.shutdown(std::net::Shutdown::Write).expect("closes");
            from
        });
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut read = Vec::new();
        soon(to.read_to_end(&mut read))
            .await
            .expect("reads to the end");
        assert!(read == bytes, "{} bytes", read.len());
        to.shutdown().await.expect("closes");
        let _from = soon(writing).await.expect("no panic");
        soon(copying).await.expect("no panic").expect("ends well");
    }
}

#[tokio::test]
async fn who_has_read_all_holds_no_room_meanwhile() {
    let mut near = Near::new(Limits::default()).await;
    let mut lent = near.lent().await;
    let answer = soon(lent.ask(&open(), None)).await;
    assert!(matches!(answer, Answer::Accepted { .. }), "{answer:?}");
    let (channel, _watch, _give_back) = lent.part();
    let mut flow = ChannelIo::new(channel);
    let mut application = soon(near.applications.recv()).await.expect("connects");
    for length in [6, 40_000] {
        let (sent, mut read) = (pattern(length), vec![0; length]);
        flow.write_all(b"request").await.expect("writes");
        flow.flush().await.expect("sends");
        soon(application.read_exact(&mut [0; 7]))
            .await
            .expect("reads");
        application.write_all(&sent).await.expect("writes");
        soon(flow.read_exact(&mut read)).await.expect("reads");
        assert!(read == sent, "{length}");
        assert_eq!(flow.buffered_bytes(), 0, "{length}");
    }
}

#[tokio::test]
async fn small_messages_go_back_and_forth() {
    let mut near = Near::new(Limits::default()).await;
    let (mut client, mut application, _copying) = near.flow().await;
    for count in 0..500_u32 {
        client
            .write_all(&count.to_be_bytes())
            .await
            .expect("writes");
        assert_eq!(soon(application.read_u32()).await.expect("reads"), count);
        application.write_all(&[count as u8]).await.expect("writes");
        assert_eq!(soon(client.read_u8()).await.expect("reads"), count as u8);
    }
}

#[tokio::test]
async fn many_tiny_writes_arrive() {
    let mut near = Near::new(Limits::default()).await;
    let (mut client, mut application, _copying) = near.flow().await;
    client.set_nodelay(true).expect("option");
    let writing = tokio::spawn(async move {
        for count in 0..30_000_u32 {
            client.write_all(&[count as u8]).await.expect("writes");
            if count % 64 == 0 {
                tokio::task::yield_now().await;
            }
        }
        client
    });
    // Read late, so that they pile up.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut all = vec![0; 30_000];
    soon(application.read_exact(&mut all)).await.expect("reads");
    assert!(all.iter().enumerate().all(|(at, byte)| at as u8 == *byte));
    soon(writing).await.expect("no panic");
}

#[tokio::test]
async fn resets_cross_both_ways_and_are_not_kept() {
    let mut near = Near::new(Limits::default()).await;
    let (client, mut application, copying) = near.flow().await;
    reset(client);
    assert!(is_reset(&mut application).await);
    assert!(soon(copying).await.expect("no panic").is_err());

    let (mut client, application, copying) = near.flow().await;
    reset(application);
    assert!(is_reset(&mut client).await);
    assert!(soon(copying).await.expect("no panic").is_err());

    // After the client has closed its direction.
    let (mut client, mut application, copying) = near.flow().await;
    client.shutdown().await.expect("closes one way");
    assert_eq!(soon(application.read(&mut [0])).await.expect("end"), 0);
    reset(application);
    assert!(is_reset(&mut client).await);
    assert!(soon(copying).await.expect("no panic").is_err());
    assert_eq!(near.connections(), 3);
    let pool = Arc::clone(&near.pool);
    eventually("nothing kept", || pool.connections() == 0).await;
}

#[tokio::test]
async fn a_reset_crosses_when_nobody_reads() {
    let mut near = Near::new(Limits::default()).await;
    let (mut client, mut application, copying) = near.flow().await;
    let chunk = vec![1; 1 << 20];
    while tokio::time::timeout(Duration::from_millis(300), client.write_all(&chunk))
        .await
        .is_ok()
    {}
    reset(client);
    assert!(soon(copying).await.expect("no panic").is_err());
    assert!(is_reset(&mut application).await);
}

#[tokio::test]
async fn the_last_bytes_before_a_reset_cross() {
    let mut near = Near::new(Limits::default()).await;
    for _ in 0..30 {
        let (mut client, mut application, copying) = near.flow().await;
        client.write_all(b"never read").await.expect("writes");
        soon(application.readable()).await.expect("readable");
        application.write_all(b"answer").await.expect("writes");
        drop(application);
        let mut answer = [0; 6];
        soon(client.read_exact(&mut answer))
            .await
            .expect("the answer arrives");
        assert!(is_reset(&mut client).await);
        assert!(soon(copying).await.expect("no panic").is_err());
    }
}

/// The end arrives first, and then what was sent is not taken: by whoever reads it nowhere.
#[tokio::test]
async fn nothing_is_sent_to_an_application_that_has_left() {
    let mut near = Near::new(Limits::default()).await;
    let (mut client, application, copying) = near.flow().await;
    drop(application);
    assert_eq!(soon(client.read(&mut [0])).await.expect("the end"), 0);
    let chunk = vec![1; 1 << 20];
    let mut taken = 0;
    // As much as there is room for on the way, which in a second of reading is passed many times over.
    while soon(client.write_all(&chunk)).await.is_ok() {
        taken += chunk.len();
        assert!(taken < 100 << 20, "it can be sent to for ever");
    }
    assert!(soon(copying).await.expect("no panic").is_err());
}

/// rustls's own connection at one end: what is made here is TLS, key updates included.
#[tokio::test]
async fn it_is_the_tls_of_others() {
    let authority = Authority::new();
    let (client, config) = weft_configs(&authority, WEB);
    let (near, mut far) = pair().await;
    let (application, application_side) = pair().await;
    let serving = tokio::spawn(async move {
        let greeted = handshake::accept(config, &mut far).await.expect("greets");
        let mut channel = Box::new(Channel::new(far, greeted, true).expect("options"));
        server::next(&mut channel)
            .await
            .expect("asks")
            .expect("asks");
        server::accept(&mut channel).expect("says");
        let socket = FlowSocket::new(application_side).expect("options");
        let back = copy::join(socket, Side::Server, channel, &Moved::default(), 0).await;
        server::leave(back.expect("ends well")).await;
    });
    let echo = tokio::spawn(async move {
        let (mut read, mut write) = application.into_split();
        tokio::io::copy(&mut read, &mut write)
            .await
            .expect("echoes");
    });
    let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
    let connector = tokio_rustls::TlsConnector::from(client);
    let mut tls = soon(connector.connect(name, near)).await.expect("greets");
    tls.write_all(&open().encode()).await.expect("writes");
    let mut head = [0; 4];
    soon(tls.read_exact(&mut head)).await.expect("reads");
    assert_eq!(head, frame::ACCEPT_FRAME);
    for count in 0..300_usize {
        if count % 70 == 0 {
            tls.get_mut().1.refresh_traffic_keys().expect("new keys");
        }
        let text = pattern(count * 13 + 1);
        tls.write_all(&frame::data_head(text.len()))
            .await
            .expect("writes");
        tls.write_all(&text).await.expect("writes");
        tls.flush().await.expect("writes");
        let mut read = Vec::new();
        while read.len() < text.len() {
            soon(tls.read_exact(&mut head)).await.expect("reads");
            let mut piece = vec![0; usize::from(u16::from_be_bytes([head[2], head[3]]))];
            soon(tls.read_exact(&mut piece)).await.expect("reads");
            read.extend(piece);
        }
        assert!(read == text, "{count}");
    }
    tls.write_all(&frame::END_FRAME).await.expect("writes");
    soon(tls.read_exact(&mut head)).await.expect("reads");
    assert_eq!(head, frame::END_FRAME);
    soon(tls.read_exact(&mut head)).await.expect("reads");
    assert_eq!(head, frame::LEAVING_FRAME);
    tls.shutdown().await.expect("closes");
    let mut rest = Vec::new();
    soon(tls.read_to_end(&mut rest))
        .await
        .expect("closes in order");
    soon(serving).await.expect("no panic");
    soon(echo).await.expect("no panic");
}
