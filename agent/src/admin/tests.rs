//! Over real sockets, with requests written by hand.

use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::*;

struct World {
    admin: Arc<Admin>,
    stop: CancellationToken,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let level = Arc::new(Mutex::new("info".to_owned()));
        let reader = Arc::clone(&level);
        let admin = Admin {
            metrics: Box::new(|| "up 1\n# EOF\n".to_owned()),
            recent: Box::new(|it| format!("covered {}\n# EOF\n", it.as_secs())),
            readiness: Box::new(|| readiness(&Facts::default())),
            dump: Box::new(|| b"{\"pods\": []}".to_vec()),
            pods: Box::new(|| b"[]".to_vec()),
            explain: Box::new(|query| Err(format!("no pod in {query}"))),
            log_level: Box::new(move || reader.lock().unwrap().clone()),
            set_log_level: Box::new(move |filter| {
                if filter == "nonsense" {
                    return Err("no filter".to_owned());
                }
                filter.clone_into(&mut level.lock().unwrap());
                Ok(())
            }),
        };
        Self {
            admin: Arc::new(admin),
            stop: CancellationToken::new(),
            directory: tempfile::tempdir().expect("a directory"),
        }
    }

    async fn port(&self) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let address = listener.local_addr().expect("bound");
        let admin = Arc::clone(&self.admin);
        tokio::spawn(serve_port(admin, listener, self.stop.clone()));
        address
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("run/agent.sock")
    }

    fn serve_socket(&self, stop: &CancellationToken) -> tokio::task::JoinHandle<()> {
        let admin = Arc::clone(&self.admin);
        let serving = serve_socket(admin, &self.socket(), stop.clone());
        tokio::spawn(serving.expect("opens"))
    }

    async fn ask_socket(&self, request: &str) -> String {
        let stream = UnixStream::connect(self.socket()).await.expect("connects");
        ask(stream, request).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
    let exchange = async {
        // The server may answer and close before it has read all of it.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut response = Vec::new();
        let _ = stream.read_to_end(&mut response).await;
        String::from_utf8(response).expect("text")
    };
    timeout(Duration::from_secs(10), exchange)
        .await
        .expect("in time")
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: agent\r\n\r\n")
}

fn put(path: &str, body: &str) -> String {
    let length = body.len();
    format!("PUT {path} HTTP/1.1\r\nhost: agent\r\ncontent-length: {length}\r\n\r\n{body}")
}

fn status(response: &str) -> &str {
    response.split(' ').nth(1).unwrap_or_default()
}

#[tokio::test]
async fn the_port_tells_and_changes_nothing() {
    let world = World::new();
    let address = world.port().await;
    for (request, expected, content) in [
        (get("/metrics"), "200", "up 1"),
        (get("/live"), "200", "alive"),
        (get("/recent?seconds=60"), "404", ""),
        (get("/ready"), "503", "\"ready\": false"),
        (get("/ready?verbose"), "503", "not everything was received"),
        (get("/config_dump"), "404", ""),
        (get("/log_level"), "404", ""),
        (put("/log_level", "debug"), "404", ""),
        (put("/ready", "x"), "405", "allow: GET, HEAD"),
        (get("/"), "404", ""),
        (get("/../config_dump"), "404", ""),
        ("nonsense\r\n\r\n".to_owned(), "400", ""),
    ] {
        let stream = TcpStream::connect(address).await.expect("connects");
        let response = ask(stream, &request).await;
        assert_eq!(status(&response), expected, "{request} {response}");
        assert!(response.contains(content), "{request} {response}");
    }
}

#[tokio::test]
async fn readiness_becomes_200() {
    let mut world = World::new();
    let admin = Arc::get_mut(&mut world.admin).expect("not shared yet");
    admin.readiness = Box::new(|| {
        readiness(&Facts {
            standing: crate::bpf::Standing::Owner,
            complete: true,
            connected: true,
            knowledge_age: Some(Duration::ZERO),
            ..Facts::default()
        })
    });
    let address = world.port().await;
    let stream = TcpStream::connect(address).await.expect("connects");
    let response = ask(stream, &get("/ready")).await;
    assert_eq!(status(&response), "200", "{response}");
    assert!(response.contains("\"knowledge_age_seconds\": 0.0"));
}

#[tokio::test]
async fn what_is_too_large_is_refused() {
    let world = World::new();
    let address = world.port().await;
    let _serving = world.serve_socket(&world.stop);
    let header = format!("GET /live HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(64 * 1024));
    let stream = TcpStream::connect(address).await.expect("connects");
    assert_ne!(status(&ask(stream, &header).await), "200");
    let body = world
        .ask_socket(&put("/log_level", &"x".repeat(8192)))
        .await;
    assert_ne!(status(&body), "200");
    assert_eq!((world.admin.log_level)(), "info");
}

#[tokio::test]
async fn the_socket_dumps_and_sets_the_log_level() {
    let world = World::new();
    let _serving = world.serve_socket(&world.stop);
    for (request, expected, content) in [
        (get("/config_dump"), "200", "\"pods\": []"),
        (get("/log_level"), "200", "info"),
        (
            put("/log_level", "weft_agent=debug\n"),
            "200",
            "weft_agent=debug",
        ),
        (put("/log_level", "nonsense"), "400", "no filter"),
        (put("/log_level", ""), "400", ""),
        (get("/log_level"), "200", "weft_agent=debug"),
        (put("/config_dump", "x"), "405", ""),
        (get("/metrics"), "200", "up 1"),
        (get("/ready"), "503", "\"pid\": "),
        (get("/live"), "200", "alive"),
        (get("/nothing"), "404", ""),
    ] {
        let response = world.ask_socket(&request).await;
        assert_eq!(status(&response), expected, "{request} {response}");
        assert!(response.contains(content), "{request} {response}");
    }
}

/// What probes and operators run in the agent's container.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_says_what_the_socket_says() {
    let world = World::new();
    let socket = world.socket();
    let asked = move |path: &str, body: Option<&str>| {
        tokio::task::block_in_place(|| super::ask(&socket, path, body)).map_err(|it| it.to_string())
    };
    let error = asked("/live", None).unwrap_err();
    assert!(error.contains("is an agent running"), "{error}");
    let _serving = world.serve_socket(&world.stop);
    assert_eq!(asked("/live", None).as_deref(), Ok("alive\n"));
    assert_eq!(asked("/metrics", None).as_deref(), Ok("up 1\n# EOF\n"));
    let set = asked("/log_level", Some("weft_agent=debug"));
    assert_eq!(set.as_deref(), Ok("weft_agent=debug\n"));
    for (path, body, expected) in [
        ("/ready", None, "503: {"),
        ("/nothing", None, "404: no such page"),
        ("/log_level", Some("nonsense"), "400: no filter"),
        ("ready", None, "is no path"),
        ("/live HTTP/1.1\r\nx: y", None, "is no path"),
    ] {
        let error = asked(path, body).unwrap_err();
        assert!(error.contains(expected), "{path}: {error}");
    }
}

#[tokio::test]
async fn the_socket_is_private_and_its_file_is_replaced_safely() {
    let world = World::new();
    let path = world.socket();
    let parent = path.parent().expect("has one");
    std::fs::create_dir(parent).expect("makes");
    // An agent that was killed leaves its socket.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("binds"));
    let first_stop = CancellationToken::new();
    let first = world.serve_socket(&first_stop);
    let mode = std::fs::metadata(&path)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(status(&world.ask_socket(&get("/config_dump")).await), "200");
    // The next agent takes its place while it drains, and stays when it goes.
    let second_stop = CancellationToken::new();
    let second = world.serve_socket(&second_stop);
    first_stop.cancel();
    first.await.expect("ends");
    assert_eq!(status(&world.ask_socket(&get("/config_dump")).await), "200");
    second_stop.cancel();
    second.await.expect("ends");
    assert!(std::fs::read_dir(parent).expect("there").next().is_none());
    // What is no socket is not touched.
    std::fs::write(&path, "precious").expect("writes");
    let admin = Arc::clone(&world.admin);
    assert!(serve_socket(admin, &path, CancellationToken::new()).is_err());
    assert_eq!(std::fs::read_to_string(&path).expect("there"), "precious");
    std::fs::remove_file(&path).expect("there");
    std::os::unix::fs::symlink("/dev/null", &path).expect("links");
    let admin = Arc::clone(&world.admin);
    assert!(serve_socket(admin, &path, CancellationToken::new()).is_err());
}
