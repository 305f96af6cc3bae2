//! What a client may send as HTTP/1: any bytes are looked at, nothing but lone line feeds is changed, and cutting
//! changes nothing of what is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_agent::proxy::http::lines::{Lines, Switching};

fuzz_target!(|input: (u8, bool, &[u8])| {
    let (piece, declined, bytes) = input;
    let switching = match declined {
        true => Switching::Declined,
        false => Switching::Done,
    };
    let look = |piece: usize| {
        let mut looked = bytes.to_vec();
        let mut lines = Lines::default();
        for piece in looked.chunks_mut(piece) {
            lines.look(piece, || switching);
        }
        looked
    };
    let whole = look(bytes.len().max(1));
    for (before, after) in bytes.iter().zip(&whole) {
        assert!(before == after || (*before == b'\n' && *after == 0));
    }
    // What comes at once with a request that asks for something else is not waited for.
    if !declined {
        assert_eq!(look(usize::from(piece).max(1)), whole);
    }
});
