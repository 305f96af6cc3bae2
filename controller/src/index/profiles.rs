//! What the index keeps of ServiceProfiles: checked, and told agents with the tables of routes of their Service.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use http::Method;
use weft_core::route::{
    Backend, BudgetSettings, Condition, GrpcCodes, Pattern, Profile, ProfileRoute, Reliability,
    ResponseClasses, Retry, StatusRange, Target, Timeouts, annotated_duration,
};
use weft_core::{Name, ObjectName};

use super::route_rules::few;
use crate::objects::Fault;
use crate::objects::profiles as written;

/// All ServiceProfiles.
#[derive(Debug, Default)]
pub(super) struct Profiles {
    /// Those that are in force, where routes leave room.
    pub(super) records: HashMap<ObjectName, ProfileRecord>,
    /// By Service.
    pub(super) of_service: HashMap<ObjectName, BTreeSet<ObjectName>>,
}

/// A ServiceProfile.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ProfileRecord {
    /// Whose it is.
    pub(super) service: ObjectName,
    /// What agents are told, if all that it names is there.
    pub(super) profile: Profile,
}

type Read<T> = Result<T, Fault>;

const MAX_ROUTES: usize = 256;
const MAX_BACKENDS: usize = 16;
const MAX_CONDITIONS: usize = 64;
const MAX_DEPTH: usize = 8;
const MAX_CLASSES: usize = 16;
const MAX_NAME_BYTES: usize = 253;
/// In Linkerd nothing but the budget ends retries, so that one request to a server that is down could go on for
/// as long as its client waits.
const RETRIES: u16 = 5;

impl ProfileRecord {
    /// Checks a ServiceProfile. Also returned: faults of parts that are ignored.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(
        name: &ObjectName,
        spec: &written::ServiceProfileSpec,
    ) -> Read<(Self, Vec<Fault>)> {
        let service = service_named("metadata.name", name.name.as_str())?;
        few("spec.routes", spec.routes.len(), MAX_ROUTES)?;
        let budget = match &spec.retry_budget {
            Some(it) => budget("spec.retryBudget", it)?,
            None => BudgetSettings::DEFAULT,
        };
        let routes = spec.routes.iter().enumerate();
        let routes = routes.map(|(index, it)| route(&format!("spec.routes[{index}]"), it, budget));
        few("spec.dstOverrides", spec.dst_overrides.len(), MAX_BACKENDS)?;
        let backends = spec.dst_overrides.iter().enumerate();
        let backends =
            backends.map(|(index, it)| backend(&format!("spec.dstOverrides[{index}]"), it));
        let profile = Profile {
            namespace: name.namespace.clone(),
            routes: routes.collect::<Read<_>>()?,
            backends: backends.collect::<Read<_>>()?,
            budget,
        };
        let mut ignored = vec![];
        if spec.opaque_ports.is_some() {
            let reason = "not heeded: annotate the Service and the pods with weft.dev/opaque-ports";
            ignored.push(Fault::new("spec.opaquePorts", reason));
        }
        Ok((Self { service, profile }, ignored))
    }

    /// What agents are told, given whether a port of a Service is there and may be named.
    pub(super) fn resolved(
        &self,
        resolve: impl Fn(&ObjectName, u16) -> Result<(), String>,
    ) -> Profile {
        let mut profile = self.profile.clone();
        for backend in &mut profile.backends {
            if let Target::Service { name, port } = &backend.target
                && let Err(reason) = resolve(name, *port)
            {
                backend.target = Target::Invalid(reason);
            }
        }
        profile
    }

    /// Where requests are sent to: which of the overrides, the Service and its port.
    pub(super) fn targets(&self) -> impl Iterator<Item = (usize, &ObjectName, u16)> {
        let backends = self.profile.backends.iter().enumerate();
        backends.filter_map(|(index, it)| match &it.target {
            Target::Service { name, port } => Some((index, name, *port)),
            Target::Egress(_) | Target::Invalid(_) => None,
        })
    }
}

impl Profiles {
    /// Takes one in, or out; gives what was there.
    pub(super) fn set(
        &mut self,
        name: &ObjectName,
        record: Option<ProfileRecord>,
    ) -> Option<ProfileRecord> {
        let service = record.as_ref().map(|it| it.service.clone());
        let before = match record {
            Some(record) => self.records.insert(name.clone(), record),
            None => self.records.remove(name),
        };
        if let Some(before) = &before
            && let Some(names) = self.of_service.get_mut(&before.service)
        {
            names.remove(name);
            if names.is_empty() {
                self.of_service.remove(&before.service);
            }
        }
        if let Some(service) = service {
            let names = self.of_service.entry(service).or_default();
            names.insert(name.clone());
        }
        before
    }

    /// The Services whose requests a ServiceProfile sends to this one.
    pub(super) fn naming<'a>(
        &'a self,
        service: &'a ObjectName,
    ) -> impl Iterator<Item = &'a ObjectName> {
        let records = self.records.values();
        let naming = records.filter(move |it| it.targets().any(|(_, name, _)| name == service));
        naming.map(|it| &it.service)
    }
}

fn route(field: &str, it: &written::ProfileRoute, budget: BudgetSettings) -> Read<ProfileRoute> {
    if it.name.len() > MAX_NAME_BYTES {
        let reason = format!("longer than {MAX_NAME_BYTES} bytes");
        return Err(Fault::new(format!("{field}.name"), reason));
    }
    let mut left = MAX_CONDITIONS;
    let condition = condition(&format!("{field}.condition"), &it.condition, 0, &mut left)?;
    let classes = classes(&format!("{field}.responseClasses"), &it.response_classes)?;
    // What is good by its status is that whatever a call of gRPC says behind it.
    let is_good_at_once = classes.is_success(200) == Some(true);
    let retry = it.is_retryable.unwrap_or(false).then(|| Retry {
        http: ranges(|status| !classes.is_success(status).unwrap_or(status < 500)),
        grpc: match is_good_at_once {
            true => GrpcCodes::default(),
            // Unknown, deadline exceeded, internal, unavailable, data loss: what counts as a failure of gRPC.
            false => GrpcCodes::new([2, 4, 13, 14, 15]),
        },
        limit: RETRIES,
        budget,
        ..Retry::new()
    });
    let timeout = it.timeout.as_deref().filter(|it| !it.is_empty());
    let timeout = timeout.map(annotated_duration).transpose();
    let request = timeout.map_err(|reason| Fault::new(format!("{field}.timeout"), reason))?;
    Ok(ProfileRoute {
        name: it.name.clone(),
        condition,
        reliability: Reliability {
            timeouts: Timeouts {
                request: request.flatten(),
                ..Timeouts::default()
            },
            retry,
            heeds_headers: false,
        },
        classes: Some(classes)
            .filter(|it| *it != ResponseClasses::default())
            .map(Arc::new),
    })
}

fn condition(
    field: &str,
    it: &written::RequestMatch,
    depth: usize,
    left: &mut usize,
) -> Read<Condition> {
    if depth > MAX_DEPTH || *left == 0 {
        let reason =
            format!("more than {MAX_DEPTH} conditions in each other, or {MAX_CONDITIONS} in all");
        return Err(Fault::new(field, reason));
    }
    *left -= 1;
    let mut parts = vec![];
    for (name, list) in [("all", &it.all), ("any", &it.any)] {
        let Some(list) = list else { continue };
        let field = format!("{field}.{name}");
        few(&field, list.len(), MAX_CONDITIONS)?;
        let inner = list.iter().enumerate();
        let inner =
            inner.map(|(index, it)| condition(&format!("{field}[{index}]"), it, depth + 1, left));
        let inner = inner.collect::<Read<Vec<_>>>()?;
        parts.push(match name {
            "all" => Condition::All(inner),
            _ => Condition::Any(inner),
        });
    }
    if let Some(it) = &it.not {
        let inner = condition(&format!("{field}.not"), it, depth + 1, left)?;
        parts.push(Condition::Not(Box::new(inner)));
    }
    if let Some(text) = &it.method {
        let method: Result<Method, _> = text.parse();
        let method = method.map_err(|reason| Fault::new(format!("{field}.method"), reason))?;
        parts.push(Condition::Method(method));
    }
    if let Some(text) = &it.path_regex {
        let pattern = Pattern::new(text);
        let pattern = pattern.map_err(|reason| Fault::new(format!("{field}.pathRegex"), reason))?;
        parts.push(Condition::Path(pattern));
    }
    match parts.len() {
        0 => Err(Fault::new(field, "says nothing")),
        1 => Ok(parts.remove(0)),
        _ => Ok(Condition::All(parts)),
    }
}

/// What is said of each status: by the first class that means it.
fn classes(field: &str, classes: &[written::ResponseClass]) -> Read<ResponseClasses> {
    few(field, classes.len(), MAX_CLASSES)?;
    for (index, it) in classes.iter().enumerate() {
        let mut left = MAX_CONDITIONS;
        let field = format!("{field}[{index}].condition");
        check_response(&field, &it.condition, 0, &mut left)?;
    }
    let is_failure = |status: u16| {
        let class = classes.iter().find(|it| is_meant(&it.condition, status));
        class.map(|it| it.is_failure.unwrap_or(false))
    };
    Ok(ResponseClasses {
        failures: ranges(|status| is_failure(status) == Some(true)),
        successes: ranges(|status| is_failure(status) == Some(false)),
    })
}

/// The statuses that are in.
fn ranges(is_in: impl Fn(u16) -> bool) -> Vec<StatusRange> {
    let mut ranges: Vec<StatusRange> = vec![];
    for status in (100..600).filter(|it| is_in(*it)) {
        match ranges.last_mut() {
            Some(range) if range.last + 1 == status => range.last = status,
            _ => ranges.push(StatusRange {
                first: status,
                last: status,
            }),
        }
    }
    ranges
}

fn check_response(
    field: &str,
    it: &written::ResponseMatch,
    depth: usize,
    left: &mut usize,
) -> Read<()> {
    if depth > MAX_DEPTH || *left == 0 {
        let reason =
            format!("more than {MAX_DEPTH} conditions in each other, or {MAX_CONDITIONS} in all");
        return Err(Fault::new(field, reason));
    }
    *left -= 1;
    if *it == written::ResponseMatch::default() {
        return Err(Fault::new(field, "says nothing"));
    }
    for (name, list) in [("all", &it.all), ("any", &it.any)] {
        for (index, it) in list.iter().flatten().enumerate() {
            check_response(&format!("{field}.{name}[{index}]"), it, depth + 1, left)?;
        }
    }
    if let Some(it) = &it.not {
        check_response(&format!("{field}.not"), it, depth + 1, left)?;
    }
    if let Some(range) = &it.status {
        let (first, last) = (range.min.unwrap_or(100), range.max.unwrap_or(599));
        StatusRange::new(first, last)
            .map_err(|reason| Fault::new(format!("{field}.status"), reason))?;
    }
    Ok(())
}

fn is_meant(it: &written::ResponseMatch, status: u16) -> bool {
    let all = it.all.as_ref();
    let any = it.any.as_ref();
    let range = it.status.as_ref();
    all.is_none_or(|all| all.iter().all(|it| is_meant(it, status)))
        && any.is_none_or(|any| any.iter().any(|it| is_meant(it, status)))
        && it.not.as_ref().is_none_or(|it| !is_meant(it, status))
        && range.is_none_or(|it| {
            it.min.is_none_or(|min| min <= status) && it.max.is_none_or(|max| status <= max)
        })
}

fn budget(field: &str, it: &written::RetryBudget) -> Read<BudgetSettings> {
    if !(0.0..=1000.0).contains(&it.retry_ratio) {
        let reason = format!("{} is no number from 0 to 1000", it.retry_ratio);
        return Err(Fault::new(format!("{field}.retryRatio"), reason));
    }
    let ttl = annotated_duration(&it.ttl);
    let ttl = ttl.map_err(|reason| Fault::new(format!("{field}.ttl"), reason))?;
    let good = ttl.filter(|it| (1..=60).contains(&it.as_secs()));
    let ttl = good.ok_or_else(|| Fault::new(format!("{field}.ttl"), "not from 1 s to 60 s"))?;
    Ok(BudgetSettings {
        // At most a million.
        ratio_thousandths: (it.retry_ratio * 1000.0).round() as u32,
        per_second: it.min_retries_per_second,
        ttl,
    })
}

fn backend(field: &str, it: &written::WeightedDst) -> Read<Backend> {
    let authority = format!("{field}.authority");
    let (host, port) = it
        .authority
        .rsplit_once(':')
        .unwrap_or((&it.authority, "80"));
    let port = port.parse::<u16>().ok().filter(|it| *it != 0);
    let port = port.ok_or_else(|| Fault::new(&authority, "no port: 1 to 65535"))?;
    let name = service_named(&authority, host.trim_end_matches('.'))?;
    let text = match &it.weight {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let weight = thousandths(&text).filter(|it| *it <= 1_000_000_000);
    let reason = "no weight: a number, or one of thousandths such as 500m";
    let weight = weight.ok_or_else(|| Fault::new(format!("{field}.weight"), reason))?;
    Ok(Backend {
        weight,
        target: Target::Service { name, port },
        filters: vec![],
    })
}

/// A quantity of Kubernetes as far as weights need it: `1`, `0.5`, `500m`.
fn thousandths(text: &str) -> Option<u32> {
    if let Some(text) = text.strip_suffix('m') {
        return text.parse().ok();
    }
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = !part.is_empty() && part.len() <= 3 && part.bytes().all(|it| it.is_ascii_digit());
    let part: u32 = format!("{part:0<3}").parse().ok().filter(|_| digits)?;
    whole
        .parse::<u32>()
        .ok()?
        .checked_mul(1000)?
        .checked_add(part)
}

/// `name.namespace.svc.cluster.local`, whatever the domain is.
fn service_named(field: &str, text: &str) -> Read<ObjectName> {
    let mut labels = text.split('.');
    let (name, namespace, svc) = (labels.next(), labels.next(), labels.next());
    let (Some(name), Some(namespace), Some("svc")) = (name, namespace, svc) else {
        let reason = "no DNS name of a Service: name.namespace.svc.cluster.local";
        return Err(Fault::new(field, reason));
    };
    let read = |text: &str| text.parse::<Name>();
    match (read(namespace), read(name)) {
        (Ok(namespace), Ok(name)) => Ok(ObjectName { namespace, name }),
        (Err(reason), _) | (_, Err(reason)) => Err(Fault::new(field, reason)),
    }
}
