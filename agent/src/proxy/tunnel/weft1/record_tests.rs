//! Against rustls as the other side, and against a peer that holds the keys and means ill.

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::identity::testing::{Authority, WEB, weft_configs};
use crate::proxy::tcp::tests::{pair, soon};
use crate::proxy::tunnel::weft1::handshake;

fn name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into())
}

/// rustls as the client, our records as the server, and the server's socket.
async fn with_rustls() -> (TlsStream<TcpStream>, Records, TcpStream) {
    let (client, config) = weft_configs(&Authority::new(), WEB);
    let (near, mut far) = pair().await;
    let serving = tokio::spawn(async move {
        let greeted = handshake::accept(config, &mut far).await.expect("greets");
        assert!(greeted.early.is_empty());
        (greeted.records, far)
    });
    let connector = tokio_rustls::TlsConnector::from(client);
    let tls = soon(connector.connect(name(), near)).await.expect("greets");
    let (records, far) = soon(serving).await.expect("no panic");
    (tls, records, far)
}

/// Our records on both sides: the client's may seal what an honest client would not.
async fn with_ourselves() -> (Records, Records) {
    let (client, config) = weft_configs(&Authority::new(), WEB);
    let (mut near, mut far) = pair().await;
    let serving =
        tokio::spawn(async move { handshake::accept(config, &mut far).await.expect("greets") });
    let greeted = soon(handshake::connect(client, name(), &mut near)).await;
    let serving = soon(serving).await.expect("no panic");
    (greeted.expect("greets").records, serving.records)
}

async fn next_record(socket: &mut TcpStream) -> Vec<u8> {
    let mut record = vec![0; HEAD_BYTES];
    soon(socket.read_exact(&mut record)).await.expect("reads");
    let all = length(&record).expect("a record").expect("its head");
    record.resize(all, 0);
    soon(socket.read_exact(&mut record[HEAD_BYTES..]))
        .await
        .expect("reads");
    record
}

/// A whole record of this kind and text.
fn sealed(records: &mut Records, kind: u8, text: &[u8]) -> Vec<u8> {
    let mut record = vec![0; HEAD_BYTES + text.len() + TAIL_BYTES];
    record[HEAD_BYTES..HEAD_BYTES + text.len()].copy_from_slice(text);
    let length = records.seal.seal(&mut record, text.len(), kind);
    assert_eq!(length, Ok(record.len()));
    record
}

#[tokio::test]
async fn each_record_opens_once_and_in_its_turn() {
    let (mut tls, mut records, mut far) = with_rustls().await;
    let mut all = Vec::new();
    for text in [&b"first"[..], b"second", b"third"] {
        tls.write_all(text).await.expect("writes");
        tls.flush().await.expect("writes");
        all.push(next_record(&mut far).await);
    }
    let mut first = all[0].clone();
    let Ok(Opened::Data(place)) = records.open(&mut first) else {
        panic!("rustls's record does not open");
    };
    assert_eq!(&first[place], b"first");
    assert_eq!(records.open(&mut all[2].clone()), Err(BadRecord::Forged));

    let (mut tls, mut records, mut far) = with_rustls().await;
    tls.write_all(b"once").await.expect("writes");
    let record = next_record(&mut far).await;
    assert!(records.open(&mut record.clone()).is_ok());
    assert_eq!(records.open(&mut record.clone()), Err(BadRecord::Forged));
}

#[tokio::test]
async fn a_changed_bit_anywhere_is_noticed() {
    for at in [0, 3, HEAD_BYTES, HEAD_BYTES + 3, usize::MAX] {
        let (mut tls, mut records, mut far) = with_rustls().await;
        tls.write_all(b"bytes").await.expect("writes");
        let mut record = next_record(&mut far).await;
        let at = at.min(record.len() - 1);
        record[at] ^= 1;
        assert_eq!(records.open(&mut record), Err(BadRecord::Forged), "{at}");
    }
}

#[tokio::test]
async fn rustls_notices_what_is_cut_off() {
    let (mut tls, mut records, mut far) = with_rustls().await;
    let record = sealed(&mut records, APPLICATION_DATA, b"the whole");
    far.write_all(&record).await.expect("writes");
    drop(far);
    let mut read = Vec::new();
    let ended = soon(tls.read_to_end(&mut read)).await;
    assert_eq!(read, b"the whole");
    assert!(ended.is_err(), "no close_notify, but a good end");

    let (mut tls, mut records, mut far) = with_rustls().await;
    let mut close = [0; 64];
    let length = records.close(&mut close).expect("there is room");
    far.write_all(&close[..length]).await.expect("writes");
    drop(far);
    let ended = soon(tls.read_to_end(&mut Vec::new())).await;
    assert!(ended.is_ok(), "{ended:?}");
}

#[tokio::test]
async fn alerts_are_told_from_a_good_end() {
    let (mut tls, mut records, mut far) = with_rustls().await;
    tls.shutdown().await.expect("closes");
    let mut record = next_record(&mut far).await;
    assert_eq!(records.open(&mut record), Ok(Opened::Closed));

    let (mut tls, mut records, mut far) = with_rustls().await;
    let mut forged = sealed(&mut records, APPLICATION_DATA, b"x");
    *forged.last_mut().expect("not empty") ^= 1;
    far.write_all(&forged).await.expect("writes");
    assert!(soon(tls.read(&mut [0; 8])).await.is_err());
    let mut record = next_record(&mut far).await;
    assert_eq!(records.open(&mut record), Err(BadRecord::Alert(20)));
}

#[tokio::test]
async fn messages_that_must_not_come() {
    let key_update = |requested| vec![KEY_UPDATE, 0, 0, 1, requested];
    let cases: Vec<(u8, Vec<u8>)> = vec![
        (HANDSHAKE, vec![4, 0, 0, 0]),
        (HANDSHAKE, key_update(2)),
        (HANDSHAKE, [key_update(0), key_update(0)].concat()),
        (HANDSHAKE, vec![]),
        (ALERT, vec![1]),
        (20, vec![1]),
        (99, b"x".to_vec()),
        // No kind at all: nothing but padding.
        (0, vec![0; 8]),
    ];
    for (kind, text) in cases {
        let (mut ill, mut records) = with_ourselves().await;
        let mut record = sealed(&mut ill, kind, &text);
        let opened = records.open(&mut record);
        assert_eq!(opened, Err(BadRecord::Message), "{kind} {text:?}");
    }
}

#[tokio::test]
async fn padding_is_no_data() {
    let (mut peer, mut records) = with_ourselves().await;
    // The kind, and zeros behind it, as padded text of another kind.
    let mut record = sealed(&mut peer, 0, b"text\x17\0\0\0");
    let Ok(Opened::Data(place)) = records.open(&mut record) else {
        panic!("padded");
    };
    assert_eq!(&record[place], b"text");
}

#[tokio::test]
async fn keys_change_so_often_and_no_more() {
    let (mut peer, mut records) = with_ourselves().await;
    let mut record = [0; 64];
    for _ in 0..3 {
        for _ in 0..MOST_IDLE_UPDATES {
            let length = peer.change_keys(&mut record).expect("there are keys");
            let opened = records.open(&mut record[..length]);
            assert_eq!(opened, Ok(Opened::KeyUpdate { requested: false }));
        }
        let mut data = sealed(&mut peer, APPLICATION_DATA, b"data between");
        assert!(records.open(&mut data).is_ok());
    }
    for _ in 0..MOST_IDLE_UPDATES {
        let length = peer.change_keys(&mut record).expect("there are keys");
        assert!(records.open(&mut record[..length]).is_ok());
    }
    let length = peer.change_keys(&mut record).expect("there are keys");
    let opened = records.open(&mut record[..length]);
    assert_eq!(opened, Err(BadRecord::Message));
}

#[tokio::test]
async fn a_key_is_not_used_beyond_its_limit() {
    let (mut peer, mut records) = with_ourselves().await;
    peer.seal.sequence = MOST_SEALED_PER_KEY - 1;
    assert!(peer.wants_new_keys());
    let mut record = [0; 64];
    assert!(peer.seal(&mut record, 4).is_ok());
    assert!(matches!(peer.seal(&mut record, 4), Err(BadRecord::Keys(_))));
    assert!(matches!(
        peer.change_keys(&mut record),
        Err(BadRecord::Keys(_))
    ));
    records.open.sequence = MOST_OPENED_PER_KEY;
    assert!(matches!(records.open(&mut record), Err(BadRecord::Keys(_))));
}

#[tokio::test]
async fn lengths_are_kept() {
    let (mut peer, mut records) = with_ourselves().await;
    let mut record = vec![0; HEAD_BYTES + MOST_PLAIN_BYTES + TAIL_BYTES + 1];
    assert!(peer.seal(&mut record, MOST_PLAIN_BYTES).is_ok());
    let all = record.len() - 1;
    assert!(records.open(&mut record[..all]).is_ok());
    assert_eq!(
        peer.seal(&mut record, MOST_PLAIN_BYTES + 1),
        Err(BadRecord::Form)
    );
    assert_eq!(peer.seal(&mut record[..20], 4), Err(BadRecord::Form));
    assert_eq!(records.open(&mut [23, 3]), Err(BadRecord::Form));
    for (head, expected) in [
        (&[23, 3, 3, 0][..], Ok(None)),
        (&[23, 3, 3, 0, 17], Ok(Some(22))),
        (&[23, 3, 3, 0x41, 0], Ok(Some(HEAD_BYTES + 16640))),
        (&[23, 3, 3, 0x41, 1], Err(BadRecord::Form)),
        (&[23, 3, 3, 0, 16], Err(BadRecord::Form)),
        (&[22, 3, 3, 0, 32], Err(BadRecord::Form)),
        (&[20, 3, 3, 0, 1], Err(BadRecord::Form)),
        (&[23, 3, 1, 0, 32], Err(BadRecord::Form)),
    ] {
        assert_eq!(length(head), expected, "{head:?}");
    }
}
