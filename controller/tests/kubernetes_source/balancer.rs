//! A load balancer before the API server that does not notice when a server is gone: connections stay as they are, and
//! nothing comes by them, until it forgets them all.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::copy;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub(crate) struct Balancer {
    address: SocketAddr,
    /// Changes when all connections are forgotten.
    forgets: watch::Sender<()>,
    stop: CancellationToken,
}

impl Balancer {
    /// One before a server at this address.
    pub(crate) async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("bound");
        let balancer = Self {
            address: listener.local_addr().expect("bound"),
            forgets: watch::Sender::default(),
            stop: CancellationToken::new(),
        };
        let (forgets, stop) = (balancer.forgets.clone(), balancer.stop.clone());
        let accepting = async move {
            while let Ok((client, _)) = listener.accept().await {
                let mut forgotten = forgets.subscribe();
                tokio::spawn(async move {
                    tokio::select! {
                        _ = forgotten.changed() => {}
                        () = carry(client, server) => {}
                    }
                });
            }
        };
        tokio::spawn(stop.run_until_cancelled_owned(accepting));
        balancer
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Breaks all connections.
    pub(crate) fn forget(&self) {
        self.forgets.send_replace(());
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.stop.cancel();
        self.forget();
    }
}

/// Carries what comes by a connection, which outlives the server.
async fn carry(mut client: TcpStream, server: SocketAddr) {
    let mut server = loop {
        match TcpStream::connect(server).await {
            Ok(server) => break server,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    tokio::select! {
        // Whoever asks may go.
        _ = copy(&mut from_client, &mut to_server) => {}
        () = async {
            let _ = copy(&mut from_server, &mut to_client).await;
            std::future::pending().await
        } => {}
    }
}
