//! Who signs: a controller, in production.

use std::sync::Arc;

use futures::future::BoxFuture;
use rustls_pki_types::CertificateDer;
use weft_core::Identity;
use weft_proto::v1::SignRequest;

use crate::discovery::{CallError, Calls};

/// Signs requests for the identities of this node's pods.
pub trait Signer: Send + Sync + 'static {
    /// Signs a PKCS #10 request in DER. The answer is the chain, leaf first, without the root.
    fn sign(
        &self,
        identity: Identity,
        request: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, SignError>>;
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
#[error("not signed: {0}")]
pub struct SignError(#[from] pub CallError);

/// Signs by the controller's Sign call.
pub struct ControllerSigner(Arc<Calls>);

impl ControllerSigner {
    /// By these calls.
    pub fn new(calls: Arc<Calls>) -> Self {
        Self(calls)
    }

    async fn call(
        &self,
        identity: Identity,
        request: Vec<u8>,
    ) -> Result<Vec<CertificateDer<'static>>, SignError> {
        let request = SignRequest {
            csr: request,
            namespace: identity.namespace.to_string(),
            service_account: identity.service_account.to_string(),
        };
        let chain = self.0.sign(request).await?.chain;
        Ok(chain.into_iter().map(Into::into).collect())
    }
}

impl Signer for ControllerSigner {
    fn sign(
        &self,
        identity: Identity,
        request: Vec<u8>,
    ) -> BoxFuture<'_, Result<Vec<CertificateDer<'static>>, SignError>> {
        Box::pin(self.call(identity, request))
    }
}
