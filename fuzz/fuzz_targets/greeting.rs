//! What anybody who reaches port 15008 may send before a handshake is done: any bytes, in any pieces,
//! end it. Nobody is greeted who has no key.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use weft_agent::proxy::tunnel::weft1::handshake::{accept, offers};
use weft_fuzz::tls::Ends;

static ENDS: LazyLock<Ends> = LazyLock::new(Ends::new);
static RUNTIME: LazyLock<Runtime> = LazyLock::new(weft_fuzz::runtime);

fuzz_target!(|input: (u16, &[u8])| {
    let (cut, bytes) = input;
    RUNTIME.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let address = listener.local_addr().expect("an address");
        let (peer, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut peer, (mut socket, _)) = (peer.expect("connects"), accepted.expect("accepts"));
        // A reset at the end, so that no port stays taken.
        let _ = socket.set_zero_linger();
        let send = async {
            let (first, second) = bytes.split_at(usize::from(cut).min(bytes.len()));
            // The other side may have given up.
            let _ = peer.write_all(first).await;
            tokio::task::yield_now().await;
            let _ = peer.write_all(second).await;
            let _ = peer.shutdown().await;
        };
        let greet = async {
            let _ = offers(&socket, b"weft/1").await;
            let greeted = accept(ENDS.server(), &mut socket).await;
            assert!(greeted.is_err(), "nobody knows a key");
        };
        tokio::join!(send, greet);
    });
});
