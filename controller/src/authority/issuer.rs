//! The issuer and the roots, as read from their files and checked.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{Issuer, KeyPair, PublicKeyData};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::files::{self, ISSUER_CERTIFICATE, ISSUER_KEY, ROOTS, Stamps};

/// What the folder holds.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) issuer: Issuer<'static, KeyPair>,
    /// Whom the issuer's certificate names.
    pub(super) subject: String,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    /// What leads from a leaf to a root: the issuer and those above it, without roots.
    pub(super) intermediates: Vec<CertificateDer<'static>>,
    pub(super) roots: Vec<CertificateDer<'static>>,
    stamps: Stamps,
}

/// Why the folder cannot be used.
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

impl Loaded {
    /// Reads and checks the folder.
    ///
    /// # Errors
    /// See [`IssuerError`].
    pub(super) fn read(folder: &Path) -> Result<Self, IssuerError> {
        // Before the content: a change in between is then seen as one.
        let stamps = Stamps::of(folder)?;
        let roots = certificates(ROOTS, &files::read(folder, ROOTS)?)?;
        for root in &roots {
            check_authority(ROOTS, &parse(ROOTS, root)?)?;
        }
        let chain = certificates(
            ISSUER_CERTIFICATE,
            &files::read(folder, ISSUER_CERTIFICATE)?,
        )?;
        files::warn_if_exposed(folder, ISSUER_KEY);
        let key = files::read(folder, ISSUER_KEY)?;
        let key = String::from_utf8(key).map_err(|it| content(ISSUER_KEY, it))?;
        let key = KeyPair::from_pem(&key).map_err(|it| content(ISSUER_KEY, it))?;
        let Some(own) = chain.first() else {
            return Err(content(ISSUER_CERTIFICATE, "no certificate"));
        };
        let certificate = parse(ISSUER_CERTIFICATE, own)?;
        check_authority(ISSUER_CERTIFICATE, &certificate)?;
        if certificate.public_key().raw != key.subject_public_key_info() {
            return Err(content(
                ISSUER_KEY,
                "not the key of the issuer's certificate",
            ));
        }
        check_path(&chain, &roots)?;
        let validity = certificate.validity();
        let loaded = Self {
            subject: certificate.subject().to_string(),
            not_before: time(validity.not_before.timestamp()),
            not_after: time(validity.not_after.timestamp()),
            issuer: Issuer::from_ca_cert_der(own, key)
                .map_err(|it| content(ISSUER_CERTIFICATE, it))?,
            intermediates: chain
                .iter()
                .filter(|it| !roots.contains(it))
                .cloned()
                .collect(),
            roots,
            stamps,
        };
        if loaded.not_after < SystemTime::now() {
            return Err(content(ISSUER_CERTIFICATE, "expired"));
        }
        Ok(loaded)
    }

    /// Whether the files changed since.
    ///
    /// # Errors
    /// They cannot be looked at.
    pub(super) fn is_stale(&self, folder: &Path) -> Result<bool, IssuerError> {
        Ok(Stamps::of(folder)? != self.stamps)
    }
}

/// Refuses an issuer that the agents would not trust: its chain must lead to one of the roots.
fn check_path(
    chain: &[CertificateDer<'static>],
    roots: &[CertificateDer<'static>],
) -> Result<(), IssuerError> {
    for (index, der) in chain.iter().enumerate() {
        if roots.contains(der) {
            return Ok(());
        }
        let certificate = parse(ISSUER_CERTIFICATE, der)?;
        let signed_by = |issuer: &X509Certificate<'_>| {
            certificate.issuer() == issuer.subject()
                && certificate
                    .verify_signature(Some(issuer.public_key()))
                    .is_ok()
        };
        for root in roots {
            if signed_by(&parse(ROOTS, root)?) {
                return Ok(());
            }
        }
        let Some(next) = chain.get(index + 1) else {
            break;
        };
        let next = parse(ISSUER_CERTIFICATE, next)?;
        check_authority(ISSUER_CERTIFICATE, &next)?;
        if !signed_by(&next) {
            break;
        }
    }
    let reason = format!("does not lead to any of the roots in {ROOTS}");
    Err(content(ISSUER_CERTIFICATE, reason))
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
