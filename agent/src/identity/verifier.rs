//! Who is believed: chains to the roots of the trust bundle in force, for workloads of its trust
//! domain, whatever the address that they are met at.
//!
//! rustls' own verifiers do the chain, the validity and the purpose. Names of hosts mean nothing
//! here: the caller compares the peer's identity with the one it expects, after every handshake.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use weft_core::{Identity, TrustBundle, TrustDomain};

use super::IdentityError;
use super::certificate::Leaf;
use super::tls;

/// Verifies peers, in both roles.
#[derive(Debug)]
pub(super) struct Verifier {
    trust_domain: TrustDomain,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    algorithms: WebPkiSupportedAlgorithms,
}

#[derive(Clone, Copy)]
enum Role {
    Client,
    Server,
}

/// Whether a bundle can be used: it has roots, and each is a certificate.
///
/// # Errors
/// What is wrong with it.
pub fn check_roots(bundle: &TrustBundle) -> Result<(), IdentityError> {
    roots(bundle).map(drop)
}

impl Verifier {
    /// A verifier of what the bundle vouches for.
    pub(super) fn new(bundle: &TrustBundle) -> Result<Arc<Self>, IdentityError> {
        let roots = Arc::new(roots(bundle)?);
        let provider = tls::provider();
        let algorithms = provider.signature_verification_algorithms;
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider)
            .build()
            .map_err(unusable)?;
        Ok(Arc::new(Self {
            trust_domain: bundle.trust_domain.clone(),
            roots,
            clients,
            algorithms,
        }))
    }

    /// Whether peers with the same bundle will believe this chain, in both roles, and as whom.
    pub(super) fn believes(&self, chain: &[CertificateDer<'_>]) -> Result<Identity, IdentityError> {
        let (leaf, rest) = chain.split_first().ok_or(IdentityError::NoCertificate)?;
        let now = UnixTime::now();
        let refused = |error: Error| IdentityError::Certificate(error.to_string());
        self.verify_client_cert(leaf, rest, now).map_err(refused)?;
        self.verify_server(leaf, rest, now).map_err(refused)?;
        Ok(Leaf::read(leaf)?.identity)
    }

    /// Whether the roots vouch for a chain that was valid at a time: for connections that outlive
    /// their certificates.
    pub(super) fn vouches(&self, chain: &[CertificateDer<'_>], at: UnixTime) -> bool {
        chain.split_first().is_some_and(|(leaf, rest)| {
            self.verify_client_cert(leaf, rest, at).is_ok()
                || self.verify_server(leaf, rest, at).is_ok()
        })
    }

    fn verify_server(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let (roots, algorithms) = (&self.roots, self.algorithms.all);
        verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)?;
        self.check(leaf, Role::Server)
    }

    /// What SPIFFE demands beyond a good chain. A certificate that says nothing of its purpose
    /// passes the chain's check, but not this one.
    fn check(&self, leaf: &CertificateDer<'_>, role: Role) -> Result<(), Error> {
        let leaf = Leaf::read(leaf).map_err(other)?;
        let purpose = match role {
            Role::Client => leaf.client_auth,
            Role::Server => leaf.server_auth,
        };
        if !purpose {
            return Err(CertificateError::InvalidPurpose.into());
        }
        if leaf.identity.trust_domain != self.trust_domain {
            let (identity, domain) = (&leaf.identity, &self.trust_domain);
            let reason = format!("{identity} is not of the trust domain {domain}");
            return Err(other(IdentityError::Certificate(reason)));
        }
        Ok(())
    }
}

impl ClientCertVerifier for Verifier {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    /// No hints: each side has one certificate only, and the roots are nobody else's business.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .clients
            .verify_client_cert(end_entity, intermediates, now)?;
        self.check(end_entity, Role::Client)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls13_only())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify_server(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(tls13_only())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn roots(bundle: &TrustBundle) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for root in &bundle.roots {
        let root = CertificateDer::from(root.as_slice());
        roots.add(root.into_owned()).map_err(unusable)?;
    }
    if roots.is_empty() {
        return Err(IdentityError::TrustBundle("it has no roots".to_owned()));
    }
    Ok(roots)
}

fn unusable(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::TrustBundle(error.to_string())
}

fn other(error: IdentityError) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

fn tls13_only() -> Error {
    Error::General("only TLS 1.3 is spoken".to_owned())
}
