//! The controller's side of TLS: version 1.3 only, a serving certificate of the authority's own,
//! renewed without closing anything.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::strangers::{Doors, Guarded};
use crate::authority::Authority;
use crate::telemetry::{Metrics, Refused};

/// The serving certificate in force.
#[derive(Debug, Default)]
pub struct Serving(ArcSwapOption<CertifiedKey>);

/// Clients that take longer for a handshake are dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// After a failure to renew.
const RETRY: Duration = Duration::from_secs(10);

impl Serving {
    /// Makes and installs a certificate. Returns when it ends.
    ///
    /// # Errors
    /// The authority cannot sign, or its key is not usable for TLS.
    pub fn renew(&self, authority: &Authority, name: &str) -> anyhow::Result<SystemTime> {
        let (signed, key) = authority.serving(name)?;
        let provider = aws_lc_rs::default_provider();
        let certified = CertifiedKey::from_der(signed.chain, key, &provider)?;
        self.0.store(Some(Arc::new(certified)));
        Ok(signed.not_after)
    }

    /// Whether agents can be served.
    pub fn has_certificate(&self) -> bool {
        self.0.load().is_some()
    }

    /// Renews at half of the certificate's life, and when the issuer changes; without one, when there is one.
    pub async fn keep(&self, authority: &Authority, name: &str, mut not_after: SystemTime) {
        let mut changes = authority.changes();
        if !self.has_certificate() {
            // It may have come already.
            changes.mark_changed();
        }
        loop {
            let left = not_after.duration_since(SystemTime::now());
            let half = left.unwrap_or_default() / 2;
            tokio::select! {
                () = tokio::time::sleep(half.max(RETRY)) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
            if !authority.has_issuer() {
                continue;
            }
            match self.renew(authority, name) {
                Ok(renewed) => not_after = renewed,
                Err(error) => tracing::error!(%error, "cannot renew the serving certificate"),
            }
        }
    }

    /// The configuration for the listener.
    ///
    /// # Errors
    /// Never with the crypto library that is built in.
    pub fn config(self: &Arc<Self>) -> anyhow::Result<Arc<ServerConfig>> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

/// Accepts connections and hands over those whose handshake succeeded.
pub(super) async fn accept(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    metrics: Arc<Metrics>,
    accepted: mpsc::Sender<std::io::Result<Guarded<TlsStream<TcpStream>>>>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(config);
    let doors = Arc::new(Doors::default());
    loop {
        let connection = tokio::select! {
            () = stop.cancelled() => return,
            connection = listener.accept() => connection,
        };
        let (stream, peer) = match connection {
            Ok(connection) => connection,
            Err(error) => {
                // Out of descriptors, mostly: give others a moment to go.
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, accepted, metrics) = (acceptor.clone(), accepted.clone(), metrics.clone());
        let seat = doors.enter(peer.ip());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream));
            let handshake = tokio::select! {
                handshake = handshake => handshake,
                () = seat.leave.cancelled() => {
                    metrics.refused(Refused::Handshake);
                    return;
                }
            };
            match handshake {
                Ok(Ok(stream)) => {
                    let _ = accepted.send(Ok(Guarded::new(stream, seat))).await;
                }
                Ok(Err(error)) => {
                    metrics.refused(Refused::Handshake);
                    tracing::debug!(%peer, %error, "the TLS handshake failed");
                }
                Err(_) => {
                    metrics.refused(Refused::Handshake);
                    tracing::debug!(%peer, "the TLS handshake took too long");
                }
            }
        });
    }
}
