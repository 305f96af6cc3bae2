//! Connecting to the controller: TLS against the agent's trust bundle, and the agent's own token.
//!
//! Bundle and token are read again for each connection, so that both can be rotated in place.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use weft_proto::MAX_MESSAGE_BYTES;
use weft_proto::v1::control_client::ControlClient;

/// Where the controller is and how both sides prove who they are.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// `https://host:port`.
    pub url: String,
    /// The name in the controller's certificate.
    pub name: String,
    /// Roots that vouch for the controller: a PEM file.
    pub trust_bundle: PathBuf,
    /// The agent's token: a text file.
    pub join_token: PathBuf,
}

/// The controller, as the agent reaches it.
#[derive(Debug)]
pub struct Controller {
    config: ControllerConfig,
    endpoint: Endpoint,
}

/// An open connection with the token that it was opened with.
#[derive(Clone)]
pub struct Connection {
    /// The client.
    pub client: ControlClient<Channel>,
    authorization: MetadataValue<Ascii>,
}

/// Why the controller cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// Not an `https://` address.
    #[error("controller address {0:?} is not of the form https://host:port")]
    Address(String),
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The trust bundle has no certificate.
    #[error("{0} holds no PEM certificate: nobody could be trusted")]
    TrustBundle(PathBuf),
    /// The token is empty or has characters that no header may have. It is not repeated here.
    #[error("{0} holds no usable token: one line of visible ASCII is needed")]
    Token(PathBuf),
    /// The connection failed.
    #[error("cannot connect to the controller at {url}: {reason}")]
    Connect {
        /// Its address.
        url: String,
        /// Why.
        reason: String,
    },
}

impl Controller {
    /// Checks the address; connects to nothing.
    ///
    /// # Errors
    /// An address that is not `https://host:port`: the token must not travel in the clear.
    pub fn new(config: ControllerConfig) -> Result<Self, ControllerError> {
        let address = || ControllerError::Address(config.url.clone());
        let endpoint = Endpoint::from_shared(config.url.clone()).map_err(|_| address())?;
        let uri = endpoint.uri();
        if uri.scheme_str() != Some("https") || uri.host().is_none() {
            return Err(address());
        }
        // A controller that is gone without a word is noticed within KEEPALIVE + KEEPALIVE_TIMEOUT.
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES * 2);
        Ok(Self { config, endpoint })
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// Bundle or token cannot be read, or the connection or its handshake fails.
    pub async fn connect(&self) -> Result<Connection, ControllerError> {
        let bundle = read(&self.config.trust_bundle).await?;
        if !CertificateDer::pem_slice_iter(&bundle).any(|it| it.is_ok()) {
            let path = self.config.trust_bundle.clone();
            return Err(ControllerError::TrustBundle(path));
        }
        let authorization = self.authorization().await?;
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(bundle))
            .domain_name(self.config.name.clone())
            .timeout(CONNECT_TIMEOUT);
        let endpoint = self.endpoint.clone().tls_config(tls);
        let endpoint = endpoint.map_err(|error| self.connect_error(&error))?;
        let channel = endpoint.connect().await;
        let channel = channel.map_err(|error| self.connect_error(&error))?;
        let client = ControlClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Connection {
            client,
            authorization,
        })
    }

    async fn authorization(&self) -> Result<MetadataValue<Ascii>, ControllerError> {
        let path = &self.config.join_token;
        let unusable = || ControllerError::Token(path.clone());
        let bytes = read(path).await?;
        let text = std::str::from_utf8(&bytes).map_err(|_| unusable())?.trim();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(unusable());
        }
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {text}").parse().map_err(|_| unusable())?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn connect_error(&self, error: &tonic::transport::Error) -> ControllerError {
        ControllerError::Connect {
            url: self.config.url.clone(),
            reason: with_sources(error),
        }
    }
}

impl Connection {
    /// A request that carries the agent's token.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("authorization", self.authorization.clone());
        request
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, ControllerError> {
    let owned = path.to_owned();
    let bytes = tokio::task::spawn_blocking(move || std::fs::read(owned)).await;
    bytes
        .unwrap_or_else(|error| Err(error.into()))
        .map_err(|source| ControllerError::File {
            path: path.to_owned(),
            source,
        })
}

/// An error with all its causes: tonic's own texts say only "transport error".
fn with_sources(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |it| it.source());
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// First state is megabytes; the default of 64 KiB would make it a round trip each.
const WINDOW_BYTES: u32 = 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_is_connected_to() {
        for (url, good) in [
            ("https://10.0.0.1:15012", true),
            ("https://[fd00::1]:15012", true),
            ("http://10.0.0.1:15012", false),
            ("10.0.0.1:15012", false),
            ("unix:///run/x", false),
            ("", false),
        ] {
            let config = ControllerConfig {
                url: url.to_owned(),
                name: "weft-controller".to_owned(),
                trust_bundle: PathBuf::new(),
                join_token: PathBuf::new(),
            };
            assert_eq!(Controller::new(config).is_ok(), good, "{url}");
        }
    }
}
