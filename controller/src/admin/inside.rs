//! What only the socket shows: what the command-line tool asks for.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use hyper::StatusCode;
use serde::Serialize;
use weft_core::{Identity, Name, ObjectName, Owner, TrustDomain, WorkloadId};
use weft_proto::v1::Page;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Admin, JSON, OPEN_METRICS, Reply, TEXT, json, respond};
use crate::control::agents::AgentStatus;
use crate::control::inspect::AskError;

/// What `/status` says.
#[derive(Debug, Serialize)]
struct Status {
    version: &'static str,
    /// The controller's clock, in milliseconds since 1970.
    now_ms: u64,
    source: String,
    /// Why it is not ready; none: it is.
    lacks: Option<&'static str>,
    trust_domain: TrustDomain,
    /// When the issuer's certificate ends, in milliseconds since 1970.
    issuer_not_after_ms: Option<u64>,
    /// The roots that are told to agents.
    roots: Vec<Root>,
    /// The nodes that meshed pods run on.
    nodes: BTreeSet<Name>,
}

#[derive(Debug, Serialize)]
struct Root {
    subject: String,
    not_before_ms: u64,
    not_after_ms: u64,
}

/// What `/workloads/NAMESPACE/NAME` says.
#[derive(Debug, Serialize)]
struct Place {
    node: Name,
}

/// What `/nodes/NODE/pods` says.
#[derive(Debug, Serialize)]
struct PodList {
    pods: Vec<Pod>,
}

/// A meshed pod, by the controller's own knowledge.
#[derive(Debug, Serialize)]
struct Pod {
    #[serde(flatten)]
    name: ObjectName,
    /// None: it has no address yet, and nobody is told who it is.
    identity: Option<Identity>,
    /// What created it, as metrics name it.
    owner: Option<Owner>,
}

#[derive(Debug, Serialize)]
struct AgentList {
    agents: Vec<Agent>,
}

#[derive(Debug, Serialize)]
struct Agent {
    #[serde(flatten)]
    status: AgentStatus,
    /// Whether it can be asked for its pages.
    inspectable: bool,
}

impl Admin {
    /// Answers what the port does not.
    pub(super) async fn inside(&self, path: &str, query: &str) -> Reply {
        match path {
            "/status" => json(&self.status()),
            "/agents" => json(&self.agents()),
            _ => match (asked(path), workload(path), node(path)) {
                (Some((node, incarnation, page)), ..) => {
                    self.page(&node, incarnation, (page, query)).await
                }
                (None, Some(workload), _) => self.workload(&workload),
                (None, None, Some(node)) => json(&self.pods_of(&node)),
                (None, None, None) => {
                    let text = "/live, /ready, /metrics, /problems, /routes, /status, /agents, \
                        /workloads/NAMESPACE/NAME, /nodes/NODE/pods, \
                        /agents/NODE/INCARNATION/metrics (or recent?seconds=60, ready, pods, config_dump, explain?...)\n";
                    respond(StatusCode::NOT_FOUND, TEXT, text)
                }
            },
        }
    }

    /// Where a workload runs.
    fn workload(&self, id: &WorkloadId) -> Reply {
        match self.state.views.workload(id) {
            Some(workload) => json(&Place {
                node: workload.node,
            }),
            None => {
                let text = format!("no pod {id} is known: is it there, and has it an address?\n");
                respond(StatusCode::NOT_FOUND, TEXT, text)
            }
        }
    }

    /// The meshed pods of a node.
    fn pods_of(&self, node: &Name) -> PodList {
        let views = &self.state.views;
        let mut pods = views.pods_of(node);
        pods.sort();
        let pods = pods.into_iter().map(|id| {
            let workload = views.workload(&id);
            Pod {
                identity: workload.as_ref().and_then(|it| it.identity().cloned()),
                owner: workload.and_then(|it| it.owner),
                name: id.0,
            }
        });
        PodList {
            pods: pods.collect(),
        }
    }

    async fn page(&self, node: &Name, incarnation: u64, asked: (Page, &str)) -> Reply {
        let kind = match asked.0 {
            Page::Metrics | Page::Recent => OPEN_METRICS,
            _ => JSON,
        };
        match self.inspections.ask(node, incarnation, asked).await {
            Ok(content) => respond(StatusCode::OK, kind, content),
            Err(error) => {
                let status = match error {
                    AskError::Nobody { .. } => StatusCode::NOT_FOUND,
                    AskError::Slow => StatusCode::GATEWAY_TIMEOUT,
                    _ => StatusCode::BAD_GATEWAY,
                };
                respond(status, TEXT, format!("{error}\n"))
            }
        }
    }

    fn status(&self) -> Status {
        let authority = &self.state.authority;
        let bundle = authority.trust_bundle();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            now_ms: milliseconds(SystemTime::now()),
            source: self.source.clone(),
            lacks: self.lacks(),
            issuer_not_after_ms: authority.issuer_not_after().map(milliseconds),
            roots: bundle.roots.iter().filter_map(|it| root(it)).collect(),
            nodes: self.state.views.nodes(),
            trust_domain: bundle.trust_domain,
        }
    }

    fn agents(&self) -> AgentList {
        let agents = self.state.agents.list().into_iter();
        let agents = agents.map(|status| Agent {
            inspectable: u64::from_str_radix(&status.incarnation, 16)
                .is_ok_and(|it| self.inspections.has(&status.node, it)),
            status,
        });
        AgentList {
            agents: agents.collect(),
        }
    }
}

/// Which page of which agent a path asks for.
fn asked(path: &str) -> Option<(Name, u64, Page)> {
    let mut parts = path.strip_prefix("/agents/")?.split('/');
    let node = parts.next()?.parse().ok()?;
    let incarnation = u64::from_str_radix(parts.next()?, 16).ok()?;
    let page = match parts.next()? {
        "metrics" => Page::Metrics,
        "ready" => Page::Readiness,
        "config_dump" => Page::State,
        "pods" => Page::Pods,
        "explain" => Page::Explain,
        "recent" => Page::Recent,
        _ => return None,
    };
    parts.next().is_none().then_some((node, incarnation, page))
}

/// Which workload a path asks for.
fn workload(path: &str) -> Option<WorkloadId> {
    path.strip_prefix("/workloads/")?.parse().ok()
}

/// The pods of which node a path asks for.
fn node(path: &str) -> Option<Name> {
    let node = path.strip_prefix("/nodes/")?.strip_suffix("/pods")?;
    node.parse().ok()
}

/// None: it cannot be read, which the authority has found before.
fn root(der: &[u8]) -> Option<Root> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let validity = certificate.validity();
    let milliseconds = |at: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(at.timestamp()).unwrap_or_default();
        seconds.saturating_mul(1000)
    };
    Some(Root {
        subject: certificate.subject().to_string(),
        not_before_ms: milliseconds(validity.not_before),
        not_after_ms: milliseconds(validity.not_after),
    })
}

fn milliseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_an_agent_is_asked_for_by_node_and_process() {
        let read = |path: &str| asked(path).map(|(node, it, page)| (node.to_string(), it, page));
        let known = read("/agents/node-1.example/00000000000000ff/metrics");
        assert_eq!(
            known,
            Some(("node-1.example".to_owned(), 255, Page::Metrics))
        );
        let last = read("/agents/one/ffffffffffffffff/config_dump");
        assert_eq!(last, Some(("one".to_owned(), u64::MAX, Page::State)));
        let one = workload("/workloads/shop/web-1").map(|it| it.to_string());
        assert_eq!(one.as_deref(), Some("shop/web-1"));
        let of = |path: &str| node(path).map(|it| it.to_string());
        assert_eq!(
            of("/nodes/one.example/pods").as_deref(),
            Some("one.example")
        );
        for other in ["/nodes/", "/nodes/pods", "/nodes//pods", "/nodes/a/b/pods"] {
            assert_eq!(of(other), None, "{other}");
        }
        for other in ["/workloads/", "/workloads/shop", "/workloads/shop/a/b"] {
            assert_eq!(workload(other), None, "{other}");
        }
        for other in [
            "/agents",
            "/agents/",
            "/agents/one/ff",
            "/agents/one/ff/log_level",
            "/agents/one/ff/ready/more",
            "/agents/one/xy/ready",
            "/agents/one/1ffffffffffffffff/ready",
            "/agents/../ff/ready",
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
