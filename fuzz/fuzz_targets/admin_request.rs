//! What may be sent to the agent's administrative socket, which offers all that the port does and more: any
//! bytes are answered or the connection ends, and only a PUT of a log filter changes anything.
#![no_main]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use weft_agent::admin::{Admin, Facts, readiness, serve_socket};
use weft_agent::config::LogFormat;

static CHANGED: AtomicBool = AtomicBool::new(false);
static SERVED: LazyLock<(Runtime, PathBuf, TempDir)> = LazyLock::new(|| {
    let runtime = weft_fuzz::runtime();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("admin.sock");
    let log = weft_agent::log::init("off", LogFormat::Text).expect("logs");
    let admin = Admin {
        metrics: Box::new(|| "# EOF\n".to_owned()),
        recent: Box::new(|window| {
            assert!((1..=600).contains(&window.as_secs()), "{window:?}");
            "# EOF\n".to_owned()
        }),
        readiness: Box::new(|| readiness(&Facts::default())),
        dump: Box::new(|| b"{}".to_vec()),
        pods: Box::new(|| b"[]".to_vec()),
        explain: Box::new(|_| Err("no question".to_owned())),
        log_level: Box::new(|| "info".to_owned()),
        set_log_level: Box::new(move |filter| {
            CHANGED.store(true, Ordering::Relaxed);
            let set = log.set(filter).map_err(|error| error.to_string());
            // Nobody reads it here.
            log.set("off").expect("a filter");
            set
        }),
    };
    let entered = runtime.enter();
    let serving = serve_socket(Arc::new(admin), &path, CancellationToken::new()).expect("listens");
    runtime.spawn(serving);
    drop(entered);
    (runtime, path, folder)
});

fuzz_target!(|bytes: &[u8]| {
    let (runtime, path, _) = &*SERVED;
    CHANGED.store(false, Ordering::Relaxed);
    let reply = runtime.block_on(async {
        let mut socket = UnixStream::connect(path).await.expect("connects");
        // The other side may have had enough.
        let _ = socket.write_all(bytes).await;
        let _ = socket.shutdown().await;
        let mut reply = Vec::new();
        let read = socket.read_to_end(&mut reply);
        let ended = tokio::time::timeout(Duration::from_secs(10), read).await;
        assert!(ended.is_ok(), "neither answered nor ended");
        reply
    });
    assert!(reply.is_empty() || reply.starts_with(b"HTTP/1."));
    if CHANGED.load(Ordering::Relaxed) {
        // Empty lines before a request are ignored (RFC 9112, section 2.2).
        let blank = bytes.iter().take_while(|byte| b"\r\n".contains(byte));
        assert!(bytes[blank.count()..].starts_with(b"PUT "));
    }
});
