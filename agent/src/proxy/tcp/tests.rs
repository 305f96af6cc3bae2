//! Copying over real sockets of the loopback device.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;

/// Two connected sockets.
pub(crate) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.expect("connects"), other.expect("accepts").0)
}

struct Joined {
    client: TcpStream,
    server: TcpStream,
    moved: Arc<Moved>,
    copying: JoinHandle<Result<(), Broken>>,
}

async fn joined() -> Joined {
    let (client, client_side) = pair().await;
    let (server, server_side) = pair().await;
    let moved = Arc::new(Moved::default());
    let counting = Arc::clone(&moved);
    let copying = tokio::spawn(async move {
        let client = FlowSocket::new(client_side).expect("options");
        let server = FlowSocket::new(server_side).expect("options");
        join_sockets(client, server, &counting).await
    });
    Joined {
        client,
        server,
        moved,
        copying,
    }
}

pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future)
        .await
        .expect("happens soon")
}

pub(crate) fn reset(socket: TcpStream) {
    SockRef::from(&socket)
        .set_linger(Some(Duration::ZERO))
        .expect("linger");
}

pub(crate) async fn is_reset(socket: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    let read = soon(socket.read_to_end(&mut rest)).await;
    read.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn bytes_cross_both_ways_and_half_close_is_half_close() {
    let mut flow = joined().await;
    flow.client.write_all(b"question").await.expect("writes");
    flow.client.shutdown().await.expect("closes one way");
    let mut question = Vec::new();
    soon(flow.server.read_to_end(&mut question))
        .await
        .expect("reads to the end");
    assert_eq!(question, b"question");
    // The other direction is still open.
    flow.server.write_all(b"answer").await.expect("writes");
    let mut answer = [0; 6];
    soon(flow.client.read_exact(&mut answer))
        .await
        .expect("reads");
    assert!(!flow.copying.is_finished());
    flow.server.shutdown().await.expect("closes");
    assert_eq!(soon(flow.client.read(&mut answer)).await.expect("end"), 0);
    soon(flow.copying)
        .await
        .expect("no panic")
        .expect("ends well");
    assert_eq!((flow.moved.sent(), flow.moved.received()), (8, 6));
}

#[tokio::test]
async fn a_reset_crosses_from_either_side() {
    let mut flow = joined().await;
    reset(flow.client);
    assert!(is_reset(&mut flow.server).await);
    let result = soon(flow.copying).await.expect("no panic");
    assert!(
        matches!(result, Err(Broken::Reset(Side::Client))),
        "{result:?}"
    );

    let mut flow = joined().await;
    reset(flow.server);
    assert!(is_reset(&mut flow.client).await);
    let result = soon(flow.copying).await.expect("no panic");
    assert!(
        matches!(result, Err(Broken::Reset(Side::Server))),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_reset_after_half_close_crosses() {
    let mut flow = joined().await;
    flow.client.shutdown().await.expect("closes one way");
    let mut end = [0; 1];
    assert_eq!(soon(flow.server.read(&mut end)).await.expect("end"), 0);
    reset(flow.client);
    // The server has nothing to read any more and learns it from a failing write.
    assert!(soon(flow.copying).await.expect("no panic").is_err());
    soon(async {
        while flow.server.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_reset_crosses_while_the_other_side_does_not_read() {
    let mut flow = joined().await;
    // Fill everything between the two.
    let chunk = vec![1; 1 << 20];
    while timeout(Duration::from_millis(300), flow.client.write_all(&chunk))
        .await
        .is_ok()
    {}
    reset(flow.client);
    let result = soon(flow.copying).await.expect("no panic");
    assert!(
        matches!(result, Err(Broken::Reset(Side::Client))),
        "{result:?}"
    );
    assert!(is_reset(&mut flow.server).await);
}

#[tokio::test]
async fn bytes_before_a_reset_arrive() {
    let mut flow = joined().await;
    // A server that answers and closes without having read everything resets the connection.
    flow.client.write_all(b"never read").await.expect("writes");
    soon(flow.server.readable()).await.expect("readable");
    flow.server.write_all(b"answer").await.expect("writes");
    drop(flow.server);
    let mut answer = [0; 6];
    soon(flow.client.read_exact(&mut answer))
        .await
        .expect("the answer arrives");
    assert_eq!(&answer, b"answer");
    assert!(is_reset(&mut flow.client).await);
}

#[tokio::test]
async fn a_dropped_flow_is_reset_not_closed() {
    let mut flow = joined().await;
    flow.client.write_all(b"x").await.expect("writes");
    let mut read = [0; 1];
    soon(flow.server.read_exact(&mut read))
        .await
        .expect("the flow stands");
    flow.copying.abort();
    assert!(is_reset(&mut flow.client).await);
    assert!(is_reset(&mut flow.server).await);
}

#[tokio::test]
async fn a_slow_reader_stops_the_writer_and_gets_every_byte() {
    let mut flow = joined().await;
    let total = 64 << 20;
    let mut client = flow.client;
    let writing = tokio::spawn(async move {
        let chunk: Vec<u8> = (0..=255).cycle().take(1 << 16).collect();
        for _ in 0..total / chunk.len() {
            client.write_all(&chunk).await.expect("writes");
        }
        client.shutdown().await.expect("closes");
        client
    });
    // Nobody reads: the writer must come to rest at what the sockets' own buffers hold.
    let mut before = u64::MAX;
    while before != flow.moved.sent() {
        before = flow.moved.sent();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(
        before < total as u64 / 2,
        "{before} bytes passed a reader that does not read"
    );
    let mut expected = (0..=255_u8).cycle();
    let mut buffer = vec![0; 1 << 18];
    let mut read = 0;
    loop {
        let count = soon(flow.server.read(&mut buffer)).await.expect("reads");
        if count == 0 {
            break;
        }
        assert!(
            buffer[..count]
                .iter()
                .all(|byte| Some(*byte) == expected.next())
        );
        read += count;
    }
    assert_eq!(read, total);
    let client = soon(writing).await.expect("no panic");
    drop((client, flow.server));
    soon(flow.copying)
        .await
        .expect("no panic")
        .expect("ends well");
}

#[test]
fn reads_grow_with_use_and_shrink_without() {
    let mut size = ReadSize::default();
    assert_eq!(size.bytes(), SMALLEST_READ_BYTES);
    for _ in 0..20 {
        size.was_read(size.bytes());
    }
    assert_eq!(size.bytes(), LARGEST_READ_BYTES);
    size.was_read(LARGEST_READ_BYTES / 2);
    assert_eq!(size.bytes(), LARGEST_READ_BYTES);
    for _ in 0..100 {
        size.was_read(10);
    }
    assert_eq!(size.bytes(), SMALLEST_READ_BYTES);
}
