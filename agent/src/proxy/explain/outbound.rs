//! The end from which a connection would be made.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use weft_core::route::{RouteTable, SelectedFlow, Target};
use weft_core::{Mesh, Name, PortProtocol, Workload, WorkloadId};

use super::asked::{Asked, Request};
use super::host::{self, Host};
use super::request::{Asking, backends, heaviest, object};
use super::{Explanation, Next, Outcome, State};
use crate::bpf::PodInKernel;
use crate::discovery::{Destination, ServicePortEntry};
use crate::node::LocalPod;
use crate::proxy::egress::{self, Led};
use crate::proxy::error::FlowError;
use crate::proxy::outbound::{Classified, classify, must_be_known};
use crate::proxy::{Context, DeclaredBy, http};

/// More endpoints are counted.
pub(super) const MAX_SHOWN: usize = 100;

/// Explains what becomes of a connection that a pod of this node makes.
///
/// # Errors
/// The question lacks something.
pub(super) async fn explain(context: &Arc<Context>, asked: &Asked) -> Result<Explanation, String> {
    let id = asked.pod()?;
    let (host, port) = host::read(&asked.to, &id.0.namespace).map_err(|error| error.to_string())?;
    let mut told = Explanation::begin(context);
    let Some(pod) = context.pods.by_id(id) else {
        return Ok(match context.store.workload(id) {
            Some(workload) if matches!(workload.mesh, Mesh::Unmeshed) => {
                told.unmeshed(context, &workload, (&host, port), asked)
            }
            _ => {
                told.not_enrolled(context, id);
                told
            }
        });
    };
    told.enrolled(&pod);
    let good =
        "its connects are redirected to the agent: programs, map entries and listener are there";
    if !told.kernel(context, &pod, PodInKernel::lacks_outbound, good) {
        return Ok(told.end(Outcome::Unknown));
    }
    let to = match told.resolve(context, (&host, port)) {
        Some(to) => to,
        None => return Ok(told.end(Outcome::Unknown)),
    };
    Ok(told.connection(context, &pod, to, asked).await)
}

impl Explanation {
    /// The pod is one that the agent serves.
    pub(super) fn enrolled(&mut self, pod: &LocalPod) {
        let fact = format!("{} is in the mesh, as {}", pod.id, pod.identity);
        let step = self.step("pod", State::Ok, fact);
        step.by(format!("Pod/{}", pod.id)).values(json!({
            "pod": pod.id, "state": "enrolled", "identity": pod.identity,
            "addresses": pod.record.load().addresses,
        }));
    }

    /// The pod is none that the agent serves.
    pub(super) fn not_enrolled(&mut self, context: &Context, id: &WorkloadId) {
        let waiting = context.pods.waiting().into_iter().find(|it| it.pod == *id);
        let (state, fact) = match (waiting, context.store.workload(id)) {
            (Some(waiting), _) => (
                "waiting",
                format!("{id} is not enrolled yet: {}", waiting.reason),
            ),
            (None, Some(workload)) => (
                "elsewhere",
                format!(
                    "{id} is not enrolled by this agent: it runs on {}",
                    workload.node
                ),
            ),
            (None, None) => ("unknown", format!("this agent knows no pod {id}")),
        };
        let step = self.step("pod", State::Error, fact);
        step.by(format!("Pod/{id}"))
            .values(json!({ "pod": id, "state": state }));
    }

    /// The pod does not take part: its connections leave as they are, and the cluster's own load balancing chooses.
    fn unmeshed(
        mut self,
        context: &Context,
        workload: &Workload,
        to: (&Host, u16),
        asked: &Asked,
    ) -> Self {
        let fact = format!(
            "{} is not in the mesh: its connections leave in plaintext, and it proves to nobody who it is",
            workload.id
        );
        let step = self.step("pod", State::Warning, fact);
        step.by(format!("Pod/{}", workload.id)).values(json!({
            "pod": workload.id, "state": "unmeshed", "addresses": workload.addresses,
        }));
        let Some(to) = self.resolve(context, to) else {
            return self.end(Outcome::Unknown);
        };
        let endpoint = match context.store.classify(to) {
            Destination::Service(port) => {
                self.of_service(&port, to);
                let tries = port.candidates(to.ip());
                match tries.standings(Instant::now()).first() {
                    Some((endpoint, _)) => endpoint.to(),
                    None => {
                        let fact = format!("no endpoint of {} is ready", port.service);
                        return self.refused("endpoint", fact);
                    }
                }
            }
            Destination::ServiceWithoutPort(name) => {
                let error = FlowError::UnknownServicePort(name, to.port());
                return self.refused("destination", error.to_string());
            }
            Destination::Workload(_) => to,
            Destination::Outside => {
                self.step(
                    "destination",
                    State::Ok,
                    format!("{to} is outside of the cluster"),
                );
                return self.end(Outcome::Reaches);
            }
            Destination::Unknown => {
                let error = FlowError::UnknownAddress(to.ip());
                self.step("destination", State::Error, error.to_string());
                return self.end(Outcome::Unknown);
            }
        };
        let Some(server) = context.store.workload_at(endpoint.ip()) else {
            let error = FlowError::UnknownAddress(endpoint.ip());
            self.step("destination", State::Error, error.to_string());
            return self.end(Outcome::Unknown);
        };
        self.step(
            "endpoint",
            State::Ok,
            format!("{endpoint} is {}, on {}", server.id, server.node),
        )
        .by(format!("Pod/{}", server.id))
        .values(json!({ "address": endpoint, "pod": server.id, "node": server.node }));
        let same = |it: &&IpAddr| it.is_ipv4() == endpoint.is_ipv4();
        match (&server.mesh, workload.addresses.iter().find(same)) {
            (Mesh::Unmeshed, _) => self.end(Outcome::Reaches),
            (Mesh::Meshed { .. }, None) => {
                let error = FlowError::NoSourceAddress(endpoint.ip());
                self.refused("endpoint", error.to_string())
            }
            (Mesh::Meshed { .. }, Some(from)) => {
                self.next = Some(Next {
                    node: server.node.clone(),
                    pod: server.id.clone(),
                    to: endpoint,
                    from: *from,
                    identity: None,
                    opaque_by: None,
                    request: asked.request.as_ref().map(|it| {
                        let head = it.head(&asked.to);
                        Request::going_on(&head, &head)
                    }),
                });
                self.end(Outcome::Continues)
            }
        }
    }

    /// Which address is meant. None: that cannot be said, and why was.
    fn resolve(&mut self, context: &Context, (host, port): (&Host, u16)) -> Option<SocketAddr> {
        let name = match host {
            Host::Address(address) => return Some(SocketAddr::new(*address, port)),
            Host::Service(name) => name,
            Host::Elsewhere(host) => {
                let fact = format!(
                    "{host} is no name of a Service: ask with the address that it has for the pod"
                );
                self.step("name", State::Error, fact);
                return None;
            }
        };
        let addresses = match context.store.resolve(name) {
            Some(addresses) => addresses,
            None => {
                let fact = format!("there is no Service {name} that agents know");
                self.step("name", State::Error, fact)
                    .by(format!("Service/{name}"));
                return None;
            }
        };
        let Some(first) = addresses.first() else {
            let fact = format!("the Service {name} has neither an address nor an endpoint");
            self.step("name", State::Error, fact)
                .by(format!("Service/{name}"));
            return None;
        };
        let fact = format!("the Service {name} has the address {first}");
        let step = self
            .step("name", State::Ok, fact)
            .by(format!("Service/{name}"));
        if addresses.len() > 1 {
            let others = addresses[1..].iter().take(MAX_SHOWN);
            step.details = others.map(|it| format!("and {it}")).collect();
        }
        step.values(json!({ "addresses": addresses }));
        Some(SocketAddr::new(*first, port))
    }

    async fn connection(
        mut self,
        context: &Arc<Context>,
        pod: &Arc<LocalPod>,
        to: SocketAddr,
        asked: &Asked,
    ) -> Self {
        if to.ip().is_loopback() || to.ip().is_unspecified() {
            let fact = format!("{to} is within the pod: that is not the mesh's business");
            self.step("destination", State::Ok, fact)
                .values(json!({ "address": to }));
            return self.end(Outcome::Reaches);
        }
        match context.bpf.is_refused(pod.cookie, to) {
            Ok(false) => {}
            Ok(true) => {
                let fact = format!(
                    "nothing listened at {to} a moment ago: connects are refused at once for some seconds"
                );
                return self.refused("kernel", fact);
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                let fact = format!(
                    "whether connects are refused at once, as nothing listened, cannot be read: {error:#}"
                );
                self.step("kernel", State::Warning, fact);
            }
        }
        let classified = match classify(context, pod, to).await {
            Ok(classified) => classified,
            Err(error) => return self.refused("destination", error.to_string()),
        };
        let namespace = &pod.id.0.namespace;
        let own = match &classified {
            Classified::Service(port) => {
                self.of_service(port, to);
                Some(Arc::clone(port))
            }
            Classified::Address => {
                self.of_address(context, pod, to);
                None
            }
        };
        if pod.has_address(to.ip()) {
            return self.end(Outcome::Reaches);
        }
        let (declared, by) = context.declared_by(pod, &classified, to);
        self.protocol(declared, by, own.as_deref());
        let is_by_what_is_said = must_be_known(context, pod, &classified, to);
        if let Some(request) = &asked.request {
            if http::may_be(declared) || is_by_what_is_said {
                let asking = Asking { context, pod, to };
                return self.request(&asking, own, (asked, request)).await;
            }
            let fact = "no request is seen there: what follows is about the connection";
            self.step("request", State::Warning, fact);
        }
        let server_name = asked.server_name.as_ref().map(Name::as_str);
        if is_by_what_is_said && server_name.is_none() {
            let fact = "where it goes, or whether, its routes decide by what the client says first: the name that TLS asks \
                        for (--sni), or, out of the cluster, requests (--method, --path)";
            self.step("route", State::Warning, fact);
            return self.end(Outcome::Unknown);
        }
        let led = match &own {
            Some(port) => {
                let table = port.routes.load_full();
                let selected = table
                    .as_deref()
                    .map(|it| it.select_flow(namespace, server_name));
                match self.route(
                    context,
                    (table.as_deref(), selected),
                    port,
                    server_name,
                    (namespace, to),
                ) {
                    None => return self.end(Outcome::Refused),
                    Some(None) => Some(Arc::clone(port)),
                    Some(Some(target)) => {
                        let found = match &target {
                            Target::Service { name, port } => {
                                context.store.service_port(name, *port)
                            }
                            Target::Egress(_) | Target::Invalid(_) => None,
                        };
                        if found.is_none() {
                            let error = FlowError::NoRoute(port.service.clone(), port.port);
                            return self.refused("backend", error.to_string());
                        }
                        found
                    }
                }
            }
            None => match egress::lead(context, pod, to, server_name) {
                Ok(Led::Original) => None,
                Ok(Led::Service(port)) => Some(port),
                Err(error) => {
                    let refused = self.refused("egress", error.to_string());
                    return match context.store.egress(namespace, to) {
                        Some(network) => {
                            refused.decided_by(format!("EgressNetwork/{}", network.name().name))
                        }
                        None => refused,
                    };
                }
            },
        };
        let endpoint = match &led {
            None => to,
            Some(port) => match self.endpoints(context, pod, port, to.ip()) {
                Some(endpoint) => endpoint,
                None => return self.none_may_be_chosen(context, pod, port, to.ip()).await,
            },
        };
        // As what is not looked at claims: of the port that it is led to.
        let claim = led.filter(|it| !http::may_be(declared) && it.protocol().is_opaque());
        let claim = claim.map(|it| format!("{}:{}", it.service.name, it.port));
        self.way(context, pod, endpoint, claim).await
    }

    fn of_service(&mut self, port: &ServicePortEntry, to: SocketAddr) {
        let fact = format!("{to} is port {} of the Service {}", port.port, port.service);
        self.step("destination", State::Ok, fact)
            .by(format!("Service/{}", port.service))
            .values(json!({ "address": to, "service": port.service, "port": port.port }));
    }

    fn of_address(&mut self, context: &Context, pod: &LocalPod, to: SocketAddr) {
        let address = json!({ "address": to });
        if pod.has_address(to.ip()) {
            let fact = format!("{to} is the pod itself: that is not the mesh's business");
            self.step("destination", State::Ok, fact).values(address);
            return;
        }
        match context.store.classify(to) {
            Destination::Workload(workload) => {
                let fact = format!("{to} is the pod {}, on {}", workload.id, workload.node);
                self.step("destination", State::Ok, fact)
                    .by(format!("Pod/{}", workload.id))
                    .values(json!({ "address": to, "pod": workload.id, "node": workload.node }));
            }
            _ => match context.store.egress(&pod.id.0.namespace, to) {
                Some(network) => {
                    let name = &network.name().name;
                    let fact =
                        format!("{to} is outside of the cluster, in the EgressNetwork {name}");
                    self.step("destination", State::Ok, fact)
                        .by(format!("EgressNetwork/{name}"))
                        .values(json!({ "address": to, "egress_network": network.name() }));
                }
                None => {
                    let fact = format!(
                        "{to} is outside of the cluster, and in no EgressNetwork: it passes through"
                    );
                    self.step("destination", State::Ok, fact).values(address);
                }
            },
        }
    }

    fn protocol(
        &mut self,
        declared: PortProtocol,
        by: DeclaredBy,
        port: Option<&ServicePortEntry>,
    ) {
        let whose = match by {
            DeclaredBy::Client => {
                "the client's pod or its namespace, for all connections to that port".to_owned()
            }
            DeclaredBy::Service => {
                "the Service: its appProtocol, or the ports that are opaque".to_owned()
            }
            DeclaredBy::Server => {
                "the server's pod or its namespace, a Server, or its number".to_owned()
            }
            DeclaredBy::Number => "its number".to_owned(),
        };
        let fact = match declared {
            PortProtocol::Detect => {
                "nobody declares what is spoken: the client's first bytes say it".to_owned()
            }
            it if http::takes_nothing_else(it) => {
                format!("{it}, by {whose}: nothing but HTTP passes")
            }
            it => format!("{it}, by {whose}: it is not looked into"),
        };
        let is_declared = declared != PortProtocol::Detect;
        let step = self.step("protocol", State::Ok, fact);
        if let Some(port) = port.filter(|_| is_declared && by == DeclaredBy::Service) {
            step.by(format!("Service/{}", port.service));
        }
        let by = match by {
            DeclaredBy::Client => "client",
            DeclaredBy::Service => "service",
            DeclaredBy::Server => "server",
            DeclaredBy::Number => "number",
        };
        step.values(json!({ "declared": declared, "by": is_declared.then_some(by) }));
    }

    /// Which route leads it where. None: nowhere; within: to the Service itself.
    fn route(
        &mut self,
        context: &Context,
        (table, selected): (Option<&RouteTable>, Option<SelectedFlow<'_>>),
        port: &ServicePortEntry,
        server_name: Option<&str>,
        (client, to): (&Name, SocketAddr),
    ) -> Option<Option<Target>> {
        let passed_over = table.map(|it| it.passed_over_by_flow(client, server_name));
        let passed_over = passed_over.into_iter().flatten().take(MAX_SHOWN);
        let passed_over: Vec<String> = passed_over.map(|it| format!("not {it}")).collect();
        match selected {
            None | Some(SelectedFlow::Service) => {
                let fact = match table.map_or(0, |it| it.routes().len()) {
                    0 => "no route: it goes to the Service's own endpoints".to_owned(),
                    routes => format!(
                        "no route for what is no request: it goes to the Service's own endpoints; {routes} for requests"
                    ),
                };
                self.step("route", State::Ok, fact);
                Some(None)
            }
            Some(SelectedFlow::NotFound) => {
                let error = FlowError::NoRoute(port.service.clone(), port.port);
                self.step("route", State::Error, error.to_string()).details = passed_over;
                None
            }
            Some(SelectedFlow::Rule { route, rule, .. }) => {
                let fact = format!(
                    "the {} {} leads it to {} backends",
                    route.kind.as_str(),
                    route.name,
                    rule.backends.len()
                );
                let step = self.step("route", State::Ok, fact).by(object(route));
                step.details = backends(context, &rule.backends, to.ip());
                step.details.extend(passed_over);
                step.values(json!({ "route": route, "backends": rule.backends }));
                match heaviest(&rule.backends) {
                    Some(backend) => Some(Some(backend.target.clone())),
                    None => {
                        self.step(
                            "backend",
                            State::Error,
                            "the rule has no backend with a weight",
                        );
                        None
                    }
                }
            }
        }
    }

    /// Says which object the last step is decided by.
    pub(super) fn decided_by(mut self, object: String) -> Self {
        if let Some(last) = self.steps.last_mut() {
            last.object = Some(object);
        }
        self
    }
}
