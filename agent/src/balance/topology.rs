//! Which of a service's endpoints may be chosen from here: `internalTrafficPolicy`, and the hints
//! that the EndpointSlice controller computes from `trafficDistribution` and topology modes. Pure.
//!
//! As kube-proxy does it: `Local` means only this node's endpoints, even if there are none. Hints are
//! followed only if every endpoint has them and one of them is for here; else something was not
//! told yet, and following them could send everything to a few.

/// Where this agent runs.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// The node.
    pub node: &'a str,
    /// The node's `topology.kubernetes.io/zone`, where it has one.
    pub zone: Option<&'a str>,
}

/// `spec.internalTrafficPolicy` of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InternalTraffic {
    /// Any endpoint.
    #[default]
    Cluster,
    /// Endpoints on the client's node only.
    Local,
}

/// What is known of where an endpoint is, and whom it is meant for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints<'a> {
    /// Its node.
    pub node: Option<&'a str>,
    /// `hints.forNodes`.
    pub for_nodes: &'a [&'a str],
    /// `hints.forZones`.
    pub for_zones: &'a [&'a str],
}

/// The endpoints that may be chosen, in their order.
pub fn reachable<'a, T: Clone>(
    endpoints: &[T],
    here: Here<'_>,
    policy: InternalTraffic,
    hints: impl Fn(&T) -> Hints<'a>,
) -> Vec<T> {
    let only = |may: &dyn Fn(Hints<'_>) -> bool| {
        let chosen = endpoints.iter().filter(|it| may(hints(it)));
        chosen.cloned().collect::<Vec<T>>()
    };
    if policy == InternalTraffic::Local {
        return only(&|it| it.node == Some(here.node));
    }
    let all = |has: &dyn Fn(Hints<'_>) -> bool| endpoints.iter().all(|it| has(hints(it)));
    if all(&|it| !it.for_nodes.is_empty()) {
        let chosen = only(&|it| it.for_nodes.contains(&here.node));
        if !chosen.is_empty() {
            return chosen;
        }
    }
    if let Some(zone) = here.zone
        && all(&|it| !it.for_zones.is_empty())
    {
        let chosen = only(&|it| it.for_zones.contains(&zone));
        if !chosen.is_empty() {
            return chosen;
        }
    }
    endpoints.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Here<'_> = Here {
        node: "n1",
        zone: Some("east"),
    };

    fn at(node: &'static str) -> Hints<'static> {
        Hints {
            node: Some(node),
            ..Hints::default()
        }
    }

    fn zones(node: &'static str, for_zones: &'static [&'static str]) -> Hints<'static> {
        Hints {
            for_zones,
            ..at(node)
        }
    }

    fn nodes(node: &'static str, for_nodes: &'static [&'static str]) -> Hints<'static> {
        Hints {
            for_nodes,
            ..zones(node, &["east"])
        }
    }

    #[test]
    fn endpoints_are_chosen_as_kube_proxy_chooses() {
        use InternalTraffic::{Cluster, Local};
        let without = [at("n1"), at("n2"), Hints::default()];
        let hinted = [
            zones("n1", &["west"]),
            zones("n2", &["east"]),
            zones("n3", &["west", "east"]),
        ];
        let partly = [zones("n1", &["west"]), zones("n2", &["east"]), at("n3")];
        let elsewhere = [zones("n1", &["west"]), zones("n2", &["north"])];
        let by_node = [nodes("n1", &["n2"]), nodes("n2", &["n1"])];
        let other_nodes = [nodes("n2", &["n2"]), nodes("n3", &["n3"])];
        let no_zone = Here { zone: None, ..HERE };
        let table: [(&[Hints<'_>], _, _, &[usize]); 11] = [
            (&without, HERE, Cluster, &[0, 1, 2]),
            (&without, HERE, Local, &[0]),
            (&without[1..], HERE, Local, &[]),
            (&hinted, HERE, Cluster, &[1, 2]),
            (&hinted, HERE, Local, &[0]),
            (&hinted, no_zone, Cluster, &[0, 1, 2]),
            (&partly, HERE, Cluster, &[0, 1, 2]),
            (&elsewhere, HERE, Cluster, &[0, 1]),
            (&by_node, HERE, Cluster, &[1]),
            (&other_nodes, HERE, Cluster, &[0, 1]),
            (&[], HERE, Cluster, &[]),
        ];
        for (number, (endpoints, here, policy, expected)) in table.into_iter().enumerate() {
            let places: Vec<usize> = (0..endpoints.len()).collect();
            let found = reachable(&places, here, policy, |place| endpoints[*place]);
            assert_eq!(found, expected, "row {number}");
        }
    }
}
