//! The mesh's certificate authority: signs short-lived certificates that say which service account
//! a workload runs as. *Whether* it may sign for somebody is decided by its caller.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use pem::{EncodeConfig, LineEnding, Pem};
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
use files::Stamps;
pub use issuer::IssuerError;
use issuer::{Loaded, Root};
use material::{IN_FOLDER, IN_SECRET, Material};
pub use roots::RootsConfigMap;
pub use secret::IssuerSecret;

mod files;
mod issuer;
mod material;
mod roots;
pub(crate) mod secret;

/// The certificate authority.
#[derive(Debug)]
pub struct Authority {
    place: Place,
    trust_domain: TrustDomain,
    lifetime: Duration,
    problems: Problems,
    loaded: ArcSwapOption<Loaded>,
    generation: watch::Sender<u64>,
}

/// Where the issuer and the roots are kept.
#[derive(Debug)]
enum Place {
    /// In files, which are looked at again.
    Folder(PathBuf, Mutex<Option<Stamps>>),
    /// Elsewhere, by this name: whoever knows brings them.
    Elsewhere(String),
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
    /// There never was an issuer that can be used.
    #[error("there is no issuer yet")]
    NoIssuer,
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
        // Before the content: a change in between is then seen as one.
        let stamps = Stamps::of(&folder)?;
        let loaded = Loaded::check(files::read(&folder)?, &trust_domain)?;
        let place = Place::Folder(folder, Mutex::new(Some(stamps)));
        let authority = Self::without_issuer(place, trust_domain, lifetime, problems);
        authority.loaded.store(Some(Arc::new(loaded)));
        Ok(authority)
    }

    /// An authority whose issuer is kept elsewhere, in what this names, and is yet to be brought.
    pub fn awaiting(
        place: String,
        trust_domain: TrustDomain,
        lifetime: Duration,
        problems: Problems,
    ) -> Self {
        let place = Place::Elsewhere(place);
        Self::without_issuer(place, trust_domain, lifetime, problems)
    }

    fn without_issuer(
        place: Place,
        trust_domain: TrustDomain,
        lifetime: Duration,
        problems: Problems,
    ) -> Self {
        Self {
            place,
            trust_domain,
            lifetime,
            problems,
            loaded: ArcSwapOption::empty(),
            generation: watch::Sender::new(0),
        }
    }

    /// Whether there is an issuer.
    pub fn has_issuer(&self) -> bool {
        self.loaded.load().is_some()
    }

    /// Reads the files again if they changed. What cannot be used is reported, and what was in
    /// force stays.
    pub fn reload(&self) {
        self.report_roots();
        let Place::Folder(folder, seen) = &self.place else {
            return;
        };
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let read = match Stamps::of(folder) {
            Ok(stamps) if seen.as_ref() == Some(&stamps) => return,
            Ok(stamps) => files::read(folder).map(|it| (stamps, it)),
            Err(error) => Err(error),
        };
        match read {
            Ok((stamps, material)) => {
                if self.bring(material) {
                    *seen = Some(stamps);
                }
            }
            Err(error) => self.report(&error),
        }
    }

    /// Takes an issuer into force, if it can be used; else that is reported, and what was in force stays.
    fn bring(&self, material: Material) -> bool {
        let in_force = self.loaded.load();
        if in_force.as_ref().is_some_and(|it| it.material == material) {
            self.problems.replace(Scope::Authority, vec![]);
            return true;
        }
        match Loaded::check(material, &self.trust_domain) {
            Ok(loaded) => {
                tracing::info!(issuer = %loaded.subject, "loaded the issuer");
                self.loaded.store(Some(Arc::new(loaded)));
                self.generation.send_modify(|it| *it += 1);
                self.problems.replace(Scope::Authority, vec![]);
                true
            }
            Err(error) => {
                self.report(&error);
                false
            }
        }
    }

    fn report(&self, fault: &dyn std::fmt::Display) {
        let problem = self.problem(fault);
        self.problems.replace(Scope::Authority, vec![problem]);
    }

    /// Reports roots that agents are not told, as they are not valid now.
    fn report_roots(&self) {
        let now = SystemTime::now();
        let loaded = self.loaded.load();
        let roots = loaded.iter().flat_map(|it| &it.roots);
        let problem = |root: &Root| {
            let fault = Fault::new("", format!("{} is expired, or not valid yet", root.subject));
            Problem::of_file(self.place.roots(), None, fault, "it vouches for nobody")
        };
        let invalid = roots.filter(|it| !it.is_valid(now)).map(problem).collect();
        self.problems.replace(Scope::Roots, invalid);
    }

    fn problem(&self, fault: &dyn std::fmt::Display) -> Problem {
        let place = match &self.place {
            Place::Folder(folder, _) => folder.display().to_string(),
            Place::Elsewhere(name) => name.clone(),
        };
        let effect = match self.has_issuer() {
            true => "the issuer and roots before stay in force",
            false => "nobody can connect, and nothing is signed, until it is there",
        };
        Problem::of_file(place, None, Fault::new("", fault), effect)
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

    /// The same as PEM; none, if there are none.
    pub fn roots_as_pem(&self) -> Option<String> {
        let roots = self.trust_bundle().roots;
        let pem = roots.iter().map(|it| pem(it)).collect::<String>();
        (!pem.is_empty()).then_some(pem)
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
        let loaded = self.loaded.load_full().ok_or(SignError::NoIssuer)?;
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
        set_validity(&mut params, not_before, not_after);
        let leaf = params.signed_by(key, &loaded.issuer)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(loaded.intermediates.iter().cloned());
        Ok(Signed { chain, not_after })
    }
}

impl Place {
    /// Where the roots are.
    fn roots(&self) -> String {
        match self {
            Self::Folder(folder, _) => folder.join(IN_FOLDER.roots).display().to_string(),
            Self::Elsewhere(name) => format!("{name}, {}", IN_SECRET.roots),
        }
    }
}

/// A certificate as text (RFC 7468).
fn pem(der: &[u8]) -> String {
    let certificate = Pem::new("CERTIFICATE", der);
    let lines = EncodeConfig::new().set_line_ending(LineEnding::LF);
    pem::encode_config(&certificate, lines)
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

/// Sets from when to when a certificate is valid, in whole seconds.
fn set_validity(params: &mut CertificateParams, not_before: SystemTime, not_after: SystemTime) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    // Before 1970 only if the clock is absurd; then nothing would be valid anyway.
    let since = |moment: SystemTime| {
        let since = moment.duration_since(SystemTime::UNIX_EPOCH);
        Duration::from_secs(since.unwrap_or_default().as_secs())
    };
    params.not_before = epoch + since(not_before);
    params.not_after = epoch + since(not_after);
}

/// A random serial number: 16 bytes, positive, as RFC 5280 (section 4.1.2.2) allows.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests;
