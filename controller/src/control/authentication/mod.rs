//! How an agent proves which node it is on: by a join token from a file, or by the token of its service account, which
//! a cluster's API server vouches for.
//!
//! | part | concern |
//! |---|---|
//! | `reviews` | asks the API server, never more than it should be asked |
//! | `remembered` | its answers, for a while |
//! | `proof` | what an answer proves: pure |
//! | `pods` | the pods of agents, as the source tells them |

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;
use weft_core::Name;

use super::tokens::Tokens;

pub mod pods;
mod proof;
mod remembered;
mod reviews;

pub(crate) use remembered::{Fingerprint, fingerprint};
pub(crate) use reviews::shape;
pub use reviews::{Expected, Reviews};

/// Who decides.
#[derive(Debug)]
pub enum Authentication {
    /// A file of join tokens.
    JoinTokens(Tokens),
    /// A cluster's API server.
    Kubernetes(Arc<Reviews>),
}

/// Why a token does not say which node somebody is on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is in no file of join tokens.
    #[error("the join token is not known")]
    Unknown,
    /// No service account has a token like that.
    #[error("this is no token of a service account")]
    Malformed,
    /// The API server does not believe it.
    #[error("the API server does not accept the token: is it expired, or its pod gone?")]
    NotAuthenticated,
    /// It is meant for somebody else.
    #[error("the token is for another audience than {0}")]
    Audience(String),
    /// It is not an agent's.
    #[error("the token is not that of the agents' service account")]
    Account,
    /// Nothing says which pod or node it is of.
    #[error("the token is bound to no node and to no pod")]
    Unbound,
    /// Only its pod could say on which node it is, and is not known.
    #[error("the token names no node, and its pod is not known")]
    UnknownPod,
    /// Another pod has the name of its pod.
    #[error("the token's pod was replaced by another one of its name")]
    OtherPod,
    /// Its pod was deleted.
    #[error("the token's pod is gone")]
    PodGone,
    /// Its pod runs no longer.
    #[error("the token's pod has succeeded or failed")]
    PodEnded,
    /// It names another node than its pod is on.
    #[error("the token names another node than its pod is on")]
    Disagrees,
    /// Nobody could be asked.
    #[error("the API server cannot be asked about the token: {0}")]
    Unavailable(String),
    /// Too many ask.
    #[error("too many tokens are being reviewed: try again")]
    Busy,
}

impl Refusal {
    /// Its label in metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Malformed => "malformed",
            Self::NotAuthenticated => "not_authenticated",
            Self::Audience(_) => "audience",
            Self::Account => "account",
            Self::Unbound => "unbound",
            Self::UnknownPod => "unknown_pod",
            Self::OtherPod => "other_pod",
            Self::PodGone => "pod_gone",
            Self::PodEnded => "pod_ended",
            Self::Disagrees => "disagrees",
            Self::Unavailable(_) => "unavailable",
            Self::Busy => "busy",
        }
    }

    /// Whether nothing was found out about the token: it may be good.
    pub fn is_unclear(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Busy)
    }

    /// What the agent is told.
    pub fn status(&self) -> Status {
        match self.is_unclear() {
            true => Status::unavailable(self.to_string()),
            false => Status::unauthenticated(self.to_string()),
        }
    }
}

impl Authentication {
    /// The node of the agent that shows a token.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub async fn node_of(&self, token: &[u8], from: IpAddr) -> Result<Name, Refusal> {
        match self {
            Self::JoinTokens(tokens) => tokens.node_of(token).ok_or(Refusal::Unknown),
            Self::Kubernetes(reviews) => {
                let proof = reviews.review(token, from, AT_THE_DOOR).await?;
                reviews.node_by(&proof)
            }
        }
    }

    /// Waits until a token that was good does not prove any more that its agent is on a node, and says so. While nobody
    /// can be asked, it goes on.
    pub async fn lapsed(&self, token: &[u8], node: &Name, from: IpAddr) -> Status {
        match self {
            Self::JoinTokens(tokens) => {
                let mut changes = tokens.changes();
                while tokens.node_of(token).as_ref() == Some(node) {
                    // The sender lives as long as the tokens do.
                    let _ = changes.changed().await;
                }
                Status::unauthenticated("the join token is no longer valid")
            }
            Self::Kubernetes(reviews) => loop {
                match reviews.stays(token, node, from).await {
                    Err(refusal) if !refusal.is_unclear() => return refusal.status(),
                    _ => tokio::time::sleep(AFTER_AN_OUTAGE).await,
                }
            },
        }
    }

    /// Looks at files again that may have changed.
    pub fn reload(&self) {
        match self {
            Self::JoinTokens(tokens) => tokens.reload(),
            Self::Kubernetes(_) => {}
        }
    }
}

/// How old an answer about a token may be for a call.
const AT_THE_DOOR: Duration = Duration::from_secs(60);
/// How long after a failure the token of an open stream is asked about again.
const AFTER_AN_OUTAGE: Duration = Duration::from_secs(5);
