//! The parts that trust rests on, as the flags say them: the issuer, and who knows agents.

use std::sync::Arc;

use anyhow::Context;
use kube::Client;
use weft_core::{Name, ObjectName};

use crate::authority::{Authority, IssuerSecret, RootsConfigMap, secret};
use crate::config::{AgentAuth, Run, SourceChoice};
use crate::control::authentication::pods::AgentPods;
use crate::control::authentication::{Authentication, Expected, Reviews};
use crate::control::tokens::Tokens;
use crate::leader::{Candidate, Leadership};
use crate::problems::Problems;
use crate::source::kubernetes::Connection;

/// Where the issuer and the roots are in a cluster.
pub(super) struct Identity {
    client: Client,
    secret: ObjectName,
    roots: ObjectName,
    make: bool,
}

/// A client for the API server of a cluster, if there is one.
pub(super) async fn client(config: &Run) -> anyhow::Result<Option<Client>> {
    if config.source != SourceChoice::Kubernetes {
        return Ok(None);
    }
    let connection = Connection {
        kubeconfig: config.kubeconfig.clone(),
        context: config.kube_context.clone(),
    };
    let client = connection.client().await;
    client.context("--source kubernetes").map(Some)
}

impl Identity {
    /// Who keeps both for an authority.
    pub(super) fn kept_for(self, authority: &Arc<Authority>) -> (IssuerSecret, RootsConfigMap) {
        let secret = IssuerSecret {
            client: self.client.clone(),
            name: self.secret,
            roots: self.roots.clone(),
            make: self.make,
            authority: authority.clone(),
        };
        let roots = RootsConfigMap {
            client: self.client,
            name: self.roots,
            authority: authority.clone(),
        };
        (secret, roots)
    }
}

/// Where the issuer and the roots are, if they are in the cluster.
pub(super) fn identity(config: &Run, client: Option<&Client>) -> Option<Identity> {
    let client = client.filter(|_| config.ca.is_none())?;
    let namespace = namespace(config, client)?;
    let named = |name: &Name| ObjectName {
        namespace: namespace.clone(),
        name: name.clone(),
    };
    Some(Identity {
        client: client.clone(),
        secret: named(&config.identity_secret),
        roots: named(&config.identity_roots),
        make: !config.wait_for_issuer,
    })
}

/// Whether this controller leads, and who sees to it that it does if it can; none where there is no cluster.
pub(super) fn leadership(
    config: &Run,
    client: Option<&Client>,
    problems: &Problems,
) -> (Option<Candidate>, Leadership) {
    let Some(client) = client else {
        return (None, Leadership::none());
    };
    let Some(namespace) = namespace(config, client) else {
        tracing::warn!(
            "no status is written: the kubeconfig names no namespace, nor does --namespace"
        );
        return (None, Leadership::none());
    };
    let name = ObjectName {
        namespace,
        name: config.lease.clone(),
    };
    let (candidate, leadership) = Candidate::new(client.clone(), name, problems.clone());
    (Some(candidate), leadership)
}

/// The controller's own namespace.
fn namespace(config: &Run, client: &Client) -> Option<Name> {
    let given = config.namespace.clone();
    // What the kubeconfig or the service account says is a name, or nothing is found there.
    given.or_else(|| client.default_namespace().parse().ok())
}

/// The certificate authority.
pub(super) fn authority(
    config: &Run,
    identity: Option<&Identity>,
    problems: &Problems,
) -> anyhow::Result<Authority> {
    let (domain, lifetime) = (config.trust_domain.clone(), config.leaf_lifetime);
    match (&config.ca, identity) {
        (Some(folder), _) => {
            let opened = Authority::open(folder.clone(), domain, lifetime, problems.clone());
            opened.context("the certificate authority")
        }
        (None, Some(identity)) => {
            let place = secret::shown(&identity.secret);
            let problems = problems.clone();
            Ok(Authority::awaiting(place, domain, lifetime, problems))
        }
        (None, None) => anyhow::bail!("--namespace is needed: the kubeconfig names none"),
    }
}

/// How agents prove where they are.
pub(super) fn authentication(
    config: &Run,
    client: Option<Client>,
    agent_pods: &Arc<AgentPods>,
    problems: &Problems,
) -> anyhow::Result<Authentication> {
    match config.agent_auth() {
        AgentAuth::JoinTokens => {
            let file = config.join_tokens.clone().context("--join-tokens")?;
            let name = file.display().to_string();
            let tokens = Tokens::open(file, problems.clone());
            let tokens = tokens.with_context(|| format!("the join tokens in {name}"))?;
            Ok(Authentication::JoinTokens(tokens))
        }
        AgentAuth::Kubernetes => {
            let client = client.context("--agent-auth kubernetes")?;
            let expected = Expected {
                audience: config.token_audience.clone(),
                account: config.agent_service_account.clone(),
            };
            let reviews = Reviews::new(client, expected, agent_pods.clone(), problems.clone());
            Ok(Authentication::Kubernetes(Arc::new(reviews)))
        }
    }
}
