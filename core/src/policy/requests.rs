//! The decision about one request, at a Server that has routes.

use http::request::Parts;

use super::{AccessPolicy, AuthorizationName, Client, DenyReason, Server, Verdict};
use crate::cluster::ClusterSettings;
use crate::route::{Dots, InboundMatch, RequestPath, RouteName};

/// A request that is allowed.
#[derive(Clone, Copy, Debug)]
pub struct Passed<'a> {
    /// The rule that it is, with what is to happen to it. None: the Server has no routes.
    pub rule: Option<InboundMatch<'a>>,
    /// What covers the client. None: the access policy does.
    pub authorization: Option<&'a AuthorizationName>,
    /// The Server's access policy, if nothing covers the client.
    pub policy: Option<AccessPolicy>,
}

/// Why a request is not allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestDenial {
    /// The Server has routes, and none is for it: answered with 404 (gRPC: UNIMPLEMENTED).
    NotFound,
    /// Nothing covers the client: answered with 403 (gRPC: PERMISSION_DENIED).
    Denied {
        /// The route that it is, if the Server has any.
        route: Option<RouteName>,
        /// What policy says.
        verdict: Box<Verdict>,
    },
}

/// Decides whether a client may make a request at a Server that governs the port.
///
/// If the Server has routes, the request must be one's, and then be allowed by an authorization of the route,
/// one of the Server (which has those of its namespace too), or its access policy. `is_grpc` is whether the
/// request is a call of gRPC. One that is not, but may be taken for one, must also be allowed by the GRPCRoute that
/// it would be.
///
/// # Errors
/// It is denied, or is no route's.
pub fn authorize_request<'a>(
    cluster: &ClusterSettings,
    server: &'a Server,
    client: Client<'_>,
    head: &Parts,
    is_grpc: bool,
) -> Result<Passed<'a>, RequestDenial> {
    let Some(routes) = &server.routes else {
        return covered(cluster, server, client, None);
    };
    let decide = |path: &RequestPath<'_>| {
        let rule = routes.select(head, path, is_grpc);
        let rule = rule.ok_or(RequestDenial::NotFound)?;
        let passed = covered(cluster, server, client, Some(rule))?;
        // What a GRPCRoute keeps from somebody is not to be had by a request that the server takes for a call.
        if let Some(call) = routes.select_call(head, path).filter(|_| !is_grpc) {
            covered(cluster, server, client, Some(call))?;
        }
        Ok(passed)
    };
    let path = head.uri.path();
    match RequestPath::read(path) {
        Ok(Some(read)) => drop(decide(&read)?),
        Ok(None) => {}
        Err(Dots) => return Err(RequestDenial::NotFound),
    }
    decide(&RequestPath::Sent(path))
}

fn covered<'a>(
    cluster: &ClusterSettings,
    server: &'a Server,
    client: Client<'_>,
    rule: Option<InboundMatch<'a>>,
) -> Result<Passed<'a>, RequestDenial> {
    let of_route = rule.map(|it| it.authorizations).unwrap_or_default();
    let mut all = of_route.iter().chain(&server.authorizations);
    if let Some(authorization) = all.find(|it| it.covers(client)) {
        return Ok(Passed {
            rule,
            authorization: Some(&authorization.name),
            policy: None,
        });
    }
    if server.access_policy.allows(cluster, client) {
        return Ok(Passed {
            rule,
            authorization: None,
            policy: Some(server.access_policy),
        });
    }
    Err(RequestDenial::Denied {
        route: rule.map(|it| it.route.clone()),
        verdict: Box::new(Verdict::Deny {
            server: Some(server.name.clone()),
            reason: DenyReason::Policy(server.access_policy),
        }),
    })
}

impl Passed<'_> {
    /// As a verdict, for metrics.
    pub fn verdict(&self, server: &Server) -> Verdict {
        Verdict::Allow {
            server: Some(server.name.clone()),
            authorization: self.authorization.cloned(),
            policy: self.policy,
        }
    }
}
