//! A certificate authority for tests.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use weft_core::TrustBundle;

use super::tls::provider;

pub(crate) const WORKLOAD_URI: &str = "spiffe://cluster.local/ns/shop/sa/web";
pub(crate) const WEB: &str = WORKLOAD_URI;

pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

pub(crate) struct IssuedLeaf {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: KeyPair,
    pub(crate) pem: String,
}

impl IssuedLeaf {
    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).expect("a key");
        let key = provider()
            .key_provider
            .load_private_key(key)
            .expect("loads");
        Arc::new(CertifiedKey::new(self.chain.clone(), key))
    }
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("signs");
        Self { issuer }
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    pub(crate) fn bundle(&self) -> TrustBundle {
        TrustBundle {
            trust_domain: "cluster.local".parse().expect("valid"),
            roots: vec![self.certificate().to_vec()],
        }
    }

    pub(crate) fn leaf(&self, uri: &str) -> IssuedLeaf {
        self.leaf_with(|params| params.subject_alt_names = names(&[uri], &[]))
    }

    /// A good leaf for one day, as changed.
    pub(crate) fn leaf_with(&self, change: impl FnOnce(&mut CertificateParams)) -> IssuedLeaf {
        let key = KeyPair::generate().expect("a key");
        let mut params = leaf_params();
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).expect("signs");
        let chain = vec![leaf.der().clone()];
        let pem = leaf.pem();
        IssuedLeaf { chain, key, pem }
    }

    /// Signs a request's key as the controller does.
    pub(crate) fn sign(
        &self,
        request: &[u8],
        uri: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Vec<CertificateDer<'static>> {
        let request = rustls_pki_types::CertificateSigningRequestDer::from(request);
        let request = rcgen::CertificateSigningRequestParams::from_der(&request).expect("reads");
        let mut params = leaf_params();
        params.subject_alt_names = names(&[uri], &[]);
        change(&mut params);
        let leaf = params
            .signed_by(&request.public_key, &self.issuer)
            .expect("signs");
        vec![leaf.der().clone()]
    }
}

/// The configurations of `weft/1` of a workload with that name.
pub(crate) fn weft_configs(
    authority: &Authority,
    uri: &str,
) -> (Arc<rustls::ClientConfig>, Arc<rustls::ServerConfig>) {
    let verifier = super::verifier::Verifier::new(&authority.bundle()).expect("good roots");
    let leaf = authority.leaf(uri);
    let configs = super::tls::Configs::new(&leaf.certified(), &verifier).expect("builds");
    (configs.weft, configs.weft_server)
}

fn leaf_params() -> CertificateParams {
    let now = std::time::SystemTime::now();
    let mut params = CertificateParams::default();
    params.subject_alt_names = names(&[WEB], &[]);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let hour = std::time::Duration::from_secs(3600);
    params.not_before = (now - hour).into();
    params.not_after = (now + 24 * hour).into();
    params
}

pub(crate) fn names(uris: &[&str], dns: &[&str]) -> Vec<SanType> {
    let uri = |it: &&str| SanType::URI((*it).try_into().expect("ASCII"));
    let dns_name = |it: &&str| SanType::DnsName((*it).try_into().expect("ASCII"));
    let uris = uris.iter().map(uri);
    uris.chain(dns.iter().map(dns_name)).collect()
}
