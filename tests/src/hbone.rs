//! An independent tunnel client: TLS 1.3, HTTP/2 and CONNECT from ordinary libraries, nothing of
//! Weft's own. It opens what a test tells it to, right or wrong, and says what it got.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Uri};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::capture::TUNNEL_PORT;
use crate::netns::Netns;
use crate::pki::{Identity, spiffe_id};

/// What to try.
#[derive(Debug)]
pub struct Attempt {
    /// The pod's tunnel listener.
    pub server: SocketAddr,
    /// The protocols to offer, in order.
    pub alpn: Vec<Vec<u8>>,
    /// What to authenticate with; none is tried too.
    pub identity: Option<Identity>,
    /// The request, `CONNECT` to an authority by default.
    pub method: Method,
    /// The `:authority`.
    pub authority: String,
    /// Further headers.
    pub headers: HeaderMap,
    /// What to send in the tunnel, before its end.
    pub send: Vec<u8>,
}

impl Attempt {
    /// A good HBONE attempt at a pod's address and port.
    pub fn hbone(target: SocketAddr, identity: Identity) -> Attempt {
        Attempt {
            server: SocketAddr::new(target.ip(), TUNNEL_PORT),
            alpn: vec![b"h2".to_vec()],
            identity: Some(identity),
            method: Method::CONNECT,
            authority: target.to_string(),
            headers: HeaderMap::new(),
            send: Vec::new(),
        }
    }

    /// With something to send.
    pub fn sending(mut self, bytes: &[u8]) -> Attempt {
        self.send = bytes.to_vec();
        self
    }

    /// With another authority.
    pub fn authority(mut self, authority: &str) -> Attempt {
        authority.clone_into(&mut self.authority);
        self
    }

    /// With other protocols offered.
    pub fn alpn(mut self, protocols: &[&str]) -> Attempt {
        self.alpn = protocols
            .iter()
            .map(|name| name.as_bytes().to_vec())
            .collect();
        self
    }

    /// With a header.
    pub fn header(mut self, name: &'static str, value: &str) -> Result<Attempt> {
        self.headers.insert(name, value.parse()?);
        Ok(self)
    }

    /// Runs it from a namespace. An error means that there was no answer to the request: the
    /// connection, the handshake or the stream failed.
    pub fn run(self, from: &Netns) -> Result<Answer> {
        from.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let limit = Duration::from_secs(10);
                tokio::time::timeout(limit, attempt(self))
                    .await
                    .context("no answer")?
            })
        })?
    }
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Its headers.
    pub headers: HeaderMap,
    /// All that came in the tunnel.
    pub received: Vec<u8>,
    /// Whether the stream was ended in order; else it was reset.
    pub ended: bool,
    /// The protocol chosen.
    pub alpn: Option<String>,
    /// What the server showed.
    pub server_certificate: CertificateDer<'static>,
    /// Who the server is.
    pub server_id: String,
    /// The TLS version, such as `TLSv1_3`.
    pub tls_version: String,
    /// The cipher suite.
    pub cipher_suite: String,
    /// The key exchange.
    pub key_exchange: String,
}

async fn attempt(attempt: Attempt) -> Result<Answer> {
    let seen: Arc<Mutex<Vec<CertificateDer<'static>>>> = Arc::default();
    let config = client_config(&attempt.alpn, attempt.identity.as_ref(), seen.clone())?;
    let tcp = TcpStream::connect(attempt.server)
        .await
        .context("connecting")?;
    let name = ServerName::IpAddress(attempt.server.ip().into());
    let tls = TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .context("the handshake")?;
    let session = tls.get_ref().1;
    let leaf = match seen
        .lock()
        .map_err(|_| anyhow::anyhow!("poisoned"))?
        .first()
    {
        Some(leaf) => leaf.clone(),
        None => bail!("the server showed no certificate"),
    };
    let mut answer = Answer {
        status: 0,
        headers: HeaderMap::new(),
        received: Vec::new(),
        ended: false,
        alpn: session
            .alpn_protocol()
            .map(|name| String::from_utf8_lossy(name).into_owned()),
        server_id: spiffe_id(&leaf)?,
        server_certificate: leaf,
        tls_version: format!("{:?}", session.protocol_version().context("no version")?),
        cipher_suite: format!(
            "{:?}",
            session
                .negotiated_cipher_suite()
                .context("no suite")?
                .suite()
        ),
        key_exchange: format!(
            "{:?}",
            session
                .negotiated_key_exchange_group()
                .context("no key exchange")?
                .name()
        ),
    };
    let (sender, connection) = h2::client::handshake(tls)
        .await
        .context("starting HTTP/2")?;
    let driver = tokio::spawn(connection);
    let result = exchange(attempt, sender, &mut answer).await;
    driver.abort();
    result.map(|()| answer)
}

async fn exchange(
    attempt: Attempt,
    sender: h2::client::SendRequest<Bytes>,
    answer: &mut Answer,
) -> Result<()> {
    let uri = if attempt.method == Method::CONNECT {
        Uri::builder()
            .authority(attempt.authority.as_str())
            .build()?
    } else {
        let uri = Uri::builder()
            .scheme("http")
            .authority(attempt.authority.as_str());
        uri.path_and_query("/").build()?
    };
    let mut request = Request::builder()
        .method(attempt.method)
        .uri(uri)
        .body(())?;
    *request.headers_mut() = attempt.headers;
    let mut sender = sender
        .ready()
        .await
        .context("the connection is not usable")?;
    let (response, mut stream) = sender.send_request(request, false).context("the request")?;
    stream
        .send_data(attempt.send.into(), true)
        .context("sending")?;
    let response = response.await.context("the response")?;
    answer.status = response.status().as_u16();
    answer.headers = response.headers().clone();
    let mut body = response.into_body();
    loop {
        match body.data().await {
            None => {
                answer.ended = true;
                return Ok(());
            }
            Some(Ok(chunk)) => {
                body.flow_control().release_capacity(chunk.len())?;
                answer.received.extend_from_slice(&chunk);
            }
            Some(Err(_)) => return Ok(()),
        }
    }
}

/// A client that offers these protocols and accepts every server.
pub(crate) fn any_server(alpn: &[Vec<u8>], identity: Option<&Identity>) -> Result<ClientConfig> {
    client_config(alpn, identity, Arc::default())
}

fn client_config(
    alpn: &[Vec<u8>],
    identity: Option<&Identity>,
    seen: Arc<Mutex<Vec<CertificateDer<'static>>>>,
) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Remembers {
        seen,
        algorithms: provider.signature_verification_algorithms,
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some(identity) => {
            builder.with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.to_vec();
    Ok(config)
}

/// Accepts every server and remembers what it showed: the test judges.
#[derive(Debug)]
struct Remembers {
    seen: Arc<Mutex<Vec<CertificateDer<'static>>>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Remembers {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Ok(mut seen) = self.seen.lock() {
            seen.push(leaf.clone().into_owned());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, leaf, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
