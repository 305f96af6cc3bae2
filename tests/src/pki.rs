//! Certificates that nobody should accept, and some that anybody should.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::parse_x509_certificate;

/// A certificate with its chain and key.
#[derive(Debug)]
pub struct Identity {
    /// The leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    chain_pem: String,
    key_pem: String,
}

impl Identity {
    /// The same once more.
    pub fn duplicate(&self) -> Identity {
        Identity {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            chain_pem: self.chain_pem.clone(),
            key_pem: self.key_pem.clone(),
        }
    }

    /// Writes the chain and the key as PEM files, for programs that want files.
    pub fn write(&self, dir: &Path) -> Result<[PathBuf; 2]> {
        let [chain, key] = [dir.join("chain.pem"), dir.join("key.pem")];
        std::fs::write(&chain, &self.chain_pem)?;
        std::fs::write(&key, &self.key_pem)?;
        Ok([chain, key])
    }
}

/// Something that signs.
#[derive(Debug)]
pub struct Authority {
    certificate: CertificateDer<'static>,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// The cluster's own, from the controller's folder.
    pub fn of_cluster(ca_dir: &Path) -> Result<Authority> {
        let read = |name: &str| {
            std::fs::read_to_string(ca_dir.join(name)).with_context(|| format!("reading {name}"))
        };
        let pem = read("issuer.crt")?;
        let key = KeyPair::from_pem(&read("issuer.key")?)?;
        let (_, parsed) = x509_parser::pem::parse_x509_pem(pem.as_bytes())?;
        Ok(Authority {
            certificate: parsed.contents.into(),
            issuer: Issuer::from_ca_cert_pem(&pem, key)?,
            pem,
        })
    }

    /// One that nobody knows, with a name that no other has.
    pub fn foreign() -> Result<Authority> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let name = format!("somebody else {}", COUNT.fetch_add(1, Ordering::Relaxed));
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key)?;
        let (pem, certificate) = (certificate.pem(), certificate.der().clone());
        Ok(Authority {
            certificate,
            pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// The certificate, as PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its name, as its certificate says it.
    pub fn name(&self) -> Result<String> {
        Ok(parse_x509_certificate(&self.certificate)?
            .1
            .subject()
            .to_string())
    }

    /// Makes it the issuer of a controller's folder.
    pub fn write(&self, ca_dir: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let key = ca_dir.join(".issuer.key.test");
        std::fs::write(&key, self.issuer.key().serialize_pem())?;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600))?;
        let certificate = ca_dir.join(".issuer.crt.test");
        std::fs::write(&certificate, &self.pem)?;
        std::fs::rename(key, ca_dir.join("issuer.key"))?;
        std::fs::rename(certificate, ca_dir.join("issuer.crt"))?;
        Ok(())
    }

    /// A certificate for this identity that is valid now.
    pub fn sign(&self, spiffe_id: &str) -> Result<Identity> {
        let now = SystemTime::now();
        self.sign_for(&[spiffe_id], now - MINUTE, now + 60 * MINUTE)
    }

    /// A certificate that ended a minute ago.
    pub fn sign_expired(&self, spiffe_id: &str) -> Result<Identity> {
        let now = SystemTime::now();
        self.sign_for(&[spiffe_id], now - 60 * MINUTE, now - MINUTE)
    }

    /// A certificate that starts in an hour.
    pub fn sign_not_yet_valid(&self, spiffe_id: &str) -> Result<Identity> {
        let now = SystemTime::now();
        self.sign_for(&[spiffe_id], now + 60 * MINUTE, now + 120 * MINUTE)
    }

    /// A certificate for `id` whose issuer is no authority: the leaf of a workload, which this one signed.
    pub fn sign_through_leaf(&self, workload: &str, id: &str) -> Result<Identity> {
        let between = self.sign(workload)?;
        let key = KeyPair::from_pem(&between.key_pem)?;
        let issuer = Authority {
            certificate: between.chain[0].clone(),
            issuer: Issuer::from_ca_cert_der(&between.chain[0], key)?,
            pem: between.chain_pem.clone(),
        };
        let mut identity = issuer.sign(id)?;
        identity.chain.push(self.certificate.clone());
        Ok(identity)
    }

    /// A certificate with any number of identities and any validity.
    pub fn sign_for(&self, ids: &[&str], from: SystemTime, until: SystemTime) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        params.distinguished_name = DistinguishedName::new();
        params.not_before = from.into();
        params.not_after = until.into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        for id in ids {
            params
                .subject_alt_names
                .push(SanType::URI((*id).try_into()?));
        }
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Identity {
            chain: vec![certificate.der().clone(), self.certificate.clone()],
            chain_pem: certificate.pem() + &self.pem,
            key_pem: key.serialize_pem(),
            key: PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?,
        })
    }
}

/// The SPIFFE ID in a certificate.
pub fn spiffe_id(certificate: &CertificateDer<'_>) -> Result<String> {
    use x509_parser::extensions::GeneralName;
    let (_, parsed) = parse_x509_certificate(certificate)?;
    let names = parsed
        .subject_alternative_name()?
        .context("no alternative names")?;
    let uri = names
        .value
        .general_names
        .iter()
        .find_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
    uri.context("no URI among the names")
}

/// The name of who signed a certificate.
pub fn issuer(certificate: &CertificateDer<'_>) -> Result<String> {
    Ok(parse_x509_certificate(certificate)?.1.issuer().to_string())
}

/// The serial number of a certificate, in hexadecimal.
pub fn serial(certificate: &CertificateDer<'_>) -> Result<String> {
    Ok(parse_x509_certificate(certificate)?
        .1
        .raw_serial_as_string())
}

const MINUTE: Duration = Duration::from_secs(60);
