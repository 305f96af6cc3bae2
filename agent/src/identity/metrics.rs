//! The certificates' numbers.

use std::fmt;
use std::time::SystemTime;

use super::{CertificateState, CertificateStatus, Identities};
use crate::telemetry::{Kind, Samples, Source};

impl Source for Identities {
    fn collect(&self, samples: &mut Samples) {
        for status in self.status() {
            collect(&status, samples);
        }
    }
}

fn collect(status: &CertificateStatus, samples: &mut Samples) {
    let labels = || vec![("identity", status.identity.to_string())];
    let held = matches!(
        status.state,
        CertificateState::Held | CertificateState::InDanger
    );
    let mut gauge = |name, help, value| samples.add(Kind::Gauge, name, help, labels(), value);
    gauge(
        "weft_certificate_held",
        "Whether the identity has a valid certificate",
        f64::from(u8::from(held)),
    );
    gauge(
        "weft_certificate_failures",
        "Tries to get or renew the certificate that failed, in a row",
        f64::from(status.failures),
    );
    let end = status.not_after;
    if let Some(end) = end.and_then(|it| it.duration_since(SystemTime::UNIX_EPOCH).ok()) {
        gauge(
            "identity_cert_expiration_timestamp_seconds",
            "When the certificate expires, in seconds since 1970",
            end.as_secs_f64(),
        );
    }
}

/// Names only; keys are nowhere near.
impl fmt::Debug for Identities {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status();
        let names = status.iter().map(|it| it.identity.to_string());
        formatter.debug_list().entries(names).finish()
    }
}
