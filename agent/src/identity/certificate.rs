//! Reading workloads' certificates (X.509-SVID: SPIFFE's profile of X.509).

use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use weft_core::Identity;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::IdentityError;

/// What a workload's certificate says. Nothing of it is proven before the chain is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) identity: Identity,
    /// In hexadecimal.
    pub(super) serial: String,
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    /// Whether it may be used by TLS clients, and by TLS servers.
    pub(super) client_auth: bool,
    pub(super) server_auth: bool,
}

/// The identity of a peer: from its leaf certificate, which the handshake has verified.
///
/// # Errors
/// No certificate, or one without exactly one URI as alternative name, or whose URI is no identity
/// of the mesh's form (X509-SVID, section 2).
pub fn peer_identity(certificates: &[CertificateDer<'_>]) -> Result<Identity, IdentityError> {
    let leaf = certificates.first().ok_or(IdentityError::NoCertificate)?;
    Ok(Leaf::read(leaf)?.identity)
}

/// When the first certificate of a chain ends; long ago if one cannot be read or there is none.
pub fn valid_until(chain: &[CertificateDer<'_>]) -> SystemTime {
    let ends = chain.iter().map(|der| {
        let read = X509Certificate::from_der(der);
        read.map_or(SystemTime::UNIX_EPOCH, |(_, it)| {
            time(it.validity().not_after.timestamp())
        })
    });
    ends.min().unwrap_or(SystemTime::UNIX_EPOCH)
}

impl Leaf {
    /// Reads a leaf.
    pub(super) fn read(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (rest, certificate) = X509Certificate::from_der(der).map_err(malformed)?;
        if !rest.is_empty() {
            return Err(refused("bytes follow it"));
        }
        let usage = certificate.key_usage().map_err(malformed)?;
        if usage.is_some_and(|it| it.value.key_cert_sign() || it.value.crl_sign()) {
            return Err(refused("its key may sign certificates"));
        }
        let constraints = certificate.basic_constraints().map_err(malformed)?;
        if constraints.is_some_and(|it| it.value.ca) {
            return Err(refused("it is an authority's"));
        }
        let purposes = certificate.extended_key_usage().map_err(malformed)?;
        let validity = certificate.validity();
        Ok(Self {
            identity: identity(&certificate)?,
            serial: certificate.raw_serial_as_string(),
            not_before: time(validity.not_before.timestamp()),
            not_after: time(validity.not_after.timestamp()),
            client_auth: purposes.as_ref().is_some_and(|it| it.value.client_auth),
            server_auth: purposes.as_ref().is_some_and(|it| it.value.server_auth),
        })
    }
}

fn identity(certificate: &X509Certificate<'_>) -> Result<Identity, IdentityError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(malformed)?
        .ok_or_else(|| refused("it has no alternative names"))?;
    let mut uris = names.value.general_names.iter().filter_map(|it| match it {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err(refused("it has not exactly one URI as alternative name"));
    };
    uri.parse()
        .map_err(|error: weft_core::IdentityError| IdentityError::Certificate(error.to_string()))
}

fn time(timestamp: i64) -> SystemTime {
    // Before 1970 is as expired as 1970.
    SystemTime::UNIX_EPOCH + Duration::from_secs(timestamp.try_into().unwrap_or(0))
}

fn refused(reason: &str) -> IdentityError {
    IdentityError::Certificate(reason.to_owned())
}

fn malformed(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::Certificate(format!("malformed: {error}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Authority, WEB, WORKLOAD_URI};
    use super::*;

    #[test]
    fn a_workloads_certificate_is_read() {
        let authority = Authority::new();
        let leaf = authority.leaf(WEB);
        let read = Leaf::read(&leaf.chain[0]).expect("reads");
        assert_eq!(read.identity.to_string(), WORKLOAD_URI);
        assert!(read.client_auth && read.server_auth);
        assert!(read.not_before < SystemTime::now() && read.not_after > SystemTime::now());
        assert_eq!(peer_identity(&leaf.chain), Ok(read.identity));
    }

    #[test]
    fn others_are_refused() {
        let authority = Authority::new();
        assert_eq!(peer_identity(&[]), Err(IdentityError::NoCertificate));
        for (uris, dns) in [
            (vec![], vec![]),
            (vec![], vec!["web.shop"]),
            (vec![WORKLOAD_URI, WORKLOAD_URI], vec![]),
            (vec![WORKLOAD_URI, "https://example.org"], vec![]),
            (vec!["spiffe://cluster.local/other/path"], vec![]),
            (vec!["https://example.org"], vec![]),
        ] {
            let leaf = authority.leaf_with(|params| {
                params.subject_alt_names = super::super::testing::names(&uris, &dns);
            });
            assert!(peer_identity(&leaf.chain).is_err(), "{uris:?} {dns:?}");
        }
        assert!(peer_identity(&[authority.certificate()]).is_err());
        let mut trailing = authority.leaf(WEB).chain[0].to_vec();
        trailing.push(0);
        assert!(peer_identity(&[trailing.into()]).is_err());
    }

    #[test]
    fn a_dns_name_beside_the_identity_is_no_harm() {
        let leaf = Authority::new().leaf_with(|params| {
            params.subject_alt_names = super::super::testing::names(&[WORKLOAD_URI], &["web"]);
        });
        assert!(peer_identity(&leaf.chain).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = peer_identity(&[bytes.into()]);
        }
    }
}
