//! Certificates for a server, and the file by which clients find and believe it.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;

/// A certificate of a server, and the root that it leads to.
#[derive(Clone, Debug)]
pub struct Tls {
    pub(crate) server: Arc<ServerConfig>,
    /// The root, as PEM.
    pub root: String,
}

impl Tls {
    /// The certificate that an earlier server left in a file, so that clients believe this one too; or a new one,
    /// left there.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn kept_in(file: &Path, names: &[&str]) -> anyhow::Result<Self> {
        let name = || file.display().to_string();
        if file.exists() {
            let text = std::fs::read_to_string(file).with_context(name)?;
            let (root, rest) = text.split_once(SEPARATOR).with_context(name)?;
            let certificate = CertificateDer::from_pem_slice(rest.as_bytes());
            let key = PrivateKeyDer::from_pem_slice(rest.as_bytes()).with_context(name)?;
            return Self::of(root.to_owned(), certificate.with_context(name)?, key);
        }
        let (root, certificate, key) = made(names)?;
        let own = certificate.pem() + &key.serialize_pem();
        std::fs::write(file, format!("{root}{SEPARATOR}{own}")).with_context(name)?;
        Self::of(root, certificate.der().clone(), der(&key))
    }

    /// A new root, and a certificate for these names and addresses.
    ///
    /// # Errors
    /// One of them is no name.
    pub fn new(names: &[&str]) -> anyhow::Result<Self> {
        let (root, certificate, key) = made(names)?;
        Self::of(root, certificate.der().clone(), der(&key))
    }

    fn of(
        root: String,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .context("the certificate of the server")?;
        Ok(Self {
            server: Arc::new(server),
            root,
        })
    }
}

/// A root as PEM, and a certificate that it signed, with its key.
fn made(names: &[&str]) -> anyhow::Result<(String, Certificate, KeyPair)> {
    let mut of_root = CertificateParams::new(vec![])?;
    of_root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root_key = KeyPair::generate()?;
    let root = of_root.self_signed(&root_key)?;
    let issuer = Issuer::new(of_root, root_key);
    let key = KeyPair::generate()?;
    let names: Vec<String> = names.iter().map(|&it| it.to_owned()).collect();
    let certificate = CertificateParams::new(names)?.signed_by(&key, &issuer)?;
    Ok((root.pem(), certificate, key))
}

fn der(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()))
}

/// Between the root and the rest in a file.
const SEPARATOR: &str = "# the server's own\n";

/// A kubeconfig, as JSON, which YAML includes.
pub(crate) fn kubeconfig(url: &str, tls: Option<&Tls>, token: Option<&str>) -> String {
    let mut cluster = json!({"server": url});
    if let Some(tls) = tls {
        cluster["certificate-authority-data"] = json!(STANDARD.encode(&tls.root));
    }
    let user = token.map_or(json!({}), |token| json!({"token": token}));
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": "tests", "user": user}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
        "current-context": "tests",
    })
    .to_string()
}
