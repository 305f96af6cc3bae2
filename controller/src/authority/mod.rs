//! The mesh's certificate authority: signs short-lived certificates that say which service account
//! a workload runs as. *Whether* it may sign for somebody is decided by its caller.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;
use weft_core::{Identity, TrustBundle, TrustDomain};
use x509_parser::prelude::{FromDer, X509CertificationRequest};

use crate::objects::Fault;
use crate::problems::{Problem, Problems, Scope};
pub use issuer::IssuerError;
use issuer::{Loaded, Root};

mod files;
mod issuer;

/// The certificate authority.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    trust_domain: TrustDomain,
    lifetime: Duration,
    problems: Problems,
    loaded: ArcSwapOption<Loaded>,
    generation: watch::Sender<u64>,
}

/// A signed certificate.
#[derive(Debug)]
pub struct Signed {
    /// DER certificates, leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// When it ends.
    pub not_after: SystemTime,
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request is not one.
    #[error("the signing request is refused: {0}")]
    Request(String),
    /// The issuer is at its end: a certificate would hardly be valid.
    #[error("the issuer's certificate expires: replace it")]
    IssuerExpires,
    /// The signing itself failed.
    #[error("signing failed: {0}")]
    Signing(#[from] rcgen::Error),
}

/// Certificates are valid from a moment before they are made, for clocks that are behind. Those
/// of a very short life less so: half of a life is when they are renewed.
const BACKDATE: Duration = Duration::from_secs(60);
/// Less of the issuer's life than this is not worth a certificate, unless it is asked for.
const SHORTEST_LIFE: Duration = Duration::from_secs(60);
/// Life of the certificate of the controller's own listener.
const SERVING_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Larger requests are no sensible ones.
const MAX_REQUEST_BYTES: usize = 8 * 1024;

impl Authority {
    /// Opens the authority's folder; makes a root that acts as issuer if there is none.
    ///
    /// # Errors
    /// What is there cannot be used, or nothing can be written.
    pub fn open(
        folder: PathBuf,
        trust_domain: TrustDomain,
        lifetime: Duration,
        problems: Problems,
    ) -> Result<Self, IssuerError> {
        if files::make(&folder, &trust_domain)? {
            tracing::info!(folder = %folder.display(), "made a root certificate");
        }
        let loaded = Loaded::read(&folder, &trust_domain)?;
        Ok(Self {
            folder,
            trust_domain,
            lifetime,
            problems,
            loaded: ArcSwapOption::from_pointee(loaded),
            generation: watch::Sender::new(0),
        })
    }

    /// Reads the files again if they changed. What cannot be used is reported, and what was in
    /// force stays.
    pub fn reload(&self) {
        let now = self.loaded.load_full();
        self.report_roots();
        let problems = match now.map_or(Ok(true), |it| it.is_stale(&self.folder)) {
            Ok(false) => return,
            Ok(true) => match Loaded::read(&self.folder, &self.trust_domain) {
                Ok(loaded) => {
                    tracing::info!(issuer = %loaded.subject, "loaded the issuer anew");
                    self.loaded.store(Some(Arc::new(loaded)));
                    self.generation.send_modify(|it| *it += 1);
                    vec![]
                }
                Err(error) => vec![self.problem(&error)],
            },
            Err(error) => vec![self.problem(&error)],
        };
        self.problems.replace(Scope::Authority, problems);
    }

    /// Reports roots that agents are not told, as they are not valid now.
    fn report_roots(&self) {
        let now = SystemTime::now();
        let loaded = self.loaded.load();
        let roots = loaded.iter().flat_map(|it| &it.roots);
        let problem = |root: &Root| {
            let fault = Fault::new("", format!("{} is expired, or not valid yet", root.subject));
            let file = self.folder.join(files::ROOTS).display().to_string();
            Problem::of_file(file, None, fault, "it vouches for nobody")
        };
        let invalid = roots.filter(|it| !it.is_valid(now)).map(problem).collect();
        self.problems.replace(Scope::Roots, invalid);
    }

    fn problem(&self, error: &IssuerError) -> Problem {
        let folder = self.folder.display().to_string();
        let fault = Fault::new("", error);
        Problem::of_file(
            folder,
            None,
            fault,
            "the issuer and roots before stay in force",
        )
    }

    /// Changes whenever issuer or roots do.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// The roots that vouch for identities now. With none left nobody is believed anyway, as no
    /// certificate outlives its root.
    pub fn trust_bundle(&self) -> TrustBundle {
        let now = SystemTime::now();
        let loaded = self.loaded.load();
        let roots = loaded.iter().flat_map(|it| it.roots.iter());
        let roots = roots.filter(|it| it.is_valid(now));
        TrustBundle {
            trust_domain: self.trust_domain.clone(),
            roots: roots.map(|it| it.der.to_vec()).collect(),
        }
    }

    /// When the issuer's certificate ends.
    pub fn issuer_not_after(&self) -> Option<SystemTime> {
        self.loaded.load().as_ref().map(|it| it.not_after)
    }

    /// Signs a certificate for an identity. Of the request (PKCS #10, DER) only the key is used,
    /// after it proved to be the requester's.
    ///
    /// # Errors
    /// See [`SignError`].
    pub fn sign(&self, request: &[u8], identity: &Identity) -> Result<Signed, SignError> {
        let key = requested_key(request)?;
        let uri = identity.to_string();
        let uri = uri.try_into().map_err(SignError::Signing)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        self.issue(params, &key, self.lifetime)
    }

    /// Makes a certificate, with a new key, for the controller's own listener.
    ///
    /// # Errors
    /// See [`SignError`].
    pub fn serving(&self, name: &str) -> Result<(Signed, PrivateKeyDer<'static>), SignError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let dns = name.to_owned().try_into().map_err(SignError::Signing)?;
        params.subject_alt_names = vec![SanType::DnsName(dns)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let signed = self.issue(params, &key, SERVING_LIFETIME)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok((signed, PrivateKeyDer::Pkcs8(key)))
    }

    fn issue(
        &self,
        mut params: CertificateParams,
        key: &impl PublicKeyData,
        lifetime: Duration,
    ) -> Result<Signed, SignError> {
        let loaded = self.loaded.load_full().ok_or(SignError::IssuerExpires)?;
        let now = SystemTime::now();
        let not_before = (now - BACKDATE.min(lifetime / 10)).max(loaded.not_before);
        let not_after = (now + lifetime).min(loaded.not_after);
        if now < loaded.not_before || not_after < now + SHORTEST_LIFE.min(lifetime) {
            return Err(SignError::IssuerExpires);
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        files::set_validity(&mut params, not_before, not_after);
        let leaf = params.signed_by(key, &loaded.issuer)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(loaded.intermediates.iter().cloned());
        Ok(Signed { chain, not_after })
    }
}

/// The key of a signing request that is signed by it: P-256, P-384 or Ed25519.
fn requested_key(request: &[u8]) -> Result<SubjectPublicKeyInfo, SignError> {
    let refuse = |reason: &str| SignError::Request(reason.to_owned());
    if request.len() > MAX_REQUEST_BYTES {
        return Err(refuse("too large"));
    }
    let (rest, parsed) = X509CertificationRequest::from_der(request)
        .map_err(|_| refuse("not a PKCS #10 request in DER"))?;
    if !rest.is_empty() {
        return Err(refuse("bytes after its end"));
    }
    let key = SubjectPublicKeyInfo::from_der(parsed.certification_request_info.subject_pki.raw)
        .map_err(|_| refuse("its kind of key is not supported"))?;
    let allowed = [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
    ];
    if !allowed.contains(&key.algorithm()) {
        return Err(refuse("its key is none of P-256, P-384 and Ed25519"));
    }
    parsed
        .verify_signature()
        .map_err(|_| refuse("its signature is not by its key"))?;
    Ok(key)
}

/// A random serial number: 16 bytes, positive, as RFC 5280 (section 4.1.2.2) allows.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests;
