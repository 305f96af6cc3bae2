//! Before a flow is accepted: bytes that go along, refusals, and who speaks first.

use super::*;

#[tokio::test]
async fn early_bytes_go_along_and_stay_with_the_client_if_refused() {
    let near = Near::new(Limits::default()).await;
    let refusal = Refuse {
        status: 503,
        reason: "connect_refused".to_owned(),
    };
    let hold = Arc::new(tokio::sync::Notify::new());
    *near.far.refusal.lock().expect("no panic") = Some(refusal.clone());
    *near.far.hold.lock().expect("no panic") = Some(Arc::clone(&hold));
    let (mut client, mut client_side) = pair().await;
    client.write_all(b"early ").await.expect("writes");
    client_side.readable().await.expect("readable");
    for _ in 0..2 {
        let mut lent = near.lent().await;
        let answer = {
            let open = open();
            let asking = lent.ask(&open, Some(&client_side));
            let answering = async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let _ = client.try_write(&[b'x'; 100]);
                tokio::time::sleep(Duration::from_millis(50)).await;
                hold.notify_one();
            };
            soon(async { tokio::join!(asking, answering).0 }).await
        };
        match answer {
            Answer::Refused(found) => assert_eq!(found, refusal),
            other => panic!("{other:?}"),
        }
        let (channel, watch, give_back) = lent.part();
        give_back.give(channel, watch);
    }
    assert_eq!(
        near.connections(),
        1,
        "a refusal leaves the connection as it is"
    );
    let mut all = vec![0; 206];
    soon(client_side.read_exact(&mut all))
        .await
        .expect("still there");
    assert!(all.starts_with(b"early xxx"));
}

#[tokio::test]
async fn early_bytes_arrive_once() {
    let mut near = Near::new(Limits::default()).await;
    for length in [1, 16_380, 20_000, 64 * 1024, 300_000] {
        let hold = Arc::new(tokio::sync::Notify::new());
        *near.far.hold.lock().expect("no panic") = Some(Arc::clone(&hold));
        let (mut client, client_side) = pair().await;
        let bytes = pattern(length);
        let sent = bytes.clone();
        let writing = tokio::spawn(async move {
            for piece in sent.chunks(7000) {
                client.write_all(piece).await.expect("writes");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            client
        });
        let copying = near.start(client_side).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        hold.notify_one();
        let mut application = soon(near.applications.recv()).await.expect("connects");
        let mut read = vec![0; length];
        soon(application.read_exact(&mut read))
            .await
            .expect("reads");
        assert!(read == bytes, "{length}");
        let mut client = soon(writing).await.expect("no panic");
        cross(&mut client, &mut application, b"more").await;
        cross(&mut application, &mut client, b"answer").await;
        soon(copying).await.expect("no panic").expect("ends well");
    }
    assert_eq!(near.connections(), 1);
}

#[tokio::test]
async fn a_server_may_speak_first() {
    let mut near = Near::new(Limits::default()).await;
    let (mut client, mut application, _copying) = near.flow().await;
    application.write_all(b"220 ready").await.expect("writes");
    let mut read = [0; 9];
    soon(client.read_exact(&mut read)).await.expect("reads");
}
