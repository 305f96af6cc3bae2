//! Checked names of Kubernetes objects, and constants with one home.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// The port of the tunnel listener in every meshed pod (TCP; the same as HBONE's).
pub const TUNNEL_PORT: u16 = 15008;

/// A name as Kubernetes allows it for objects: a DNS subdomain (RFC 1123), 1 to 253 characters of
/// lower-case letters, digits, `-` and `.`, starting and ending with a letter or digit.
///
/// Cheap to clone: names are shared, not copied.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

/// Why a text is no [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a valid name: 1 to 253 lower-case letters, digits, '-' or '.' are needed")]
pub struct NameError {
    /// The refused text, shortened to 64 characters.
    pub text: String,
}

/// The name of a namespaced object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ObjectName {
    /// The object's namespace.
    pub namespace: Name,
    /// The object's own name.
    pub name: Name,
}

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        let allowed = bytes
            .iter()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'));
        if bytes.len() <= 253 && allowed && edge(bytes.first()) && edge(bytes.last()) {
            Ok(Self(Arc::from(text)))
        } else {
            Err(NameError {
                text: text.chars().take(64).collect(),
            })
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", &self.0)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl ObjectName {
    /// Parses both parts.
    ///
    /// # Errors
    /// The first part that is not a name.
    pub fn parse(namespace: &str, name: &str) -> Result<Self, NameError> {
        Ok(Self {
            namespace: namespace.parse()?,
            name: name.parse()?,
        })
    }
}

/// `namespace/name`.
impl fmt::Display for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.namespace, self.name)
    }
}

/// Reads `namespace/name`.
impl FromStr for ObjectName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (namespace, name) = text.split_once('/').ok_or_else(|| NameError {
            text: text.chars().take(64).collect(),
        })?;
        Self::parse(namespace, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "web-0", "kube-root-ca.crt", "0"] {
            assert_eq!(good.parse::<Name>().expect(good).as_str(), good);
        }
        let long = "a".repeat(254);
        for bad in ["", "-a", "a-", "A", "a/b", "a b", "ä", long.as_str()] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn object_names_round_trip() {
        let name: ObjectName = "shop/web".parse().expect("valid");
        assert_eq!(name.to_string(), "shop/web");
        assert!("shop".parse::<ObjectName>().is_err());
        assert!("shop/web/x".parse::<ObjectName>().is_err());
    }
}
