//! Which path answers what, and where.

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tokio::runtime::{Handle, RuntimeFlavor};
use tracing::info;

use super::Admin;

/// Where a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surface {
    /// The port of the node.
    Port,
    /// The Unix socket.
    Socket,
}

type Reply = Response<Full<Bytes>>;

/// Answers one request.
pub(super) async fn answer(admin: &Admin, surface: Surface, request: Request<Incoming>) -> Reply {
    let method = request.method().clone();
    let read = matches!(method, Method::GET | Method::HEAD);
    match (surface, request.uri().path()) {
        (_, "/metrics") if read => reply(StatusCode::OK, OPEN_METRICS, slow(|| (admin.metrics)())),
        (_, "/live") if read => text(StatusCode::OK, "alive"),
        (_, "/ready") if read => {
            let readiness = (admin.readiness)();
            let status = if readiness.ready {
                StatusCode::OK
            } else {
                StatusCode::SERVICE_UNAVAILABLE
            };
            json(status, &readiness)
        }
        (Surface::Socket, "/config_dump") if read => {
            reply(StatusCode::OK, "application/json", slow(|| (admin.dump)()))
        }
        (Surface::Socket, "/recent") if read => {
            let query = request.uri().query().unwrap_or_default();
            match slow(|| admin.recent(query)) {
                Ok(recent) => reply(StatusCode::OK, OPEN_METRICS, recent),
                Err(wrong) => text(StatusCode::BAD_REQUEST, &wrong),
            }
        }
        (Surface::Socket, "/log_level") if read => text(StatusCode::OK, &(admin.log_level)()),
        (Surface::Socket, "/log_level") if method == Method::PUT => {
            set_log_level(admin, request).await
        }
        (_, "/metrics" | "/live" | "/ready") | (Surface::Socket, "/config_dump" | "/recent") => {
            not_allowed("GET, HEAD")
        }
        (Surface::Socket, "/log_level") => not_allowed("GET, HEAD, PUT"),
        _ => text(StatusCode::NOT_FOUND, "no such page"),
    }
}

/// Does something that takes long, without keeping flows from being served.
fn slow<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

async fn set_log_level(admin: &Admin, request: Request<Incoming>) -> Reply {
    let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect();
    let Ok(body) = body.await else {
        return text(StatusCode::PAYLOAD_TOO_LARGE, "a log filter is shorter");
    };
    let bytes = body.to_bytes();
    let Ok(filter) = std::str::from_utf8(&bytes).map(str::trim) else {
        return text(StatusCode::BAD_REQUEST, "a log filter is text");
    };
    if filter.is_empty() {
        return text(StatusCode::BAD_REQUEST, "the body must be a log filter");
    }
    match (admin.set_log_level)(filter) {
        Ok(()) => {
            info!(filter, "log filter changed");
            text(StatusCode::OK, &(admin.log_level)())
        }
        Err(error) => text(StatusCode::BAD_REQUEST, &error),
    }
}

fn json(status: StatusCode, content: &impl serde::Serialize) -> Reply {
    match serde_json::to_vec_pretty(content) {
        Ok(mut bytes) => {
            bytes.push(b'\n');
            reply(status, "application/json", bytes)
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn text(status: StatusCode, content: &str) -> Reply {
    reply(status, "text/plain; charset=utf-8", format!("{content}\n"))
}

fn not_allowed(methods: &'static str) -> Reply {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "not by this method");
    let headers = response.headers_mut();
    headers.insert(ALLOW, HeaderValue::from_static(methods));
    response
}

fn reply(status: StatusCode, content_type: &'static str, content: impl Into<Bytes>) -> Reply {
    let mut response = Response::new(Full::new(content.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const MAX_BODY_BYTES: usize = 4096;
