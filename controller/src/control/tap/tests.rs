//! Who is told what.

use super::*;

fn name(text: &str) -> Name {
    text.parse().expect("valid")
}

#[test]
fn scopes_have_what_they_say() {
    let scope = |namespace: &str, kind: &str, name: &str| Scope {
        namespace: namespace.to_owned(),
        kind: kind.to_owned(),
        name: name.to_owned(),
    };
    let pod: WorkloadId = "shop/web-1".parse().expect("valid");
    let workload = Workload {
        id: pod.clone(),
        addresses: vec![],
        node: name("one"),
        owner: Some(weft_core::Owner {
            kind: name("deployment"),
            name: name("web"),
        }),
        mesh: weft_core::Mesh::Unmeshed,
        opaque_ports: None,
    };
    for (scope, has) in [
        (scope("", "", ""), true),
        (scope("shop", "", ""), true),
        (scope("other", "", ""), false),
        (scope("shop", "pod", "web-1"), true),
        (scope("shop", "pod", "web-2"), false),
        (scope("shop", "pod", ""), true),
        (scope("shop", "deployment", "web"), true),
        (scope("", "deployment", ""), true),
        (scope("shop", "deployment", "api"), false),
        (scope("shop", "statefulset", "web"), false),
    ] {
        assert_eq!(scope.has(&pod, || Some(workload.clone())), has, "{scope:?}");
    }
}

#[test]
fn whoever_does_not_read_loses_lines_and_nobody_waits() {
    let taps = Arc::new(Taps::new(Arc::default()));
    let (open, mut lines) = taps
        .open("a", Scope::default(), v1::TapStart::default())
        .expect("room");
    let batch = |count| v1::TapBatch {
        tap: open.id,
        events: (0..count)
            .map(|id| v1::TapEvent {
                id,
                at_us: 0,
                event: Some(v1::tap_event::Event::Head(v1::TapHead::default())),
            })
            .collect(),
        dropped: 0,
        left_out: 0,
    };
    let node = name("one");
    taps.pass(&node, batch(LINES_WAITING as u64 + 7));
    let mut count = 0;
    while lines.try_recv().is_ok() {
        count += 1;
    }
    assert_eq!(count, LINES_WAITING);
    // It is told as soon as there is room.
    taps.pass(&node, batch(0));
    let lost = lines.try_recv().expect("a line");
    let lost = std::str::from_utf8(&lost).expect("text");
    let expected = r#"{"lost":{"node":"one","dropped":7,"left_out":0}}"#;
    assert_eq!(lost.trim_end(), expected);
    let id = open.id;
    drop(open);
    taps.pass(
        &node,
        v1::TapBatch {
            tap: id,
            ..v1::TapBatch::default()
        },
    );
    assert_eq!(taps.count(), 0);
    let open = |by: &str| taps.open(by, Scope::default(), v1::TapStart::default());
    let of_one: Vec<_> = (0..MOST_OF_ONE).map(|_| open("a").expect("room")).collect();
    assert_eq!(open("a").err(), Some(TooManyTaps::OfOne));
    let rest = MOST_OF_ONE..MOST_TAPS;
    let others: Vec<_> = rest
        .map(|it| open(&it.to_string()).expect("room"))
        .collect();
    assert_eq!(open("b").err(), Some(TooManyTaps::Here));
    drop((of_one, others));
}

#[test]
fn an_agent_is_believed_about_its_own_pods() {
    let begin = |inbound, source: &str, destination: &str| {
        let who = |pod: &str| {
            Some(v1::TapWho {
                namespace: "shop".to_owned(),
                pod: pod.to_owned(),
                ..v1::TapWho::default()
            })
        };
        v1::TapEvent {
            event: Some(v1::tap_event::Event::Begin(v1::TapBegin {
                inbound,
                source: who(source),
                destination: who(destination),
                ..v1::TapBegin::default()
            })),
            ..v1::TapEvent::default()
        }
    };
    let node = name("one");
    let passes = |event| {
        let runs = |pod: &WorkloadId| pod.0.name.as_str() == "own";
        Line::event(&node, event, runs).is_some()
    };
    assert!(passes(begin(false, "own", "other")));
    assert!(passes(begin(true, "other", "own")));
    assert!(!passes(begin(true, "own", "other")));
    assert!(!passes(begin(false, "other", "own")));
    assert!(!passes(begin(false, "", "own")));
    assert!(!passes(v1::TapEvent::default()));
}
