//! What a peer may send through `weft/1`: any bytes are read or refused, however they are cut, and
//! cutting changes nothing of what they say.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_agent::proxy::tunnel::weft1::frame::{BadFrame, Event, Parser, first_data};

fuzz_target!(|input: (bool, u8, &[u8])| {
    let (at_server, cut, bytes) = input;
    assert!(first_data(bytes).len() < bytes.len().max(1));
    let whole = said(at_server, bytes, bytes.len());
    let pieces = said(at_server, bytes, usize::from(cut));
    assert_eq!(whole, pieces);
    for event in whole.0 {
        if let Event::Open(open) = event {
            // What is understood of it, metadata included, is said and read again.
            let again = said(true, &open.encode(), bytes.len());
            assert_eq!(again, (vec![Event::Open(open)], None));
        }
    }
});

fn said(at_server: bool, bytes: &[u8], cut: usize) -> (Vec<Event>, Option<BadFrame>) {
    let mut parser = if at_server {
        Parser::server()
    } else {
        Parser::client()
    };
    if !at_server {
        parser.asked();
    }
    let mut events: Vec<Event> = Vec::new();
    for piece in bytes.chunks(cut.max(1)) {
        let mut rest = piece;
        loop {
            let step = match parser.read(rest) {
                Ok(step) => step,
                Err(error) => return (events, Some(error)),
            };
            rest = &rest[step.consumed..];
            match (step.event, events.last_mut()) {
                (None, _) => {
                    assert!(rest.is_empty());
                    break;
                }
                (Some(Event::Data(more)), Some(Event::Data(before))) => *before += more,
                (Some(event), _) => events.push(event),
            }
        }
    }
    (events, None)
}
