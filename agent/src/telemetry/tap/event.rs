//! What is told of exchanges and flows.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::Request;
use http::header::HOST;
use weft_core::{Identity, ObjectName, Owner, WorkloadId};

use super::spec::WhoIs;
use super::{Direction, PodLabels};
use crate::telemetry::TlsLabel;
use crate::telemetry::exchange::RouteRef;

/// Something happened to an exchange or a flow.
#[derive(Clone, Debug)]
pub struct Event {
    /// Which one.
    pub id: u64,
    /// When.
    pub at: SystemTime,
    /// What.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum What {
    /// It began.
    Begin(Arc<Begin>),
    /// The head of the response came, with this status, so long after the request.
    Head(u16, Duration),
    /// It ended.
    End(End),
}

/// A request, or a flow that opened.
#[derive(Clone, Debug)]
pub struct Begin {
    /// What is spoken.
    pub protocol: Protocol,
    /// Whether the pod that is watched is the client or the server.
    pub direction: Direction,
    /// The client.
    pub source: Who,
    /// The server.
    pub destination: Who,
    /// The port of a Service that was asked for.
    pub service: Option<(ObjectName, u16)>,
    /// How it is secured.
    pub tls: TlsLabel,
    /// What is asked; none: it is no request.
    pub asked: Option<Asked>,
    /// The route that it takes.
    pub route: Option<RouteRef>,
}

/// What is known of an exchange or flow without looking anything up.
#[derive(Clone, Copy, Debug)]
pub struct Glance<'a> {
    /// Whether the pod that is watched is the client or the server.
    pub direction: Direction,
    /// Method and path; none: it is no request.
    pub asked: Option<(&'a str, &'a str)>,
}

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
    /// gRPC.
    Grpc,
    /// Anything.
    Tcp,
}

/// One of the two ends, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Who {
    /// Where.
    pub address: Option<SocketAddr>,
    /// Its name.
    pub workload: Option<WorkloadId>,
    /// What created it.
    pub owner: Option<Owner>,
    /// Who it proved to be.
    pub identity: Option<Identity>,
}

/// What of a request is told: nothing that is likely to be secret, and of nothing more than there is room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Its method.
    pub method: String,
    /// The host that is asked for, as it was written.
    pub authority: String,
    /// Without the query.
    pub path: String,
}

/// How it ended.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// Since the head of the response, or since the beginning if there was none.
    pub duration: Duration,
    /// From the client to the server: of a request the body.
    pub request_bytes: u64,
    /// From the server to the client: of a response the body.
    pub response_bytes: u64,
    /// The status of gRPC.
    pub grpc: Option<&'static str>,
    /// Why it did not end by itself.
    pub error: Option<String>,
}

impl<'a> Glance<'a> {
    /// Of a request.
    pub fn of<B>(direction: Direction, request: &'a Request<B>) -> Self {
        let asked = Some((request.method().as_str(), request.uri().path()));
        Self { direction, asked }
    }

    /// Of a flow.
    pub fn flow(direction: Direction) -> Self {
        let asked = None;
        Self { direction, asked }
    }
}

impl Protocol {
    /// As it is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1",
            Self::Http2 => "HTTP/2",
            Self::Grpc => "gRPC",
            Self::Tcp => "TCP",
        }
    }

    /// That of a request.
    pub fn of<B>(request: &Request<B>, is_grpc: bool) -> Self {
        match request.version() {
            _ if is_grpc => Self::Grpc,
            http::Version::HTTP_2 => Self::Http2,
            _ => Self::Http1,
        }
    }
}

impl Who {
    /// A pod of this node.
    pub fn pod(labels: &PodLabels, identity: &Identity, address: Option<SocketAddr>) -> Self {
        Self {
            address,
            workload: Some(labels.id.clone()),
            owner: labels.owner.clone(),
            identity: Some(identity.clone()),
        }
    }

    pub(super) fn is(&self) -> WhoIs<'_> {
        WhoIs {
            workload: self.workload.as_ref(),
            owner: self.owner.as_ref(),
            service: None,
        }
    }
}

impl Asked {
    /// What a request asks.
    pub fn of<B>(request: &Request<B>) -> Self {
        let uri = request.uri();
        let host = || {
            let host = request.headers().get(HOST)?;
            Some(String::from_utf8_lossy(host.as_bytes()))
        };
        let authority = uri.authority().map(|it| it.as_str().into());
        let authority = authority.or_else(host).unwrap_or_default();
        // A name and password before the host are refused, and shown to nobody.
        let authority = authority.rsplit('@').next().unwrap_or_default();
        Self {
            method: shortened(request.method().as_str(), MOST_METHOD_BYTES),
            authority: shortened(authority, MOST_AUTHORITY_BYTES),
            path: shortened(uri.path(), MOST_PATH_BYTES),
        }
    }
}

fn shortened(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].to_owned()
}

const MOST_METHOD_BYTES: usize = 32;
/// More than a name with a port can have.
const MOST_AUTHORITY_BYTES: usize = 264;
const MOST_PATH_BYTES: usize = 1024;
