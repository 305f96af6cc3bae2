//! Connections between flows: kept, retired, and how many.

use super::*;

#[tokio::test]
async fn a_far_end_that_leaves_is_asked_no_more() {
    let mut near = Near::new(Limits::default()).await;
    let first = near.flow().await;
    let (mut client, mut application, copying) = near.flow().await;
    cross(&mut client, &mut application, b"x").await;
    cross(&mut application, &mut client, b"y").await;
    soon(copying).await.expect("no panic").expect("ends well");
    assert_eq!(near.pool.connections(), 2);
    near.far.stopping.cancel();
    let pool = Arc::clone(&near.pool);
    eventually("the idle one closes", || pool.connections() == 1).await;
    let (mut client, mut application, copying) = first;
    cross(&mut client, &mut application, b"still").await;
    cross(&mut application, &mut client, b"here").await;
    soon(copying).await.expect("no panic").expect("ends well");
    let pool = Arc::clone(&near.pool);
    eventually("the other one closes", || pool.connections() == 0).await;
}

#[tokio::test]
async fn no_flow_begins_with_an_expired_certificate() {
    let mut near = Near::new(Limits::default()).await;
    let soon_over = SystemTime::now() + Duration::from_millis(300);
    *near.far.valid_until.lock().expect("not poisoned") = soon_over;
    for wait_ms in [0, 400, 0] {
        let (mut client, mut application, copying) = near.flow().await;
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        // What is open goes on.
        cross(&mut client, &mut application, b"x").await;
        cross(&mut application, &mut client, b"x").await;
        soon(copying).await.expect("no panic").expect("ends well");
        if wait_ms > 0 {
            assert_eq!(near.connections(), 1);
            let later = soon_over + Duration::from_secs(3600);
            *near.far.valid_until.lock().expect("not poisoned") = later;
        }
    }
    assert_eq!(near.connections(), 2, "not on the connection of before");
}

#[tokio::test]
async fn idle_and_old_connections_close() {
    let limits = Limits {
        idle: Duration::from_millis(200),
        ..Limits::default()
    };
    let mut near = Near::new(limits).await;
    let (mut client, mut application, copying) = near.flow().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    cross(&mut client, &mut application, b"in use").await;
    cross(&mut application, &mut client, b"in use").await;
    soon(copying).await.expect("no panic").expect("ends well");
    let pool = Arc::clone(&near.pool);
    eventually("idle close", || pool.connections() == 0).await;

    let limits = Limits {
        age: Duration::from_millis(1),
        ..Limits::default()
    };
    let mut near = Near::new(limits).await;
    for count in 1..3 {
        let (mut client, mut application, copying) = near.flow().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        cross(&mut client, &mut application, b"x").await;
        cross(&mut application, &mut client, b"x").await;
        soon(copying).await.expect("no panic").expect("ends well");
        assert_eq!(near.connections(), count, "never a second flow");
    }
}

#[tokio::test]
async fn so_many_are_left_unused() {
    for (idle_of_source, idle_of_all) in [(2, 100), (100, 2)] {
        let limits = Limits {
            idle_of_source,
            idle_of_all,
            ..Limits::default()
        };
        let mut near = Near::new(limits).await;
        let mut flows = Vec::new();
        for _ in 0..5 {
            flows.push(near.flow().await);
        }
        for (mut client, mut application, copying) in flows {
            cross(&mut client, &mut application, b"x").await;
            cross(&mut application, &mut client, b"x").await;
            soon(copying).await.expect("no panic").expect("ends well");
        }
        let pool = Arc::clone(&near.pool);
        eventually("all but two close", || pool.connections() <= 2).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
        assert_eq!(pool.connections(), 2);
    }
}

#[tokio::test]
async fn changed_trust_retires_connections() {
    let mut near = Near::new(Limits::default()).await;
    for count in 1..3 {
        let (mut client, mut application, copying) = near.flow().await;
        near.far.changed.send_modify(|it| *it += 1);
        cross(&mut client, &mut application, b"x").await;
        cross(&mut application, &mut client, b"x").await;
        soon(copying).await.expect("no panic").expect("ends well");
        assert_eq!(near.connections(), count);
    }
}

#[tokio::test]
async fn a_pair_has_so_many_connections_and_no_more() {
    let limits = Limits {
        connections: 3,
        making: 1,
        ..Limits::default()
    };
    let near = Near::new(limits).await;
    let taken = futures::future::join_all((0..5).map(|_| near.take())).await;
    let lent = |it: &&Result<Taken, _>| matches!(it, Ok(Taken::Lent(_)));
    assert_eq!(taken.iter().filter(lent).count(), 3);
    assert!(taken.iter().all(Result::is_ok));
    drop(taken);
    assert_eq!(near.pool.connections(), 0);
    near.lent().await;
}
