//! Tables of filters, and what they make of requests and responses.

use http::header::HOST;
use http::{HeaderName, HeaderValue, Response, StatusCode};
use proptest::prelude::*;

use super::head;
use crate::route::*;

const AT_ROOT: Place<'_> = Place {
    prefix: Some(""),
    port: 80,
};

fn pairs(list: &[(&str, &str)]) -> Vec<(HeaderName, HeaderValue)> {
    let pair = |(name, value): &(&str, &str)| {
        let name = name.parse().expect("a header");
        (name, HeaderValue::from_str(value).expect("a value"))
    };
    list.iter().map(pair).collect()
}

fn edit(
    set: &[(&str, &str)],
    add: &[(&str, &str)],
    remove: &[&str],
) -> Result<HeaderEdit, FilterError> {
    let remove = remove.iter().map(|it| it.parse().expect("a header"));
    HeaderEdit::new(pairs(set), pairs(add), remove.collect())
}

fn shown(headers: &http::HeaderMap) -> Vec<String> {
    let mut shown: Vec<String> = headers
        .iter()
        .map(|(name, it)| format!("{name}: {}", it.to_str().expect("text")))
        .collect();
    shown.sort();
    shown
}

#[test]
fn headers_are_set_added_and_removed() {
    let change = edit(
        &[("x-set", "new"), ("X-Set", "second"), ("x-more", "m")],
        &[("x-add", "2"), ("x-new", "n")],
        &["x-gone", "x-absent"],
    )
    .expect("allowed");
    let before = [
        ("x-set", "old"),
        ("x-set", "older"),
        ("x-add", "1"),
        ("x-gone", "g"),
        ("x-stays", "s"),
    ];
    let after = [
        "x-add: 1",
        "x-add: 2",
        "x-more: m",
        "x-new: n",
        "x-set: new",
        "x-stays: s",
    ];
    let filters = [Filter::RequestHeaders(change.clone())];
    let mut request = head("GET", "/", &before);
    assert!(apply_to_request(&filters, &mut request, AT_ROOT).is_none());
    assert_eq!(shown(&request.headers), after);
    let mut response = Response::builder();
    for (name, value) in before {
        response = response.header(name, value);
    }
    let mut response = response.body(()).expect("a response").into_parts().0;
    // Each filter touches its own direction only.
    apply_to_response(&filters, &mut response);
    assert_eq!(response.headers.len(), before.len());
    apply_to_response(&[Filter::ResponseHeaders(change)], &mut response);
    assert_eq!(shown(&response.headers), after);
}

#[test]
fn headers_that_frame_messages_are_not_for_routes() {
    for name in [
        "Content-Length",
        "transfer-encoding",
        "Connection",
        "te",
        "upgrade",
        "weft-port",
    ] {
        assert!(edit(&[(name, "1")], &[], &[]).is_err(), "set {name}");
        assert!(edit(&[], &[(name, "1")], &[]).is_err(), "add {name}");
        assert!(edit(&[], &[], &[name]).is_err(), "remove {name}");
    }
    assert!(edit(&[], &[("host", "a")], &[]).is_err());
    assert!(edit(&[], &[], &["host"]).is_err());
    assert!(edit(&[("host", "a")], &[], &[]).is_ok());
}

/// (prefix, replacement, path) -> path: the table of `HTTPPathModifier.replacePrefixMatch`, and more.
#[test]
fn prefixes_are_replaced() {
    for (prefix, replacement, path, expected) in [
        ("/foo", "/xyz", "/foo/bar", "/xyz/bar"),
        ("/foo", "/xyz/", "/foo/bar", "/xyz/bar"),
        ("/foo/", "/xyz", "/foo/bar", "/xyz/bar"),
        ("/foo/", "/xyz/", "/foo/bar", "/xyz/bar"),
        ("/foo", "/xyz", "/foo", "/xyz"),
        ("/foo", "/xyz", "/foo/", "/xyz/"),
        ("/foo", "", "/foo/bar", "/bar"),
        ("/foo", "", "/foo/", "/"),
        ("/foo", "", "/foo", "/"),
        ("/foo", "/", "/foo/", "/"),
        ("/foo", "/", "/foo", "/"),
        ("/foo", "/", "/foo/bar", "/bar"),
        ("/", "/xyz", "/bar", "/xyz/bar"),
        ("/", "/xyz", "/", "/xyz/"),
        ("/foo", "/xyz", "/foo/bar?a=/foo&b", "/xyz/bar?a=/foo&b"),
        ("/foo", "/foo", "/foo?a", "/foo?a"),
    ] {
        let rewrite = PathRewrite::prefix(replacement).expect("a path");
        let filters = [Filter::Rewrite(Rewrite {
            hostname: None,
            path: Some(rewrite),
        })];
        for uri in [path.to_owned(), format!("http://host:81{path}")] {
            let mut request = head("GET", &uri, &[]);
            let prefix = PathPrefix::new(prefix);
            let place = Place {
                prefix: Some(prefix.as_str()),
                port: 80,
            };
            assert!(apply_to_request(&filters, &mut request, place).is_none());
            let result = request.uri.path_and_query().expect("a path").as_str();
            assert_eq!(result, expected, "{prefix:?} {replacement} {uri}");
        }
    }
}

#[test]
fn what_cannot_be_rewritten_is_answered() {
    let by_prefix = Filter::Rewrite(Rewrite {
        hostname: None,
        path: Some(PathRewrite::prefix("/x").expect("a path")),
    });
    let nowhere = Place {
        prefix: None,
        port: 80,
    };
    let elsewhere = Place {
        prefix: Some("/other"),
        port: 80,
    };
    for (filter, uri, place) in [
        (by_prefix.clone(), "/a", nowhere),
        (by_prefix.clone(), "/a", elsewhere),
        (by_prefix, "*", AT_ROOT),
        (Filter::Invalid("unknown".to_owned()), "/a", AT_ROOT),
    ] {
        let mut request = head("GET", uri, &[]);
        let answer = apply_to_request(std::slice::from_ref(&filter), &mut request, place);
        let status = answer.map(|it| it.status);
        assert_eq!(
            status,
            Some(StatusCode::INTERNAL_SERVER_ERROR),
            "{filter:?} {uri}"
        );
    }
}

/// (uri, host header) -> the same after the host was rewritten
#[test]
fn hosts_are_rewritten_where_they_are() {
    let rewrite = Filter::Rewrite(Rewrite {
        hostname: Some(hostname("new.example").expect("a host")),
        path: Some(PathRewrite::full("/all").expect("a path")),
    });
    let set = Filter::RequestHeaders(edit(&[("host", "new.example")], &[], &[]).expect("allowed"));
    for (uri, host, uri_after, host_after) in [
        ("/a?b", Some("old:80"), "/a?b", Some("new.example")),
        ("/a", None, "/a", Some("new.example")),
        ("http://old:80/a", None, "http://new.example/a", None),
        (
            "http://old/a",
            Some("old"),
            "http://new.example/a",
            Some("new.example"),
        ),
    ] {
        let headers: Vec<_> = host.map(|it| ("host", it)).into_iter().collect();
        let mut request = head("GET", uri, &headers);
        assert!(apply_to_request(std::slice::from_ref(&rewrite), &mut request, AT_ROOT).is_none());
        let text = |request: &http::request::Parts| {
            let value = request.headers.get(HOST);
            value.map(|it| it.to_str().expect("text").to_owned())
        };
        let replaced = uri_after.replace("/a", "/all");
        assert_eq!(request.uri.to_string(), replaced);
        assert_eq!(text(&request).as_deref(), host_after, "{uri}");
        let mut request = head("GET", uri, &headers);
        assert!(apply_to_request(std::slice::from_ref(&set), &mut request, AT_ROOT).is_none());
        assert_eq!(request.uri.to_string(), uri_after);
        assert!(text(&request).is_some(), "a header was set");
    }
}

fn redirect() -> Redirect {
    Redirect {
        scheme: None,
        hostname: None,
        path: None,
        port: None,
        status: StatusCode::FOUND,
    }
}

/// (redirect, uri, host, port of the Service) -> location
#[test]
fn redirects() {
    let host = |it: &str| Some(hostname(it).expect("a host"));
    let full = |it: &str| Some(PathRewrite::full(it).expect("a path"));
    let https = Some(RedirectScheme::Https);
    for (redirect, uri, named, port, expected) in [
        (redirect(), "/a?b", Some("web"), 80, "http://web/a?b"),
        (
            redirect(),
            "/a",
            Some("web:8080"),
            8080,
            "http://web:8080/a",
        ),
        (
            redirect(),
            "http://web:8080/a",
            None,
            8080,
            "http://web:8080/a",
        ),
        (
            redirect(),
            "/a",
            Some("[fd00::1]:81"),
            81,
            "http://[fd00::1]:81/a",
        ),
        (redirect(), "/a", None, 80, "/a"),
        (
            Redirect {
                scheme: https,
                ..redirect()
            },
            "/a",
            Some("web:8080"),
            8080,
            "https://web/a",
        ),
        (
            Redirect {
                scheme: https,
                port: Some(8443),
                ..redirect()
            },
            "/a",
            Some("web"),
            80,
            "https://web:8443/a",
        ),
        (
            Redirect {
                scheme: https,
                port: Some(443),
                ..redirect()
            },
            "/a",
            Some("web"),
            80,
            "https://web/a",
        ),
        (
            Redirect {
                scheme: https,
                port: Some(80),
                ..redirect()
            },
            "/a",
            Some("web"),
            80,
            "https://web:80/a",
        ),
        (
            Redirect {
                port: Some(81),
                ..redirect()
            },
            "/a",
            Some("web"),
            80,
            "http://web:81/a",
        ),
        (
            Redirect {
                hostname: host("new"),
                ..redirect()
            },
            "/a",
            None,
            80,
            "http://new/a",
        ),
        (
            Redirect {
                path: full("/x"),
                ..redirect()
            },
            "/a?b=1",
            Some("web"),
            80,
            "http://web/x?b=1",
        ),
        (
            Redirect {
                path: Some(PathRewrite::prefix("/x").expect("a path")),
                ..redirect()
            },
            "/p/a",
            Some("web"),
            80,
            "http://web/x/a",
        ),
    ] {
        let headers: Vec<_> = named.map(|it| ("host", it)).into_iter().collect();
        let mut request = head("GET", uri, &headers);
        let place = Place {
            prefix: Some("/p").filter(|it| uri.starts_with(it)),
            port,
        };
        let filters = [
            Filter::Redirect(redirect.clone()),
            Filter::Invalid("later".to_owned()),
        ];
        let answer = apply_to_request(&filters, &mut request, place).expect("an answer");
        assert_eq!(answer.status, StatusCode::FOUND);
        assert_eq!(answer.headers["location"], expected, "{redirect:?} {uri}");
    }
    for status in [301, 302, 303, 307, 308] {
        assert!(Redirect::status(status).is_ok());
    }
    for status in [0, 200, 300, 304, 404] {
        assert!(Redirect::status(status).is_err());
    }
}

#[test]
fn what_filters_write_is_checked() {
    for bad in ["", "x", "/a?b", "/a#b", "/a b", "/ü", "*"] {
        assert!(PathRewrite::full(bad).is_err(), "{bad:?} was accepted");
        assert!(
            bad.is_empty() || PathRewrite::prefix(bad).is_err(),
            "{bad:?} was accepted"
        );
    }
    for good in ["/", "/a/b", "/a%20b"] {
        assert!(PathRewrite::full(good).is_ok(), "{good}");
    }
    for bad in ["", "a:80", "a@b", "a/b", "a b", "[fd00::1"] {
        assert!(hostname(bad).is_err(), "{bad:?} was accepted");
    }
    for good in ["a", "a.example.com", "10.0.0.1"] {
        assert!(hostname(good).is_ok(), "{good}");
    }
    assert!(Share::new(1, 0).is_err());
    assert!(Share::new(3, 2).is_err());
}

#[test]
fn shares() {
    let count = |share: Share| {
        let steps = 1000_u64;
        let drawn = (0..steps).filter(|it| share.includes(u64::MAX / steps * it));
        drawn.count()
    };
    for (numerator, denominator, expected) in [(0, 1, 0), (1, 1, 1000), (1, 4, 250), (42, 100, 420)]
    {
        let share = Share::new(numerator, denominator).expect("a share");
        assert!(
            count(share).abs_diff(expected) <= 1,
            "{numerator}/{denominator}"
        );
    }
    assert!(Share::ALL.includes(u64::MAX));
}

proptest! {
    #[test]
    fn any_request_is_changed_or_answered(
        path in "/[!-~]{0,16}",
        host in "[ -~]{0,12}",
        prefix in "/[a-c/]{0,4}",
        replacement in "(/[a-c/]{0,4})?",
    ) {
        let Ok(request) = http::Request::builder().uri(&path).header("host", &host).body(()) else {
            return Ok(());
        };
        let mut request = request.into_parts().0;
        let prefix = PathPrefix::new(&prefix);
        let place = Place { prefix: Some(prefix.as_str()), port: 80 };
        let rewrite = PathRewrite::prefix(&replacement).expect("a path");
        let filters = [
            Filter::Rewrite(Rewrite { hostname: hostname("new").ok(), path: Some(rewrite) }),
            Filter::Redirect(redirect()),
        ];
        let matched = prefix.rest_of(request.uri.path()).is_some();
        let answer = apply_to_request(&filters, &mut request, place).expect("an answer");
        prop_assert!(answer.status == StatusCode::FOUND || !matched);
    }
}

/// What is in force is shown to whoever helps: names of headers, and none of what they are set to or compared with.
#[test]
fn values_of_headers_are_not_shown() {
    let edit = edit(
        &[("authorization", "Bearer s3cret")],
        &[("x-key", "s3cret")],
        &["x-old"],
    );
    let text = |value: &str| TextMatch::Exact(value.to_owned());
    let conditions = HttpMatch {
        path: PathMatch::Exact("/".to_owned()),
        method: None,
        headers: vec![HeaderMatch {
            name: "x-token".parse().expect("a header"),
            value: text("s3cret"),
        }],
        query: vec![QueryMatch {
            name: "key".to_owned(),
            value: TextMatch::Regex(Pattern::new("s3cret.*").expect("a pattern")),
        }],
    };
    let shown = (Filter::RequestHeaders(edit.expect("an edit")), conditions);
    let shown = serde_json::to_string(&shown).expect("JSON");
    for name in [
        "authorization",
        "x-key",
        "x-old",
        "x-token",
        "\"exact\"",
        "\"regex\"",
    ] {
        assert!(shown.contains(name), "{name}: {shown}");
    }
    assert!(!shown.contains("s3cret"), "{shown}");
}
