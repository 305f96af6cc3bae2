use std::os::unix::fs::PermissionsExt;

use rcgen::{BasicConstraints, CertifiedIssuer, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};
use rustls_pki_types::{ServerName, TrustAnchor, UnixTime};
use tempfile::TempDir;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::X509Certificate;

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn open(folder: &TempDir, lifetime: Duration) -> Result<Authority, IssuerError> {
    let domain = "cluster.local".parse().expect("valid");
    let ca = folder.path().join("ca");
    Authority::open(ca, domain, lifetime, Problems::default())
}

fn identity() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/web"
        .parse()
        .expect("valid")
}

fn request(key: &KeyPair) -> Vec<u8> {
    let mut params = CertificateParams::default();
    // What a requester may ask for, and does not get.
    params.subject_alt_names = vec![
        SanType::URI(
            "spiffe://cluster.local/ns/admin/sa/root"
                .try_into()
                .expect("ASCII"),
        ),
        SanType::DnsName("weft-controller".try_into().expect("ASCII")),
    ];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.serialize_request(key).expect("made").der().to_vec()
}

fn seconds(moment: SystemTime) -> i64 {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH);
    since.expect("after 1970").as_secs() as i64
}

fn parse(der: &[u8]) -> X509Certificate<'_> {
    X509Certificate::from_der(der).expect("a certificate").1
}

#[test]
fn leaves_say_who_and_nothing_that_was_asked_for() {
    let folder = tempfile::tempdir().expect("made");
    let authority = open(&folder, DAY).expect("opened");
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &PKCS_ECDSA_P384_SHA384,
        &PKCS_ED25519,
    ] {
        let key = KeyPair::generate_for(algorithm).expect("made");
        let before = SystemTime::now();
        let signed = authority.sign(&request(&key), &identity()).expect("signed");
        assert_eq!(signed.chain.len(), 1, "the root is not sent");
        let leaf = parse(&signed.chain[0]);
        let names = leaf
            .subject_alternative_name()
            .expect("valid")
            .expect("there");
        assert!(names.critical, "without a subject the name is critical");
        let uri = identity().to_string();
        assert_eq!(names.value.general_names, [GeneralName::URI(&uri)]);
        assert_eq!(leaf.subject().iter().count(), 0);
        assert!(!leaf.is_ca());
        let usage = leaf.key_usage().expect("valid").expect("there").value;
        assert!(usage.digital_signature() && usage.flags.count_ones() == 1);
        let extended = leaf
            .extended_key_usage()
            .expect("valid")
            .expect("there")
            .value;
        assert!(extended.server_auth && extended.client_auth);
        assert!(!extended.any && !extended.code_signing && extended.other.is_empty());
        assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
        let validity = leaf.validity();
        let (from, until) = (
            validity.not_before.timestamp(),
            validity.not_after.timestamp(),
        );
        assert!(until <= seconds(SystemTime::now() + DAY) && until >= seconds(before + DAY));
        // Never before its issuer, which is as old as this test.
        let bundle = authority.trust_bundle();
        let root = parse(&bundle.roots[0]);
        assert!(from >= root.validity().not_before.timestamp());
        assert!(from <= seconds(before));
        leaf.verify_signature(Some(root.public_key()))
            .expect("by the root");
    }
}

#[test]
fn leaves_are_accepted_by_tls() {
    let folder = tempfile::tempdir().expect("made");
    let authority = open(&folder, DAY).expect("opened");
    let (signed, _) = authority.serving("weft-controller").expect("made");
    let mut roots = rustls::RootCertStore::empty();
    for root in authority.trust_bundle().roots {
        roots.add(root.into()).expect("a root");
    }
    let _: &[TrustAnchor<'static>] = &roots.roots;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
    let verifier = verifier.build().expect("a verifier");
    use rustls::client::danger::ServerCertVerifier;
    for (name, accepted) in [("weft-controller", true), ("else.where", false)] {
        let name = ServerName::try_from(name).expect("a name");
        let chain = &signed.chain;
        let verified =
            verifier.verify_server_cert(&chain[0], &chain[1..], &name, &[], UnixTime::now());
        assert_eq!(verified.is_ok(), accepted, "{name:?}");
    }
}

#[test]
fn serials_differ() {
    let folder = tempfile::tempdir().expect("made");
    let authority = open(&folder, DAY).expect("opened");
    let csr = request(&KeyPair::generate().expect("made"));
    let serial = || {
        let signed = authority.sign(&csr, &identity()).expect("signed");
        parse(&signed.chain[0]).raw_serial().to_vec()
    };
    let (one, other) = (serial(), serial());
    assert_ne!(one, other);
    assert!(one.len() == 16 && one[0] < 0x80);
}

#[test]
fn requests_that_prove_nothing_are_refused() {
    let folder = tempfile::tempdir().expect("made");
    let authority = open(&folder, DAY).expect("opened");
    let good = request(&KeyPair::generate().expect("made"));
    let mut forged = good.clone();
    // The signature is at the end.
    *forged.last_mut().expect("not empty") ^= 1;
    let mut other_key = good.clone();
    let raw = {
        let (_, parsed) = X509CertificationRequest::from_der(&good).expect("valid");
        let key = &parsed.certification_request_info.subject_pki;
        key.subject_public_key.data.to_vec()
    };
    let at = good
        .windows(raw.len())
        .position(|it| it == raw)
        .expect("there");
    let another = KeyPair::generate().expect("made");
    other_key[at..at + raw.len()].copy_from_slice(another.public_key_raw());
    let trailing = [good.as_slice(), b"x"].concat();
    let p521 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).expect("made");
    for (name, csr) in [
        ("empty", vec![]),
        ("noise", b"no request at all".to_vec()),
        ("forged", forged),
        ("another's key", other_key),
        ("trailing", trailing),
        ("cut", good[..good.len() - 1].to_vec()),
        ("P-521", request(&p521)),
        ("huge", vec![0x30; MAX_REQUEST_BYTES + 1]),
        ("RSA", rsa_request()),
    ] {
        let refused = authority.sign(&csr, &identity());
        assert!(
            matches!(refused, Err(SignError::Request(_))),
            "{name}: {refused:?}"
        );
    }
}

fn rsa_request() -> Vec<u8> {
    let key = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048);
    request(&key.expect("made"))
}

#[test]
fn files_are_private_and_stay_the_same() {
    let folder = tempfile::tempdir().expect("made");
    let first = open(&folder, DAY).expect("made").trust_bundle();
    let ca = folder.path().join("ca");
    for (path, mode) in [
        (ca.clone(), 0o700),
        (ca.join("issuer.key"), 0o600),
        (ca.join("issuer.crt"), 0o600),
        (ca.join("ca.crt"), 0o644),
    ] {
        let metadata = std::fs::metadata(&path).expect("there");
        assert_eq!(
            metadata.permissions().mode() & 0o777,
            mode,
            "{}",
            path.display()
        );
    }
    assert_eq!(open(&folder, DAY).expect("opened").trust_bundle(), first);
    // Never repaired by guessing.
    std::fs::remove_file(ca.join("issuer.key")).expect("removed");
    let error = open(&folder, DAY).expect_err("refused").to_string();
    assert!(error.contains("issuer.key"), "{error}");
}

/// An issuer below a root, as cert-manager writes it.
struct Foreign {
    root: CertifiedIssuer<'static, KeyPair>,
    issuer: String,
    key: String,
}

fn foreign(change: impl FnOnce(&mut CertificateParams)) -> Foreign {
    below(|_| {}, change)
}

fn below(
    change_root: impl FnOnce(&mut CertificateParams),
    change: impl FnOnce(&mut CertificateParams),
) -> Foreign {
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    };
    let key = KeyPair::generate().expect("made");
    let mut params = authority("root");
    change_root(&mut params);
    let root = CertifiedIssuer::self_signed(params, key).expect("made");
    let key = KeyPair::generate().expect("made");
    let mut params = authority("issuer");
    change(&mut params);
    let issuer = params.signed_by(&key, &root).expect("made").pem();
    let key = key.serialize_pem();
    Foreign { root, issuer, key }
}

impl Foreign {
    fn write(&self, folder: &TempDir, roots: &str) {
        let ca = folder.path().join("ca");
        std::fs::create_dir_all(&ca).expect("made");
        for (name, content) in [
            ("ca.crt", roots),
            ("issuer.crt", self.issuer.as_str()),
            ("issuer.key", self.key.as_str()),
        ] {
            std::fs::write(ca.join(name), content).expect("written");
        }
    }
}

#[test]
fn an_issuer_below_a_root_is_sent_with_the_leaf() {
    let folder = tempfile::tempdir().expect("made");
    let foreign = foreign(|_| {});
    foreign.write(&folder, &foreign.root.pem());
    let authority = open(&folder, DAY).expect("opened");
    let csr = request(&KeyPair::generate().expect("made"));
    let signed = authority.sign(&csr, &identity()).expect("signed");
    assert_eq!(signed.chain.len(), 2);
    let issuer = parse(&signed.chain[1]);
    parse(&signed.chain[0])
        .verify_signature(Some(issuer.public_key()))
        .expect("by the issuer");
}

#[test]
fn a_leaf_never_outlives_its_issuer() {
    let folder = tempfile::tempdir().expect("made");
    let end = SystemTime::now() + Duration::from_secs(600);
    let foreign = foreign(|it| set_validity(it, SystemTime::now() - DAY, end));
    foreign.write(&folder, &foreign.root.pem());
    let authority = open(&folder, DAY).expect("opened");
    let csr = request(&KeyPair::generate().expect("made"));
    let signed = authority.sign(&csr, &identity()).expect("signed");
    let leaf = parse(&signed.chain[0]);
    assert_eq!(leaf.validity().not_after.timestamp(), seconds(end));

    let folder = tempfile::tempdir().expect("made");
    let end = SystemTime::now() + Duration::from_secs(30);
    let foreign = self::foreign(|it| set_validity(it, SystemTime::now() - DAY, end));
    foreign.write(&folder, &foreign.root.pem());
    let authority = open(&folder, DAY).expect("opened");
    let refused = authority.sign(&csr, &identity());
    assert!(matches!(refused, Err(SignError::IssuerExpires)));
}

#[test]
fn a_leaf_never_outlives_its_root() {
    let folder = tempfile::tempdir().expect("made");
    let end = SystemTime::now() + Duration::from_secs(600);
    let foreign = below(|it| set_validity(it, SystemTime::now() - DAY, end), |_| {});
    foreign.write(&folder, &foreign.root.pem());
    let authority = open(&folder, DAY).expect("opened");
    let csr = request(&KeyPair::generate().expect("made"));
    let signed = authority.sign(&csr, &identity()).expect("signed");
    let leaf = parse(&signed.chain[0]);
    assert_eq!(leaf.validity().not_after.timestamp(), seconds(end));
}

#[test]
fn an_expired_root_vouches_for_nobody() {
    let folder = tempfile::tempdir().expect("made");
    let good = foreign(|_| {});
    let end = SystemTime::now() + Duration::from_secs(2);
    let ends = below(|it| set_validity(it, SystemTime::now() - DAY, end), |_| {});
    good.write(&folder, &(good.root.pem() + &ends.root.pem()));
    let authority = open(&folder, DAY).expect("opened");
    assert_eq!(authority.trust_bundle().roots.len(), 2);
    std::thread::sleep(Duration::from_secs(2));
    authority.reload();
    assert_eq!(authority.trust_bundle().roots, [good.root.der().to_vec()]);
    assert_eq!(authority.problems.count(), 1);
}

#[test]
fn short_lives_are_not_over_before_they_begin() {
    let folder = tempfile::tempdir().expect("made");
    let foreign = foreign(|_| {});
    foreign.write(&folder, &foreign.root.pem());
    let csr = request(&KeyPair::generate().expect("made"));
    for (lifetime, backdate) in [(20, 2), (600, 60), (24 * 3600, 60)] {
        let authority = open(&folder, Duration::from_secs(lifetime)).expect("opened");
        let signed = authority.sign(&csr, &identity()).expect("signed");
        let validity = parse(&signed.chain[0]).validity().clone();
        let life = validity.not_after.timestamp() - validity.not_before.timestamp();
        // Both ends are cut to seconds.
        assert!(
            (life - (lifetime + backdate) as i64).abs() <= 1,
            "{lifetime}: {life}"
        );
    }
}

#[test]
fn unusable_issuers_are_refused() {
    let good = foreign(|_| {});
    let stranger = foreign(|_| {});
    let no_authority = foreign(|it| it.is_ca = IsCa::ExplicitNoCa);
    let no_signing = foreign(|it| it.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    let past = SystemTime::now() - DAY;
    let expired = foreign(|it| set_validity(it, past - DAY, past));
    let early = foreign(|it| set_validity(it, SystemTime::now() + DAY, past + 9 * DAY));
    let dead_root = below(|it| set_validity(it, past - DAY, past), |_| {});
    let path_too_long = below(
        |it| it.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)),
        |_| {},
    );
    let mut wrong_key = foreign(|_| {});
    wrong_key.key = KeyPair::generate().expect("made").serialize_pem();
    for (foreign, roots, says) in [
        (&good, stranger.root.pem(), "does not lead to"),
        (&good, String::new(), "ca.crt"),
        (&good, good.key.clone(), "ca.crt"),
        (&no_authority, no_authority.root.pem(), "basic constraints"),
        (&no_signing, no_signing.root.pem(), "key usage"),
        (&expired, expired.root.pem(), "expired"),
        (&wrong_key, wrong_key.root.pem(), "not the key"),
        (&path_too_long, path_too_long.root.pem(), "shorter path"),
        (&dead_root, dead_root.root.pem(), "expired"),
        (&early, early.root.pem(), "not believed"),
    ] {
        let folder = tempfile::tempdir().expect("made");
        foreign.write(&folder, &roots);
        let error = open(&folder, DAY).expect_err(says).to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn a_new_issuer_is_taken_over_and_a_broken_one_is_not() {
    let folder = tempfile::tempdir().expect("made");
    let authority = open(&folder, DAY).expect("opened");
    let old_roots = authority.trust_bundle();
    let changes = authority.changes();
    let old = std::fs::read_to_string(folder.path().join("ca/ca.crt")).expect("read");

    let foreign = foreign(|_| {});
    foreign.write(&folder, "not PEM");
    authority.reload();
    assert_eq!(authority.trust_bundle(), old_roots);
    assert_eq!(authority.problems.count(), 1);
    assert!(!changes.has_changed().expect("open"));

    foreign.write(&folder, &(old + &foreign.root.pem()));
    authority.reload();
    assert_eq!(authority.problems.count(), 0);
    assert!(changes.has_changed().expect("open"));
    let roots = authority.trust_bundle().roots;
    assert_eq!((roots.len(), &roots[0]), (2, &old_roots.roots[0]));
    let csr = request(&KeyPair::generate().expect("made"));
    let signed = authority.sign(&csr, &identity()).expect("signed");
    assert_eq!(signed.chain.len(), 2);
}

/// Killed at any moment of its first start, the next one makes a root or ends what was begun; later nothing
/// is made anew.
#[test]
fn a_first_start_that_was_cut_short_is_done_again() {
    let names = ["issuer.key", "issuer.crt", "ca.crt"];
    for moved in 0..=names.len() {
        let folder = tempfile::tempdir().expect("made");
        drop(open(&folder, DAY).expect("opened"));
        let ca = folder.path().join("ca");
        let root = std::fs::read(ca.join("ca.crt")).expect("there");
        let making = ca.join(".making");
        assert!(!making.exists());
        std::fs::create_dir_all(making.join("made")).expect("made");
        for missing in &names[moved..] {
            std::fs::rename(ca.join(missing), making.join("made").join(missing)).expect("moved");
        }
        drop(open(&folder, DAY).expect("opened"));
        let same = std::fs::read(ca.join("ca.crt")).expect("there") == root;
        // Before the first was in its place nobody had seen any.
        assert_eq!(same, moved > 0, "{moved} were moved");
        assert!(!making.exists());
        std::fs::remove_file(ca.join("issuer.crt")).expect("removed");
        let error = open(&folder, DAY).expect_err("nothing is guessed");
        assert!(error.to_string().contains("missing"), "{error}");
    }
}

/// A start that was cut short, and an operator who then brings files of his own: none is removed.
#[test]
fn what_an_operator_brings_is_kept() {
    for unfinished in ["unfinished", "made"] {
        let folder = tempfile::tempdir().expect("made");
        let ca = folder.path().join("ca");
        let making = ca.join(".making").join(unfinished);
        std::fs::create_dir_all(&making).expect("made");
        std::fs::write(making.join("issuer.key"), "half a key").expect("written");
        for name in ["issuer.key", "issuer.crt"] {
            std::fs::write(ca.join(name), "an operator's").expect("written");
        }
        let error = open(&folder, DAY).expect_err("the roots are missing");
        assert!(error.to_string().contains("missing"), "{error}");
        for name in ["issuer.key", "issuer.crt"] {
            let kept = std::fs::read_to_string(ca.join(name)).expect("there");
            assert_eq!(kept, "an operator's");
        }
    }
}
