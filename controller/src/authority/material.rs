//! What an authority is made of, wherever it is kept: the roots, the issuer's certificate and its key, as PEM.

use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose,
};
use weft_core::TrustDomain;

use super::set_validity;

/// The three parts.
#[derive(PartialEq, Eq)]
pub(super) struct Material {
    /// What they are called where they are kept.
    pub(super) names: Names,
    /// One or several certificates.
    pub(super) roots: Vec<u8>,
    /// The issuer's certificate, followed by those between it and a root, if any.
    pub(super) certificate: Vec<u8>,
    /// The key of that certificate.
    pub(super) key: Vec<u8>,
}

/// What the parts are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) roots: &'static str,
    pub(super) certificate: &'static str,
    pub(super) key: &'static str,
}

/// In a folder.
pub(super) const IN_FOLDER: Names = Names {
    roots: "ca.crt",
    certificate: "issuer.crt",
    key: "issuer.key",
};
/// In a Secret of the type `kubernetes.io/tls`.
pub(super) const IN_SECRET: Names = Names {
    roots: "ca.crt",
    certificate: "tls.crt",
    key: "tls.key",
};

/// Life of a root made here.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl Material {
    /// A new root that acts as issuer.
    ///
    /// # Errors
    /// Only if the trust domain fits into no certificate.
    pub(super) fn new(names: Names, trust_domain: &TrustDomain) -> Result<Self, rcgen::Error> {
        let key = KeyPair::generate()?;
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let name = format!("Weft root of {trust_domain}");
        params.distinguished_name.push(DnType::CommonName, name);
        // No certificate authority below it.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(super::serial());
        set_validity(&mut params, now - super::BACKDATE, now + ROOT_LIFETIME);
        let certificate = params.self_signed(&key)?.pem().into_bytes();
        Ok(Self {
            names,
            roots: certificate.clone(),
            certificate,
            key: key.serialize_pem().into_bytes(),
        })
    }
}

/// Never the key.
impl fmt::Debug for Material {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Material");
        shown.field("names", &self.names).finish_non_exhaustive()
    }
}
