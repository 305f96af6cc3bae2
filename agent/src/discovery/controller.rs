//! Connecting to a controller: TLS against the agent's trust bundle, and the agent's own token.
//!
//! Bundle and token are read again for each connection, so that both can be rotated in place; and names are looked up
//! again, so that controllers may come and go. Which of several is tried first is [`Places`]' concern.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Uri;
use tokio::net::lookup_host;
use tokio::time::{Instant, timeout};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use weft_proto::MAX_MESSAGE_BYTES;
use weft_proto::v1::control_client::ControlClient;

use super::places::Places;

/// Where the controllers are and how both sides prove who they are.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// `https://host:port`, each with a name that may have several addresses.
    pub urls: Vec<String>,
    /// The name in the controller's certificate.
    pub name: String,
    /// Roots that vouch for the controller: a PEM file.
    pub trust_bundle: PathBuf,
    /// The agent's token: a text file.
    pub join_token: PathBuf,
}

/// The controllers, as the agent reaches them.
#[derive(Debug)]
pub struct Controller {
    config: ControllerConfig,
    hosts: Vec<Host>,
    /// What each of them was last found to be.
    answers: Mutex<Vec<Vec<SocketAddr>>>,
    /// All addresses have failed: names are worth waiting for.
    all_failed: AtomicBool,
    places: Mutex<Places>,
}

/// Where controllers are, as it is written.
#[derive(Debug)]
struct Host {
    name: String,
    port: u16,
}

/// An open connection with the token that it was opened with.
#[derive(Clone)]
pub struct Connection {
    /// The client.
    pub client: ControlClient<Channel>,
    /// Whom it is to.
    pub address: SocketAddr,
    authorization: MetadataValue<Ascii>,
}

/// Why the controller cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// Not an `https://` address.
    #[error("controller address {0:?} is not of the form https://host:port")]
    Address(String),
    /// There is nobody by that name.
    #[error("cannot find the controller {host}: {reason}")]
    Unknown {
        /// The name.
        host: String,
        /// Why.
        reason: String,
    },
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
    #[error("cannot connect to the controller at {address}: {reason}")]
    Connect {
        /// Its address.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// There are several, and none could be connected to.
    #[error("{}", joined(.0))]
    Each(Vec<ControllerError>),
}

impl ControllerError {
    /// Whether an address was tried in vain. If not, there is no use in going to another at once.
    pub(super) fn is_of_address(&self) -> bool {
        match self {
            Self::Connect { .. } => true,
            Self::Each(errors) => errors.iter().any(Self::is_of_address),
            _ => false,
        }
    }
}

impl Controller {
    /// Checks the addresses; connects to nothing.
    ///
    /// # Errors
    /// One that is not `https://host:port`: the token must not travel in the clear.
    pub fn new(config: ControllerConfig) -> Result<Self, ControllerError> {
        let hosts = config.urls.iter().map(|it| Host::parse(it));
        let hosts: Vec<_> = hosts.collect::<Result<_, _>>()?;
        Ok(Self {
            answers: Mutex::new(vec![vec![]; hosts.len()]),
            all_failed: AtomicBool::new(false),
            hosts,
            config,
            places: Mutex::new(Places::new(Instant::now())),
        })
    }

    /// Opens a connection to one of them.
    ///
    /// # Errors
    /// Bundle or token cannot be read, or at none of the addresses connection and handshake succeed.
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
        self.find().await?;
        let order = self.places().order(Instant::now());
        let mut errors = vec![];
        for (address, patience) in order {
            match channel(address, tls.clone(), patience).await {
                Ok(channel) => {
                    self.all_failed.store(false, Ordering::Relaxed);
                    let client = ControlClient::new(channel)
                        .max_decoding_message_size(MAX_MESSAGE_BYTES)
                        .max_encoding_message_size(MAX_MESSAGE_BYTES);
                    return Ok(Connection {
                        client,
                        address,
                        authorization,
                    });
                }
                Err(error) => {
                    tracing::debug!(%error, "tries another controller");
                    self.failed(address);
                    errors.push(error);
                }
            }
        }
        self.all_failed.store(true, Ordering::Relaxed);
        Err(each(errors))
    }

    /// The stream is at this controller, or at none: who signs is asked there first.
    pub fn uses(&self, address: Option<SocketAddr>) {
        self.places().uses(address);
    }

    /// A controller that was connected to is of no use: others come first.
    pub fn failed(&self, address: SocketAddr) {
        self.places().failed(address, Instant::now());
    }

    /// Whether there is a controller that has not failed since [`Controller::begin_round`].
    pub fn has_untried(&self) -> bool {
        self.has_untried_but(None)
    }

    /// The same, beside this one.
    pub fn has_untried_but(&self, address: Option<SocketAddr>) -> bool {
        self.places().has_untried_but(address)
    }

    /// Whether there is more than one.
    pub fn has_several(&self) -> bool {
        self.places().count() > 1
    }

    /// From now on all count as not tried.
    pub fn begin_round(&self) {
        self.places().begin_round(Instant::now());
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        // Every change leaves it whole.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds their addresses. Those that were found before will do where names cannot be looked up now, or not soon.
    async fn find(&self) -> Result<(), ControllerError> {
        let must_look = self.places().count() == 0 || self.all_failed.load(Ordering::Relaxed);
        let patience = match must_look {
            true => CONNECT_TIMEOUT,
            false => LOOKUP_PATIENCE,
        };
        let lookups = self.hosts.iter().map(|it| it.addresses(patience));
        let looked_up = futures::future::join_all(lookups).await;
        let (found, unknown) = {
            let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            let unknown = update(&mut answers, looked_up);
            (answers.concat(), unknown)
        };
        if found.is_empty() {
            return Err(each(unknown));
        }
        self.places().found(found);
        Ok(())
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
}

/// Takes in what names were found to be. Of one that was not found, the addresses of before stay, and no others do.
fn update<E>(
    answers: &mut [Vec<SocketAddr>],
    looked_up: Vec<Result<Vec<SocketAddr>, E>>,
) -> Vec<E> {
    let mut unknown = vec![];
    for (answer, looked_up) in answers.iter_mut().zip(looked_up) {
        match looked_up {
            Ok(addresses) => *answer = addresses,
            Err(error) => unknown.push(error),
        }
    }
    unknown
}

impl Host {
    fn parse(url: &str) -> Result<Self, ControllerError> {
        let address = || ControllerError::Address(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| address())?;
        let name = uri.host().filter(|_| uri.scheme_str() == Some("https"));
        let name = name.ok_or_else(address)?;
        let bare = name.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
        Ok(Self {
            name: bare.unwrap_or(name).to_owned(),
            port: uri.port_u16().unwrap_or(HTTPS_PORT),
        })
    }

    async fn addresses(&self, patience: Duration) -> Result<Vec<SocketAddr>, ControllerError> {
        if let Ok(address) = self.name.parse::<IpAddr>() {
            return Ok(vec![(address, self.port).into()]);
        }
        let unknown = |reason: String| ControllerError::Unknown {
            host: self.name.clone(),
            reason,
        };
        let found = timeout(patience, lookup_host((self.name.as_str(), self.port))).await;
        let found =
            found.map_err(|_| unknown("no answer to the question of its address".into()))?;
        let mut found = found
            .map_err(|error| unknown(error.to_string()))?
            .peekable();
        match found.peek() {
            Some(_) => Ok(found.collect()),
            None => Err(unknown("the name has no address".to_owned())),
        }
    }
}

async fn channel(
    address: SocketAddr,
    tls: ClientTlsConfig,
    patience: Duration,
) -> Result<Channel, ControllerError> {
    let failed = |reason: String| ControllerError::Connect { address, reason };
    let endpoint = Endpoint::from_shared(format!("https://{address}"));
    let endpoint = endpoint.and_then(|it| it.tls_config(tls));
    let endpoint = endpoint.map_err(|error| failed(with_sources(&error)))?;
    // A controller that is gone without a word is noticed within KEEPALIVE + KEEPALIVE_TIMEOUT.
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES * 2);
    match timeout(patience, endpoint.connect()).await {
        Ok(channel) => channel.map_err(|error| failed(with_sources(&error))),
        Err(_) => Err(failed(format!("no answer within {} s", patience.as_secs()))),
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

fn each(mut errors: Vec<ControllerError>) -> ControllerError {
    match errors.len() {
        1 => errors.remove(0),
        _ => ControllerError::Each(errors),
    }
}

fn joined(errors: &[ControllerError]) -> String {
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long names may take where addresses are known.
const LOOKUP_PATIENCE: Duration = Duration::from_millis(300);
const HTTPS_PORT: u16 = 443;
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// First state is megabytes; the default of 64 KiB would make it a round trip each.
const WINDOW_BYTES: u32 = 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_not_found_keeps_its_own_addresses_alone() {
        let address = |number: u8| SocketAddr::from(([10, 0, 0, number], 15012));
        let mut answers = vec![vec![address(1), address(2)], vec![]];
        // The one that is found has others now; the other never was.
        let unknown = update(&mut answers, vec![Ok(vec![address(3)]), Err(())]);
        assert_eq!(
            (unknown.len(), &answers),
            (1, &vec![vec![address(3)], vec![]])
        );
        let unknown = update(&mut answers, vec![Err(()), Err(())]);
        assert_eq!(
            (unknown.len(), &answers),
            (2, &vec![vec![address(3)], vec![]])
        );
    }

    #[test]
    fn only_https_is_connected_to() {
        for (url, good) in [
            ("https://10.0.0.1:15012", true),
            ("https://[fd00::1]:15012", true),
            ("https://weft-controller.weft-system.svc:15012", true),
            ("http://10.0.0.1:15012", false),
            ("10.0.0.1:15012", false),
            ("unix:///run/x", false),
            ("", false),
        ] {
            let config = ControllerConfig {
                urls: vec![url.to_owned()],
                name: "weft-controller".to_owned(),
                trust_bundle: PathBuf::new(),
                join_token: PathBuf::new(),
            };
            assert_eq!(Controller::new(config).is_ok(), good, "{url}");
        }
    }
}
