//! What a rule does to the heads of requests and responses: header modifiers, redirects, rewrites,
//! mirroring (Gateway API, `HTTPRouteFilter`).
//!
//! What a filter writes is checked when it is made, so that applying one can fail only by what the
//! request brings along (a path that becomes too long); that is answered with an error, never passed on
//! half done. Headers that frame a message or belong to one connection cannot be modified: a route could
//! otherwise make two servers disagree about where a request ends.

use http::header::{HOST, LOCATION};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, request, response};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::Target;
use super::matches::{PathPrefix, shown};

/// Something that a rule, or one of its backends, does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Changes the request's headers.
    RequestHeaders(HeaderEdit),
    /// Changes the response's headers.
    ResponseHeaders(HeaderEdit),
    /// Answers with a redirect.
    Redirect(Redirect),
    /// Changes the request's host or path.
    Rewrite(Rewrite),
    /// Sends some requests to another backend too, whose answers nobody gets. For the proxy to do:
    /// [`apply_to_request`] passes over it.
    Mirror(Mirror),
    /// Something that is not known, for this reason: requests are answered with 500, as filters must not be
    /// skipped.
    Invalid(String),
}

/// A change of headers: some are removed, then some set, then some added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdit {
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
}

/// A redirect. What is not given is as in the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Redirect {
    /// The scheme.
    pub scheme: Option<RedirectScheme>,
    /// The host, without port.
    #[serde(serialize_with = "shown")]
    pub hostname: Option<Authority>,
    /// The path; the query stays.
    pub path: Option<PathRewrite>,
    /// The port; if it is not given, the scheme's, if that is, else the Service's.
    pub port: Option<u16>,
    /// The status: 301, 302, 303, 307 or 308.
    #[serde(serialize_with = "status_code")]
    pub status: StatusCode,
}

/// The scheme of a redirect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum RedirectScheme {
    Http,
    Https,
}

/// A change of host or path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rewrite {
    /// The new host.
    #[serde(serialize_with = "shown")]
    pub hostname: Option<Authority>,
    /// The new path; the query stays.
    pub path: Option<PathRewrite>,
}

/// A change of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PathRewrite {
    /// All of it becomes this.
    Full(String),
    /// The prefix that the rule matched by becomes this.
    Prefix(String),
}

/// Requests that are sent elsewhere too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mirror {
    /// Where.
    pub target: Target,
    /// Which part of all requests.
    pub share: Share,
}

/// A part of a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Share {
    numerator: u32,
    denominator: u32,
}

/// Why a filter cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// The header is none that a route may change.
    #[error(
        "{0} is not for a route to change: it frames messages, or belongs to a connection or the mesh"
    )]
    ReservedHeader(HeaderName),
    /// The text is no path.
    #[error(
        "{0:?} is not a path: it begins with a slash, and has no '?', '#' or characters to be escaped"
    )]
    NotAPath(String),
    /// The share is more than all.
    #[error("{0}/{1} is not a part of a whole")]
    NotAShare(u32, u32),
    /// The status does not redirect.
    #[error("{0} is not 301, 302, 303, 307 or 308")]
    NotARedirect(u16),
    /// The text is no host name.
    #[error("{0:?} is not a host name")]
    NotAHost(String),
}

/// What filters have to know of where a request was matched.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The prefix that it was matched by: [`super::Matched::prefix`].
    pub prefix: Option<&'a str>,
    /// The port of the Service that it was sent to.
    pub port: u16,
}

/// Applies filters to a request, in their order. Some: the request goes nowhere and is answered with this
/// (a redirect, or 500 where a filter cannot be applied), which has no body.
pub fn apply_to_request(
    filters: &[Filter],
    head: &mut request::Parts,
    place: Place<'_>,
) -> Option<response::Parts> {
    for filter in filters {
        let answered = match filter {
            Filter::RequestHeaders(edit) => {
                edit.apply(&mut head.headers);
                edit.new_host().and_then(|host| set_host(head, host).err())
            }
            Filter::Redirect(redirect) => {
                Some(redirect.answer(head, place).unwrap_or_else(Failed::into))
            }
            Filter::Rewrite(rewrite) => rewrite.apply(head, place).err().map(Failed::into),
            Filter::Invalid(_) => Some(Failed.into()),
            Filter::ResponseHeaders(_) | Filter::Mirror(_) => None,
        };
        if answered.is_some() {
            return answered;
        }
    }
    None
}

/// Applies filters to a response, in their order.
pub fn apply_to_response(filters: &[Filter], head: &mut response::Parts) {
    for filter in filters {
        if let Filter::ResponseHeaders(edit) = filter {
            edit.apply(&mut head.headers);
        }
    }
}

/// A filter cannot be applied to this request.
#[derive(Debug)]
struct Failed;

impl From<Failed> for response::Parts {
    fn from(_: Failed) -> Self {
        answer(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

fn answer(status: StatusCode) -> response::Parts {
    let (mut head, ()) = http::Response::new(()).into_parts();
    head.status = status;
    head
}

impl HeaderEdit {
    /// A change of headers. Of several values for one header in `set`, or in `add`, the first counts
    /// (Gateway API, `HTTPHeader.name`).
    ///
    /// # Errors
    /// A header is none that a route may change.
    pub fn new(
        set: Vec<(HeaderName, HeaderValue)>,
        add: Vec<(HeaderName, HeaderValue)>,
        remove: Vec<HeaderName>,
    ) -> Result<Self, FilterError> {
        let named = set.iter().chain(&add).map(|(name, _)| name);
        if let Some(name) = named.chain(&remove).find(|it| is_reserved(it)) {
            return Err(FilterError::ReservedHeader(name.clone()));
        }
        // A request has one host: it can be another one, not two or none.
        let hosts = add.iter().map(|(name, _)| name).chain(&remove);
        if let Some(host) = hosts.into_iter().find(|it| **it == HOST) {
            return Err(FilterError::ReservedHeader(host.clone()));
        }
        Ok(Self {
            remove,
            set: first_of_each(set),
            add: first_of_each(add),
        })
    }

    /// What is removed.
    pub fn removed(&self) -> &[HeaderName] {
        &self.remove
    }

    /// What is set.
    pub fn set(&self) -> &[(HeaderName, HeaderValue)] {
        &self.set
    }

    /// What is added.
    pub fn added(&self) -> &[(HeaderName, HeaderValue)] {
        &self.add
    }

    fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
    }

    fn new_host(&self) -> Option<&HeaderValue> {
        let set = self.set.iter().find(|(name, _)| *name == HOST);
        set.map(|(_, value)| value)
    }
}

fn first_of_each(list: Vec<(HeaderName, HeaderValue)>) -> Vec<(HeaderName, HeaderValue)> {
    let mut kept: Vec<(HeaderName, HeaderValue)> = vec![];
    for (name, value) in list {
        if !kept.iter().any(|(it, _)| *it == name) {
            kept.push((name, value));
        }
    }
    kept
}

/// Headers that say where a message ends or that are one connection's (RFC 9110, section 7.6.1), and
/// those of the mesh.
fn is_reserved(name: &HeaderName) -> bool {
    const RESERVED: [&str; 10] = [
        "connection",
        "content-length",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    RESERVED.contains(&name.as_str()) || name.as_str().starts_with("weft-")
}

impl Redirect {
    /// Checks a status.
    ///
    /// # Errors
    /// It is none of those that the Gateway API allows.
    pub fn status(code: u16) -> Result<StatusCode, FilterError> {
        match code {
            301 | 302 | 303 | 307 | 308 => {
                StatusCode::from_u16(code).map_err(|_| FilterError::NotARedirect(code))
            }
            _ => Err(FilterError::NotARedirect(code)),
        }
    }

    fn answer(&self, head: &request::Parts, place: Place<'_>) -> Result<response::Parts, Failed> {
        let scheme = match self.scheme {
            Some(RedirectScheme::Http) => "http",
            Some(RedirectScheme::Https) => "https",
            None => head.uri.scheme_str().unwrap_or("http"),
        };
        let well_known = if scheme == "https" { 443 } else { 80 };
        let port = match (self.port, self.scheme) {
            (Some(port), _) => port,
            (None, Some(_)) => well_known,
            (None, None) => place.port,
        };
        let path = match &self.path {
            Some(rewrite) => rewrite.path_and_query(&head.uri, place)?,
            None => head.uri.path_and_query().cloned().unwrap_or_else(root),
        };
        let host = match &self.hostname {
            Some(hostname) => Some(hostname.as_str()),
            None => host_of(head),
        };
        // A request of HTTP/1.0 may name no host: then the redirect cannot either.
        let location = match host {
            None => path.to_string(),
            Some(host) if port == well_known => format!("{scheme}://{host}{path}"),
            Some(host) => format!("{scheme}://{host}:{port}{path}"),
        };
        let mut answer = answer(self.status);
        let location = HeaderValue::try_from(location).map_err(|_| Failed)?;
        answer.headers.insert(LOCATION, location);
        Ok(answer)
    }
}

impl RedirectScheme {
    /// As in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

impl Rewrite {
    fn apply(&self, head: &mut request::Parts, place: Place<'_>) -> Result<(), Failed> {
        if let Some(path) = &self.path {
            let path = path.path_and_query(&head.uri, place)?;
            change_uri(head, |uri| uri.path_and_query = Some(path))?;
        }
        if let Some(host) = &self.hostname {
            // What an authority is made of may be in a header.
            let value = HeaderValue::from_str(host.as_str()).map_err(|_| Failed)?;
            set_authority(head, host.clone(), value)?;
        }
        Ok(())
    }
}

/// Reads a host without port for a redirect or a rewrite.
///
/// # Errors
/// It is none.
pub fn hostname(text: &str) -> Result<Authority, FilterError> {
    let refused = || FilterError::NotAHost(text.chars().take(64).collect());
    let authority: Authority = text.parse().map_err(|_| refused())?;
    match authority.host() == text && !text.is_empty() {
        true => Ok(authority),
        false => Err(refused()),
    }
}

impl PathRewrite {
    /// A path that replaces all of a path.
    ///
    /// # Errors
    /// It is no path.
    pub fn full(text: &str) -> Result<Self, FilterError> {
        checked_path(text).map(Self::Full)
    }

    /// A path that replaces a prefix; may be empty.
    ///
    /// # Errors
    /// It is no path.
    pub fn prefix(text: &str) -> Result<Self, FilterError> {
        match text {
            "" => Ok(Self::Prefix(String::new())),
            _ => checked_path(text).map(Self::Prefix),
        }
    }

    fn path_and_query(&self, uri: &Uri, place: Place<'_>) -> Result<PathAndQuery, Failed> {
        let mut path = match self {
            Self::Full(path) => path.clone(),
            Self::Prefix(replacement) => {
                // The controller lets this stand beside prefixes only.
                let prefix = PathPrefix::new(place.prefix.ok_or(Failed)?);
                let rest = prefix.rest_of(uri.path()).ok_or(Failed)?;
                if !rest.is_empty() && !rest.starts_with('/') {
                    return Err(Failed);
                }
                joined(replacement, rest)
            }
        };
        if let Some(query) = uri.query() {
            path.push('?');
            path.push_str(query);
        }
        PathAndQuery::try_from(path).map_err(|_| Failed)
    }
}

/// What a replacement of a prefix and what followed the prefix are together: the slash between them is
/// there once, and a path is never empty (Gateway API, `HTTPPathModifier.replacePrefixMatch`).
fn joined(replacement: &str, rest: &str) -> String {
    let mut path = match rest.starts_with('/') {
        true => replacement.trim_end_matches('/').to_owned(),
        false => replacement.to_owned(),
    };
    path.push_str(rest);
    if path.is_empty() {
        path.push('/');
    }
    path
}

fn checked_path(text: &str) -> Result<String, FilterError> {
    let refused = || FilterError::NotAPath(text.chars().take(64).collect());
    let plain = text.is_ascii() && text.starts_with('/') && !text.contains(['?', '#']);
    match plain && text.parse::<PathAndQuery>().is_ok_and(|it| it == text) {
        true => Ok(text.to_owned()),
        false => Err(refused()),
    }
}

fn root() -> PathAndQuery {
    PathAndQuery::from_static("/")
}

/// The host that a request names, without port.
pub(super) fn host_of(head: &request::Parts) -> Option<&str> {
    let of_uri = head.uri.host();
    let of_header = || {
        let text = head.headers.get(HOST)?.to_str().ok()?;
        let end = match text.rfind(']') {
            Some(bracket) => bracket + 1,
            None => text.find(':').unwrap_or(text.len()),
        };
        text.get(..end)
    };
    of_uri.or_else(of_header).filter(|it| !it.is_empty())
}

/// Sets the host of a request by a header that a route writes.
fn set_host(head: &mut request::Parts, value: &HeaderValue) -> Result<(), response::Parts> {
    let authority = Authority::try_from(value.as_bytes()).map_err(|_| Failed)?;
    set_authority(head, authority, value.clone()).map_err(Failed::into)
}

/// Sets the host wherever the request says it: in its target, in its header, in both; at least in the
/// header.
fn set_authority(
    head: &mut request::Parts,
    authority: Authority,
    value: HeaderValue,
) -> Result<(), Failed> {
    let in_uri = head.uri.authority().is_some();
    if in_uri {
        change_uri(head, |uri| uri.authority = Some(authority))?;
    }
    if !in_uri || head.headers.contains_key(HOST) {
        head.headers.insert(HOST, value);
    }
    Ok(())
}

fn change_uri(
    head: &mut request::Parts,
    change: impl FnOnce(&mut http::uri::Parts),
) -> Result<(), Failed> {
    let mut parts = head.uri.clone().into_parts();
    change(&mut parts);
    // What is only an authority (CONNECT) has no path to change.
    if parts.authority.is_some() && parts.scheme.is_none() && parts.path_and_query.is_some() {
        return Err(Failed);
    }
    head.uri = Uri::from_parts(parts).map_err(|_| Failed)?;
    Ok(())
}

impl Share {
    /// Everything.
    pub const ALL: Self = Self {
        numerator: 1,
        denominator: 1,
    };

    /// A part of a whole.
    ///
    /// # Errors
    /// It is more than all of it, or a part of nothing.
    pub fn new(numerator: u32, denominator: u32) -> Result<Self, FilterError> {
        match denominator != 0 && numerator <= denominator {
            true => Ok(Self {
                numerator,
                denominator,
            }),
            false => Err(FilterError::NotAShare(numerator, denominator)),
        }
    }

    /// How many of [`Share::denominator`].
    pub fn numerator(self) -> u32 {
        self.numerator
    }

    /// Of how many.
    pub fn denominator(self) -> u32 {
        self.denominator
    }

    /// Whether the part includes this time; `random` is a number out of all of its type.
    pub fn includes(self, random: u64) -> bool {
        let place = (u128::from(random) * u128::from(self.denominator)) >> 64;
        place < u128::from(self.numerator)
    }
}

/// `1/10`.
impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}/{}", self.numerator, self.denominator))
    }
}

impl Serialize for HeaderEdit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // A value may be a token, which is nobody's to see who sees what is in force.
        let names = |fields: &[(HeaderName, HeaderValue)]| -> Vec<String> {
            fields.iter().map(|(name, _)| name.to_string()).collect()
        };
        let removed: Vec<&str> = self.remove.iter().map(HeaderName::as_str).collect();
        let mut shown = serializer.serialize_map(Some(3))?;
        shown.serialize_entry("remove", &removed)?;
        shown.serialize_entry("set", &names(&self.set))?;
        shown.serialize_entry("add", &names(&self.add))?;
        shown.end()
    }
}

fn status_code<S: Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}
