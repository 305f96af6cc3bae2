//! One certificate: a new key, a request for it, and a look at what came back.

use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::sign::CertifiedKey;
use rustls_pki_types::PrivateKeyDer;
use weft_core::Identity;

use super::super::certificate::Leaf;
use super::super::signer::Signer;
use super::super::tls::provider;

/// Makes a key, has it signed, and checks that the answer is for this identity and this key.
pub(super) async fn certificate(
    signer: Arc<dyn Signer>,
    identity: Identity,
) -> Result<(CertifiedKey, Leaf), String> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(text)?;
    let request = request(&identity, &key).map_err(text)?;
    let chain = signer.sign(identity.clone(), request).await.map_err(text)?;
    let leaf = chain.first().ok_or("an empty chain was signed")?;
    let leaf = Leaf::read(leaf).map_err(text)?;
    if leaf.identity != identity {
        return Err(format!("a certificate of {} was signed", leaf.identity));
    }
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(text)?;
    let key = provider().key_provider.load_private_key(key);
    let certified = CertifiedKey::new(chain, key.map_err(text)?);
    certified.keys_match().map_err(text)?;
    Ok((certified, leaf))
}

fn request(identity: &Identity, key: &KeyPair) -> Result<Vec<u8>, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    Ok(params.serialize_request(key)?.der().to_vec())
}

fn text(error: impl ToString) -> String {
    error.to_string()
}
