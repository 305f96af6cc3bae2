//! TLS configurations of the tunnels: TLS 1.3 only, AES-GCM only, post-quantum key exchange preferred,
//! certificates from both sides, and nothing that could skip the handshake.
//!
//! No resumption, no tickets, no early data: the peer's certificate is seen in every handshake.

use std::sync::{Arc, LazyLock};

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, Error, ServerConfig};

use super::Alpn;
use super::verifier::Verifier;

/// The configurations of one identity.
#[derive(Clone, Debug)]
pub(super) struct Configs {
    pub(super) weft: Arc<ClientConfig>,
    pub(super) weft_h2: Arc<ClientConfig>,
    pub(super) hbone: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
    pub(super) weft_server: Arc<ServerConfig>,
}

impl Configs {
    /// Builds them from one certificate with its key, and one verifier.
    pub(super) fn new(key: &Arc<CertifiedKey>, verifier: &Arc<Verifier>) -> Result<Self, Error> {
        let own = Arc::new(SingleCertAndKey::from(Arc::clone(key)));
        Ok(Self {
            // Offers the other one too: a peer that speaks no `weft/1` says so by choosing it.
            weft: client(&own, verifier, &[Alpn::Weft, Alpn::WeftH2])?,
            weft_h2: client(&own, verifier, &[Alpn::WeftH2])?,
            hbone: client(&own, verifier, &[Alpn::Hbone])?,
            server: server(&own, verifier, &[Alpn::WeftH2, Alpn::Hbone])?,
            weft_server: server(&own, verifier, &[Alpn::Weft])?,
        })
    }
}

/// What cryptography is used.
pub(super) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_128_GCM_SHA256,
                cipher_suite::TLS13_AES_256_GCM_SHA384,
            ],
            kx_groups: vec![
                kx_group::X25519MLKEM768,
                kx_group::X25519,
                kx_group::SECP256R1,
            ],
            ..default_provider()
        })
    });
    Arc::clone(&PROVIDER)
}

fn client(
    own: &Arc<SingleCertAndKey>,
    verifier: &Arc<Verifier>,
    protocols: &[Alpn],
) -> Result<Arc<ClientConfig>, Error> {
    let verifier: Arc<Verifier> = Arc::clone(verifier);
    let own: Arc<SingleCertAndKey> = Arc::clone(own);
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(own);
    config.alpn_protocols = names(protocols);
    // Whoever speaks `weft/1` makes TLS's records without rustls.
    config.enable_secret_extraction = protocols.contains(&Alpn::Weft);
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Ok(Arc::new(config))
}

fn server(
    own: &Arc<SingleCertAndKey>,
    verifier: &Arc<Verifier>,
    protocols: &[Alpn],
) -> Result<Arc<ServerConfig>, Error> {
    let verifier: Arc<Verifier> = Arc::clone(verifier);
    let own: Arc<SingleCertAndKey> = Arc::clone(own);
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(own);
    config.alpn_protocols = names(protocols);
    config.enable_secret_extraction = protocols.contains(&Alpn::Weft);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

fn names(protocols: &[Alpn]) -> Vec<Vec<u8>> {
    let names = protocols.iter().map(|it| it.as_bytes().to_vec());
    names.collect()
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
