//! What annotations say about ports: which are opaque, and which Linkerd's proxy would have left alone.
//! Nothing that is meshed bypasses the mesh here, so that the latter are opaque too.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use weft_core::{ListedPort, PortRanges};

use crate::objects::Fault;

/// What an object's annotations say about ports.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct PortsChoice {
    /// Ports that are opaque, in place of those that are by default.
    pub(super) opaque: Listed,
    /// Ports of pods that are opaque in any case.
    pub(super) skip_inbound: Listed,
    /// Ports of destinations to which connections are opaque.
    pub(super) skip_outbound: Listed,
}

/// A list of ports, as it is written.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) enum Listed {
    /// Nothing is said.
    #[default]
    Silent,
    /// These.
    Ports(Vec<ListedPort>),
    /// Something that is no list: nothing, unless it said something better before.
    Unreadable,
}

/// The annotations; of each, the first one present counts.
const OPAQUE: [&str; 2] = ["weft.dev/opaque-ports", "config.linkerd.io/opaque-ports"];
const SKIP_INBOUND: [&str; 2] = [
    "weft.dev/skip-inbound-ports",
    "config.linkerd.io/skip-inbound-ports",
];
const SKIP_OUTBOUND: [&str; 2] = [
    "weft.dev/skip-outbound-ports",
    "config.linkerd.io/skip-outbound-ports",
];
/// A longer list is a mistake: agents are told it with every pod that it is for.
const MAX_LISTED: usize = 256;

/// Of a namespace that is not known, or says nothing.
pub(super) static SILENT: PortsChoice = PortsChoice {
    opaque: Listed::Silent,
    skip_inbound: Listed::Silent,
    skip_outbound: Listed::Silent,
};

impl PortsChoice {
    /// Reads annotations. Also returned: faults of those that cannot be read.
    pub(super) fn check(metadata: &ObjectMeta) -> (Self, Vec<Fault>) {
        let mut faults = vec![];
        let choice = Self {
            opaque: listed(metadata, OPAQUE, &mut faults),
            skip_inbound: listed(metadata, SKIP_INBOUND, &mut faults),
            skip_outbound: listed(metadata, SKIP_OUTBOUND, &mut faults),
        };
        (choice, faults)
    }

    /// Takes what cannot be read now from what was known of the same object before.
    pub(super) fn complete_by(&mut self, before: &Self) {
        self.opaque.complete_by(&before.opaque);
        self.skip_inbound.complete_by(&before.skip_inbound);
        self.skip_outbound.complete_by(&before.skip_outbound);
    }

    /// The opaque ports of a Service or a pod of a namespace; `named` finds ports by name.
    pub(super) fn opaque_ports(
        &self,
        namespace: &Self,
        named: impl Fn(&str) -> Vec<u16>,
    ) -> PortRanges {
        let listed = self.opaque.or(&namespace.opaque);
        listed.map_or_else(PortRanges::opaque_by_default, |it| resolved(it, named))
    }

    /// The opaque ports of a pod of a namespace, with those that are to be left alone.
    pub(super) fn inbound_ports(
        &self,
        namespace: &Self,
        named: impl Fn(&str) -> Vec<u16>,
    ) -> PortRanges {
        let opaque = self.opaque_ports(namespace, &named);
        match self.skip_inbound.or(&namespace.skip_inbound) {
            Some(skipped) => opaque.union(&resolved(skipped, named)),
            None => opaque,
        }
    }

    /// Ports to which connections of a pod of a namespace are opaque.
    pub(super) fn outbound_ports(&self, namespace: &Self) -> PortRanges {
        let listed = self.skip_outbound.or(&namespace.skip_outbound);
        // Whose names would they be?
        listed.map_or_else(PortRanges::default, |it| resolved(it, |_| vec![]))
    }
}

impl Listed {
    fn complete_by(&mut self, before: &Self) {
        if *self == Self::Unreadable {
            *self = before.clone();
        }
    }

    fn or<'a>(&'a self, other: &'a Self) -> Option<&'a [ListedPort]> {
        match (self, other) {
            (Self::Ports(ports), _) => Some(ports),
            (Self::Silent | Self::Unreadable, Self::Ports(ports)) => Some(ports),
            (Self::Silent | Self::Unreadable, Self::Silent | Self::Unreadable) => None,
        }
    }
}

fn resolved(listed: &[ListedPort], named: impl Fn(&str) -> Vec<u16>) -> PortRanges {
    PortRanges::new(listed.iter().flat_map(|it| match it {
        ListedPort::Range(first, last) => vec![(*first, *last)],
        ListedPort::Named(name) => named(name).into_iter().map(|it| (it, it)).collect(),
    }))
}

fn listed(metadata: &ObjectMeta, names: [&str; 2], faults: &mut Vec<Fault>) -> Listed {
    let annotations = metadata.annotations.as_ref();
    let written = names
        .iter()
        .find_map(|name| Some((name, annotations?.get(*name)?)));
    let Some((name, text)) = written else {
        return Listed::Silent;
    };
    let reason = match ListedPort::list(text) {
        Ok(ports) if ports.len() <= MAX_LISTED => return Listed::Ports(ports),
        Ok(ports) => format!("{} ports and ranges, more than {MAX_LISTED}", ports.len()),
        Err(error) => error.to_string(),
    };
    faults.push(Fault::new(
        format!("metadata.annotations[{name:?}]"),
        reason,
    ));
    Listed::Unreadable
}
