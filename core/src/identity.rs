//! Who a workload is: a SPIFFE ID made of trust domain, namespace and service account.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::names::Name;

/// A SPIFFE trust domain (SPIFFE-ID specification, section 2.1): 1 to 255 lower-case letters,
/// digits, `.`, `-` and `_`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// A workload's identity, written `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The trust domain whose roots vouch for it.
    pub trust_domain: TrustDomain,
    /// The service account's namespace.
    pub namespace: Name,
    /// The service account's name.
    pub service_account: Name,
}

/// Why a text is no identity or trust domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The trust domain has characters or a length that SPIFFE does not allow.
    #[error("{0:?} is not a trust domain: 1 to 255 lower-case letters, digits, '.', '-' or '_'")]
    TrustDomain(String),
    /// The text is not of the mesh's form.
    #[error("{0:?} is not of the form spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>")]
    Form(String),
}

impl TrustDomain {
    /// The trust domain as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if (1..=255).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(Arc::from(text)))
        } else {
            Err(IdentityError::TrustDomain(shortened(text)))
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            trust_domain,
            namespace,
            service_account,
        } = self;
        write!(
            formatter,
            "spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"
        )
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form(shortened(text));
        let rest = text.strip_prefix("spiffe://").ok_or_else(form)?;
        let mut parts = rest.split('/');
        let (Some(domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return Err(form());
        };
        Ok(Self {
            trust_domain: domain.parse()?,
            namespace: namespace.parse().map_err(|_| form())?,
            service_account: account.parse().map_err(|_| form())?,
        })
    }
}

impl Serialize for TrustDomain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl Serialize for Identity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn identities_are_checked() {
        let good = "spiffe://cluster.local/ns/shop/sa/web";
        assert_eq!(good.parse::<Identity>().expect("valid").to_string(), good);
        for bad in [
            "",
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/shop/sa/web/",
            "spiffe://cluster.local/ns/shop/sa/",
            "spiffe:///ns/shop/sa/web",
            "spiffe://Cluster/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/web?x",
            "spiffe://cluster.local/sa/web/ns/shop",
            "https://cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local:80/ns/shop/sa/web",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails_and_what_parses_is_canonical(text in ".{0,80}") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }
    }
}
