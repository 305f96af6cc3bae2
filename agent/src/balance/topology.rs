//! Which of a service's endpoints may be chosen from here: `internalTrafficPolicy`, and the hints
//! that the EndpointSlice controller computes from `trafficDistribution` and topology modes. Pure.
//!
//! As kube-proxy does it: `Local` means only this node's endpoints, even if there are none. Hints are
//! followed only if every endpoint has them and one of them is for here; else something was not
//! told yet, and following them could send everything to a few.

use weft_core::{EndpointPlace, InternalTraffic, Name};

/// Where this agent runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Here {
    /// The node; none: nothing is near.
    pub node: Option<Name>,
    /// The node's `topology.kubernetes.io/zone`, where it has one.
    pub zone: Option<String>,
}

/// The endpoints that may be chosen, in their order. `place` says where one is; none: nobody knows.
pub fn reachable<'a, T: 'a>(
    endpoints: Vec<T>,
    here: &Here,
    policy: InternalTraffic,
    place: impl Fn(&T) -> Option<&'a EndpointPlace>,
) -> Vec<T> {
    let only = |endpoints: Vec<T>, may: &dyn Fn(&EndpointPlace) -> bool| -> Vec<T> {
        let mut chosen = endpoints;
        chosen.retain(|it| place(it).is_some_and(may));
        chosen
    };
    if policy == InternalTraffic::Local {
        return only(endpoints, &|it| it.node.is_some() && it.node == here.node);
    }
    let for_here: [[May<'_>; 2]; 2] = [
        [&|it| !it.for_nodes.is_empty(), &|it| {
            here.node
                .as_ref()
                .is_some_and(|node| it.for_nodes.contains(node))
        }],
        [&|it| !it.for_zones.is_empty(), &|it| {
            here.zone
                .as_ref()
                .is_some_and(|zone| it.for_zones.contains(zone))
        }],
    ];
    for [has, is_here] in for_here {
        let mut places = endpoints.iter().map(&place);
        let all = places.all(|it| it.is_some_and(has));
        let any = endpoints
            .iter()
            .map(&place)
            .any(|it| it.is_some_and(is_here));
        if all && any {
            return only(endpoints, is_here);
        }
    }
    endpoints
}

type May<'a> = &'a dyn Fn(&EndpointPlace) -> bool;

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().expect("valid")
    }

    fn here() -> Here {
        Here {
            node: Some(name("n1")),
            zone: Some("east".to_owned()),
        }
    }

    fn at(node: &str) -> EndpointPlace {
        EndpointPlace {
            node: Some(name(node)),
            ..EndpointPlace::default()
        }
    }

    fn zones(node: &str, for_zones: &[&str]) -> EndpointPlace {
        EndpointPlace {
            for_zones: for_zones.iter().map(ToString::to_string).collect(),
            ..at(node)
        }
    }

    fn nodes(node: &str, for_nodes: &[&str]) -> EndpointPlace {
        EndpointPlace {
            for_nodes: for_nodes.iter().map(|it| name(it)).collect(),
            ..zones(node, &["east"])
        }
    }

    #[test]
    fn endpoints_are_chosen_as_kube_proxy_chooses() {
        use InternalTraffic::{Cluster, Local};
        let without = [at("n1"), at("n2"), EndpointPlace::default()];
        let hinted = [
            zones("n1", &["west"]),
            zones("n2", &["east"]),
            zones("n3", &["west", "east"]),
        ];
        let partly = [zones("n1", &["west"]), zones("n2", &["east"]), at("n3")];
        let elsewhere = [zones("n1", &["west"]), zones("n2", &["north"])];
        let by_node = [nodes("n1", &["n2"]), nodes("n2", &["n1"])];
        let other_nodes = [
            nodes("n2", &["n2"]),
            EndpointPlace {
                for_zones: vec!["west".to_owned()],
                ..nodes("n3", &["n3"])
            },
        ];
        let no_zone = Here {
            zone: None,
            ..here()
        };
        let nowhere = Here::default();
        let here = here();
        let table: [(&[EndpointPlace], _, _, &[usize]); 13] = [
            (&without, &here, Cluster, &[0, 1, 2]),
            (&without, &here, Local, &[0]),
            (&without[1..], &here, Local, &[]),
            (&without, &nowhere, Local, &[]),
            (&hinted, &here, Cluster, &[1, 2]),
            (&hinted, &here, Local, &[0]),
            (&hinted, &no_zone, Cluster, &[0, 1, 2]),
            (&partly, &here, Cluster, &[0, 1, 2]),
            (&elsewhere, &here, Cluster, &[0, 1]),
            (&by_node, &here, Cluster, &[1]),
            // None is for this node: those that are for its zone.
            (&other_nodes, &here, Cluster, &[0]),
            (&other_nodes, &no_zone, Cluster, &[0, 1]),
            (&[], &here, Cluster, &[]),
        ];
        for (number, (endpoints, here, policy, expected)) in table.into_iter().enumerate() {
            let places: Vec<usize> = (0..endpoints.len()).collect();
            let found = reachable(places, here, policy, |place| Some(&endpoints[*place]));
            assert_eq!(found, expected, "row {number}");
        }
    }

    #[test]
    fn one_of_which_nothing_is_known_makes_hints_be_ignored() {
        let known = zones("n1", &["east"]);
        let places = vec![Some(&known), None];
        let found = reachable(places.clone(), &here(), InternalTraffic::Cluster, |it| *it);
        assert_eq!(found, places);
        let found = reachable(places, &here(), InternalTraffic::Local, |it| *it);
        assert_eq!(found, [Some(&known)]);
    }
}
