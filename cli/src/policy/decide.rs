//! The answer to one question: the decisions that the agents of both sides would make.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use clap::ValueEnum;
use http::request::Parts;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use weft_core::route::{InboundRoutes, is_grpc};
use weft_core::{
    Client, ClusterSettings, Identity, Mesh, Name, PortProtocol, RequestDenial, Verdict, Workload,
    authorize, authorize_request, let_out,
};

use super::addresses::{self, Place};
use super::cases::Case;
use super::who::{Target, Who, WhoError};
use super::world::{Destination, World};

/// The answer in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Word {
    /// It is let through.
    Allow,
    /// It is not.
    Deny,
}

/// What would happen, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The answer.
    #[serde(rename = "answer")]
    pub word: Word,
    /// What decides it: an authorization, a policy, a route.
    pub by: String,
    /// The Server that governs the port, if one does.
    pub server: Option<String>,
    /// The client's identity, if it has one.
    pub identity: Option<Identity>,
    /// The pod and port that this is about: of several, one with another answer than expected if there is one.
    pub destination: String,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

/// A client, as the destination's agent sees it.
struct Source {
    workload: Option<Arc<Workload>>,
    identity: Option<Identity>,
    place: Place,
}

/// What is asked of a destination.
struct Asked {
    request: Option<Parts>,
    is_grpc: bool,
    has_host: bool,
    to_address: Option<IpAddr>,
}

/// Answers a question.
pub(super) fn decide(world: &World, case: &Case, namespace: &Name) -> Result<Decision, WhoError> {
    let who = Who::parse(&case.from, namespace, &world.trust_domain)?;
    let target = Target::parse(&case.to, namespace)?;
    let source = Source::of(world, &who, case.address)?;
    let request = request(case)?;
    let asked = Asked {
        is_grpc: request.as_ref().is_some_and(|it| is_grpc(&it.headers)),
        has_host: case.host.is_some(),
        to_address: case.to_address,
        request,
    };
    let destinations = world.destinations(&target, &case.port.to_string())?;
    let mut decisions = vec![];
    for destination in destinations {
        decisions.push(one(world, &source, &destination, &asked)?);
    }
    let denied = decisions.iter().filter(|it| it.word == Word::Deny).count();
    let (all, first) = (
        decisions.len(),
        decisions.iter().position(|it| it.word != case.expect),
    );
    let mut decision = match decisions.into_iter().nth(first.unwrap_or(0)) {
        Some(decision) => decision,
        None => return Err(WhoError::Unknown(target.to_string())),
    };
    if denied > 0 && denied < all {
        let note = format!("{} of {all} pods would let it through", all - denied);
        decision.notes.push(note);
    }
    if let Who::Identity(identity) = &who
        && !world.has_identity(identity)
    {
        let note = format!("no meshed pod of the manifests is {identity}");
        decision.notes.push(note);
    }
    Ok(decision)
}

impl Source {
    fn of(world: &World, who: &Who, address: Option<IpAddr>) -> Result<Self, WhoError> {
        Ok(match who {
            Who::Workload(target) => {
                let workload = world.client(target)?;
                Self {
                    identity: workload.identity().cloned(),
                    place: address.map_or_else(|| world.place(&workload), Place::Known),
                    workload: Some(workload),
                }
            }
            Who::Identity(identity) => Self {
                workload: None,
                identity: Some(identity.clone()),
                place: address.map_or(Place::Anywhere, Place::Known),
            },
            Who::Address(address) => Self {
                workload: None,
                identity: None,
                place: Place::Known(*address),
            },
        })
    }

    /// What keeps it from leaving its pod.
    fn kept(
        &self,
        world: &World,
        to: &Destination,
        address: Option<IpAddr>,
    ) -> Result<Option<String>, WhoError> {
        let is_meshed = |it: &&Arc<Workload>| it.mesh != Mesh::Unmeshed;
        let Some(own) = self.workload.as_ref().filter(is_meshed) else {
            return Ok(None);
        };
        let policy = world.policy(&own.id);
        let rules = policy.and_then(|it| it.network_egress.as_ref());
        let networks: Vec<IpNet> = rules
            .iter()
            .flat_map(|it| addresses::of_rules(it))
            .collect();
        let place = address.map_or_else(|| world.place(&to.workload), Place::Known);
        let addresses = place.kinds(&networks).into_iter();
        let mut kept = addresses.map(|address| {
            let address = SocketAddr::new(address, to.port);
            let kept = let_out(policy, address, Some(&to.workload.id)).err()?;
            Some(format!("{kept}, which does not let the client out"))
        });
        // Without a place it could have, nobody lets it anywhere.
        let first = kept.next().unwrap_or(Some("nobody".to_owned()));
        match kept.find(|it| it.is_some() != first.is_some()) {
            None => Ok(first),
            Some(other) => {
                let by = first.or(other).unwrap_or_default();
                Err(WhoError::Address {
                    one: format!("denied by {by}"),
                    other: "let out".to_owned(),
                    what: "with --to-address where the destination is, or with --pod-range where pods are",
                })
            }
        }
    }
}

fn one(
    world: &World,
    source: &Source,
    to: &Destination,
    asked: &Asked,
) -> Result<Decision, WhoError> {
    let mut decision = Decision {
        word: Word::Deny,
        by: String::new(),
        server: None,
        identity: source.identity.clone(),
        destination: format!("{}:{}", to.workload.id, to.port),
        notes: vec![],
    };
    let unmeshed = |it: &Workload| it.mesh == Mesh::Unmeshed;
    if source.workload.as_deref().is_some_and(unmeshed) {
        let note = "the client is not in the mesh, so that it has no identity: label its namespace \
            weft.dev/mesh=enabled, or use --assume-meshed if it is labelled elsewhere";
        decision.notes.push(note.to_owned());
    }
    if let Some(by) = source.kept(world, to, asked.to_address)? {
        decision.by = by;
        return Ok(decision);
    }
    if unmeshed(&to.workload) {
        decision.word = Word::Allow;
        decision.by = "nobody: the destination is not in the mesh".to_owned();
        let note = "policy is not enforced at a destination outside of the mesh: label its namespace \
            weft.dev/mesh=enabled, or use --assume-meshed if it is labelled elsewhere";
        decision.notes.push(note.to_owned());
        return Ok(decision);
    }
    let mut all = possible(world, source, to, asked, &decision)?.into_iter();
    let Some(mut first) = all.next() else {
        // It has no address that could be, so that nobody lets it in.
        return Ok(decision);
    };
    let others: Vec<Decision> = all.collect();
    if let Some(other) = others.iter().find(|it| it.word != first.word) {
        let shown = |it: &Decision| format!("{} by {}", it.word, it.by);
        return Err(WhoError::Address {
            one: shown(&first),
            other: shown(other),
            what: "with --address where the client is, and with --pod-range which networks are the cluster's",
        });
    }
    if let Some(other) = others.iter().find(|it| it.by != first.by) {
        let note = format!(
            "by the client's address it may be {} that decides so",
            other.by
        );
        first.notes.push(note);
    }
    Ok(first)
}

/// What would happen for every kind of address that the client may have, and of networks that the cluster may.
fn possible(
    world: &World,
    source: &Source,
    to: &Destination,
    asked: &Asked,
    so_far: &Decision,
) -> Result<Vec<Decision>, WhoError> {
    let policy = world.policy(&to.workload.id);
    let server = |name: &weft_core::ServerName| world.server(name);
    // Whoever is named as a pod is that one, wherever it is; an identity alone is none.
    let at = |address: IpAddr| match (&source.workload, &source.place) {
        (Some(own), _) => Some(own.clone()),
        (None, Place::Known(_)) => world.workload_at(address),
        (None, _) => None,
    };
    let binding = policy.and_then(|it| it.servers.iter().find(|it| it.port == to.port));
    let governing = binding.and_then(|it| world.server(&it.server));
    let rules = policy.and_then(|it| it.network.as_ref());
    let mut networks: Vec<IpNet> = rules
        .iter()
        .flat_map(|it| addresses::of_rules(it))
        .collect();
    networks.extend(governing.iter().flat_map(|it| addresses::of_server(it)));
    let protocol = world.protocol(to, source.identity.is_some());
    let mut all = vec![];
    for cluster in world.clusters() {
        let networks = [networks.as_slice(), cluster.pod_ranges.as_slice()].concat();
        for address in source.place.kinds(&networks) {
            let client = Client {
                address,
                identity: source.identity.as_ref(),
            };
            let verdict = authorize(&cluster, policy, server, at, to.port, client);
            let mut decision = so_far.clone();
            let by = (&cluster, client, protocol);
            by_verdict(&mut decision, world, by, verdict, asked)?;
            all.push(decision);
        }
    }
    Ok(all)
}

/// What a verdict makes of a connection, or of a request on it.
fn by_verdict(
    decision: &mut Decision,
    world: &World,
    (cluster, client, protocol): (&ClusterSettings, Client<'_>, PortProtocol),
    verdict: Verdict,
    asked: &Asked,
) -> Result<(), WhoError> {
    decision.server = verdict.server().map(ToString::to_string);
    let server = verdict.server().and_then(|it| world.server(it));
    let speaks_http = !protocol.is_opaque();
    let request = asked.request.as_ref();
    if request.is_some() && !speaks_http {
        let note = format!(
            "the mesh does not look into this port ({protocol}): the connection is decided about, and no request"
        );
        decision.notes.push(note);
    }
    if let (true, Some(server), Some(head)) =
        (verdict.admits_requests() && speaks_http, server, request)
    {
        let routes = server.routes.iter().flat_map(InboundRoutes::routes);
        if !asked.has_host && routes.into_iter().any(|it| !it.hostnames.is_empty()) {
            return Err(WhoError::Host(server.name.to_string()));
        }
        match authorize_request(cluster, server, client, head, asked.is_grpc) {
            Ok(passed) => {
                let route = passed.rule.map(|it| format!(" (route {})", it.route));
                settle(decision, &passed.verdict(server));
                decision.by.push_str(&route.unwrap_or_default());
            }
            Err(RequestDenial::NotFound) => {
                decision.by = "no route of the Server is for this request: 404".to_owned();
            }
            Err(RequestDenial::Denied { route, verdict }) => {
                let route = route.map(|it| format!(" (route {it})"));
                settle(decision, &verdict);
                decision.by.push_str(&route.unwrap_or_default());
            }
        }
        return Ok(());
    }
    if verdict.requests_only() {
        let note = match speaks_http {
            true => {
                "the Server lets this client in for requests of some routes only: ask with --method and --path"
            }
            false => {
                "the Server lets this client in for requests of some routes only, and none is seen at this port"
            }
        };
        decision.notes.push(note.to_owned());
    } else if speaks_http && verdict.is_allowed() && server.is_some_and(|it| it.routes.is_some()) {
        let note = "requests are decided by the Server's routes: ask with --method and --path";
        decision.notes.push(note.to_owned());
    }
    settle(decision, &verdict.without_requests());
    Ok(())
}

fn settle(decision: &mut Decision, verdict: &Verdict) {
    decision.word = match verdict.is_allowed() {
        true => Word::Allow,
        false => Word::Deny,
    };
    decision.by = verdict.by();
    if verdict.is_audited() {
        let note = "only `audit` lets it through: it would be denied once that is `deny`";
        decision.notes.push(note.to_owned());
    }
}

/// The request that is asked about, if one is.
fn request(case: &Case) -> Result<Option<Parts>, WhoError> {
    let is_asked = case.method.is_some()
        || case.path.is_some()
        || !case.headers.is_empty()
        || case.host.is_some();
    if !is_asked {
        return Ok(None);
    }
    let path = case.path.as_deref().unwrap_or("/");
    if !path.starts_with('/') {
        return Err(WhoError::Request(format!(
            "the path {path:?} does not begin with /"
        )));
    }
    let otherwise = if case.grpc { "POST" } else { "GET" };
    let method = case.method.as_deref().unwrap_or(otherwise);
    let mut request = http::Request::builder().method(method).uri(path);
    if case.grpc {
        request = request.header("content-type", "application/grpc");
    }
    if let Some(host) = &case.host {
        request = request.header(http::header::HOST, host);
    }
    for header in &case.headers {
        let (name, value) = header.split_once(':').ok_or_else(|| {
            WhoError::Request(format!(
                "the header {header:?} is not of the form name: value"
            ))
        })?;
        let name = name.trim();
        if let Some(reason) = is_not_the_clients(name) {
            return Err(WhoError::Request(format!("the header {name:?}: {reason}")));
        }
        request = request.header(name, value.trim());
    }
    let request = request.body(());
    let request = request.map_err(|error| WhoError::Request(error.to_string()))?;
    Ok(Some(request.into_parts().0))
}

/// Why it is not what a client sends that the Server's routes see.
fn is_not_the_clients(header: &str) -> Option<&'static str> {
    let name = header.to_ascii_lowercase().replace('_', "-");
    match name.as_str() {
        "host" => Some("say with --host which host the request is for"),
        "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade"
        | "http2-settings" => Some("it is of one connection, and made anew by the mesh"),
        _ if name.starts_with("weft-") || name.starts_with("l5d-") => {
            Some("the mesh says this itself, and takes out what clients say")
        }
        _ => None,
    }
}

impl fmt::Display for Word {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}
