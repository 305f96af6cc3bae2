use super::*;
use crate::metrics::Scrape;
use crate::view::{Recent, Said};

const NOW: &str = r#"
tcp_open_connections{direction="inbound",peer="src",namespace="shop",deployment="web",pod="web-1"} 3
"#;
const GROWN: &str = r#"
response_total{direction="inbound",namespace="shop",deployment="web",pod="web-1",classification="success"} 90
response_total{direction="inbound",namespace="shop",deployment="web",pod="web-1",classification="failure"} 5
response_total{direction="inbound",namespace="shop",deployment="web",pod="web-2",classification="success"} 5
response_total{direction="outbound",namespace="shop",deployment="web",pod="web-1",classification="failure"} 50
response_latency_ms_bucket{direction="inbound",namespace="shop",deployment="web",pod="web-1",le="10.0"} 50
response_latency_ms_bucket{direction="inbound",namespace="shop",deployment="web",pod="web-1",le="100.0"} 100
response_latency_ms_bucket{direction="inbound",namespace="shop",deployment="web",pod="web-1",le="+Inf"} 100
tcp_read_bytes_total{direction="inbound",peer="src",namespace="shop",deployment="web",pod="web-1"} 20480
tcp_read_bytes_total{direction="inbound",peer="dst",namespace="shop",deployment="web",pod="web-1"} 777777
outbound_http_route_request_statuses_total{namespace="shop",deployment="web",pod="web-1",PARENT,http_status="200",error=""} 40
outbound_http_route_request_statuses_total{namespace="shop",deployment="web",pod="web-1",PARENT,error="REQUEST_TIMEOUT"} 5
outbound_grpc_route_retry_requests_total{namespace="shop",deployment="web",pod="web-1",PARENT} 20
"#;
const PARENT: &str =
    r#"parent_kind="Service",parent_namespace="shop",parent_name="db",parent_port="80""#;
const PODS: &str = r#"[
{"namespace": "shop", "name": "web-1", "state": "enrolled", "identity": "spiffe://td/ns/shop/sa/web", "owner": {"kind": "deployment", "name": "web"}},
{"namespace": "shop", "name": "web-2", "state": "waiting", "identity": null, "owner": {"kind": "deployment", "name": "web"}},
{"namespace": "shop", "name": "idle", "state": "enrolled", "identity": "spiffe://td/ns/shop/sa/idle", "owner": null},
{"namespace": "other", "name": "x", "state": "enrolled", "identity": "spiffe://td/ns/other/sa/x", "owner": null}
]"#;

fn view() -> View {
    View {
        said: vec![Said {
            node: "one".to_owned(),
            scrape: Scrape::read(NOW, |_| true),
            recent: Recent::default(),
            pods: serde_json::from_str(PODS).expect("pods"),
        }],
        missing: vec![],
    }
}

fn report(direction: Direction) -> Report {
    let scope = ScopeArgs {
        resource: None,
        namespace: Some("shop".to_owned()),
        all_namespaces: false,
    };
    let change = Change::grown(&GROWN.replace("PARENT", PARENT), 10.0);
    Report::new(&view(), &change, &scope, direction)
}

#[test]
fn what_grew_is_shown_by_workload() {
    let report = report(Direction::Inbound);
    let mut text = vec![];
    report.write(&mut text, false).expect("a vector");
    let text = String::from_utf8(text).expect("text");
    assert_eq!(
        text,
        "NAMESPACE   NAME             MESHED   SUCCESS    RPS      P50      P95      P99   TCP    READ/S   WRITTEN/S\n\
         shop        deployment/web      1/2    95.00%   10.0   10.0ms   91.0ms   98.2ms     3   2.0 KiB         0 B\n\
         shop        pod/idle            1/1         -    0.0        -        -        -     0       0 B         0 B\n"
    );
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!(json["window_seconds"], 10.0);
    assert_eq!(json["rows"][0]["success_rate"], 0.95);
    assert_eq!(json["rows"][1]["success_rate"], serde_json::Value::Null);
    assert_eq!(
        json["rows"][0]["retries_per_second"],
        serde_json::Value::Null
    );
}

#[test]
fn what_workloads_ask_of_others_has_retries_and_timeouts() {
    let report = report(Direction::Outbound);
    let mut text = vec![];
    report.write(&mut text, false).expect("a vector");
    let text = String::from_utf8(text).expect("text");
    assert_eq!(
        text,
        "NAMESPACE   NAME             MESHED   SUCCESS   RPS   P50   P95   P99   TIMEOUTS/S   RETRIES/S   TCP   READ/S   WRITTEN/S\n\
         shop        deployment/web      1/2     0.00%   5.0     -     -     -          0.5         2.0     0      0 B         0 B\n\
         shop        pod/idle            1/1         -   0.0     -     -     -          0.0         0.0     0      0 B         0 B\n"
    );
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!(json["rows"][0]["retries_per_second"], 2.0);
    assert_eq!(json["rows"][0]["timeouts_per_second"], 0.5);
}
