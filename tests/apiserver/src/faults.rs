//! Requests for objects that fail as a test wants it: those for the first page of a list, for further ones, or for a watch.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::{BodyExt, Full};

use crate::Shared;
use crate::answer::{Body, Query, respond};

/// A failure of some requests.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The plural name of the collection that is asked for.
    pub plural: String,
    /// What is asked for of it.
    pub of: Asked,
    /// The status of the answer.
    pub code: u16,
    /// How many seconds it asks to wait.
    pub retry_after: Option<u32>,
    /// How often.
    pub times: usize,
}

/// What of a collection is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A list, from its first page on.
    List,
    /// A further page.
    Page,
    /// A watch.
    Watch,
}

impl Fault {
    /// A failure, so often.
    pub fn new(plural: &str, of: Asked, code: u16, times: usize) -> Self {
        Self {
            plural: plural.to_owned(),
            of,
            code,
            retry_after: None,
            times,
        }
    }

    /// The same, asking for a pause of so many seconds.
    #[must_use]
    pub fn asking(self, seconds: u32) -> Self {
        Self {
            retry_after: Some(seconds),
            ..self
        }
    }
}

fn asked(query: &Query) -> Asked {
    let watches = query.get("watch").map(String::as_str);
    match query.contains_key("continue") {
        _ if matches!(watches, Some("true" | "1")) => Asked::Watch,
        true => Asked::Page,
        false => Asked::List,
    }
}

/// The failure that a request for a collection is answered with, in plain text as by what has not looked at it.
pub(crate) fn answer(shared: &Shared, plural: &str, query: &Query) -> Option<Response<Body>> {
    let asked = asked(query);
    let mut behaviour = shared.behaviour();
    let mut faults = behaviour.faults.iter_mut();
    let fault = faults.find(|it| it.times > 0 && it.plural == plural && it.of == asked)?;
    fault.times -= 1;
    let code = StatusCode::from_u16(fault.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let text = Bytes::from_static(b"failed by the test\n");
    let body = Full::new(text).map_err(|never| match never {});
    let mut response = respond(code, "text/plain; charset=utf-8", body.boxed_unsync());
    if let Some(seconds) = fault.retry_after {
        let headers = response.headers_mut();
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    Some(response)
}

/// Waits for as long as further pages of a collection are held.
pub(crate) async fn held(shared: &Arc<Shared>, path: &str, query: &Query) {
    let plural = path.rsplit('/').next().unwrap_or_default();
    while asked(query) == Asked::Page && shared.behaviour().held_pages.contains(plural) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
