//! What becomes of a request where its client is: which rule it is, what that does to it, and how long it may take.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::LOCATION;
use serde_json::json;
use weft_core::route::{
    Backend, Filter, HeaderEdit, PathRewrite, Retry, RouteName, RouteTable, SelectedFlow,
    StatusRange, Target, Timeouts,
};
use weft_core::{EgressNetwork, Name};

use super::asked::{Asked, Request};
use super::outbound::MAX_SHOWN;
use super::{Explanation, Outcome, State};
use crate::balance::breaker::Standing;
use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::error::FlowError;
use crate::proxy::http::answer::ExchangeError;
use crate::proxy::http::deadlines::Late;
use crate::proxy::http::head;
use crate::proxy::http::outbound::Target as Wanted;
use crate::proxy::http::outbound::lead::{Goal, Going, Way, lead, said};
use crate::proxy::http::outbound::terms::Terms;

/// Who asks, and for what.
pub(super) struct Asking<'a> {
    pub(super) context: &'a Arc<Context>,
    pub(super) pod: &'a Arc<LocalPod>,
    pub(super) to: SocketAddr,
}

impl Explanation {
    /// What becomes of a request to a port of a Service; none: to an address.
    pub(super) async fn request(
        mut self,
        asking: &Asking<'_>,
        own: Option<Arc<ServicePortEntry>>,
        (asked, request): (&Asked, &Request),
    ) -> Self {
        let Asking { context, pod, to } = *asking;
        let mut head = request.head(&asked.to);
        let purpose = match head::accept(&mut head) {
            Ok(purpose) => purpose,
            Err(error) => return self.refused("request", error.to_string()),
        };
        let client = &pod.id.0.namespace;
        let wanted = own.map_or(Wanted::Address, Wanted::Service);
        let network = match &wanted {
            Wanted::Service(_) => None,
            Wanted::Address => context.store.egress(client, to),
        };
        let table = wanted.routes(network.as_ref(), to);
        let going = Going {
            context,
            pod,
            original: to,
            target: &wanted,
            choose: heaviest,
        };
        let came = head::line_and_headers(&head);
        let mut matched = None;
        let routes = (table.as_deref(), network.as_deref());
        let way = lead(&going, routes, &mut head, &mut matched);
        let passed_over = table.as_deref().map(|it| it.passed_over(client, &came));
        let passed_over = passed_over.into_iter().flatten().take(MAX_SHOWN);
        let passed_over: Vec<String> = passed_over.map(|it| format!("not {it}")).collect();
        match matched {
            Some(matched) => {
                let named = matched.rule.name.as_ref();
                let named = named.map_or(String::new(), |it| format!(" ({it})"));
                let number = matched.rule_index + 1;
                let fact = format!(
                    "{request} is rule {number}{named} of the {} {}",
                    matched.route.kind.as_str(),
                    matched.route.name
                );
                let step = self
                    .step("route", State::Ok, fact)
                    .by(object(matched.route));
                step.details = backends(context, &matched.rule.backends, to.ip());
                step.details.extend(passed_over);
                step.values(json!({
                    "route": matched.route, "rule": number, "rule_name": matched.rule.name,
                    "backends": matched.rule.backends,
                }));
            }
            None => {
                let routes = (table.as_deref(), network.as_deref());
                self.no_rule((context, routes), (client, to), (&way, passed_over));
            }
        }
        let led = match way {
            Err(error) => return self.not_led(&error),
            Ok(Way::Answered(answer)) => {
                let to = answer.headers.get(LOCATION);
                let to = to.map(|it| format!(" to {}", String::from_utf8_lossy(it.as_bytes())));
                let status = answer.status.as_u16();
                let fact = format!(
                    "its client is answered here with {status}{}",
                    to.unwrap_or_default()
                );
                let step = self.step("filters", State::Ok, fact);
                step.values(json!({ "status": status }));
                return self.end(Outcome::Answered);
            }
            Ok(Way::To(led)) => led,
        };
        let filters: Vec<&Filter> = led.filters.iter().copied().flatten().collect();
        if !filters.is_empty() {
            let fact = format!("{} filters are applied", filters.len());
            let step = self.step("filters", State::Ok, fact);
            step.details = filters.iter().map(|it| filter(it)).collect();
            step.values(json!({ "filters": filters }));
        }
        let said = said(&going, table.as_deref(), matched, &head);
        let is_grpc = head::is_grpc(&head.headers);
        let whole = (said.reliability, said.budget);
        let terms = Terms::of(whole, &mut head, is_grpc, purpose);
        let by = match (matched, &wanted) {
            (Some(matched), _) => Some(object(matched.route)),
            (None, Wanted::Service(port)) => {
                let profile = table.as_deref().and_then(|it| it.profile(client));
                let kind = profile.map_or("Service", |_| "ServiceProfile");
                Some(format!("{kind}/{}", port.service))
            }
            (None, Wanted::Address) => None,
        };
        self.terms(terms.as_ref(), by);
        self.going_on = Some(Request::going_on(&came, &head));
        match led.goal {
            Goal::Address(to) => self.way(context, pod, to, None).await,
            Goal::Port(port) => match self.endpoints(context, pod, &port, to.ip()) {
                Some(endpoint) => self.way(context, pod, endpoint, None).await,
                None => self.none_may_be_chosen(context, pod, &port, to.ip()).await,
            },
        }
    }

    /// No rule of requests is for it: what that means.
    fn no_rule(
        &mut self,
        (context, (table, network)): (&Context, (Option<&RouteTable>, Option<&EgressNetwork>)),
        (client, to): (&Name, SocketAddr),
        (way, mut passed_over): (&Result<Way<'_>, ExchangeError>, Vec<String>),
    ) {
        let flow = table.map(|it| it.select_flow(client, None));
        if let Some(SelectedFlow::Rule { route, rule, .. }) = flow {
            let fact = format!(
                "the {} {} is for all connections",
                route.kind.as_str(),
                route.name
            );
            let step = self.step("route", State::Ok, fact).by(object(route));
            step.details = backends(context, &rule.backends, to.ip());
            step.values(json!({ "route": route, "backends": rule.backends }));
            return;
        }
        let (state, fact) = match (way, network) {
            (Err(ExchangeError::NoRule), _) => (
                State::Error,
                "no rule of the Service's routes is for it: 404".to_owned(),
            ),
            (_, Some(network)) => {
                let name = &network.name().name;
                (
                    State::Ok,
                    format!("no route of the EgressNetwork {name} is for it"),
                )
            }
            (_, None) => (
                State::Ok,
                "no route: it goes where its client wants".to_owned(),
            ),
        };
        let profile = table.and_then(|it| it.profile(client));
        if let Some(profile) = profile.filter(|it| !it.backends.is_empty()) {
            passed_over.extend(backends(context, &profile.backends, to.ip()));
        }
        self.step("route", state, fact).details = passed_over;
    }

    /// It is led nowhere.
    fn not_led(mut self, error: &ExchangeError) -> Self {
        let (step, by) = match error {
            // The route's step has said so.
            ExchangeError::NoRule => return self.end(Outcome::Refused),
            ExchangeError::Filter => ("filters", None),
            ExchangeError::Flow(FlowError::EgressDenied(network)) => {
                ("egress", Some(format!("EgressNetwork/{}", network.name)))
            }
            _ => ("backend", None),
        };
        let status = error.status().as_u16();
        let fact = format!("{error}: {status}");
        let said = self.step(step, State::Error, fact);
        said.object = by;
        said.values(json!({ "status": status }));
        self.end(Outcome::Refused)
    }

    /// How long it may take, and when it is sent again.
    fn terms(&mut self, terms: Option<&Terms<'_>>, by: Option<String>) {
        let Some(terms) = terms else {
            let fact = "it may take as long as it does, and is sent once";
            self.step("terms", State::Ok, fact)
                .values(json!({ "timeouts": {}, "retry": null }));
            return;
        };
        let mut details = vec![];
        let whole = terms.end.map(|(end, late)| {
            let left = end.saturating_duration_since(tokio::time::Instant::now());
            let left = (left.as_secs_f64() * 1000.0).round() / 1000.0;
            let why = match late {
                Late::Client => ", as its client waits no longer",
                _ => "",
            };
            details.push(format!("all of it may take {left} s{why}"));
            left
        });
        let Timeouts {
            request: _,
            response,
            backend_request,
            idle,
        } = terms.timeouts;
        for (what, time) in [
            ("the response", response),
            ("each try", backend_request),
            ("a pause in it", idle),
        ] {
            if let Some(time) = time {
                details.push(format!("{what} may take {}", seconds(time)));
            }
        }
        details.extend(terms.retry.as_deref().map(retry));
        let count = match &terms.retry {
            Some(retry) => format!("up to {} times", u32::from(retry.limit) + 1),
            None => "once".to_owned(),
        };
        let fact = match whole {
            Some(whole) => format!("it may take {whole} s, and is sent {count}"),
            None => format!("it is sent {count}"),
        };
        let step = self.step("terms", State::Ok, fact);
        step.object = by;
        step.details = details;
        step.values(json!({
            "whole_seconds": whole, "timeouts": terms.timeouts, "retry": terms.retry.as_deref(),
        }));
    }
}

/// The one that is looked at of several: that of most weight, and of these the first.
pub(super) fn heaviest(backends: &[Backend]) -> Option<&Backend> {
    let weighted = backends.iter().filter(|it| it.weight > 0);
    weighted.rev().max_by_key(|it| it.weight)
}

/// Backends with how often each is chosen, and how many of its endpoints are ready.
pub(super) fn backends(context: &Context, backends: &[Backend], like: IpAddr) -> Vec<String> {
    let whole: u64 = backends.iter().map(|it| u64::from(it.weight)).sum();
    let backends = backends.iter().take(MAX_SHOWN);
    let shown = backends.map(|it| {
        let share = (u64::from(it.weight) * 100).checked_div(whole).unwrap_or(0);
        let weight = it.weight;
        format!(
            "weight {weight}, {share} %: {}",
            target(context, &it.target, like)
        )
    });
    shown.collect()
}

fn target(context: &Context, target: &Target, like: IpAddr) -> String {
    let (name, port) = match target {
        Target::Egress(name) => return format!("EgressNetwork {}", name.name),
        Target::Invalid(reason) => return format!("nowhere: {reason}"),
        Target::Service { name, port } => (name, *port),
    };
    let Some(entry) = context.store.service_port(name, port) else {
        return format!("Service {name}:{port}, which is not known");
    };
    let tries = entry.candidates(like);
    let standings = tries.standings(Instant::now());
    let ready = standings.iter().filter(|(_, it)| *it == Standing::Ready);
    let (ready, all) = (ready.count(), standings.len());
    format!("Service {name}:{port}, {ready} of {all} endpoints ready")
}

pub(super) fn object(route: &RouteName) -> String {
    format!("{}/{}", route.kind.as_str(), route.name)
}

/// What a filter does. Values of headers are not told: they may be tokens.
pub(super) fn filter(filter: &Filter) -> String {
    match filter {
        Filter::RequestHeaders(edit) => format!("changes its headers: {}", headers(edit)),
        Filter::ResponseHeaders(edit) => {
            format!("changes its response's headers: {}", headers(edit))
        }
        Filter::Redirect(redirect) => format!("redirects it with {}", redirect.status.as_u16()),
        Filter::Rewrite(rewrite) => {
            let host = rewrite
                .hostname
                .as_ref()
                .map(|it| format!("the host to {it}"));
            let path = rewrite.path.as_ref().map(|it| match it {
                PathRewrite::Full(path) => format!("the path to {path}"),
                PathRewrite::Prefix(prefix) => format!("the path's prefix to {prefix:?}"),
            });
            let both: Vec<String> = host.into_iter().chain(path).collect();
            format!("rewrites {}", both.join(", and "))
        }
        Filter::Mirror(mirror) => {
            let (part, whole) = (mirror.share.numerator(), mirror.share.denominator());
            let to = match &mirror.target {
                Target::Service { name, port } => format!("the Service {name}:{port}"),
                Target::Egress(name) => format!("the EgressNetwork {}", name.name),
                Target::Invalid(reason) => format!("nowhere ({reason})"),
            };
            format!("mirrors {part} of {whole} to {to}")
        }
        Filter::Invalid(reason) => format!("cannot be applied: {reason}"),
    }
}

fn headers(edit: &HeaderEdit) -> String {
    let removed = edit.removed().iter().map(|it| format!("removes {it}"));
    let set = edit.set().iter().map(|(it, _)| format!("sets {it}"));
    let added = edit.added().iter().map(|(it, _)| format!("adds {it}"));
    let all: Vec<String> = removed.chain(set).chain(added).collect();
    all.join(", ")
}

fn retry(retry: &Retry) -> String {
    let http = retry.http.iter().map(StatusRange::to_string);
    let grpc = retry.grpc.iter().map(|it| format!("gRPC {it}"));
    let failure = retry.on_failure.then(|| "a failed connection".to_owned());
    let late = retry.try_timeout;
    let late = late.map(|it| format!("no answer in {}", seconds(it)));
    let on: Vec<String> = http.chain(grpc).chain(failure).chain(late).collect();
    let budget = &retry.budget;
    format!(
        "it is sent again up to {} times, on {}; {} to {} later, within {} % of requests and {} per second",
        retry.limit,
        on.join(", "),
        seconds(retry.backoff.least),
        seconds(retry.backoff.most),
        f64::from(budget.ratio_thousandths) / 10.0,
        budget.per_second,
    )
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(name: &str, weight: u32) -> Backend {
        Backend {
            weight,
            target: Target::Invalid(name.to_owned()),
            filters: vec![],
        }
    }

    #[test]
    fn the_first_of_the_heaviest_is_looked_at() {
        let all = [backend("a", 1), backend("b", 9), backend("c", 9)];
        assert_eq!(heaviest(&all), Some(&all[1]));
        assert_eq!(heaviest(&[backend("none", 0)]), None);
    }

    #[test]
    fn filters_are_told_without_values() {
        let token = (
            "x-token".parse().expect("a name"),
            "secret".parse().expect("a value"),
        );
        let edit = HeaderEdit::new(vec![token], vec![], vec!["x-old".parse().expect("a name")]);
        let told = filter(&Filter::RequestHeaders(edit.expect("fine")));
        assert_eq!(told, "changes its headers: removes x-old, sets x-token");
    }

    #[test]
    fn retries_are_told_whole() {
        let told = retry(&Retry {
            http: StatusRange::list("503,500-502").expect("a list"),
            limit: 2,
            try_timeout: Some(Duration::from_millis(250)),
            on_failure: true,
            ..Retry::new()
        });
        let start = "it is sent again up to 2 times, on 503, 500-502, a failed connection, no answer in 0.25 s; ";
        assert!(told.starts_with(start), "{told}");
    }
}
