//! What a rule asks of a request's head. Nothing here allocates while it matches, save that a regular
//! expression over an escaped query parameter needs it unescaped.

use std::borrow::Cow;
use std::fmt;

use http::request::Parts;
use http::{HeaderName, Method};
use regex::bytes::{Regex, RegexBuilder};
use serde::{Serialize, Serializer};

/// Conditions of which all must hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HttpMatch {
    /// The path.
    pub path: PathMatch,
    /// The method; none: any.
    #[serde(serialize_with = "shown")]
    pub method: Option<Method>,
    /// Headers. Of several conditions on one header the first counts.
    pub headers: Vec<HeaderMatch>,
    /// Parameters of the query. Of several conditions on one parameter the first counts.
    pub query: Vec<QueryMatch>,
}

/// A condition on a path, which is compared as it was received: not unescaped, not normalized.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// It is this one.
    Exact(String),
    /// It begins with these segments.
    Prefix(PathPrefix),
    /// The whole of it matches.
    Regex(Pattern),
    /// It is a gRPC method's, of which not all is said exactly: `/service/method`.
    Grpc {
        /// The service, with its package; none: any.
        service: Option<TextMatch>,
        /// The method; none: any.
        method: Option<TextMatch>,
    },
}

/// The first segments of a path: `/shop` is the prefix of `/shop` and `/shop/cart`, not of `/shopping`.
/// The slash at its end, if there is one, does not count.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct PathPrefix(String);

/// A condition on the values of a header. Where a header is repeated, one line has to satisfy it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HeaderMatch {
    /// The header.
    #[serde(serialize_with = "shown_one")]
    pub name: HeaderName,
    /// What its value must be.
    #[serde(serialize_with = "without_text")]
    pub value: TextMatch,
}

/// A condition on a parameter of the query. Of a repeated parameter the first counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QueryMatch {
    /// The parameter's name, unescaped.
    pub name: String,
    /// What its value must be, unescaped.
    #[serde(serialize_with = "without_text")]
    pub value: TextMatch,
}

/// A condition on a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TextMatch {
    /// It is this one.
    Exact(String),
    /// The whole of it matches.
    Regex(Pattern),
}

/// A regular expression for the whole of a text, in the syntax of the `regex` crate: no look-around, no
/// references back, so that it takes time in proportion to the text, whoever wrote it.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    compiled: Regex,
}

/// A condition that a request does not satisfy. What a header or a parameter must be is not told: it may be a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Miss<'a> {
    /// The hosts that the route is for.
    Host,
    /// The path.
    Path(&'a PathMatch),
    /// The method.
    Method(&'a Method),
    /// A header.
    Header(&'a HeaderName),
    /// A parameter of the query.
    Query(&'a str),
}

/// Why a text is no [`Pattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// It is longer than [`MAX_PATTERN_BYTES`].
    #[error("a regular expression of {0} bytes, more than {MAX_PATTERN_BYTES}")]
    TooLong(usize),
    /// It is not one, or takes too much memory.
    #[error("not a usable regular expression: {0}")]
    Invalid(String),
}

/// How long a regular expression may be: the Gateway API's limit for a path.
pub const MAX_PATTERN_BYTES: usize = 1024;
/// What one may take compiled, and each thread's cache for it, in bytes: a table may hold hundreds.
const MAX_COMPILED_BYTES: usize = 128 * 1024;
const MAX_CACHE_BYTES: usize = 64 * 1024;

impl HttpMatch {
    /// What every request satisfies.
    pub fn any() -> Self {
        Self {
            path: PathMatch::Prefix(PathPrefix::new("/")),
            method: None,
            headers: vec![],
            query: vec![],
        }
    }

    /// Whether a request satisfies everything.
    pub fn is_match(&self, head: &Parts) -> bool {
        self.miss(head).is_none()
    }

    /// The first condition that a request does not satisfy.
    pub(super) fn miss(&self, head: &Parts) -> Option<Miss<'_>> {
        match self.path.is_match(head.uri.path()) {
            true => self.miss_but_for_path(head),
            false => Some(Miss::Path(&self.path)),
        }
    }

    /// Whether a request of a path that is known to match satisfies the rest.
    pub(super) fn is_match_but_for_path(&self, head: &Parts) -> bool {
        self.miss_but_for_path(head).is_none()
    }

    /// The first condition beside the path's that a request does not satisfy.
    pub(super) fn miss_but_for_path(&self, head: &Parts) -> Option<Miss<'_>> {
        if let Some(method) = self.method.as_ref().filter(|it| **it != head.method) {
            return Some(Miss::Method(method));
        }
        if let Some(header) = self.headers.iter().find(|it| !it.is_match(head)) {
            return Some(Miss::Header(&header.name));
        }
        let query = self.query.iter().find(|it| !it.is_match(head))?;
        Some(Miss::Query(&query.name))
    }

    /// Leaves out conditions that do not count, as an earlier one is for the same header or parameter
    /// (Gateway API, `HTTPHeaderMatch.name` and `HTTPQueryParamMatch.name`).
    pub(super) fn normalize(&mut self) {
        keep_first(&mut self.headers, |it| it.name.clone());
        keep_first(&mut self.query, |it| it.name.clone());
    }

    /// How many regular expressions it holds.
    pub fn patterns(&self) -> usize {
        let text = |it: &TextMatch| usize::from(matches!(it, TextMatch::Regex(_)));
        let path = match &self.path {
            PathMatch::Exact(_) | PathMatch::Prefix(_) => 0,
            PathMatch::Regex(_) => 1,
            PathMatch::Grpc { service, method } => {
                service.iter().chain(method).map(text).sum::<usize>()
            }
        };
        let headers = self.headers.iter().map(|it| text(&it.value));
        let query = self.query.iter().map(|it| text(&it.value));
        path + headers.sum::<usize>() + query.sum::<usize>()
    }
}

/// What is asked for: `path /shop/…`, `method GET`, `header x-canary`.
impl fmt::Display for Miss<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => formatter.write_str("another host"),
            Self::Path(path) => write!(formatter, "path {path}"),
            Self::Method(method) => write!(formatter, "method {method}"),
            Self::Header(name) => write!(formatter, "header {name}"),
            Self::Query(name) => write!(formatter, "query parameter {name}"),
        }
    }
}

/// `/shop`, `/shop/…` of a prefix, `~ /shop.*` of a regular expression, `/service/*` of gRPC.
impl fmt::Display for PathMatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |it: &Option<TextMatch>| match it {
            None => "*".to_owned(),
            Some(TextMatch::Exact(text)) => text.clone(),
            Some(TextMatch::Regex(pattern)) => format!("~{}", pattern.as_str()),
        };
        match self {
            Self::Exact(path) => formatter.write_str(path),
            Self::Prefix(prefix) => write!(formatter, "{}/…", prefix.as_str()),
            Self::Regex(pattern) => write!(formatter, "~ {}", pattern.as_str()),
            Self::Grpc { service, method } => {
                write!(formatter, "/{}/{}", part(service), part(method))
            }
        }
    }
}

fn keep_first<T, K: PartialEq>(list: &mut Vec<T>, key: impl Fn(&T) -> K) {
    let mut seen: Vec<K> = vec![];
    list.retain(|it| {
        let key = key(it);
        let new = !seen.contains(&key);
        if new {
            seen.push(key);
        }
        new
    });
}

impl PathMatch {
    /// The path of a gRPC method: exact if all is, a prefix if only the service is given.
    pub fn grpc(service: Option<TextMatch>, method: Option<TextMatch>) -> Self {
        match (service, method) {
            (None, None) => Self::Prefix(PathPrefix::new("/")),
            (Some(TextMatch::Exact(service)), None) => {
                Self::Prefix(PathPrefix::new(&format!("/{service}")))
            }
            (Some(TextMatch::Exact(service)), Some(TextMatch::Exact(method))) => {
                Self::Exact(format!("/{service}/{method}"))
            }
            (service, method) => Self::Grpc { service, method },
        }
    }

    /// Whether it is every path's.
    pub fn is_any(&self) -> bool {
        matches!(self, Self::Prefix(prefix) if prefix.is_any())
    }

    /// Whether a path satisfies it.
    pub fn is_match(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == path,
            Self::Prefix(prefix) => prefix.rest_of(path).is_some(),
            Self::Regex(pattern) => pattern.is_match(path.as_bytes()),
            Self::Grpc { service, method } => {
                let parts = path.strip_prefix('/').and_then(|it| it.split_once('/'));
                let holds = |it: &Option<TextMatch>, text: &str| {
                    it.as_ref().is_none_or(|it| it.is_match(text.as_bytes()))
                };
                parts.is_some_and(|(of_service, of_method)| {
                    holds(service, of_service) && holds(method, of_method)
                })
            }
        }
    }
}

impl PathPrefix {
    /// The prefix of this text.
    pub fn new(text: &str) -> Self {
        Self(text.strip_suffix('/').unwrap_or(text).to_owned())
    }

    /// Whether it is every path's.
    pub fn is_any(&self) -> bool {
        self.0.is_empty()
    }

    /// It, without a slash at its end; empty for every path's.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What follows it in a path: nothing, or a text that begins with a slash. None: it is not the
    /// path's. (Of `*` and of what CONNECT has for a path, which begin with no slash, all follows the empty
    /// prefix.)
    pub fn rest_of<'a>(&self, path: &'a str) -> Option<&'a str> {
        let rest = path.strip_prefix(self.as_str())?;
        let ends = self.is_any() || rest.is_empty() || rest.starts_with('/');
        ends.then_some(rest)
    }
}

impl HeaderMatch {
    fn is_match(&self, head: &Parts) -> bool {
        let mut values = head.headers.get_all(&self.name).iter();
        values.any(|it| self.value.is_match(it.as_bytes()))
    }
}

impl QueryMatch {
    fn is_match(&self, head: &Parts) -> bool {
        let query = head.uri.query().unwrap_or("");
        let mut pairs = query
            .split('&')
            .map(|it| it.split_once('=').unwrap_or((it, "")));
        let found = pairs.find(|(name, _)| unescaped(name).eq(self.name.bytes()));
        found.is_some_and(|(_, value)| match &self.value {
            TextMatch::Exact(exact) => unescaped(value).eq(exact.bytes()),
            TextMatch::Regex(pattern) => pattern.is_match(&owned_if_escaped(value)),
        })
    }
}

/// The bytes of a part of a query as its author meant them (`application/x-www-form-urlencoded`): an
/// incomplete escape stands for itself.
fn unescaped(text: &str) -> impl Iterator<Item = u8> {
    let mut rest = text.as_bytes();
    std::iter::from_fn(move || {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|it| it as u8);
        let (first, after) = rest.split_first()?;
        if let (b'%', [high, low, after @ ..]) = (*first, after)
            && let (Some(high), Some(low)) = (digit(*high), digit(*low))
        {
            rest = after;
            return Some(high << 4 | low);
        }
        rest = after;
        Some(if *first == b'+' { b' ' } else { *first })
    })
}

fn owned_if_escaped(text: &str) -> Cow<'_, [u8]> {
    match text.bytes().any(|it| matches!(it, b'%' | b'+')) {
        true => unescaped(text).collect::<Vec<u8>>().into(),
        false => text.as_bytes().into(),
    }
}

impl TextMatch {
    /// Whether a text satisfies it.
    pub fn is_match(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => exact.as_bytes() == text,
            Self::Regex(pattern) => pattern.is_match(text),
        }
    }

    /// Its length as written, which counts as how much it says.
    pub(super) fn written_len(&self) -> usize {
        match self {
            Self::Exact(exact) => exact.len(),
            Self::Regex(pattern) => pattern.as_str().len(),
        }
    }
}

impl Pattern {
    /// Compiles a regular expression.
    ///
    /// # Errors
    /// It is none, or too large.
    pub fn new(text: &str) -> Result<Self, PatternError> {
        if text.len() > MAX_PATTERN_BYTES {
            return Err(PatternError::TooLong(text.len()));
        }
        let invalid = |error: regex::Error| PatternError::Invalid(last_line(&error.to_string()));
        // By itself first: `a)|(b` would be one only between our parentheses.
        build(text).map_err(invalid)?;
        // `\A` and `\z`, as flags within may change what `^` and `$` mean only there, and not outside.
        let compiled = build(&format!(r"\A(?:{text})\z")).map_err(invalid)?;
        Ok(Self {
            text: text.to_owned(),
            compiled,
        })
    }

    /// The expression as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the whole of a text matches.
    pub fn is_match(&self, text: &[u8]) -> bool {
        self.compiled.is_match(text)
    }
}

fn build(text: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(text)
        .size_limit(MAX_COMPILED_BYTES)
        .dfa_size_limit(MAX_CACHE_BYTES)
        .nest_limit(32)
        .build()
}

/// The library draws a picture of the place over several lines; its last one says what is wrong.
fn last_line(text: &str) -> String {
    let last = text.lines().last().unwrap_or_default();
    last.strip_prefix("error: ").unwrap_or(last).to_owned()
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.text)
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// How it is compared, and not with what: that may be a token, which is nobody's to see who sees what is in force.
fn without_text<S: Serializer>(it: &TextMatch, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match it {
        TextMatch::Exact(_) => "exact",
        TextMatch::Regex(_) => "regex",
    })
}

pub(super) fn shown<S: Serializer>(
    it: &Option<impl fmt::Display>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match it {
        Some(it) => serializer.collect_str(it),
        None => serializer.serialize_none(),
    }
}

pub(super) fn shown_one<S: Serializer>(
    it: &impl fmt::Display,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(it)
}
