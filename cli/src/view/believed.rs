//! What of an agent's words is believed: what it says of the pods of its own node.
//!
//! Whoever has taken over a node could have its agent speak of pods elsewhere, of other identities and of other owners. Which pods a
//! node has, who they are and what created them is known by the controller, which signs by it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::workload::{owner_labels, set_owner};
use super::{Owner, Pod};
use crate::controller::{self, Agent, ReachError};
use crate::metrics::Scrape;

/// The meshed pods of a node, as its agent's controller knows them.
#[derive(Debug, Default)]
pub struct Known(BTreeMap<(String, String), KnownPod>);

#[derive(Debug, Deserialize)]
struct KnownPod {
    namespace: String,
    name: String,
    identity: Option<String>,
    owner: Option<Owner>,
}

#[derive(Debug, Deserialize)]
struct List {
    pods: Vec<KnownPod>,
}

impl Known {
    /// Of an agent's node. To be asked for after the agent has spoken: of what it says, nothing is too new then.
    ///
    /// # Errors
    /// Its controller does not answer.
    pub async fn of(agent: &Agent) -> Result<Self, ReachError> {
        let path = format!("/nodes/{}/pods", agent.status.node);
        let List { pods } = controller::json(&agent.place, &path).await?;
        let pods = pods.into_iter();
        let pods = pods.map(|it| ((it.namespace.clone(), it.name.clone()), it));
        Ok(Self(pods.collect()))
    }

    /// Pods that are of the node, with what is known of them.
    pub fn pods(&self, said: Vec<Pod>) -> Vec<Pod> {
        let believed = said.into_iter().filter_map(|pod| {
            let known = self.of_pod(&pod.namespace, &pod.name)?;
            Some(Pod {
                // Whether it is served is the agent's to say.
                identity: pod.identity.and_then(|_| known.identity.clone()),
                owner: known.owner.clone(),
                ..pod
            })
        });
        believed.collect()
    }

    /// Series that are of no pod, or of one of the node, with its owner.
    pub fn scrape(&self, said: Scrape) -> Scrape {
        let mut believed = Scrape {
            unread: said.unread,
            ..Scrape::default()
        };
        for (mut series, value) in said.values {
            if let (Some(namespace), Some(pod)) = (series.label("namespace"), series.label("pod")) {
                let Some(known) = self.of_pod(namespace, pod) else {
                    continue;
                };
                let owner = known.owner.as_ref();
                series
                    .labels
                    .retain(|name, _| !owner_labels().any(|it| it == name));
                if let Some(owner) = owner {
                    set_owner(&mut series, owner);
                }
            }
            *believed.values.entry(series).or_default() += value;
        }
        believed
    }

    fn of_pod(&self, namespace: &str, name: &str) -> Option<&KnownPod> {
        self.0.get(&(namespace.to_owned(), name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &str = r#"{"pods": [
{"namespace": "shop", "name": "web-1", "identity": "spiffe://td/ns/shop/sa/web", "owner": {"kind": "deployment", "name": "web"}},
{"namespace": "shop", "name": "bare", "identity": "spiffe://td/ns/shop/sa/bare", "owner": null}]}"#;

    fn known() -> Known {
        let List { pods } = serde_json::from_str(KNOWN).expect("a list");
        let pods = pods.into_iter();
        Known(
            pods.map(|it| ((it.namespace.clone(), it.name.clone()), it))
                .collect(),
        )
    }

    #[test]
    fn of_other_pods_nothing_is_believed() {
        let said = r#"[
{"namespace": "shop", "name": "web-1", "state": "enrolled", "identity": "spiffe://td/ns/bank/sa/vault", "owner": {"kind": "deployment", "name": "vault"}},
{"namespace": "shop", "name": "bare", "state": "waiting", "identity": null},
{"namespace": "bank", "name": "vault-1", "state": "enrolled", "identity": "spiffe://td/ns/bank/sa/vault"}]"#;
        let pods = known().pods(serde_json::from_str(said).expect("pods"));
        let names: Vec<&str> = pods.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["web-1", "bare"]);
        assert_eq!(
            pods[0].identity.as_deref(),
            Some("spiffe://td/ns/shop/sa/web")
        );
        assert_eq!(
            pods[0].owner.as_ref().map(|it| it.name.as_str()),
            Some("web")
        );
        assert_eq!(pods[1].identity, None);
        let text = "\
a{namespace=\"shop\",deployment=\"vault\",pod=\"web-1\"} 1
a{namespace=\"shop\",statefulset=\"vault\",pod=\"web-1\"} 2
a{namespace=\"shop\",deployment=\"vault\",pod=\"bare\"} 4
a{namespace=\"bank\",deployment=\"vault\",pod=\"vault-1\"} 8
a{reason=\"of the node\"} 16
";
        let scrape = known().scrape(Scrape::read(text, |_| true));
        let shown = scrape.values.iter().map(|(series, value)| {
            let label = |name| series.label(name).unwrap_or("-").to_owned();
            (
                label("pod"),
                label("deployment"),
                label("statefulset"),
                *value,
            )
        });
        let mut shown: Vec<_> = shown.collect();
        shown.sort_by(|one, other| one.3.total_cmp(&other.3));
        let expected = [
            ("web-1", "web", "-", 3.0),
            ("bare", "-", "-", 4.0),
            ("-", "-", "-", 16.0),
        ];
        let expected =
            expected.map(|(a, b, c, value)| (a.to_owned(), b.to_owned(), c.to_owned(), value));
        assert_eq!(shown, expected);
    }
}
