//! What is sampled, and what is not.

use std::time::Duration;

use http::Request;
use weft_core::{Identity, Owner, WorkloadId};

use super::*;
use crate::telemetry::{Telemetry, TlsLabel};

fn spec() -> Spec {
    Spec {
        target: Scope {
            namespace: Some("shop".to_owned()),
            kind: Named::Owner("deployment".to_owned()),
            name: Some("web".to_owned()),
        },
        to: None,
        from: None,
        method: None,
        path_prefix: None,
        status: None,
        identity: None,
        max_per_second: 100,
    }
}

fn pod(name: &str, owner: &str) -> PodLabels {
    PodLabels {
        id: name.parse::<WorkloadId>().expect("valid"),
        owner: Some(Owner {
            kind: "deployment".parse().expect("valid"),
            name: owner.parse().expect("valid"),
        }),
    }
}

fn identity(account: &str) -> Identity {
    let id = format!("spiffe://td/ns/shop/sa/{account}");
    id.parse().expect("valid")
}

fn begin(direction: Direction) -> Begin {
    let request = Request::get("/orders/7?token=secret")
        .header("host", "api.shop:80")
        .body(())
        .expect("valid");
    Begin {
        protocol: Protocol::of(&request, false),
        direction,
        source: Who::pod(&pod("shop/web-1", "web"), &identity("web"), None),
        destination: Who::pod(&pod("shop/api-1", "api"), &identity("api"), None),
        service: Some(("shop/api".parse().expect("valid"), 80)),
        tls: TlsLabel::Mutual,
        asked: Some(Asked::of(&request)),
        route: None,
    }
}

/// The request of [`begin`], before anything is made of it.
fn glance(direction: Direction) -> Glance<'static> {
    Glance {
        direction,
        asked: Some(("GET", "/orders/7")),
    }
}

/// Begins to sample it.
fn sampled(watched: Watched<'_>, direction: Direction) -> Option<Box<Tapped>> {
    watched.begin(&glance(direction), || begin(direction))
}

/// What was told until now.
fn told(tapping: &mut Tapping) -> Vec<What> {
    std::iter::from_fn(|| tapping.events.try_recv().ok())
        .map(|it| it.what)
        .collect()
}

#[test]
fn while_nobody_watches_nothing_is_made_or_kept() {
    let telemetry = Telemetry::new();
    let taps = telemetry.taps();
    let pod = pod("shop/web-1", "web");
    assert!(taps.of(&pod).is_none());
    // Of other pods nothing is made either.
    let other = Spec {
        target: Scope {
            name: Some("api".to_owned()),
            ..spec().target
        },
        ..spec()
    };
    let mut tapping = taps.add(other).expect("room");
    assert!(taps.of(&pod).is_none());
    assert_eq!(taps.next.load(Ordering::Relaxed), 0);
    assert!(told(&mut tapping).is_empty());
    drop(tapping);
    assert_eq!(taps.count(), 0);
    assert_eq!(size_of::<Option<Box<Tapped>>>(), size_of::<usize>());
}

#[test]
fn an_exchange_is_told_from_its_beginning_to_its_end() {
    let telemetry = Telemetry::new();
    let taps = telemetry.taps();
    let mut tapping = taps.add(spec()).expect("room");
    let watched = taps.of(&pod("shop/web-1", "web")).expect("watched");
    let mut tapped = sampled(watched, Direction::Outbound).expect("wanted");
    tapped.request_bytes().fetch_add(3, Ordering::Relaxed);
    tapped.head(200);
    tapped.responds(5);
    tapped.end(End::default());
    let told = told(&mut tapping);
    let [What::Begin(begin), What::Head(200, _), What::End(end)] = &told[..] else {
        panic!("{told:?}");
    };
    let asked = begin.asked.as_ref().expect("a request");
    let shown = (
        asked.method.as_str(),
        asked.authority.as_str(),
        asked.path.as_str(),
    );
    assert_eq!(
        shown,
        ("GET", "api.shop:80", "/orders/7"),
        "without a query"
    );
    assert_eq!((end.request_bytes, end.response_bytes), (3, 5));
}

#[test]
fn only_what_is_wanted_is_told() {
    let scope = |kind: &str, name: &str| {
        Some(Scope {
            namespace: Some("shop".to_owned()),
            kind: match kind {
                "service" => Named::Service,
                "pod" => Named::Pod,
                "" => Named::Any,
                kind => Named::Owner(kind.to_owned()),
            },
            name: (!name.is_empty()).then(|| name.to_owned()),
        })
    };
    let text = |it: &str| Some(it.to_owned());
    let of = |change: &dyn Fn(&mut Spec)| {
        let mut spec = spec();
        change(&mut spec);
        let wants = |direction| spec.may_want(&glance(direction)) && spec.wants(&begin(direction));
        (wants(Direction::Outbound), wants(Direction::Inbound))
    };
    assert_eq!(of(&|_| {}), (true, true));
    for (kind, name, is) in [
        ("deployment", "api", true),
        ("deployment", "web", false),
        ("statefulset", "api", false),
        ("service", "api", true),
        ("service", "web", false),
        ("pod", "api-1", true),
        ("pod", "", true),
        ("", "", true),
    ] {
        let to = of(&|it| it.to = scope(kind, name));
        assert_eq!(to, (is, false), "{kind}/{name}");
    }
    let from = of(&|it| it.from = scope("deployment", "web"));
    assert_eq!(from, (false, true));
    assert_eq!(of(&|it| it.method = text("get")), (true, true));
    assert_eq!(of(&|it| it.method = text("POST")), (false, false));
    assert_eq!(of(&|it| it.path_prefix = text("/orders")), (true, true));
    assert_eq!(of(&|it| it.path_prefix = text("/carts")), (false, false));
    let api = text("spiffe://td/ns/shop/sa/api");
    assert_eq!(of(&|it| it.identity = api.clone()), (true, false));
    assert_eq!(of(&|it| it.identity = text("shop/web")), (false, true));
}

#[test]
fn what_is_chosen_by_its_status_is_told_when_it_has_one() {
    let telemetry = Telemetry::new();
    let taps = telemetry.taps();
    let failed = Spec {
        status: Some(500..=599),
        ..spec()
    };
    let mut tapping = taps.add(failed).expect("room");
    for (status, count) in [(200, 0), (503, 3)] {
        let watched = taps.of(&pod("shop/web-1", "web")).expect("watched");
        let mut tapped = sampled(watched, Direction::Outbound).expect("wanted");
        assert!(told(&mut tapping).is_empty());
        tapped.head(status);
        tapped.end(End::default());
        assert_eq!(told(&mut tapping).len(), count, "{status}");
    }
}

/// What costs is not done for what is not shown.
#[test]
fn of_what_nobody_sees_nothing_is_made() {
    let telemetry = Telemetry::new();
    let taps = telemetry.taps();
    let made = std::cell::Cell::new(0);
    let offer = |glance: Glance<'_>| {
        let watched = taps.of(&pod("shop/web-1", "web")).expect("watched");
        let begun = watched.begin(&glance, || {
            made.set(made.get() + 1);
            begin(glance.direction)
        });
        (begun.is_some(), made.take())
    };
    let one = Spec {
        method: Some("get".to_owned()),
        max_per_second: 1,
        ..spec()
    };
    let tapping = taps.add(one).expect("room");
    let posted = Glance {
        asked: Some(("POST", "/orders/7")),
        ..glance(Direction::Inbound)
    };
    assert_eq!(offer(posted), (false, 0));
    assert_eq!(offer(Glance::flow(Direction::Inbound)), (false, 0));
    assert_eq!(offer(glance(Direction::Inbound)), (true, 1));
    assert_eq!(offer(glance(Direction::Inbound)), (false, 0));
    assert_eq!(tapping.lost(), (0, 1));
    drop(tapping);
    // Who the ends are has to be looked up first; which way it goes has not.
    let from = Spec {
        from: Some(Scope::default()),
        ..spec()
    };
    let _tapping = taps.add(from).expect("room");
    assert_eq!(offer(glance(Direction::Outbound)), (false, 0));
    assert_eq!(offer(glance(Direction::Inbound)), (true, 1));
}

#[test]
fn what_is_too_much_is_left_out_and_counted() {
    let telemetry = Telemetry::new();
    let taps = telemetry.taps();
    let few = Spec {
        max_per_second: 3,
        ..spec()
    };
    let mut tapping = taps.add(few).expect("room");
    let now = Instant::now();
    let tap = Arc::clone(&tapping.tap);
    let in_a_second = |now| (0..10).filter(|_| tap.has_room(now)).count();
    assert_eq!(in_a_second(now), 3);
    assert_eq!(in_a_second(now + Duration::from_secs(1)), 3);
    assert_eq!(tapping.lost(), (0, 14));
    // Whoever does not listen loses what there is no room for, and nobody waits.
    let event = Event {
        id: 0,
        at: std::time::SystemTime::now(),
        what: What::End(End::default()),
    };
    for _ in 0..MOST_WAITING + 5 {
        tap.tell(event.clone());
    }
    assert_eq!(tapping.lost(), (5, 0));
    assert_eq!(told(&mut tapping).len(), MOST_WAITING);
    let others: Vec<_> = (1..MOST_TAPS)
        .map(|_| taps.add(spec()).expect("room"))
        .collect();
    assert_eq!(taps.add(spec()).err(), Some(TooManyTaps));
    drop(others);
    assert_eq!(taps.count(), 1);
}
