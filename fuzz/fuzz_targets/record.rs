//! What a peer may put into TLS records after the handshake of `weft/1`: it has the keys, so that
//! content, kind and padding are its own to choose. Any of it is opened or refused, never beyond the
//! record's bounds, and nothing that was not sealed is taken for data.
//!
//! The input is a sequence of records: a mode, a length (two bytes), so many bytes.
#![no_main]

use std::sync::LazyLock;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use libfuzzer_sys::fuzz_target;
use rustls::ConnectionTrafficSecrets;
use weft_agent::proxy::tunnel::weft1::record::{BadRecord, HEAD_BYTES, Opened, length};
use weft_fuzz::tls::Ends;

static ENDS: LazyLock<Ends> = LazyLock::new(Ends::new);

fuzz_target!(|bytes: &[u8]| {
    let _ = length(bytes);
    let (mut records, (mut sequence, secrets)) = ENDS.shake();
    let mut keys_changed = false;
    let mut rest = bytes;
    while let Some((&[mode, high, low], after)) = rest.split_first_chunk() {
        let count = usize::from(u16::from_be_bytes([high, low])).min(after.len());
        let (content, next) = after.split_at(count);
        rest = next;
        let sealed = seal(&secrets, sequence, content);
        let mut record = match mode {
            // As it is: nobody sealed it.
            0 => content.to_vec(),
            // Damaged in one place.
            1 => {
                let mut record = sealed;
                let place = content.len() % record.len();
                record[place] ^= 1;
                record
            }
            // The last byte is the kind, and zeros behind it are padding.
            _ => sealed,
        };
        let honest = mode > 1;
        let framed = length(&record);
        if framed != Ok(Some(record.len())) {
            // The caller shows whole records only.
            continue;
        }
        match records.open(&mut record) {
            Ok(Opened::Data(place)) => {
                assert!(honest && !keys_changed, "taken for data");
                assert!(place.start == HEAD_BYTES && place.end <= record.len());
                assert!(content.starts_with(&record[place]));
            }
            Ok(Opened::KeyUpdate { .. }) => {
                assert!(honest && !keys_changed);
                keys_changed = true;
            }
            Ok(Opened::Closed) => assert!(honest && !keys_changed),
            Err(BadRecord::Forged) => assert!(!honest || keys_changed),
            Err(_) => {}
        }
        // Whoever reads gives up at the first mistake; what follows one is opened all the same.
        sequence += 1;
    }
});

fn seal(keys: &ConnectionTrafficSecrets, sequence: u64, content: &[u8]) -> Vec<u8> {
    let (cipher, key, iv) = match keys {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
        _ => unreachable!("the server agrees on AES-GCM alone"),
    };
    let mut nonce: [u8; 12] = iv.as_ref().try_into().expect("12 bytes");
    for (byte, count) in nonce[4..].iter_mut().zip(sequence.to_be_bytes()) {
        *byte ^= count;
    }
    let [high, low] = ((content.len() + 16) as u16).to_be_bytes();
    let head = [23, 3, 3, high, low];
    let key = LessSafeKey::new(UnboundKey::new(cipher, key.as_ref()).expect("a key"));
    let mut text = content.to_vec();
    let nonce = Nonce::assume_unique_for_key(nonce);
    key.seal_in_place_append_tag(nonce, Aad::from(head), &mut text)
        .expect("seals");
    [&head[..], &text].concat()
}
