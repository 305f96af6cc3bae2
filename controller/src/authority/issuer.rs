//! The issuer and the roots, read and checked.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, PublicKeyData, SanType};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use weft_core::TrustDomain;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::material::{Material, Names};
use super::set_validity;

/// What can be used.
pub(super) struct Loaded {
    pub(super) issuer: Issuer<'static, KeyPair>,
    /// Whom the issuer's certificate names.
    pub(super) subject: String,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    /// What leads from a leaf to a root: the issuer and those above it, without roots.
    pub(super) intermediates: Vec<CertificateDer<'static>>,
    pub(super) roots: Vec<Root>,
    /// What it was read from.
    pub(super) material: Material,
}

/// A root.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) der: CertificateDer<'static>,
    /// Whom it names.
    pub(super) subject: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Root {
    fn read(file: &'static str, der: CertificateDer<'static>) -> Result<Self, IssuerError> {
        let certificate = parse(file, &der)?;
        check_authority(file, &certificate)?;
        let validity = certificate.validity();
        let (subject, not_before, not_after) = (
            certificate.subject().to_string(),
            time(validity.not_before.timestamp()),
            time(validity.not_after.timestamp()),
        );
        Ok(Self {
            der,
            subject,
            not_before,
            not_after,
        })
    }

    /// Whether it vouches for anybody at a moment. Verifiers take roots for eternal.
    pub(super) fn is_valid(&self, at: SystemTime) -> bool {
        (self.not_before..=self.not_after).contains(&at)
    }
}

/// Why an issuer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// A file or folder cannot be read or written.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{file}: {reason}")]
    Content {
        /// Which.
        file: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// Never the key.
impl fmt::Debug for Loaded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = formatter.debug_struct("Loaded");
        shown
            .field("subject", &self.subject)
            .finish_non_exhaustive()
    }
}

impl Loaded {
    /// Reads and checks it.
    ///
    /// # Errors
    /// See [`IssuerError`].
    pub(super) fn check(
        material: Material,
        trust_domain: &TrustDomain,
    ) -> Result<Self, IssuerError> {
        let names = material.names;
        let roots = certificates(names.roots, &material.roots)?.into_iter();
        let roots = roots.map(|it| Root::read(names.roots, it));
        let roots = roots.collect::<Result<Vec<_>, _>>()?;
        let chain = certificates(names.certificate, &material.certificate)?;
        let key = std::str::from_utf8(&material.key).map_err(|it| content(names.key, it))?;
        let key = KeyPair::from_pem(key).map_err(|it| content(names.key, it))?;
        let Some(own) = chain.first() else {
            return Err(content(names.certificate, "no certificate"));
        };
        let certificate = parse(names.certificate, own)?;
        check_authority(names.certificate, &certificate)?;
        if certificate.public_key().raw != key.subject_public_key_info() {
            return Err(content(
                names.key,
                "not the key of the issuer's certificate",
            ));
        }
        let path_ends = check_path(names, &chain, &roots)?;
        let validity = certificate.validity();
        let loaded = Self {
            subject: certificate.subject().to_string(),
            not_before: time(validity.not_before.timestamp()),
            not_after: path_ends,
            issuer: Issuer::from_ca_cert_der(own, key)
                .map_err(|it| content(names.certificate, it))?,
            intermediates: chain
                .iter()
                .filter(|it| roots.iter().all(|root| root.der != **it))
                .cloned()
                .collect(),
            roots,
            material,
        };
        if loaded.not_after < SystemTime::now() {
            return Err(content(names.certificate, "expired"));
        }
        loaded
            .probe(trust_domain)
            .map_err(|reason| content(names.certificate, format!("not believed: {reason}")))?;
        Ok(loaded)
    }

    /// Signs a certificate and verifies it as agents would: what they would not believe must not
    /// come into force.
    fn probe(&self, trust_domain: &TrustDomain) -> anyhow::Result<()> {
        let now = SystemTime::now();
        let mut store = RootCertStore::empty();
        for root in self.roots.iter().filter(|it| it.is_valid(now)) {
            store.add(root.der.clone())?;
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        let uri = format!("spiffe://{trust_domain}/ns/probe/sa/probe");
        params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        set_validity(&mut params, now - super::BACKDATE, now + super::BACKDATE);
        let leaf = params.signed_by(&key, &self.issuer)?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider);
        let verifier = verifier.build()?;
        verifier.verify_client_cert(leaf.der(), &self.intermediates, UnixTime::now())?;
        Ok(())
    }
}

/// Refuses an issuer whose chain does not lead to one of the roots. Returns when the first of the
/// certificates on the way ends, root included.
fn check_path(
    names: Names,
    chain: &[CertificateDer<'static>],
    roots: &[Root],
) -> Result<SystemTime, IssuerError> {
    let mut ends = None;
    for (index, der) in chain.iter().enumerate() {
        let certificate = parse(names.certificate, der)?;
        let end = time(certificate.validity().not_after.timestamp());
        let end = ends.map_or(end, |it: SystemTime| it.min(end));
        ends = Some(end);
        if roots.iter().any(|it| it.der == *der) {
            return Ok(end);
        }
        let signed_by = |issuer: &X509Certificate<'_>| {
            certificate.issuer() == issuer.subject()
                && certificate
                    .verify_signature(Some(issuer.public_key()))
                    .is_ok()
        };
        let mut signers = vec![];
        for root in roots {
            let authority = parse(names.roots, &root.der)?;
            if signed_by(&authority) {
                // Verifiers do not look at a root's own constraint.
                if path_length(&authority).is_some_and(|it| (it as usize) < index + 1) {
                    let reason = "its root allows a shorter path only (path length constraint)";
                    return Err(content(names.certificate, reason));
                }
                signers.push(root.not_after);
            }
        }
        if let Some(longest) = signers.into_iter().max() {
            return Ok(end.min(longest));
        }
        let Some(next) = chain.get(index + 1) else {
            break;
        };
        let next = parse(names.certificate, next)?;
        check_authority(names.certificate, &next)?;
        if !signed_by(&next) {
            break;
        }
    }
    let reason = format!("does not lead to any of the roots in {}", names.roots);
    Err(content(names.certificate, reason))
}

fn path_length(certificate: &X509Certificate<'_>) -> Option<u32> {
    let constraints = certificate.basic_constraints().ok().flatten()?;
    constraints.value.path_len_constraint
}

fn check_authority(
    file: &'static str,
    certificate: &X509Certificate<'_>,
) -> Result<(), IssuerError> {
    let usage = certificate.key_usage().ok().flatten();
    if !certificate.is_ca() {
        return Err(content(
            file,
            "not a certificate authority's (basic constraints)",
        ));
    }
    if usage.is_some_and(|it| !it.value.key_cert_sign()) {
        return Err(content(file, "may not sign certificates (key usage)"));
    }
    Ok(())
}

fn certificates(
    file: &'static str,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, IssuerError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let parsed = parsed.map_err(|reason| content(file, reason))?;
    if parsed.is_empty() {
        return Err(content(file, "no certificate in PEM"));
    }
    Ok(parsed)
}

fn parse<'a>(
    file: &'static str,
    der: &'a CertificateDer<'_>,
) -> Result<X509Certificate<'a>, IssuerError> {
    match X509Certificate::from_der(der) {
        Ok((_, certificate)) => Ok(certificate),
        Err(reason) => Err(content(file, reason)),
    }
}

fn time(seconds: i64) -> SystemTime {
    match u64::try_from(seconds) {
        Ok(seconds) => SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        Err(_) => SystemTime::UNIX_EPOCH,
    }
}

fn content(file: &'static str, reason: impl ToString) -> IssuerError {
    IssuerError::Content {
        file,
        reason: reason.to_string(),
    }
}
