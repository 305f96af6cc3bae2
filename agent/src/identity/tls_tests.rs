use rcgen::{ExtendedKeyUsagePurpose, IsCa};
use rustls::HandshakeKind;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::super::peer_identity;
use super::super::testing::{Authority, IssuedLeaf, WEB, names};
use super::*;

const ORDER: &str = "spiffe://cluster.local/ns/shop/sa/order";

type Sides = (
    std::io::Result<client::TlsStream<tokio::io::DuplexStream>>,
    std::io::Result<server::TlsStream<tokio::io::DuplexStream>>,
);

/// A handshake, until both sides have said a byte or failed: in TLS 1.3 the client learns only then
/// that its certificate was refused.
async fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Sides {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = ServerName::from(std::net::IpAddr::from([10, 1, 0, 2]));
    let connect = async {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.write_all(b"x").await?;
        stream.flush().await?;
        stream.read_u8().await?;
        Ok(stream)
    };
    let accept = async {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.read_u8().await?;
        stream.write_all(b"y").await?;
        stream.flush().await?;
        Ok(stream)
    };
    tokio::join!(connect, accept)
}

fn configs(leaf: &IssuedLeaf, trusts: &Authority) -> Configs {
    let verifier = Verifier::new(&trusts.bundle()).expect("good roots");
    Configs::new(&leaf.certified(), &verifier).expect("builds")
}

#[tokio::test]
async fn two_workloads_meet() {
    let authority = Authority::new();
    let web = configs(&authority.leaf(WEB), &authority);
    let order = configs(&authority.leaf(ORDER), &authority);
    for (config, alpn) in [(&order.weft_h2, Alpn::WeftH2), (&order.hbone, Alpn::Hbone)] {
        for _ in 0..2 {
            let (client, server) = handshake(Arc::clone(config), Arc::clone(&web.server)).await;
            let (client, server) = (client.expect("connects"), server.expect("accepts"));
            let (client, server) = (client.get_ref().1, server.get_ref().1);
            let seen = |certificates: Option<&[_]>| {
                peer_identity(certificates.unwrap_or_default()).map(|it| it.to_string())
            };
            assert_eq!(seen(client.peer_certificates()), Ok(WEB.to_owned()));
            assert_eq!(seen(server.peer_certificates()), Ok(ORDER.to_owned()));
            assert_eq!(server.alpn_protocol(), Some(alpn.as_bytes()));
            assert_eq!(server.server_name(), None);
            // The second time is as full as the first.
            assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
            let version = rustls::ProtocolVersion::TLSv1_3;
            assert_eq!(client.protocol_version(), Some(version));
            let group = client.negotiated_key_exchange_group().map(|it| it.name());
            assert_eq!(group, Some(rustls::NamedGroup::X25519MLKEM768));
            let suite = client.negotiated_cipher_suite().map(|it| it.suite());
            assert_eq!(suite, Some(rustls::CipherSuite::TLS13_AES_128_GCM_SHA256));
            assert_eq!(client.tls13_tickets_received(), 0);
        }
    }
}

/// Each leaf is refused as a client's and as a server's, unless said otherwise.
#[tokio::test]
async fn others_are_refused() {
    let authority = Authority::new();
    let foreign = Authority::new();
    let good = configs(&authority.leaf(WEB), &authority);
    let hour = std::time::Duration::from_secs(3600);
    let now = std::time::SystemTime::now();
    let only =
        |purpose| authority.leaf_with(move |params| params.extended_key_usages = vec![purpose]);
    let with_names = |uris: &[&str]| {
        authority.leaf_with(|params| params.subject_alt_names = names(uris, &["web.shop"]))
    };
    let cases = [
        ("good", authority.leaf(ORDER), true, true),
        ("foreign", foreign.leaf(ORDER), false, false),
        (
            "expired",
            authority.leaf_with(|it| it.not_after = (now - hour / 2).into()),
            false,
            false,
        ),
        (
            "not yet valid",
            authority.leaf_with(|it| it.not_before = (now + hour).into()),
            false,
            false,
        ),
        ("two identities", with_names(&[WEB, ORDER]), false, false),
        ("no identity", with_names(&[]), false, false),
        (
            "other trust domain",
            authority.leaf("spiffe://example.org/ns/shop/sa/web"),
            false,
            false,
        ),
        (
            "client only",
            only(ExtendedKeyUsagePurpose::ClientAuth),
            true,
            false,
        ),
        (
            "server only",
            only(ExtendedKeyUsagePurpose::ServerAuth),
            false,
            true,
        ),
        (
            "other purpose",
            only(ExtendedKeyUsagePurpose::CodeSigning),
            false,
            false,
        ),
        (
            "no purpose",
            authority.leaf_with(|it| it.extended_key_usages = vec![]),
            false,
            false,
        ),
        (
            "an authority",
            authority.leaf_with(|it| {
                it.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            }),
            false,
            false,
        ),
        (
            "a signing key",
            authority.leaf_with(|it| it.key_usages.push(rcgen::KeyUsagePurpose::KeyCertSign)),
            false,
            false,
        ),
    ];
    for (what, leaf, as_client, as_server) in cases {
        let it = configs(&leaf, &authority);
        let (client, server) = handshake(it.weft_h2, Arc::clone(&good.server)).await;
        assert_eq!(server.is_ok(), as_client, "{what} as client");
        assert_eq!(client.is_ok(), as_client, "{what} as client");
        let (client, server) = handshake(Arc::clone(&good.weft_h2), it.server).await;
        assert_eq!(client.is_ok(), as_server, "{what} as server");
        assert_eq!(server.is_ok(), as_server, "{what} as server");
    }
}

/// A client as rustls makes it, with what is given changed.
fn plain_client(authority: &Authority, change: impl FnOnce(&mut CryptoProvider)) -> ClientConfig {
    let verifier = Verifier::new(&authority.bundle()).expect("good roots");
    let mut provider = default_provider();
    change(&mut provider);
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let authority = Authority::new();
    let good = configs(&authority.leaf(WEB), &authority);
    let (_, server) = handshake(Arc::new(plain_client(&authority, |_| {})), good.server).await;
    let error = server.expect_err("must be refused").to_string();
    assert!(error.contains("no certificates"), "{error}");
}

#[tokio::test]
async fn other_suites_groups_and_protocols_are_refused() {
    let authority = Authority::new();
    let good = configs(&authority.leaf(WEB), &authority);
    let chacha = plain_client(&authority, |provider| {
        provider.cipher_suites = vec![cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
    });
    let p384 = plain_client(&authority, |provider| {
        provider.kx_groups = vec![kx_group::SECP384R1]
    });
    let mut http = plain_client(&authority, |_| {});
    http.alpn_protocols = vec![b"http/1.1".to_vec()];
    for (what, config) in [("suite", chacha), ("group", p384), ("protocol", http)] {
        let (_, server) = handshake(Arc::new(config), Arc::clone(&good.server)).await;
        let error = server.expect_err(what).to_string();
        assert!(!error.contains("no certificates"), "{what}: {error}");
    }
}

#[test]
fn bundles_are_checked() {
    let good = Authority::new().bundle();
    assert!(super::super::check_roots(&good).is_ok());
    let mut empty = good.clone();
    empty.roots.clear();
    let mut half = good;
    half.roots.push(vec![1, 2, 3]);
    for bad in [empty, half] {
        assert!(super::super::check_roots(&bad).is_err());
    }
}
