//! What those are told of flows who watch a pod.

use weft_core::{ObjectName, Workload, WorkloadId};

use super::Context;
use super::error::FlowError;
use super::record::{PathLabel, Record};
use crate::discovery::Store;
use crate::node::LocalPod;
use crate::telemetry::tap::{Begin, End, Glance, Protocol, Tapped, Who};
use crate::telemetry::{Direction, PodLabels, Telemetry, TlsLabel};

/// A flow that is watched: on one node, at both of its ends perhaps.
#[derive(Debug, Default)]
pub(super) struct TappedFlow([Option<Box<Tapped>>; 2]);

/// A flow has opened at one of its ends, and is carried as it is.
pub(super) fn opened(context: &Context, pod: &LocalPod, direction: Direction, record: &mut Record) {
    let Some(watched) = context.telemetry.taps().of(&pod.labels) else {
        return;
    };
    let begin = || begin(&context.store, direction, record, tls(record.path));
    if let Some(tapped) = watched.begin(&Glance::flow(direction), begin) {
        let flow = record.tapped.get_or_insert_default();
        flow.0[direction as usize] = Some(tapped);
    }
}

/// A flow has ended, or did not come to be.
pub(super) fn ended(
    telemetry: &Telemetry,
    store: &Store,
    record: &mut Record,
    error: Option<&FlowError>,
) {
    let end = || End {
        request_bytes: record.moved.sent(),
        response_bytes: record.moved.received(),
        error: error.map(|it| match (it.refusal(), &record.verdict) {
            (Some(refusal), Some(verdict)) => format!("{}: {}", refusal.as_str(), verdict.by()),
            (Some(refusal), None) => refusal.as_str().to_owned(),
            (None, _) => it.to_string(),
        }),
        ..End::default()
    };
    if let Some(flow) = &mut record.tapped {
        let ends = std::mem::take(&mut flow.0);
        for tapped in ends.into_iter().flatten() {
            tapped.end(end());
        }
        return;
    }
    let is_refused = error.is_some_and(|it| it.refusal().is_some());
    if !is_refused || record.has_exchanges || telemetry.taps().count() == 0 {
        return;
    }
    let labels = PodLabels {
        id: record.pod.clone(),
        owner: who(store.workload(&record.pod).as_deref()).owner,
    };
    if let Some(watched) = telemetry.taps().of(&labels) {
        let begin = || begin(store, record.direction, record, TlsLabel::Unconnected);
        if let Some(tapped) = watched.begin(&Glance::flow(record.direction), begin) {
            tapped.end(end());
        }
    }
}

fn begin(store: &Store, direction: Direction, record: &Record, tls: TlsLabel) -> Begin {
    let named = |id: &Option<WorkloadId>| Who {
        workload: id.clone(),
        owner: id
            .as_ref()
            .and_then(|it| who(store.workload(it).as_deref()).owner),
        ..Who::default()
    };
    let port = record.original.map_or(0, |it| it.port());
    let service = |name: &ObjectName| (name.clone(), port);
    Begin {
        protocol: Protocol::Tcp,
        direction,
        source: Who {
            address: record.client,
            identity: record.source_identity.clone(),
            ..named(&record.source)
        },
        destination: Who {
            address: record.endpoint.or(record.original),
            identity: record.destination_identity.clone(),
            ..named(&record.destination)
        },
        service: record.service.as_ref().map(service),
        tls,
        asked: None,
        route: None,
    }
}

/// A workload by its record.
pub(super) fn who(workload: Option<&Workload>) -> Who {
    Who {
        workload: workload.map(|it| it.id.clone()),
        owner: workload.and_then(|it| it.owner.clone()),
        ..Who::default()
    }
}

/// How a path secures what goes by it.
pub(super) fn tls(path: PathLabel) -> TlsLabel {
    match path {
        PathLabel::Tunnel => TlsLabel::Mutual,
        PathLabel::SameNode => TlsLabel::SameNode,
        PathLabel::Itself => TlsLabel::Loopback,
        PathLabel::Plaintext => TlsLabel::None,
        PathLabel::Unknown => TlsLabel::Unconnected,
    }
}
