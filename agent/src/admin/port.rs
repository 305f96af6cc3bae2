//! The admin port. Another program of the node may have it: then pods are served all the same, and it is tried again.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Admin, serve_port};

/// The port, and why it is not open.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    retry: Duration,
    problem: watch::Sender<Option<String>>,
}

impl Port {
    /// To be opened by [`Port::run`].
    pub fn new(address: SocketAddr) -> Arc<Port> {
        Arc::new(Port::retrying(address, RETRY))
    }

    fn retrying(address: SocketAddr, retry: Duration) -> Port {
        Port {
            address,
            retry,
            problem: watch::Sender::new(None),
        }
    }

    /// Why it is not open, where that was tried.
    pub fn problem(&self) -> Option<String> {
        self.problem.borrow().clone()
    }

    /// Opens it, as soon as nobody else has it, and serves there until `stop`.
    pub async fn run(self: Arc<Port>, admin: Arc<Admin>, stop: CancellationToken) {
        let opened = stop.run_until_cancelled(self.opened()).await;
        if let Some(listener) = opened {
            serve_port(admin, listener, stop).await;
        }
    }

    async fn opened(&self) -> TcpListener {
        loop {
            let error = match self.open() {
                Ok(listener) => {
                    if self.problem.send_replace(None).is_some() {
                        tracing::info!(address = %self.address, "the admin port is open now");
                    }
                    return listener;
                }
                Err(error) => error,
            };
            let problem = format!(
                "nothing is answered on {} (--admin): {error}; trying again",
                self.address
            );
            if self.problem.send_replace(Some(problem.clone())).is_none() {
                tracing::error!("{problem}");
            }
            tokio::time::sleep(self.retry).await;
        }
    }

    /// The agent that is to take over listens on the port while this one still does. Only processes of
    /// the same user can join so.
    fn open(&self) -> io::Result<TcpListener> {
        let socket = match self.address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        socket.bind(self.address)?;
        socket.listen(BACKLOG)
    }
}

const RETRY: Duration = Duration::from_secs(5);
const BACKLOG: u32 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    /// A listener that does not share its port keeps it from all others, and then lets it go.
    #[tokio::test]
    async fn a_taken_port_is_waited_for() {
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let retry = Duration::from_millis(50);
        let port = Arc::new(Port::retrying(other.local_addr().unwrap(), retry));
        assert_eq!(port.problem(), None);
        let opening = Arc::clone(&port);
        let opening = tokio::spawn(async move { opening.opened().await });
        let mut problem = port.problem.subscribe();
        let problem = problem.wait_for(Option::is_some).await.unwrap().clone();
        let problem = problem.unwrap();
        assert!(problem.contains("--admin"), "{problem}");
        drop(other);
        let listener = opening.await.unwrap();
        assert_eq!(listener.local_addr().unwrap(), port.address);
        assert_eq!(port.problem(), None);
    }
}
