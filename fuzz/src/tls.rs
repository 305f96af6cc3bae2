//! A server's side of TLS, and the keys of a client that holds nothing back.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, ConnectionTrafficSecrets, DigitallySignedStruct, Error,
    ServerConfig, SignatureScheme,
};
use weft_agent::proxy::tunnel::weft1::record::Records;

/// What both sides of a handshake need; made once.
pub struct Ends {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Ends {
    /// A server with a certificate of its own making, and a client that believes it.
    ///
    /// # Panics
    /// If a key cannot be made.
    pub fn new() -> Self {
        let provider = Arc::new(default_provider());
        let made = rcgen::generate_simple_self_signed(["fuzzed".to_owned()]).expect("signs");
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key");
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .expect("a certificate");
        server.alpn_protocols = vec![b"weft/1".to_vec()];
        server.enable_secret_extraction = true;
        server.send_tls13_tickets = 0;
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Believing(provider)))
            .with_no_client_auth();
        client.alpn_protocols = vec![b"weft/1".to_vec()];
        client.enable_secret_extraction = true;
        Self {
            server: Arc::new(server),
            client: Arc::new(client),
        }
    }

    /// The server's configuration.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// Shakes hands in memory: the server's records from then on, and the keys by which the client
    /// seals what it sends.
    ///
    /// # Panics
    /// If two good sides cannot agree.
    pub fn shake(&self) -> (Records, (u64, ConnectionTrafficSecrets)) {
        let name = ServerName::try_from("fuzzed").expect("a name");
        let mut client = ClientConnection::new(self.client.clone(), name).expect("a client");
        let mut server = UnbufferedServerConnection::new(self.server.clone()).expect("a server");
        let mut to_server = Vec::new();
        while client.is_handshaking() || server.is_handshaking() {
            while client.wants_write() {
                client.write_tls(&mut to_server).expect("into memory");
            }
            let to_client = serve(&mut server, &mut to_server);
            let mut rest = &to_client[..];
            while !rest.is_empty() {
                client.read_tls(&mut rest).expect("from memory");
                client.process_new_packets().expect("a good server");
            }
        }
        let (secrets, keys) = server.dangerous_into_kernel_connection().expect("keys");
        let records = Records::new(secrets, keys).expect("a known cipher");
        let secrets = client.dangerous_extract_secrets().expect("keys");
        (records, secrets.tx)
    }
}

impl Default for Ends {
    fn default() -> Self {
        Self::new()
    }
}

fn serve(server: &mut UnbufferedServerConnection, incoming: &mut Vec<u8>) -> Vec<u8> {
    let mut outgoing = Vec::new();
    loop {
        let UnbufferedStatus { discard, state } = server.process_tls_records(incoming);
        let blocked = match state.expect("a good client") {
            ConnectionState::EncodeTlsData(mut data) => {
                let mut encoded = vec![0; 16 * 1024];
                let length = data.encode(&mut encoded).expect("room");
                outgoing.extend_from_slice(&encoded[..length]);
                false
            }
            ConnectionState::TransmitTlsData(data) => {
                data.done();
                false
            }
            _ => true,
        };
        incoming.drain(..discard);
        if blocked {
            return outgoing;
        }
    }
}

#[derive(Debug)]
struct Believing(Arc<CryptoProvider>);

impl ServerCertVerifier for Believing {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, leaf, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, leaf, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let algorithms = &self.0.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}
