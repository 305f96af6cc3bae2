//! Frames by tables, and by whatever bytes.

use proptest::prelude::*;

use super::*;

/// All events of some bytes, cut as told.
fn events(parser: &mut Parser, bytes: &[u8], cut: usize) -> Result<Vec<Event>, BadFrame> {
    let mut events: Vec<Event> = Vec::new();
    for piece in bytes.chunks(cut.max(1)) {
        let mut rest = piece;
        loop {
            let step = parser.read(rest)?;
            rest = &rest[step.consumed..];
            match (step.event, events.last_mut()) {
                (None, _) => {
                    assert!(rest.is_empty(), "bytes are left and no event");
                    break;
                }
                (Some(Event::Data(more)), Some(Event::Data(before))) => *before += more,
                (Some(event), _) => events.push(event),
            }
        }
    }
    Ok(events)
}

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).expect("a port")
}

fn open() -> Open {
    Open {
        port: port(80),
        source_port: NonZeroU16::new(4711),
        opaque_by: None,
    }
}

fn data(bytes: &[u8]) -> Vec<u8> {
    [&data_head(bytes.len()), bytes].concat()
}

#[test]
fn a_flow_at_the_server_however_it_is_cut() {
    let flow = [
        &open().encode()[..],
        &data(b"hello"),
        &data(&[7; 300]),
        &END_FRAME,
    ]
    .concat();
    for cut in 1..flow.len() {
        let mut parser = Parser::server();
        let said = events(&mut parser, &flow, cut).expect("in order");
        let expected = [Event::Open(open()), Event::Data(305), Event::End];
        assert_eq!(said, expected, "cut {cut}");
        assert_eq!(parser.read(&flow), Err(BadFrame::Order(OPEN)), "too early");
        let mut parser = Parser::server();
        events(&mut parser, &flow, cut).expect("in order");
        parser.next_flow();
        events(&mut parser, &flow, cut).expect("the next flow");
    }
}

#[test]
fn a_flow_at_the_client() {
    let refusal = Refuse {
        status: 503,
        reason: "connect_refused".to_owned(),
    };
    let mut parser = Parser::client();
    assert_eq!(parser.read(&ACCEPT_FRAME), Err(BadFrame::Order(ACCEPT)));
    let mut parser = Parser::client();
    parser.asked();
    let said = events(&mut parser, &refusal.encode(), 3).expect("in order");
    assert_eq!(said, [Event::Refuse(refusal)]);
    parser.asked();
    let flow = [
        &ACCEPT_FRAME[..],
        &data(b"x"),
        &LEAVING_FRAME,
        &END_FRAME,
        &LEAVING_FRAME,
    ];
    let said = events(&mut parser, &flow.concat(), 5).expect("in order");
    let expected = [
        Event::Accept,
        Event::Data(1),
        Event::Leaving,
        Event::End,
        Event::Leaving,
    ];
    assert_eq!(said, expected);
    assert_eq!(parser.read(&data(b"x")), Err(BadFrame::Order(DATA)));
}

#[test]
fn what_must_not_be_is_refused() {
    let open = open().encode();
    let after_open = |bytes: &[u8]| [&open[..], bytes].concat();
    let cases: &[(&str, Vec<u8>, BadFrame)] = &[
        ("data before open", data(b"x"), BadFrame::Order(DATA)),
        (
            "an answer at the server",
            ACCEPT_FRAME.to_vec(),
            BadFrame::Order(ACCEPT),
        ),
        ("a second open", after_open(&open), BadFrame::Order(OPEN)),
        (
            "leaving of a client",
            after_open(&LEAVING_FRAME),
            BadFrame::Order(LEAVING),
        ),
        (
            "data after the end",
            after_open(&[&END_FRAME[..], &data(b"x")].concat()),
            BadFrame::Order(DATA),
        ),
        ("an unknown kind", vec![9, 0, 0, 0], BadFrame::Kind(9)),
        ("an unknown flag", vec![OPEN, 2, 0, 4], BadFrame::Flags(2)),
        (
            "the end of an open",
            vec![OPEN, 1, 0, 4],
            BadFrame::Flags(1),
        ),
        (
            "empty data",
            after_open(&[DATA, 0, 0, 0]),
            BadFrame::Length {
                kind: DATA,
                length: 0,
            },
        ),
        (
            "long data",
            after_open(&[DATA, 0, 0x3f, 0xfd]),
            BadFrame::Length {
                kind: DATA,
                length: 0x3ffd,
            },
        ),
        (
            "a long open",
            vec![OPEN, 0, 4, 1],
            BadFrame::Length {
                kind: OPEN,
                length: 1025,
            },
        ),
        (
            "port 0",
            vec![OPEN, 0, 0, 4, 0, 0, 1, 1],
            BadFrame::Payload(OPEN),
        ),
        (
            "a short open",
            vec![OPEN, 0, 0, 3, 0, 80, 0],
            BadFrame::Payload(OPEN),
        ),
        (
            "half a field",
            vec![OPEN, 0, 0, 9, 0, 80, 0, 1, 0, 1, 0, 2, 0],
            BadFrame::Payload(OPEN),
        ),
    ];
    for (name, bytes, error) in cases {
        let mut parser = Parser::server();
        let found = events(&mut parser, bytes, bytes.len());
        assert_eq!(found, Err(*error), "{name}");
    }
    for (name, payload) in [
        ("an unknown status", &[0, 200, 0][..]),
        ("a reason that is cut", &[1, 0xf7, 5, b'x']),
        ("a reason in capitals", &[1, 0xf7, 1, b'X']),
    ] {
        let mut parser = Parser::client();
        parser.asked();
        let frame = [&[REFUSE, 0, 0, payload.len() as u8], payload].concat();
        assert_eq!(
            parser.read(&frame),
            Err(BadFrame::Payload(REFUSE)),
            "{name}"
        );
    }
}

#[test]
fn what_comes_first_is_seen_without_being_read() {
    let frames = [data(b"one"), data(b"two")].concat();
    assert_eq!(first_data(&frames), b"one");
    assert_eq!(first_data(&frames[..6]), b"on");
    for other in [
        &ACCEPT_FRAME[..],
        &END_FRAME,
        &LEAVING_FRAME,
        &frames[..3],
        b"",
    ] {
        assert_eq!(first_data(other), b"");
    }
}

#[test]
fn unknown_metadata_is_ignored() {
    let frame = [OPEN, 0, 0, 11, 0, 80, 0, 0, 0xab, 0xcd, 0, 3, 1, 2, 3];
    let step = Parser::server().read(&frame).expect("reads");
    let expected = Open {
        port: port(80),
        source_port: None,
        opaque_by: None,
    };
    assert_eq!(step.event, Some(Event::Open(expected)));
}

/// The first counts; what is no claim, claims nothing.
#[test]
fn claims() {
    for (values, is) in [
        (&["db:5432"][..], Some("db:5432")),
        (&["db:5432", "web:80"], Some("db:5432")),
        (&["shop/db:5432"], None),
        (&["", "web:80"], None),
    ] {
        let mut frame = vec![OPEN, 0, 0, 4, 0, 80, 0, 0];
        for value in values {
            frame.extend([0, 1, 0, value.len() as u8]);
            frame.extend(value.as_bytes());
        }
        frame[3] = (frame.len() - HEAD_BYTES) as u8;
        let step = Parser::server().read(&frame).expect("reads");
        let Some(Event::Open(open)) = step.event else {
            panic!("{values:?} is not read as an open frame");
        };
        let claim = open.opaque_by.map(|it| it.to_string());
        assert_eq!(claim.as_deref(), is, "{values:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        cut in 1_usize..50,
        at_server: bool,
    ) {
        let mut parser = if at_server { Parser::server() } else { Parser::client() };
        if !at_server {
            parser.asked();
        }
        let _ = events(&mut parser, &bytes, cut);
    }

    #[test]
    fn what_is_cut_says_the_same(
        sizes in proptest::collection::vec(1_usize..3000, 0..5),
        cut in 1_usize..700,
        source in 0_u16..,
        to in 1_u16..,
        claim in proptest::option::of("[a-z]([a-z0-9.-]{0,200}[a-z0-9])?:[1-9][0-9]{0,3}"),
    ) {
        let opaque_by = claim.map(|it| it.parse().expect("a claim"));
        let open = Open { port: port(to), source_port: NonZeroU16::new(source), opaque_by };
        let mut bytes = open.encode();
        for size in &sizes {
            bytes.extend(data(&vec![1; *size]));
        }
        bytes.extend(END_FRAME);
        let said = events(&mut Parser::server(), &bytes, cut).expect("in order");
        let total: usize = sizes.iter().sum();
        let mut expected = vec![Event::Open(open)];
        if total > 0 {
            expected.push(Event::Data(total));
        }
        expected.push(Event::End);
        prop_assert_eq!(said, expected);
    }
}
