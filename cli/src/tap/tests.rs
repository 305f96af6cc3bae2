//! What each form looks like, for the same events.

use serde_json::Value;

use super::*;

/// What controllers tell: an exchange of HTTP, a call of gRPC that fails, a flow, and what no terminal is to see.
const LINES: &str = r#"
{"scope":{"pods":2,"nodes":["a","b"],"missing":[]}}
{"event":{"node":"a","id":7,"at_us":1796047512000250,"begin":{"protocol":"HTTP/1","direction":"outbound","source":{"address":"10.1.0.4:40000","namespace":"shop","pod":"web-1","owner":"deployment/web","identity":"spiffe://td/ns/shop/sa/web"},"destination":{"address":"10.1.1.5:8080","namespace":"shop","pod":"api-1","owner":"deployment/api","identity":"spiffe://td/ns/shop/sa/api"},"service":"shop/api:80","tls":"true","no_tls_reason":null,"method":"GET","authority":"api.shop","path":"/orders/7","route":"HTTPRoute/shop/api"}}}
{"event":{"node":"b","id":3,"at_us":1796047512000400,"begin":{"protocol":"gRPC","direction":"inbound","source":{"address":"[fd00::4]:40000","namespace":null,"pod":null,"owner":null,"identity":null},"destination":{"address":"[fd00::5]:9090","namespace":"shop","pod":"api-1","owner":null,"identity":"spiffe://td/ns/shop/sa/api"},"service":null,"tls":"no_identity","no_tls_reason":"plaintext","method":"POST","authority":"api\u001b[2J tls=true","path":"/shop.Orders/Get\u202e","route":null}}}
{"event":{"node":"a","id":7,"at_us":1796047512012750,"head":{"status":200,"latency_us":12500}}}
{"lost":{"node":"a","dropped":2,"left_out":0}}
{"event":{"node":"a","id":7,"at_us":1796047512012800,"end":{"duration_us":50,"request_bytes":0,"response_bytes":1234,"grpc_status":null,"error":null}}}
{"event":{"node":"b","id":3,"at_us":1796047512012900,"head":{"status":503,"latency_us":900}}}
{"event":{"node":"b","id":3,"at_us":1796047512013000,"end":{"duration_us":100,"request_bytes":5,"response_bytes":0,"grpc_status":"UNAVAILABLE","error":"FAIL_FAST"}}}
{"event":{"node":"a","id":8,"at_us":1796047513000000,"begin":{"protocol":"TCP","direction":"outbound","source":{"address":"10.1.0.4:40002","namespace":"shop","pod":"web-1","owner":"deployment/web","identity":"spiffe://td/ns/shop/sa/web"},"destination":{"address":"10.1.1.9:5432","namespace":null,"pod":null,"owner":null,"identity":null},"service":"shop/db:5432","tls":null,"no_tls_reason":null,"method":null,"authority":null,"path":null,"route":null}}}
{"event":{"node":"a","id":8,"at_us":1796047533000000,"end":{"duration_us":20000000,"request_bytes":10,"response_bytes":20,"grpc_status":null,"error":"denied: default:deny"}}}
{"event":{"node":"a","id":99,"at_us":1796047533000000,"head":{"status":200,"latency_us":1}}}
{"news":{"of":"a later version"}}
"#;

fn written(format: Format) -> String {
    let mut text = vec![];
    let mut writer = match Writer::begin(format, &mut text).expect("a vector") {
        Writer::Shown(_) => Writer::Shown(Box::new(Shown::new(format == Format::Wide, false))),
        writer => writer,
    };
    for line in LINES.lines().filter(|it| !it.is_empty()) {
        match Line::read(line.as_bytes()).expect("a line") {
            Line::Event(event) => writer.event(&mut text, &event).expect("a vector"),
            Line::Scope(_) | Line::Lost(_) | Line::Other => {}
            line => panic!("{line:?}"),
        }
    }
    writer.end(&mut text).expect("a vector");
    String::from_utf8(text).expect("text")
}

#[test]
fn a_line_is_written_for_each_part_of_an_exchange() {
    assert_eq!(
        written(Format::Line),
        "\
req id=0:7 proxy=out src=10.1.0.4:40000 dst=10.1.1.5:8080 tls=true :method=GET :authority=api.shop :path=/orders/7
req id=1:3 proxy=in src=[fd00::4]:40000 dst=[fd00::5]:9090 tls=no_identity :method=POST :authority=api\u{fffd}[2J\u{fffd}tls=true :path=/shop.Orders/Get\u{fffd}
rsp id=0:7 proxy=out src=10.1.0.4:40000 dst=10.1.1.5:8080 tls=true :status=200 latency=12ms
end id=0:7 proxy=out src=10.1.0.4:40000 dst=10.1.1.5:8080 tls=true duration=50µs request-length=0B response-length=1234B
rsp id=1:3 proxy=in src=[fd00::4]:40000 dst=[fd00::5]:9090 tls=no_identity :status=503 latency=900µs
end id=1:3 proxy=in src=[fd00::4]:40000 dst=[fd00::5]:9090 tls=no_identity duration=100µs request-length=5B response-length=0B grpc-status=UNAVAILABLE error=FAIL_FAST
tcp id=0:8 proxy=out src=10.1.0.4:40002 dst=10.1.1.9:5432 tls=not_connected
end id=0:8 proxy=out src=10.1.0.4:40002 dst=10.1.1.9:5432 tls=not_connected duration=20s request-length=10B response-length=20B error=denied:\u{fffd}default:deny
"
    );
}

#[test]
fn wide_lines_say_who_is_at_both_ends() {
    let text = written(Format::Wide);
    let first = text.lines().next().expect("a line");
    assert_eq!(
        first,
        "req id=0:7 proxy=out src=10.1.0.4:40000 dst=10.1.1.5:8080 tls=true protocol=HTTP/1 src_ns=shop src_pod=web-1 \
         src_res=deployment/web src_id=spiffe://td/ns/shop/sa/web dst_ns=shop dst_pod=api-1 dst_res=deployment/api \
         dst_id=spiffe://td/ns/shop/sa/api dst_svc=shop/api:80 rt=HTTPRoute/shop/api node=a :method=GET \
         :authority=api.shop :path=/orders/7"
    );
    assert_eq!(text.lines().count(), 8);
}

#[test]
fn json_is_what_was_told_and_moves_no_cursor() {
    let text = written(Format::Json);
    let events = LINES.lines().filter(|it| it.contains("\"event\""));
    let events = events.map(|it| serde_json::from_str::<Value>(it).expect("JSON")["event"].take());
    let shown = text
        .lines()
        .map(|it| serde_json::from_str(it).expect("JSON"));
    let shown: Vec<Value> = shown.collect();
    assert_eq!(shown, events.collect::<Vec<_>>());
    assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text}");
}

#[test]
fn an_archive_has_all_exchanges_that_have_ended() {
    let text = written(Format::Har);
    assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text}");
    let archive: Value = serde_json::from_str(&text).expect("JSON");
    let entries = archive["log"]["entries"].as_array().expect("entries");
    let [first, second] = &entries[..] else {
        panic!("{text}");
    };
    let expected = serde_json::json!({
        "startedDateTime": "2026-11-30T14:05:12.000250Z",
        "time": 12.55,
        "request": {
            "method": "GET", "url": "http://api.shop/orders/7", "httpVersion": "HTTP/1.1",
            "cookies": [], "headers": [], "queryString": [], "headersSize": -1, "bodySize": 0,
        },
        "response": {
            "status": 200, "statusText": "", "httpVersion": "HTTP/1.1",
            "cookies": [], "headers": [], "redirectURL": "", "headersSize": -1, "bodySize": 1234,
            "content": {"size": 1234, "mimeType": ""},
        },
        "cache": {},
        "timings": {"send": 0, "wait": 12.5, "receive": 0.05},
        "serverIPAddress": "10.1.1.5",
        "_node": "a", "_direction": "outbound", "_protocol": "HTTP/1",
        "_source": {"address": "10.1.0.4:40000", "namespace": "shop", "pod": "web-1", "owner": "deployment/web",
            "identity": "spiffe://td/ns/shop/sa/web"},
        "_destination": {"address": "10.1.1.5:8080", "namespace": "shop", "pod": "api-1", "owner": "deployment/api",
            "identity": "spiffe://td/ns/shop/sa/api"},
        "_service": "shop/api:80", "_route": "HTTPRoute/shop/api", "_tls": "true",
        "_grpcStatus": null, "_error": null,
    });
    assert_eq!(*first, expected);
    assert_eq!(second["_grpcStatus"], "UNAVAILABLE");
    assert_eq!(second["serverIPAddress"], "fd00::5");
    let mut nothing = vec![];
    let mut har = Har::begin(&mut nothing).expect("a vector");
    har.end(&mut nothing).expect("a vector");
    let nothing: Value = serde_json::from_slice(&nothing).expect("JSON");
    assert_eq!(nothing["log"]["entries"], serde_json::json!([]));
}

#[test]
fn what_is_watched_is_asked_for_by_namespace_kind_and_name() {
    use clap::Parser;
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        tap: Watch,
    }
    let asked = |line: &str| {
        let tap = Line::try_parse_from(line.split(' '))
            .map_err(|it| it.to_string())?
            .tap;
        let scope = ScopeArgs {
            namespace: tap.scope.namespace.clone().or(Some("own".to_owned())),
            ..tap.scope.clone()
        };
        let target = Target::of(&scope).map_err(|it| it.to_string())?;
        Ok::<_, String>((tap.query(&target), target.to_string()))
    };
    for (line, query, shown) in [
        ("tap", "namespace=own&max_rps=100", "the mesh in own"),
        ("tap -A", "max_rps=100", "the mesh in all namespaces"),
        (
            "tap deploy/web -n shop --to svc/api --status 5xx --max-rps 7",
            "namespace=shop&kind=deployment&name=web&to_namespace=shop&to_kind=service&to_name=api&status=5xx&max_rps=7",
            "deployment/web in shop",
        ),
        (
            "tap ns/shop --from pod/a-1 --from-namespace other --method GET --path /a",
            "namespace=shop&from_namespace=other&from_kind=pod&from_name=a-1&method=GET&path=%2Fa&max_rps=100",
            "the mesh in shop",
        ),
        (
            "tap sts",
            "namespace=own&kind=statefulset&max_rps=100",
            "any statefulset in own",
        ),
    ] {
        assert_eq!(
            asked(line),
            Ok((query.to_owned(), shown.to_owned())),
            "{line}"
        );
    }
    for bad in [
        "tap svc/web",
        "tap deploy/web -A",
        "tap --to deploy/a --from deploy/b",
        "tap --max-rps 0",
        "tap --to-namespace x",
    ] {
        assert!(asked(bad).is_err(), "{bad}");
    }
}
