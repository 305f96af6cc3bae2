//! The rules of routes, from what is written to what agents decide by. Limits are those of the Gateway
//! API's definitions, which nothing else enforces for objects out of a directory.

use http::{HeaderName, HeaderValue};
use weft_core::route::{
    Backend, Filter, FlowRule, HeaderEdit, HeaderMatch, HostMatch, HttpMatch, Mirror, PathMatch,
    PathPrefix, PathRewrite, Pattern, QueryMatch, Redirect, RedirectScheme, Rewrite, Rule, Share,
    Target, TextMatch, hostname,
};
use weft_core::{EgressName, Name, ObjectName};

use super::reliability::{Annotated, ReliabilitySaid};
use crate::objects::routes as written;
use crate::objects::{Fault, ObjectKind};

/// Reads the rules of one route, and collects what is to be said about them besides.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    namespace: &'a Name,
    filters_of: FiltersOf,
    annotated: Annotated,
    /// What was found besides rules.
    pub(super) aside: Aside,
}

/// What was found in rules besides them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Aside {
    /// Parts that count as not written.
    pub(super) ignored: Vec<Fault>,
    /// Parts that are answered with an error, as they must not be skipped and are not understood.
    pub(super) unsupported: Vec<Fault>,
    /// References to what can be no backend or filter.
    pub(super) invalid: Vec<Fault>,
    /// Services that are referred to, with where.
    pub(super) references: Vec<Reference>,
    /// EgressNetworks that are referred to, with the field that each stands in.
    pub(super) egress: Vec<(String, EgressName)>,
    /// What each rule for requests says about how long they may take, and of retries.
    pub(super) reliability: Vec<ReliabilitySaid>,
}

/// A reference to a port of a Service.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reference {
    /// The field that it stands in.
    pub(super) field: String,
    /// The Service.
    pub(super) service: ObjectName,
    /// Its port.
    pub(super) port: u16,
}

/// Whose filters may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FiltersOf {
    /// All of an HTTPRoute.
    Http,
    /// Those of a GRPCRoute: no redirects and rewrites.
    Grpc,
    /// None.
    Flows,
}

type Read<T> = Result<T, Fault>;

const MAX_RULES: usize = 16;
const MAX_MATCHES_OF_RULE: usize = 64;
const MAX_MATCHES: usize = 128;
const MAX_FILTERS: usize = 16;
const MAX_BACKENDS: usize = 16;
const MAX_HEADERS: usize = 16;
pub(super) const MAX_HOSTNAMES: usize = 16;
const MAX_WEIGHT: u32 = 1_000_000;
const MAX_PATH_BYTES: usize = 1024;
const MAX_VALUE_BYTES: usize = 4096;

impl<'a> Reader<'a> {
    pub(super) fn new(namespace: &'a Name, filters_of: FiltersOf, annotated: Annotated) -> Self {
        Self {
            namespace,
            filters_of,
            annotated,
            aside: Aside::default(),
        }
    }

    /// The rules of an HTTPRoute; none written: one for everything, as the definition has it.
    pub(super) fn http_rules(&mut self, rules: Option<&[written::HttpRule]>) -> Read<Vec<Rule>> {
        let default = [written::HttpRule::default()];
        let rules = rules.unwrap_or(&default);
        few("spec.rules", rules.len(), MAX_RULES)?;
        let matches = rules.iter().map(|it| it.matches.len()).sum();
        few("spec.rules", matches, MAX_MATCHES)?;
        let rules = rules.iter().enumerate();
        rules
            .map(|(index, it)| self.http_rule(&format!("spec.rules[{index}]"), it))
            .collect()
    }

    fn http_rule(&mut self, field: &str, rule: &written::HttpRule) -> Read<Rule> {
        few(
            &format!("{field}.matches"),
            rule.matches.len(),
            MAX_MATCHES_OF_RULE,
        )?;
        let matches = rule.matches.iter().enumerate();
        let matches =
            matches.map(|(index, it)| http_match(&format!("{field}.matches[{index}]"), it));
        let matches = or_any(matches.collect::<Read<_>>()?);
        let persistence = rule.session_persistence.is_some();
        self.ignore(&format!("{field}.sessionPersistence"), persistence);
        let (timeouts, retry) = (rule.timeouts.as_ref(), rule.retry.as_ref());
        let said = self.annotated.of_http_rule(field, timeouts, retry)?;
        self.aside.reliability.push(said);
        Ok(Rule {
            name: rule_name(field, rule.name.as_deref())?,
            filters: self.filters(&format!("{field}.filters"), &rule.filters, &matches)?,
            backends: self.backends(field, &rule.backend_refs, &matches)?,
            matches,
            // Known with the Service that it is attached to.
            reliability: None,
        })
    }

    /// The rules of a GRPCRoute.
    pub(super) fn grpc_rules(&mut self, rules: &[written::GrpcRule]) -> Read<Vec<Rule>> {
        few("spec.rules", rules.len(), MAX_RULES)?;
        let matches = rules.iter().map(|it| it.matches.len()).sum();
        few("spec.rules", matches, MAX_MATCHES)?;
        let rules = rules.iter().enumerate();
        rules
            .map(|(index, it)| self.grpc_rule(&format!("spec.rules[{index}]"), it))
            .collect()
    }

    fn grpc_rule(&mut self, field: &str, rule: &written::GrpcRule) -> Read<Rule> {
        few(
            &format!("{field}.matches"),
            rule.matches.len(),
            MAX_MATCHES_OF_RULE,
        )?;
        let matches = rule.matches.iter().enumerate();
        let matches =
            matches.map(|(index, it)| grpc_match(&format!("{field}.matches[{index}]"), it));
        let matches = or_any(matches.collect::<Read<_>>()?);
        let persistence = rule.session_persistence.is_some();
        self.ignore(&format!("{field}.sessionPersistence"), persistence);
        self.aside.reliability.push(self.annotated.of_rule());
        Ok(Rule {
            name: rule_name(field, rule.name.as_deref())?,
            filters: self.filters(&format!("{field}.filters"), &rule.filters, &matches)?,
            backends: self.backends(field, &rule.backend_refs, &matches)?,
            matches,
            reliability: None,
        })
    }

    /// The rule of a TLSRoute or a TCPRoute: nothing would tell a second one apart.
    pub(super) fn flow_rule(
        &mut self,
        hostnames: &[String],
        rules: &[written::FlowRule],
    ) -> Read<FlowRule> {
        few("spec.hostnames", hostnames.len(), MAX_HOSTNAMES)?;
        let hostnames = hostnames.iter().enumerate();
        let hostnames = hostnames.map(|(index, text)| {
            let field = format!("spec.hostnames[{index}]");
            text.parse().map_err(|reason| Fault::new(field, reason))
        });
        let Some(rule) = rules.first() else {
            return Err(Fault::new("spec.rules", "missing"));
        };
        if rules.len() > 1 {
            let reason = "only the first rule can ever be in force";
            self.aside.ignored.push(Fault::new("spec.rules[1]", reason));
        }
        Ok(FlowRule {
            name: rule_name("spec.rules[0]", rule.name.as_deref())?,
            hostnames: hostnames.collect::<Read<Vec<HostMatch>>>()?,
            backends: self.backends("spec.rules[0]", &rule.backend_refs, &[])?,
        })
    }

    fn backends(
        &mut self,
        rule: &str,
        list: &[written::BackendRef],
        matches: &[HttpMatch],
    ) -> Read<Vec<Backend>> {
        few(&format!("{rule}.backendRefs"), list.len(), MAX_BACKENDS)?;
        let mut backends = vec![];
        for (index, it) in list.iter().enumerate() {
            let field = format!("{rule}.backendRefs[{index}]");
            let weight = it.weight.map_or(Ok(1), u32::try_from);
            let weight = weight.ok().filter(|it| *it <= MAX_WEIGHT).ok_or_else(|| {
                let reason = format!("not a number from 0 to {MAX_WEIGHT}");
                Fault::new(format!("{field}.weight"), reason)
            })?;
            backends.push(Backend {
                weight,
                target: self.target(&field, it)?,
                filters: self.filters(&format!("{field}.filters"), &it.filters, matches)?,
            });
        }
        Ok(backends)
    }

    fn target(&mut self, field: &str, it: &written::BackendRef) -> Read<Target> {
        let kind = it.kind.as_deref().unwrap_or("Service");
        let group = it.group.as_deref().unwrap_or("");
        let network = ObjectKind::policy_group_named(group).filter(|_| kind == "EgressNetwork");
        let is_service = kind == "Service" && matches!(group, "" | "core");
        if !is_service && network.is_none() {
            let reason = format!(
                "{} can be no backend: only a Service, or an EgressNetwork of its own routes, can",
                kind_of(group, kind)
            );
            self.aside.invalid.push(Fault::new(field, &reason));
            return Ok(Target::Invalid(reason));
        }
        let name = ObjectName {
            namespace: match &it.namespace {
                Some(text) => parsed(&format!("{field}.namespace"), text)?,
                None => self.namespace.clone(),
            },
            name: parsed(&format!("{field}.name"), &it.name)?,
        };
        if let Some(group) = network {
            let name = EgressName { name, group };
            self.aside.egress.push((field.to_owned(), name.clone()));
            return Ok(Target::Egress(name));
        }
        let number = it.port.and_then(|it| u16::try_from(it).ok());
        let port = number.filter(|it| *it != 0).ok_or_else(|| {
            let reason = "missing, or no port: 1 to 65535";
            Fault::new(format!("{field}.port"), reason)
        })?;
        self.aside.references.push(Reference {
            field: field.to_owned(),
            service: name.clone(),
            port,
        });
        Ok(Target::Service { name, port })
    }

    /// Where copies of requests go: where the requests went they would be no copies.
    fn mirror_target(&mut self, field: &str, it: &written::BackendRef) -> Read<Target> {
        let target = self.target(field, it)?;
        if !matches!(target, Target::Egress(_)) {
            return Ok(target);
        }
        self.aside.egress.pop();
        let reason = "requests are mirrored to Services only";
        self.aside.invalid.push(Fault::new(field, reason));
        Ok(Target::Invalid(reason.to_owned()))
    }

    fn filters(
        &mut self,
        field: &str,
        list: &[written::Filter],
        matches: &[HttpMatch],
    ) -> Read<Vec<Filter>> {
        few(field, list.len(), MAX_FILTERS)?;
        let mut filters = vec![];
        for (index, it) in list.iter().enumerate() {
            let field = format!("{field}[{index}]");
            let same = |other: &&written::Filter| other.kind == it.kind;
            let repeatable = matches!(it.kind.as_str(), "RequestMirror" | "ExtensionRef");
            if !repeatable && list.iter().filter(same).count() > 1 {
                let reason = format!("there is more than one {}", it.kind);
                return Err(Fault::new(field, reason));
            }
            filters.push(self.filter(&field, it, matches)?);
        }
        let redirects = filters.iter().any(|it| matches!(it, Filter::Redirect(_)));
        let rewrites = filters.iter().any(|it| matches!(it, Filter::Rewrite(_)));
        match redirects && rewrites {
            true => Err(Fault::new(
                field,
                "RequestRedirect and URLRewrite exclude each other",
            )),
            false => Ok(filters),
        }
    }

    fn filter(&mut self, field: &str, it: &written::Filter, matches: &[HttpMatch]) -> Read<Filter> {
        let missing = |name: &str| Fault::new(format!("{field}.{name}"), "missing");
        let of_http = self.filters_of == FiltersOf::Http;
        Ok(match it.kind.as_str() {
            _ if self.filters_of == FiltersOf::Flows => {
                return Err(Fault::new(field, "there are no filters for connections"));
            }
            "RequestHeaderModifier" => {
                let name = "requestHeaderModifier";
                let modifier = it.request_header_modifier.as_ref();
                let modifier = modifier.ok_or_else(|| missing(name))?;
                Filter::RequestHeaders(header_edit(&format!("{field}.{name}"), modifier)?)
            }
            "ResponseHeaderModifier" => {
                let name = "responseHeaderModifier";
                let modifier = it.response_header_modifier.as_ref();
                let modifier = modifier.ok_or_else(|| missing(name))?;
                Filter::ResponseHeaders(header_edit(&format!("{field}.{name}"), modifier)?)
            }
            "RequestRedirect" if of_http => {
                let name = "requestRedirect";
                let redirect = it.request_redirect.as_ref().ok_or_else(|| missing(name))?;
                Filter::Redirect(checked_redirect(
                    &format!("{field}.{name}"),
                    redirect,
                    matches,
                )?)
            }
            "URLRewrite" if of_http => {
                let rewrite = it
                    .url_rewrite
                    .as_ref()
                    .ok_or_else(|| missing("urlRewrite"))?;
                let field = format!("{field}.urlRewrite");
                Filter::Rewrite(Rewrite {
                    hostname: host(&field, rewrite.hostname.as_deref())?,
                    path: path_rewrite(&field, rewrite.path.as_ref(), matches)?,
                })
            }
            "RequestMirror" => {
                let mirror = it.request_mirror.as_ref();
                let mirror = mirror.ok_or_else(|| missing("requestMirror"))?;
                let field = format!("{field}.requestMirror");
                Filter::Mirror(Mirror {
                    target: self
                        .mirror_target(&format!("{field}.backendRef"), &mirror.backend_ref)?,
                    share: share(&field, mirror)?,
                })
            }
            "ExtensionRef" => {
                let reason = "no extension is known";
                self.aside
                    .invalid
                    .push(Fault::new(format!("{field}.extensionRef"), reason));
                Filter::Invalid(reason.to_owned())
            }
            "CORS" | "ExternalAuth" if of_http => {
                let reason = format!("filters of type {} are not supported", it.kind);
                self.aside.unsupported.push(Fault::new(field, &reason));
                Filter::Invalid(reason)
            }
            other => {
                let shown: String = other.chars().take(64).collect();
                let reason = format!("{shown:?} is no type of filter of this kind of route");
                return Err(Fault::new(format!("{field}.type"), reason));
            }
        })
    }

    fn ignore(&mut self, field: &str, is_written: bool) {
        if is_written {
            let fault = Fault::new(field, "not supported yet");
            self.aside.ignored.push(fault);
        }
    }
}

fn http_match(field: &str, it: &written::HttpMatch) -> Read<HttpMatch> {
    let path = it.path.clone().unwrap_or_default();
    let value = path.value.as_deref().unwrap_or("/");
    let value_field = format!("{field}.path.value");
    let kind = path.kind.unwrap_or(written::PathMatchType::PathPrefix);
    Ok(HttpMatch {
        path: match kind {
            written::PathMatchType::Exact => PathMatch::Exact(plain_path(&value_field, value)?),
            written::PathMatchType::PathPrefix => {
                PathMatch::Prefix(PathPrefix::new(&plain_path(&value_field, value)?))
            }
            written::PathMatchType::RegularExpression => {
                PathMatch::Regex(pattern(&value_field, value)?)
            }
        },
        method: match &it.method {
            Some(text) => Some(parsed(&format!("{field}.method"), text)?),
            None => None,
        },
        headers: header_matches(&format!("{field}.headers"), &it.headers)?,
        query: query_matches(&format!("{field}.queryParams"), &it.query_params)?,
    })
}

fn grpc_match(field: &str, it: &written::GrpcMatch) -> Read<HttpMatch> {
    let method = it.method.clone().unwrap_or_default();
    let said = |it: &Option<String>| it.clone().filter(|it| !it.is_empty());
    let (service, name) = (said(&method.service), said(&method.method));
    if it.method.is_some() && service.is_none() && name.is_none() {
        let reason = "neither a service nor a method";
        return Err(Fault::new(format!("{field}.method"), reason));
    }
    let kind = method.kind.unwrap_or(written::TextMatchType::Exact);
    let text = |part: &str, text: Option<String>| {
        let field = format!("{field}.method.{part}");
        let matches = text.map(|it| match kind {
            written::TextMatchType::Exact if it.contains('/') => Err(Fault::new(
                &field,
                "has a slash: service and method are apart",
            )),
            kind => text_match(&field, kind, &it),
        });
        matches.transpose()
    };
    Ok(HttpMatch {
        path: PathMatch::grpc(text("service", service)?, text("method", name)?),
        headers: header_matches(&format!("{field}.headers"), &it.headers)?,
        ..HttpMatch::any()
    })
}

/// A rule without conditions is for everything.
fn or_any(matches: Vec<HttpMatch>) -> Vec<HttpMatch> {
    match matches.is_empty() {
        true => vec![HttpMatch::any()],
        false => matches,
    }
}

fn header_matches(field: &str, list: &[written::NamedMatch]) -> Read<Vec<HeaderMatch>> {
    few(field, list.len(), MAX_HEADERS)?;
    let read = |(index, it): (usize, &written::NamedMatch)| {
        let field = format!("{field}[{index}]");
        let kind = it.kind.unwrap_or(written::TextMatchType::Exact);
        Ok(HeaderMatch {
            name: parsed(&format!("{field}.name"), &it.name)?,
            value: text_match(&format!("{field}.value"), kind, &it.value)?,
        })
    };
    list.iter().enumerate().map(read).collect()
}

fn query_matches(field: &str, list: &[written::NamedMatch]) -> Read<Vec<QueryMatch>> {
    few(field, list.len(), MAX_HEADERS)?;
    let read = |(index, it): (usize, &written::NamedMatch)| {
        let field = format!("{field}[{index}]");
        let kind = it.kind.unwrap_or(written::TextMatchType::Exact);
        if it.name.is_empty() || it.name.len() > MAX_VALUE_BYTES {
            let reason = format!("not a name of 1 to {MAX_VALUE_BYTES} bytes");
            return Err(Fault::new(format!("{field}.name"), reason));
        }
        Ok(QueryMatch {
            name: it.name.clone(),
            value: text_match(&format!("{field}.value"), kind, &it.value)?,
        })
    };
    list.iter().enumerate().map(read).collect()
}

fn text_match(field: &str, kind: written::TextMatchType, text: &str) -> Read<TextMatch> {
    if text.len() > MAX_VALUE_BYTES {
        let reason = format!("{} bytes, more than {MAX_VALUE_BYTES}", text.len());
        return Err(Fault::new(field, reason));
    }
    Ok(match kind {
        written::TextMatchType::Exact => TextMatch::Exact(text.to_owned()),
        written::TextMatchType::RegularExpression => TextMatch::Regex(pattern(field, text)?),
    })
}

fn pattern(field: &str, text: &str) -> Read<Pattern> {
    Pattern::new(text).map_err(|reason| Fault::new(field, reason))
}

/// A path as a client would send it: what clients normalize would never match (`HTTPPathMatch`).
fn plain_path(field: &str, text: &str) -> Read<String> {
    let refused = |reason: &str| Err(Fault::new(field, reason));
    if text.len() > MAX_PATH_BYTES {
        return refused("longer than 1024 bytes");
    }
    if !text.starts_with('/') {
        return refused("does not begin with a slash");
    }
    let lower = text.to_ascii_lowercase();
    let never_sent = ["//", "/./", "/../", "%2f", "#", "?"];
    if let Some(part) = never_sent.iter().find(|it| lower.contains(**it)) {
        return refused(&format!("contains {part:?}"));
    }
    if text.ends_with("/..") || text.ends_with("/.") {
        return refused("ends with a segment of dots");
    }
    match text.bytes().all(|it| it.is_ascii_graphic()) {
        true => Ok(text.to_owned()),
        false => refused("contains characters that have to be escaped"),
    }
}

fn header_edit(field: &str, modifier: &written::HeaderModifier) -> Read<HeaderEdit> {
    let headers = |part: &str, list: &[written::Header]| -> Read<Vec<_>> {
        let field = format!("{field}.{part}");
        few(&field, list.len(), MAX_HEADERS)?;
        let header = |(index, it): (usize, &written::Header)| {
            let name: HeaderName = parsed(&format!("{field}[{index}].name"), &it.name)?;
            let value: HeaderValue = parsed(&format!("{field}[{index}].value"), &it.value)?;
            Ok((name, value))
        };
        list.iter().enumerate().map(header).collect()
    };
    let field_of_removed = format!("{field}.remove");
    few(&field_of_removed, modifier.remove.len(), MAX_HEADERS)?;
    let removed = modifier.remove.iter().enumerate();
    let removed = removed.map(|(index, it)| parsed(&format!("{field_of_removed}[{index}]"), it));
    HeaderEdit::new(
        headers("set", &modifier.set)?,
        headers("add", &modifier.add)?,
        removed.collect::<Read<_>>()?,
    )
    .map_err(|reason| Fault::new(field, reason))
}

fn checked_redirect(
    field: &str,
    redirect: &written::RequestRedirect,
    matches: &[HttpMatch],
) -> Read<Redirect> {
    let port = match redirect.port {
        None => None,
        Some(number) => match u16::try_from(number) {
            Ok(port) if port != 0 => Some(port),
            _ => return Err(Fault::new(format!("{field}.port"), "no port: 1 to 65535")),
        },
    };
    let status = Redirect::status(redirect.status_code.unwrap_or(302));
    Ok(Redirect {
        scheme: redirect.scheme.map(|it| match it {
            written::RedirectScheme::Http => RedirectScheme::Http,
            written::RedirectScheme::Https => RedirectScheme::Https,
        }),
        hostname: host(field, redirect.hostname.as_deref())?,
        path: path_rewrite(field, redirect.path.as_ref(), matches)?,
        port,
        status: status.map_err(|reason| Fault::new(format!("{field}.statusCode"), reason))?,
    })
}

fn host(field: &str, text: Option<&str>) -> Read<Option<http::uri::Authority>> {
    let host = text.map(hostname).transpose();
    host.map_err(|reason| Fault::new(format!("{field}.hostname"), reason))
}

fn path_rewrite(
    field: &str,
    modifier: Option<&written::PathModifier>,
    matches: &[HttpMatch],
) -> Read<Option<PathRewrite>> {
    let Some(modifier) = modifier else {
        return Ok(None);
    };
    let full = modifier.replace_full_path.as_deref();
    let prefix = modifier.replace_prefix_match.as_deref();
    let (name, rewrite) = match (modifier.kind, full, prefix) {
        (written::PathModifierType::ReplaceFullPath, Some(full), None) => {
            ("replaceFullPath", PathRewrite::full(full))
        }
        (written::PathModifierType::ReplacePrefixMatch, None, Some(prefix)) => {
            ("replacePrefixMatch", PathRewrite::prefix(prefix))
        }
        _ => {
            let reason = "not exactly the replacement that the type names";
            return Err(Fault::new(format!("{field}.path"), reason));
        }
    };
    let field = format!("{field}.path.{name}");
    let rewrite = rewrite.map_err(|reason| Fault::new(&field, reason))?;
    let by_prefix = |it: &HttpMatch| matches!(it.path, PathMatch::Prefix(_));
    if matches!(rewrite, PathRewrite::Prefix(_)) && !matches.iter().all(by_prefix) {
        return Err(Fault::new(
            field,
            "the rule matches by more than prefixes of paths",
        ));
    }
    Ok(Some(rewrite))
}

fn share(field: &str, mirror: &written::RequestMirror) -> Read<Share> {
    let positive = |number: i32| u32::try_from(number).unwrap_or(u32::MAX);
    let share = match (mirror.percent, &mirror.fraction) {
        (None, None) => Ok(Share::ALL),
        (Some(percent), None) => Share::new(positive(percent), 100),
        (None, Some(fraction)) => {
            let denominator = fraction.denominator.unwrap_or(100);
            // What is negative is no denominator, as zero is none.
            let denominator = u32::try_from(denominator).unwrap_or_default();
            Share::new(positive(fraction.numerator), denominator)
        }
        (Some(_), Some(_)) => {
            return Err(Fault::new(field, "percent and fraction exclude each other"));
        }
    };
    share.map_err(|reason| Fault::new(field, reason))
}

fn rule_name(field: &str, text: Option<&str>) -> Read<Option<Name>> {
    let name = text.map(|it| parsed(&format!("{field}.name"), it));
    name.transpose()
}

pub(super) fn parsed<T: std::str::FromStr>(field: &str, text: &str) -> Read<T>
where
    T::Err: ToString,
{
    text.parse()
        .map_err(|reason: T::Err| Fault::new(field, reason))
}

pub(super) fn few(field: &str, count: usize, most: usize) -> Read<()> {
    if count <= most {
        return Ok(());
    }
    let reason = format!("{count} are written, more than {most}");
    Err(Fault::new(field, reason))
}

fn kind_of(group: &str, kind: &str) -> String {
    let short = |text: &str| text.chars().take(64).collect::<String>();
    match group {
        "" => short(kind),
        group => format!("{}.{}", short(kind), short(group)),
    }
}
