use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// A flow between two applications, looked at.
struct Scene {
    client: TcpStream,
    server: TcpStream,
    looking: tokio::task::JoinHandle<Result<Option<Begun>, FlowError>>,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let address = listener.local_addr().expect("has one");
    let one = TcpStream::connect(address).await.expect("connects");
    let (other, _) = listener.accept().await.expect("accepts");
    (one, other)
}

impl Scene {
    async fn new(declared: PortProtocol, patience: Duration) -> Self {
        let (client, arriving) = pair().await;
        let (delivering, server) = pair().await;
        let looking = tokio::spawn(async move {
            let arriving = FlowSocket::accepted(arriving);
            let mut delivering = FlowSocket::accepted(delivering);
            let look = Look {
                declared,
                requests_only: false,
                patience,
                telemetry: None,
            };
            let moved = Moved::default();
            let noted = (&moved, &mut None);
            let found = look
                .at(Client::Socket(&arriving), &mut delivering, noted)
                .await;
            // Until it is known what was passed on.
            tokio::task::yield_now().await;
            found
        });
        Self {
            client,
            server,
            looking,
        }
    }

    async fn says(&mut self, text: &str) {
        let said = self.client.write_all(text.as_bytes()).await;
        said.expect("writes");
    }

    async fn is_passed(&mut self, text: &str) {
        let mut bytes = vec![0; text.len()];
        let reading = self.server.read_exact(&mut bytes);
        let read = tokio::time::timeout(SOON, reading).await;
        read.expect("comes soon").expect("comes");
        assert_eq!(bytes, text.as_bytes());
    }

    async fn found(self) -> Result<Option<Begun>, FlowError> {
        let found = tokio::time::timeout(SOON, self.looking).await;
        found.expect("is soon known").expect("no panic")
    }

    async fn begins_with(self, text: &str) {
        let (version, first) = self.found().await.expect("works").expect("HTTP");
        assert_eq!(version, Version::Http1);
        assert_eq!(first, text.as_bytes());
    }
}

const SOON: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);
const REQUEST: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";

#[tokio::test]
async fn a_client_that_is_silent_for_long_is_looked_at() {
    let mut scene = Scene::new(PortProtocol::Detect, SHORT).await;
    tokio::time::sleep(4 * SHORT).await;
    scene.says(REQUEST).await;
    scene.begins_with(REQUEST).await;
}

#[tokio::test]
async fn what_is_waited_for_in_vain_is_passed_on_and_must_not_become_a_request() {
    let mut scene = Scene::new(PortProtocol::Detect, SHORT).await;
    scene.says("GET").await;
    scene.is_passed("GET").await;
    scene.says(" / HTTP/1.1\r\n").await;
    let found = scene.found().await;
    assert!(matches!(found, Err(FlowError::HttpInPieces)), "{found:?}");
}

#[tokio::test]
async fn what_is_doubtful_is_passed_on_at_once_and_must_not_become_a_request() {
    let mut scene = Scene::new(PortProtocol::Detect, LONG).await;
    scene.says("frob").await;
    scene.is_passed("frob").await;
    scene.says(" /").await;
    scene.is_passed(" /").await;
    scene.says(" HTTP/1.1\r\n").await;
    let found = scene.found().await;
    assert!(matches!(found, Err(FlowError::HttpInPieces)), "{found:?}");
}

#[tokio::test]
async fn no_odd_beginning_hides_a_request() {
    let blank = "\r\n".repeat(MOST_BYTES);
    for odd in [&blank, "\u{b}", "GET\u{b}", "{", "\0"] {
        let mut scene = Scene::new(PortProtocol::Detect, LONG).await;
        scene.says(odd).await;
        scene.is_passed(odd).await;
        // That is looked at too, and the rest of its line.
        scene.says(REQUEST).await;
        let found = scene.found().await;
        assert!(
            matches!(found, Err(FlowError::HttpInPieces)),
            "{:.9?}: {found:?}",
            odd
        );
    }
}

#[tokio::test]
async fn what_is_doubtful_may_become_something_else() {
    let mut scene = Scene::new(PortProtocol::Detect, LONG).await;
    scene.says("hello").await;
    scene.is_passed("hello").await;
    scene.says(" world\r\n").await;
    scene.is_passed(" world\r\n").await;
    assert!(scene.found().await.expect("works").is_none());
}

#[tokio::test]
async fn a_server_that_speaks_first_ends_it() {
    let mut scene = Scene::new(PortProtocol::Detect, LONG).await;
    scene
        .server
        .write_all(b"220 ready\r\n")
        .await
        .expect("writes");
    assert!(scene.found().await.expect("works").is_none());
    // That of HTTP/2 leaves it to the client.
    let mut scene = Scene::new(PortProtocol::Detect, LONG).await;
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    scene.server.write_all(&settings).await.expect("writes");
    tokio::time::sleep(SHORT).await;
    scene.says(REQUEST).await;
    scene.begins_with(REQUEST).await;
}

#[tokio::test]
async fn where_http_is_declared_nothing_else_passes() {
    for text in ["hello\r\n", "\0", "\u{16}\u{3}\u{1}\u{0}\u{0}\u{2}"] {
        let mut scene = Scene::new(PortProtocol::Http1, LONG).await;
        scene.says(text).await;
        let found = scene.found().await;
        assert!(
            matches!(found, Err(FlowError::NotHttp)),
            "{text:?}: {found:?}"
        );
    }
    // In pieces, in time.
    let mut scene = Scene::new(PortProtocol::Http2, LONG).await;
    scene.says("frob").await;
    tokio::time::sleep(SHORT).await;
    scene.says(&REQUEST[3..]).await;
    scene.begins_with(&format!("frob{}", &REQUEST[3..])).await;
    // And too late.
    let mut scene = Scene::new(PortProtocol::Http1, SHORT).await;
    scene.says("GET").await;
    let found = scene.found().await;
    assert!(matches!(found, Err(FlowError::NotHttp)), "{found:?}");
    let mut scene = Scene::new(PortProtocol::Http1, LONG).await;
    scene
        .server
        .write_all(b"220 ready\r\n")
        .await
        .expect("writes");
    let found = scene.found().await;
    assert!(matches!(found, Err(FlowError::NotHttp)), "{found:?}");
}

/// A server that has ended before its client began can answer nothing, so nothing is sent to it.
#[tokio::test]
async fn where_http_is_declared_a_server_that_leaves_hears_no_more() {
    let mut scene = Scene::new(PortProtocol::Http1, LONG).await;
    scene.server.shutdown().await.expect("shuts down");
    let mut server = scene.server;
    let read = tokio::time::timeout(SOON, server.read_u8()).await;
    assert!(read.expect("ends soon").is_err(), "it is told nothing");
    let found = scene.looking.await.expect("no panic");
    assert!(found.expect("works").is_none());
}
