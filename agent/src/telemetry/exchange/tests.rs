use http::StatusCode;
use weft_core::{AccessPolicy, DenyReason, Verdict};

use super::super::{Direction, PodLabels, Telemetry, TlsLabel};
use super::*;

fn pod(id: &str) -> PodLabels {
    PodLabels {
        id: id.parse().expect("valid"),
        owner: Some(weft_core::Owner {
            kind: "deployment".parse().expect("valid"),
            name: "web".parse().expect("valid"),
        }),
    }
}

fn inbound(id: &str) -> ExchangeLabels {
    ExchangeLabels {
        direction: Direction::Inbound,
        pod: pod(id),
        authority: Some(AuthorityLabel::Service {
            service: "shop/web".parse().expect("valid"),
            port: 80,
        }),
        service: None,
        destination: None,
        target_port: Some(8080),
        tls: TlsLabel::Mutual,
        client: Some(
            "spiffe://cluster.local/ns/shop/sa/curl"
                .parse()
                .expect("valid"),
        ),
        server: None,
        verdict: None,
        backend: None,
    }
}

fn outbound(id: &str, to: &str) -> ExchangeLabels {
    let service = || "shop/api".parse().expect("valid");
    ExchangeLabels {
        direction: Direction::Outbound,
        authority: None,
        service: Some(service()),
        destination: Some(DestinationLabels {
            id: to.parse().expect("valid"),
            owner: Some(weft_core::Owner {
                kind: "statefulset".parse().expect("valid"),
                name: "api".parse().expect("valid"),
            }),
        }),
        target_port: None,
        client: None,
        backend: Some(BackendLabels {
            parent: PortRef::service(service(), 80),
            route: http_route(),
            backend: PortRef::service("shop/api-v2".parse().expect("valid"), 8080),
        }),
        ..inbound(id)
    }
}

fn http_route() -> RouteRef {
    RouteRef::Resource {
        group: "gateway.networking.k8s.io",
        kind: "HTTPRoute",
        name: "shop/split".parse().expect("valid"),
    }
}

fn route(id: &str, route: RouteRef) -> RouteLabels {
    RouteLabels {
        pod: pod(id),
        parent: PortRef::service("shop/api".parse().expect("valid"), 80),
        route,
    }
}

/// One exchange, its moments in milliseconds from its beginning.
fn exchange(
    series: &Arc<ExchangeSeries>,
    head: Option<u16>,
    first_byte: Option<u64>,
    ended: Result<Option<&str>, ExchangeError>,
    end: u64,
) {
    let began = Instant::now();
    let at = |ms| began + Duration::from_millis(ms);
    let mut timer = ExchangeTimer::begin_at(Arc::clone(series), began);
    if let Some(status) = head {
        timer.respond(StatusCode::from_u16(status).expect("valid"), None);
    }
    if let Some(first_byte) = first_byte {
        timer.first_byte_at(at(first_byte));
    }
    let ended = ended.map(|it| GrpcStatus::parse(it?.as_bytes()));
    timer.end_at(ended, at(end));
}

fn has(text: &str, line: &str) {
    assert!(text.lines().any(|it| it == line), "{line}\n\n{text}");
}

const INBOUND: &str = "direction=\"inbound\",authority=\"web.shop.svc.cluster.local:80\",\
namespace=\"shop\",deployment=\"web\",pod=\"web-0\",target_port=\"8080\",tls=\"true\",\
client_id=\"spiffe://cluster.local/ns/shop/sa/curl\"";

#[test]
fn inbound_exchanges_are_encoded_as_prometheus_reads_them() {
    let telemetry = Telemetry::new();
    let series = telemetry.exchanges(inbound("shop/web-0"));
    exchange(&series, Some(200), Some(3), Ok(None), 40);
    exchange(&series, Some(200), None, Ok(Some("14")), 250);
    exchange(&series, Some(503), Some(1), Ok(None), 1);
    exchange(
        &series,
        Some(200),
        Some(60_000),
        Err(ExchangeError::Reset),
        60_001,
    );
    exchange(&series, None, None, Err(ExchangeError::Refused), 1);
    let text = telemetry.encode();
    has(&text, "# TYPE request counter");
    has(&text, "# TYPE response counter");
    has(&text, "# TYPE response_latency_ms histogram");
    has(&text, &format!("request_total{{{INBOUND}}} 5"));
    for (class, count) in [
        ("status_code=\"200\",classification=\"success\"", 1),
        (
            "status_code=\"200\",classification=\"failure\",grpc_status=\"14\"",
            1,
        ),
        ("status_code=\"503\",classification=\"failure\"", 1),
        (
            "status_code=\"200\",classification=\"failure\",error=\"RESET\"",
            1,
        ),
        ("classification=\"failure\",error=\"REFUSED\"", 1),
    ] {
        has(
            &text,
            &format!("response_total{{{INBOUND},{class}}} {count}"),
        );
    }
    let labels = format!("{INBOUND},status_code=\"200\"");
    for (bound, count) in [
        ("1.0", 0),
        ("2.0", 0),
        ("3.0", 1),
        ("200.0", 1),
        ("300.0", 2),
        ("50000.0", 2),
        ("+Inf", 3),
    ] {
        // The encoder writes the bound first.
        let either = [
            format!("response_latency_ms_bucket{{le=\"{bound}\",{labels}}} {count}"),
            format!("response_latency_ms_bucket{{{labels},le=\"{bound}\"}} {count}"),
        ];
        assert!(
            text.lines().any(|it| either.iter().any(|line| line == it)),
            "{bound}\n{text}"
        );
    }
    has(&text, &format!("response_latency_ms_count{{{labels}}} 3"));
    has(
        &text,
        &format!("response_latency_ms_sum{{{labels}}} 60253.0"),
    );
    // 26 buckets for each of two statuses; none for what had no response.
    assert_eq!(text.matches("response_latency_ms_bucket{").count(), 52);
    assert_eq!(text.matches("# TYPE response_latency_ms ").count(), 1);
    assert!(text.ends_with("# EOF\n"));
    assert!(!text.contains("weft_metrics_overflow"));
}

const POD: &str = "namespace=\"shop\",deployment=\"web\",pod=\"web-0\"";
const PARENT: &str = "parent_group=\"core\",parent_kind=\"Service\",parent_namespace=\"shop\",\
parent_name=\"api\",parent_port=\"80\",parent_section_name=\"\"";
const SPLIT: &str = "route_group=\"gateway.networking.k8s.io\",route_kind=\"HTTPRoute\",\
route_namespace=\"shop\",route_name=\"split\"";

#[test]
fn outbound_exchanges_are_counted_for_their_endpoint_and_their_backend() {
    let telemetry = Telemetry::new();
    let first = telemetry.exchanges(outbound("shop/web-0", "shop/api-0"));
    let second = telemetry.exchanges(outbound("shop/web-0", "shop/api-1"));
    exchange(&first, Some(200), Some(10), Ok(None), 20);
    exchange(&first, Some(200), Some(10), Ok(None), 20);
    exchange(&second, Some(500), Some(10), Ok(None), 300);
    let text = telemetry.encode();
    for (to, count) in [("api-0", 2), ("api-1", 1)] {
        has(
            &text,
            &format!(
                "request_total{{direction=\"outbound\",{POD},dst_namespace=\"shop\",dst_service=\"api\",\
                 dst_statefulset=\"api\",dst_pod=\"{to}\",tls=\"true\"}} {count}"
            ),
        );
    }
    let labels = format!(
        "{POD},{PARENT},{SPLIT},backend_group=\"core\",backend_kind=\"Service\",\
         backend_namespace=\"shop\",backend_name=\"api-v2\",backend_port=\"8080\",\
         backend_section_name=\"\""
    );
    let name = "outbound_http_route_backend";
    has(&text, &format!("{name}_requests_total{{{labels}}} 3"));
    has(
        &text,
        &format!("{name}_response_statuses_total{{{labels},http_status=\"200\"}} 2"),
    );
    has(
        &text,
        &format!("{name}_response_statuses_total{{{labels},http_status=\"500\"}} 1"),
    );
    has(
        &text,
        &format!("{name}_response_duration_seconds_count{{{labels}}} 3"),
    );
    has(
        &text,
        &format!("{name}_response_duration_seconds_sum{{{labels}}} 0.34"),
    );
}

#[test]
fn a_backend_is_timed_from_the_end_of_the_request() {
    let telemetry = Telemetry::new();
    let series = telemetry.exchanges(outbound("shop/web-0", "shop/api-0"));
    let began = Instant::now();
    let at = |ms| began + Duration::from_millis(ms);
    let mut timer = ExchangeTimer::begin_at(series, began);
    timer.request_ended(RequestEnd::At(at(700)));
    timer.respond(StatusCode::OK, None);
    timer.end_at(Ok(None), at(1000));
    let text = telemetry.encode();
    let sum = |name: &str| {
        let line = text.lines().find(|it| it.starts_with(name));
        let value = line.and_then(|it| it.rsplit_once(' ')).map(|it| it.1);
        value.expect("there").to_owned()
    };
    assert_eq!(
        sum("outbound_http_route_backend_response_duration_seconds_sum"),
        "0.3"
    );
    assert_eq!(sum("response_latency_ms_sum"), "1000.0");
}

#[test]
fn routes_count_what_clients_see() {
    let telemetry = Telemetry::new();
    let http = telemetry.route(route("shop/web-0", http_route()));
    exchange(&http, Some(301), None, Ok(None), 1);
    exchange(&http, Some(200), Some(1), Ok(Some("5")), 100);
    exchange(&http, Some(200), Some(1), Ok(None), 700);
    exchange(&http, None, None, Err(ExchangeError::FailFast), 3000);
    let grpc = telemetry.route(route("shop/web-0", RouteRef::Default("grpc")));
    exchange(&grpc, Some(200), None, Ok(Some("0")), 1);
    exchange(&grpc, Some(200), None, Ok(Some("14")), 1);
    exchange(&grpc, Some(200), None, Ok(None), 1);
    let text = telemetry.encode();
    let name = "outbound_http_route_request_statuses_total";
    let labels = format!("{POD},{PARENT},{SPLIT}");
    // Two outcomes that differ in what is not shown are one series.
    has(&text, &format!("{name}{{{labels},http_status=\"200\"}} 2"));
    has(&text, &format!("{name}{{{labels},http_status=\"301\"}} 1"));
    has(&text, &format!("{name}{{{labels},error=\"FAIL_FAST\"}} 1"));
    let duration = "outbound_http_route_request_duration_seconds";
    has(&text, &format!("{duration}_count{{{labels}}} 4"));
    has(&text, &format!("{duration}_sum{{{labels}}} 3.801"));
    let name = "outbound_grpc_route_request_statuses_total";
    let default =
        "route_group=\"\",route_kind=\"default\",route_namespace=\"\",route_name=\"grpc\"";
    for status in ["OK", "UNAVAILABLE", "UNKNOWN"] {
        has(
            &text,
            &format!("{name}{{{POD},{PARENT},{default},grpc_status=\"{status}\"}} 1"),
        );
    }
    assert!(!text.contains("request_total{"));
}

#[test]
fn what_is_dropped_counts_by_what_is_known() {
    let telemetry = Telemetry::new();
    let series = telemetry.exchanges(outbound("shop/web-0", "shop/api-0"));
    drop(series.begin());
    let mut timer = series.begin();
    timer.respond(StatusCode::OK, None);
    timer.first_byte();
    drop(timer);
    let mut timer = series.begin();
    timer.respond(StatusCode::OK, GrpcStatus::parse(b"13"));
    drop(timer);
    let text = telemetry.encode();
    let labels = format!(
        "direction=\"outbound\",{POD},dst_namespace=\"shop\",dst_service=\"api\",\
         dst_statefulset=\"api\",dst_pod=\"api-0\",tls=\"true\""
    );
    has(&text, &format!("request_total{{{labels}}} 3"));
    for ended in [
        "classification=\"failure\",error=\"CANCEL\"",
        "status_code=\"200\",classification=\"success\",error=\"CANCEL\"",
        "status_code=\"200\",classification=\"failure\",grpc_status=\"13\",error=\"CANCEL\"",
    ] {
        has(&text, &format!("response_total{{{labels},{ended}}} 1"));
    }
    let of_backend = [
        ("http_status=\"200\",error=\"CANCEL\"", 2),
        ("backend_section_name=\"\",error=\"CANCEL\"", 1),
    ];
    for (ended, count) in of_backend {
        assert!(text.contains(&format!("{ended}}} {count}")), "{text}");
    }
}

#[test]
fn what_is_answered_here_counts_by_its_status_and_says_why() {
    let telemetry = Telemetry::new();
    let series = telemetry.exchanges(inbound("shop/web-0"));
    let errors = telemetry.http_errors(Direction::Inbound, &pod("shop/web-0"));
    for (status, grpc, why, reason) in [
        (400, None, ExchangeError::Unknown, "bad_request"),
        (502, None, ExchangeError::Io, "server_failed"),
        (200, Some("7"), ExchangeError::Unknown, "denied"),
        (200, Some("14"), ExchangeError::FailFast, "no_endpoint"),
    ] {
        let grpc = grpc.and_then(|it: &str| GrpcStatus::parse(it.as_bytes()));
        let status = StatusCode::from_u16(status).expect("valid");
        series.begin().answer(status, grpc, why);
        errors.count(why, reason);
    }
    let text = telemetry.encode();
    has(&text, &format!("request_total{{{INBOUND}}} 4"));
    for class in [
        "status_code=\"400\",classification=\"success\",error=\"UNKNOWN\"",
        "status_code=\"502\",classification=\"failure\",error=\"IO\"",
        "status_code=\"200\",classification=\"success\",grpc_status=\"7\",error=\"UNKNOWN\"",
        "status_code=\"200\",classification=\"failure\",grpc_status=\"14\",error=\"FAIL_FAST\"",
    ] {
        has(&text, &format!("response_total{{{INBOUND},{class}}} 1"));
    }
    for (error, reason) in [
        ("unexpected", "bad_request"),
        ("i/o", "server_failed"),
        ("unexpected", "denied"),
        ("failfast", "no_endpoint"),
    ] {
        has(
            &text,
            &format!("inbound_http_errors_total{{{POD},error=\"{error}\",reason=\"{reason}\"}} 1"),
        );
    }
}

#[test]
fn a_response_that_ends_before_its_request_took_the_backend_no_time() {
    let telemetry = Telemetry::new();
    let series = telemetry.exchanges(outbound("shop/web-0", "shop/api-0"));
    let told = Arc::new(std::sync::OnceLock::new());
    let began = Instant::now();
    for end in [None, Some(100)] {
        if let Some(end) = end {
            told.set(began + Duration::from_millis(end)).expect("once");
        }
        let mut timer = ExchangeTimer::begin_at(Arc::clone(&series), began);
        timer.request_ended(RequestEnd::Told(Arc::clone(&told)));
        timer.respond(StatusCode::OK, None);
        timer.end_at(Ok(None), began + Duration::from_millis(500));
    }
    let text = telemetry.encode();
    let sum = "outbound_http_route_backend_response_duration_seconds_sum";
    let sum = text.lines().find(|it| it.starts_with(sum));
    assert!(sum.is_some_and(|it| it.ends_with(" 0.4")), "{sum:?}");
}

#[test]
fn status_codes_that_a_server_makes_up_are_few() {
    let telemetry = Telemetry::new();
    let series = telemetry.exchanges(inbound("shop/web-0"));
    for status in (200..300).chain([600, 999]) {
        exchange(&series, Some(status), None, Ok(None), 1);
    }
    let text = telemetry.encode();
    let statuses = text.lines().filter(|it| it.starts_with("response_total{"));
    assert_eq!(statuses.count(), 17);
    has(
        &text,
        &format!("response_total{{{INBOUND},status_code=\"other\",classification=\"success\"}} 86"),
    );
    // A latency and an outcome each.
    has(&text, &format!("weft_metrics_overflow_total{{{POD}}} 168"));
    let routed = telemetry.route(route("shop/web-0", http_route()));
    for status in (200..300).chain([600, 999]) {
        exchange(&routed, Some(status), None, Ok(None), 1);
    }
    exchange(&routed, Some(600), None, Err(ExchangeError::Reset), 1);
    exchange(&routed, Some(200), None, Err(ExchangeError::Reset), 1);
    let text = telemetry.encode();
    let name = "outbound_http_route_request_statuses_total";
    let statuses = text.lines().filter(|it| it.starts_with(name));
    let mut series: Vec<&str> = statuses
        .filter_map(|it| Some(it.rsplit_once(' ')?.0))
        .collect();
    series.sort_unstable();
    series.dedup();
    assert_eq!(series.len(), 49);
    assert_eq!(text.matches("http_status=\"other\"}").count(), 1);
}

#[test]
fn a_pod_has_so_many_series_and_others_have_theirs() {
    let telemetry = Telemetry::new();
    let series: Vec<_> = (0..MOST_SERIES_PER_POD + 10)
        .map(|number| {
            let labels = ExchangeLabels {
                backend: None,
                ..outbound("shop/web-0", &format!("shop/api-{number}"))
            };
            telemetry.exchanges(labels)
        })
        .collect();
    for series in &series {
        drop(series.begin());
    }
    exchange(
        &telemetry.exchanges(outbound("shop/web-1", "shop/api-0")),
        Some(200),
        None,
        Ok(None),
        1,
    );
    let routed = telemetry.route(route("shop/web-0", http_route()));
    exchange(&routed, Some(200), None, Ok(None), 1);
    let text = telemetry.encode();
    has(
        &text,
        &format!(
            "request_total{{direction=\"outbound\",authority=\"overflow\",{POD},tls=\"true\"}} 10"
        ),
    );
    has(&text, &format!("weft_metrics_overflow_total{{{POD}}} 11"));
    has(
        &text,
        &format!(
            "outbound_http_route_request_statuses_total{{{POD},route_name=\"overflow\",http_status=\"200\"}} 1"
        ),
    );
    let of_pod = |name: &str| {
        let labels = format!("pod=\"{name}\"");
        let lines = text.lines().filter(|it| it.starts_with("request_total{"));
        lines.filter(|it| it.contains(&labels)).count()
    };
    assert_eq!(of_pod("web-0"), MOST_SERIES_PER_POD + 1);
    assert_eq!(of_pod("web-1"), 1);
    // One that is there is found all the same.
    let known = ExchangeLabels {
        backend: None,
        ..outbound("shop/web-0", "shop/api-3")
    };
    drop(telemetry.exchanges(known).begin());
    assert!(
        telemetry
            .encode()
            .contains("dst_pod=\"api-3\",tls=\"true\"} 2")
    );
}

#[test]
fn series_go_with_their_pod_with_what_they_are_about_and_when_idle() {
    let exchanges = Exchanges::default();
    let held = exchanges.exchanges(outbound("shop/web-0", "shop/api-0"));
    drop(exchanges.exchanges(outbound("shop/web-0", "shop/api-1")));
    drop(exchanges.exchanges(outbound("shop/web-0", "shop/api-2")));
    drop(exchanges.route(route("shop/web-0", http_route())));
    let count = || {
        let pod = exchanges.pod(&pod("shop/web-0"));
        let maps = pod.maps.read().expect("whole");
        (maps.exchanges.len(), maps.routes.len(), maps.backends.len())
    };
    assert_eq!(count(), (3, 1, 1));
    let now = Instant::now();
    let exists = |id: &WorkloadId| id.0.name.as_str() == "api-1";
    exchanges.forget_unused(exists, now);
    assert_eq!(count(), (2, 1, 1));
    // What moved is idle from then on only.
    drop(exchanges.route(route("shop/web-0", http_route())).begin());
    exchanges.forget_unused(exists, now + KEEP_IDLE);
    assert_eq!(count(), (1, 1, 1));
    drop(held);
    exchanges.forget_unused(|_| true, now + 2 * KEEP_IDLE);
    assert_eq!(count(), (0, 0, 0));
    drop(exchanges.exchanges(outbound("shop/web-0", "shop/api-1")));
    exchanges.forget_pod(&"shop/web-0".parse().expect("valid"));
    assert!(exchanges.pods.read().expect("whole").is_empty());
}

#[test]
fn decisions_about_requests_name_what_decided_and_the_route() {
    let telemetry = Telemetry::new();
    let name = |name: &str| weft_core::ServerName {
        group: weft_core::PolicyGroup::Weft,
        name: name.parse().expect("valid"),
    };
    let labels = |verdict: &Verdict| {
        let client = "spiffe://cluster.local/ns/shop/sa/curl";
        let client = Some(client.parse().expect("valid"));
        AuthzLabels::new(pod("shop/web-0"), 8080, TlsLabel::Mutual, client, verdict)
    };
    let allowed = Verdict::Allow {
        server: Some(name("shop/web")),
        authorization: Some(weft_core::AuthorizationName {
            group: weft_core::PolicyGroup::Weft,
            name: "shop/callers".parse().expect("valid"),
        }),
        policy: None,
    };
    let by_default = Verdict::Deny {
        server: None,
        reason: DenyReason::Policy(AccessPolicy::AllAuthenticated),
    };
    let handle = telemetry.http_authz(labels(&allowed), http_route());
    handle.count();
    handle.count();
    telemetry
        .http_authz(labels(&by_default), RouteRef::Default("default"))
        .count();
    let text = telemetry.encode();
    let client = "tls=\"true\",client_id=\"spiffe://cluster.local/ns/shop/sa/curl\"";
    has(
        &text,
        &format!(
            "inbound_http_authz_allow_total{{direction=\"inbound\",{POD},target_port=\"8080\",{client},\
             srv_group=\"policy.weft.dev\",srv_kind=\"server\",srv_name=\"web\",srv_port=\"8080\",{SPLIT},\
             authz_group=\"policy.weft.dev\",authz_kind=\"authorizationpolicy\",authz_name=\"callers\"}} 2"
        ),
    );
    has(
        &text,
        &format!(
            "inbound_http_authz_deny_total{{direction=\"inbound\",{POD},{client},srv_group=\"\",\
             srv_kind=\"default\",srv_name=\"all-authenticated\",route_group=\"\",route_kind=\"default\",\
             route_namespace=\"\",route_name=\"default\",authz_group=\"\",authz_kind=\"default\",\
             authz_name=\"default:all-authenticated\"}} 1"
        ),
    );
}

/// All that comes from a network, ten thousand of each: hosts (all of them known, which is the worst), statuses,
/// and statuses of gRPC. Methods and paths are in no label.
#[test]
fn what_others_write_makes_few_series() {
    let telemetry = Telemetry::new();
    let pod_id = "shop/web-0".parse().expect("valid");
    let namespace = "shop".parse().expect("valid");
    let scope = HostScope {
        namespace: &namespace,
        pod: &pod_id,
        port: 8080,
        is_known: |_: &weft_core::ObjectName, _| true,
        is_own: |_| true,
    };
    for number in 0..10_000_u32 {
        let host = format!("service-{number}.shop:{}", number % 100);
        let series = telemetry.exchanges(ExchangeLabels {
            authority: Some(AuthorityLabel::of_host(host.as_bytes(), &scope)),
            ..inbound("shop/web-0")
        });
        let mut timer = series.begin();
        // There are no others: 100 to 999.
        let status = u16::try_from(100 + number % 900).expect("small");
        let in_headers = GrpcStatus::parse(number.to_string().as_bytes());
        timer.respond(
            StatusCode::from_u16(status).expect("valid"),
            in_headers.filter(|_| number % 2 == 0),
        );
        timer.end(Ok(GrpcStatus::parse(
            (number / 3 % 100).to_string().as_bytes(),
        )));
    }
    let text = telemetry.encode();
    let lines = |name: &str| text.lines().filter(|it| it.starts_with(name)).count();
    // So many names, what is too many, and nothing else.
    assert_eq!(lines("request_total{"), 64 + 1);
    let of_overflow = text
        .lines()
        .filter(|it| it.starts_with("response_total{") && it.contains("authority=\"overflow\""));
    // At most 16 statuses, and the others; with each success, failure, and 18 statuses of gRPC.
    let of_overflow = of_overflow.count();
    assert!(of_overflow <= 17 * 20, "{of_overflow}");
    assert!(lines("response_total{") <= 64 + 17 * 20);
    assert!(!text.contains("service-9999"));
    let overflow = text
        .lines()
        .find(|it| it.starts_with("weft_metrics_overflow_total"));
    let overflow = overflow.and_then(|it| it.rsplit_once(' ')?.1.parse::<u64>().ok());
    assert!(overflow.is_some_and(|it| it >= 10_000 - 64), "{overflow:?}");
}

/// Names of services that are gone make room for others.
#[test]
fn authorities_are_forgotten_with_their_series() {
    let exchanges = Exchanges::default();
    let of = |number: usize| ExchangeLabels {
        authority: Some(AuthorityLabel::Service {
            service: format!("shop/service-{number}").parse().expect("valid"),
            port: 80,
        }),
        ..inbound("shop/web-0")
    };
    for number in 0..100 {
        drop(exchanges.exchanges(of(number)));
    }
    let count = || {
        let pods = exchanges.pods.read().expect("whole");
        let pod = pods.values().next().expect("there");
        pod.authorities.lock().expect("whole").len()
    };
    assert_eq!(count(), 64);
    let held = exchanges.exchanges(of(3));
    exchanges.forget_unused(|_| true, Instant::now() + KEEP_IDLE * 2);
    exchanges.forget_unused(|_| true, Instant::now() + KEEP_IDLE * 4);
    assert_eq!(count(), 1);
    drop(held);
}
