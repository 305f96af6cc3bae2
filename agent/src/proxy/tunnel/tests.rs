//! Both ends of tunnels in one process, over byte pipes and real sockets.

use bytes::Bytes;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use h2::RecvStream;
use h2::server::SendResponse;
use http::{Request, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpStream;

use super::chunk::Chunk;
use super::client::{Dialed, Key, Limits, Opened, Pool};
use super::server::Ends;
use super::*;
use crate::identity::Alpn;
use crate::proxy::error::TunnelError;
use crate::proxy::tcp::tests::{is_reset, pair, reset, soon};
use crate::proxy::tcp::{Broken, FlowSocket, Moved, Side, TunnelHalves, join_tunnel};

/// The far end: every flow is joined with a socket whose other side comes out of `applications`.
struct Far {
    dials: AtomicUsize,
    refuse_dials: AtomicBool,
    answer: StatusCode,
    stopping: CancellationToken,
    deadline: CancellationToken,
    changed: watch::Sender<u64>,
    trusted: AtomicBool,
    valid_until: Mutex<SystemTime>,
    applications: tokio::sync::mpsc::UnboundedSender<TcpStream>,
}

struct Near {
    far: Arc<Far>,
    pool: Arc<Pool>,
    applications: tokio::sync::mpsc::UnboundedReceiver<TcpStream>,
}

impl Near {
    fn new(limits: Limits, answer: StatusCode) -> Self {
        let (sender, applications) = tokio::sync::mpsc::unbounded_channel();
        let far = Arc::new(Far {
            dials: AtomicUsize::new(0),
            refuse_dials: AtomicBool::new(false),
            answer,
            stopping: CancellationToken::new(),
            deadline: CancellationToken::new(),
            changed: watch::Sender::new(0),
            trusted: AtomicBool::new(true),
            valid_until: Mutex::new(SystemTime::now() + Duration::from_secs(3600)),
            applications: sender,
        });
        Self {
            far,
            pool: Pool::new(limits),
            applications,
        }
    }

    async fn request(&self) -> Result<Opened, Arc<TunnelError>> {
        let request = wire::write_request("10.1.2.3:80".parse().expect("valid"), Some(4711), None);
        let dial = || Arc::clone(&self.far).dial();
        soon(self.pool.request(&key(), dial, request)).await
    }

    /// A flow from a client's socket to an application's.
    async fn flow(
        &mut self,
    ) -> (
        TcpStream,
        TcpStream,
        tokio::task::JoinHandle<Result<(), Broken>>,
    ) {
        let opened = self.request().await.expect("opens");
        assert_eq!(opened.response.status(), StatusCode::OK);
        let application = soon(self.applications.recv()).await.expect("connects");
        let (client, client_side) = pair().await;
        let copying = tokio::spawn(async move {
            let Opened { halves, slot, .. } = opened;
            let socket = FlowSocket::new(client_side).expect("options");
            let result = join_tunnel(socket, Side::Client, halves, &Moved::default()).await;
            drop(slot);
            result
        });
        (client, application, copying)
    }

    fn dials(&self) -> usize {
        self.far.dials.load(Ordering::SeqCst)
    }
}

impl Far {
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

    async fn dial(self: Arc<Self>) -> Result<Dialed<DuplexStream>, TunnelError> {
        self.dials.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.refuse_dials.load(Ordering::SeqCst) {
            return Err(TunnelError::Closed);
        }
        let (near, far) = duplex(1 << 16);
        let watch = self.watch();
        tokio::spawn(async move {
            let ends = Ends {
                stopping: &self.stopping,
                deadline: &self.deadline,
            };
            let flow = |request, respond| {
                tokio::spawn(Arc::clone(&self).answer(request, respond));
            };
            let _ = server::serve(far, self.watch(), ends, flow).await;
        });
        Ok(Dialed { io: near, watch })
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<RecvStream>,
        mut respond: SendResponse<Chunk>,
    ) {
        let (head, receive) = request.into_parts();
        let connected: IpAddr = "10.1.2.3".parse().expect("valid");
        let asked = wire::read_request(&head, connected, true).expect("well asked");
        assert_eq!(asked.source_port.map(u16::from), Some(4711));
        if self.answer != StatusCode::OK {
            let refusal = wire::write_response(self.answer, Some("connect_refused"));
            respond.send_response(refusal, true).expect("answers");
            return;
        }
        let send = respond
            .send_response(wire::write_response(StatusCode::OK, None), false)
            .expect("answers");
        let (application, socket) = pair().await;
        let _ = self.applications.send(application);
        let socket = FlowSocket::new(socket).expect("options");
        let halves = TunnelHalves {
            send,
            receive,
            first: Bytes::new(),
        };
        let _ = join_tunnel(socket, Side::Server, halves, &Moved::default()).await;
    }
}

fn key() -> Key {
    Key {
        source: "shop/curl".parse().expect("valid"),
        source_uid: "1".into(),
        destination: "10.1.2.3".parse().expect("valid"),
        identity: "spiffe://cluster.local/ns/shop/sa/web"
            .parse()
            .expect("valid"),
        alpn: Alpn::WeftH2,
    }
}

fn few(streams: usize) -> Limits {
    Limits {
        streams,
        ..Limits::default()
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

#[tokio::test]
async fn bytes_and_half_close_cross_a_tunnel() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    let (mut client, mut application, copying) = near.flow().await;
    client.write_all(b"question").await.expect("writes");
    client.shutdown().await.expect("closes one way");
    let mut question = Vec::new();
    soon(application.read_to_end(&mut question))
        .await
        .expect("reads");
    assert_eq!(question, b"question");
    let answer = vec![7; 3 << 20];
    application
        .write_all(&answer[..1000])
        .await
        .expect("writes");
    let mut read = vec![0; 1000];
    soon(client.read_exact(&mut read)).await.expect("reads");
    let writing = tokio::spawn(async move {
        application
            .write_all(&vec![7; (3 << 20) - 1000])
            .await
            .expect("writes");
    });
    soon(client.read_to_end(&mut read)).await.expect("reads");
    assert!(read == answer);
    soon(writing).await.expect("no panic");
    soon(copying).await.expect("no panic").expect("ends well");
}

#[tokio::test]
async fn resets_cross_a_tunnel_both_ways() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
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
    let mut end = [0; 1];
    assert_eq!(soon(application.read(&mut end)).await.expect("end"), 0);
    reset(application);
    assert!(is_reset(&mut client).await);
    assert!(soon(copying).await.expect("no panic").is_err());
    assert_eq!(near.dials(), 1, "resets of flows leave the tunnel as it is");
}

#[tokio::test]
async fn a_reset_crosses_a_tunnel_whose_reader_does_not_read() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
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
async fn the_last_bytes_before_a_reset_cross_a_tunnel() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    for _ in 0..50 {
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

#[tokio::test]
async fn a_flow_that_does_not_read_does_not_stop_its_neighbours() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    let mut stopped = Vec::new();
    for _ in 0..8 {
        let (mut client, application, copying) = near.flow().await;
        let chunk = vec![1; 1 << 20];
        while tokio::time::timeout(Duration::from_millis(100), client.write_all(&chunk))
            .await
            .is_ok()
        {}
        stopped.push((client, application, copying));
    }
    let (mut client, mut application, _copying) = near.flow().await;
    assert_eq!(near.dials(), 1);
    for _ in 0..20 {
        client.write_all(&[3; 100_000]).await.expect("writes");
        let mut read = vec![0; 100_000];
        soon(application.read_exact(&mut read))
            .await
            .expect("reads");
    }
}

#[tokio::test]
async fn tiny_writes_to_a_reader_that_stopped_harm_nobody() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    let (client, mut application, _copying) = near.flow().await;
    let (mut neighbour, mut neighbours_application, _) = near.flow().await;
    let writing = tokio::spawn(async move {
        client.set_nodelay(true).expect("option");
        let mut client = client;
        for count in 0..120_000_u32 {
            client
                .write_all(&[count as u8])
                .await
                .expect("the connection stands");
            tokio::task::yield_now().await;
        }
        client.shutdown().await.expect("closes");
        client
    });
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        neighbour.write_all(b"x").await.expect("writes");
        let mut read = [0; 1];
        soon(neighbours_application.read_exact(&mut read))
            .await
            .expect("reads");
    }
    let mut all = Vec::new();
    soon(application.read_to_end(&mut all))
        .await
        .expect("reads");
    assert_eq!(all.len(), 120_000);
    assert!(
        all.iter()
            .enumerate()
            .all(|(count, byte)| count as u8 == *byte)
    );
    soon(writing).await.expect("no panic");
    assert_eq!(near.dials(), 1);
}

#[tokio::test]
async fn a_thousand_resets_leave_the_tunnel_as_it_is() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    let (mut neighbour, mut neighbours_application, _copying) = near.flow().await;
    for _ in 0..40 {
        let mut flows = Vec::new();
        for _ in 0..50 {
            flows.push(near.flow().await);
        }
        for (client, mut application, _) in flows {
            application.write_all(&[1; 1000]).await.expect("writes");
            reset(client);
        }
    }
    neighbour.write_all(b"x").await.expect("writes");
    let mut read = [0; 1];
    soon(neighbours_application.read_exact(&mut read))
        .await
        .expect("reads");
    assert_eq!(near.dials(), 1);
}

#[tokio::test]
async fn flows_share_a_connection_up_to_its_limit() {
    let mut near = Near::new(few(2), StatusCode::OK);
    let first = near.flow().await;
    let second = near.flow().await;
    assert_eq!(near.dials(), 1);
    let third = near.flow().await;
    assert_eq!((near.dials(), near.pool.connections()), (2, 2));
    drop((first.0, first.1));
    soon(first.2).await.expect("no panic").ok();
    let _fourth = near.flow().await;
    assert_eq!(near.dials(), 2, "the place that became free is taken");
    drop((second, third));
}

#[tokio::test]
async fn those_who_wait_share_one_connection_in_the_making() {
    let near = Near::new(few(100), StatusCode::OK);
    let opened = futures::future::join_all((0..50).map(|_| near.request())).await;
    assert!(opened.iter().all(Result::is_ok));
    assert_eq!(near.dials(), 1);
}

#[tokio::test]
async fn failing_to_connect_fails_everybody_and_is_tried_again() {
    let near = Near::new(few(100), StatusCode::OK);
    near.far.refuse_dials.store(true, Ordering::SeqCst);
    let failed = futures::future::join_all((0..10).map(|_| near.request())).await;
    assert!(failed.iter().all(Result::is_err));
    assert_eq!(near.dials(), 1);
    near.far.refuse_dials.store(false, Ordering::SeqCst);
    near.request().await.expect("opens");
    assert_eq!(near.dials(), 2);
}

#[tokio::test]
async fn a_refusal_says_why() {
    let near = Near::new(Limits::default(), StatusCode::SERVICE_UNAVAILABLE);
    let opened = near.request().await.expect("answers");
    assert_eq!(opened.response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let reason = wire::read_reason(opened.response.headers());
    assert_eq!(reason.as_deref(), Some("connect_refused"));
}

#[tokio::test]
async fn no_flow_begins_with_an_expired_certificate() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    let soon = SystemTime::now() + Duration::from_millis(300);
    *near.far.valid_until.lock().expect("not poisoned") = soon;
    let (mut client, mut application, _copying) = near.flow().await;
    let _second = near.flow().await;
    assert_eq!(near.dials(), 1);
    tokio::time::sleep(Duration::from_millis(400)).await;
    *near.far.valid_until.lock().expect("not poisoned") = soon + Duration::from_secs(3600);
    let _third = near.flow().await;
    assert_eq!(near.dials(), 2, "not on the connection of before");
    // What is open goes on.
    client.write_all(b"x").await.expect("sends");
    assert_eq!(application.read_u8().await.expect("arrives"), b'x');
}

#[tokio::test]
async fn idle_and_old_connections_close() {
    let limits = Limits {
        idle: Duration::from_millis(200),
        ..Limits::default()
    };
    let mut near = Near::new(limits, StatusCode::OK);
    let flow = near.flow().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(
        near.pool.connections(),
        1,
        "a connection in use is not idle"
    );
    drop((flow.0, flow.1));
    let pool = Arc::clone(&near.pool);
    eventually("idle close", || pool.connections() == 0).await;

    let limits = Limits {
        age: Duration::from_millis(1),
        ..Limits::default()
    };
    let mut near = Near::new(
        Limits {
            idle: Duration::from_millis(400),
            ..limits
        },
        StatusCode::OK,
    );
    let (mut client, mut application, _copying) = near.flow().await;
    let pool = Arc::clone(&near.pool);
    eventually("retirement by age", || pool.connections() == 0).await;
    client.write_all(b"x").await.expect("writes");
    let mut read = [0; 1];
    soon(application.read_exact(&mut read))
        .await
        .expect("the flow goes on");
}

#[tokio::test]
async fn a_far_end_that_leaves_lets_flows_finish_and_takes_no_new_ones() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    let (mut client, mut application, copying) = near.flow().await;
    near.far.stopping.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    client.write_all(b"still").await.expect("writes");
    let mut read = [0; 5];
    soon(application.read_exact(&mut read))
        .await
        .expect("the flow goes on");
    let opened = near.request().await;
    assert!(
        near.dials() >= 2,
        "a new flow needs a new connection: {opened:?}"
    );
    near.far.deadline.cancel();
    assert!(is_reset(&mut client).await);
    assert!(is_reset(&mut application).await);
    assert!(soon(copying).await.expect("no panic").is_err());
}

#[tokio::test]
async fn a_connection_that_is_cut_resets_its_flows() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    let (mut client, mut application, copying) = near.flow().await;
    near.far.deadline.cancel();
    assert!(
        is_reset(&mut client).await,
        "a cut must not look like an end"
    );
    assert!(is_reset(&mut application).await);
    assert!(soon(copying).await.expect("no panic").is_err());
}

#[tokio::test]
async fn changed_trust_retires_tunnels_and_ends_those_it_no_longer_covers() {
    let mut near = Near::new(Limits::default(), StatusCode::OK);
    let (mut client, mut application, _copying) = near.flow().await;
    near.far.changed.send_modify(|it| *it += 1);
    let pool = Arc::clone(&near.pool);
    eventually("retirement", || pool.connections() == 0).await;
    client.write_all(b"x").await.expect("writes");
    let mut read = [0; 1];
    soon(application.read_exact(&mut read))
        .await
        .expect("still trusted, so the flow goes on");
    near.far.trusted.store(false, Ordering::SeqCst);
    near.far.changed.send_modify(|it| *it += 1);
    assert!(is_reset(&mut client).await);
    assert!(is_reset(&mut application).await);
}
