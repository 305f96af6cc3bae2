//! What a panic leaves behind: nothing.

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;

use super::*;
use crate::panics;

/// What an exchange holds when it panics is given back, and it is counted.
#[tokio::test]
async fn one_that_panics_ends_alone() {
    let usage = Usage::new(&Limits::default(), &KeptBytes::new(1 << 30));
    let (began, go) = tokio::sync::oneshot::channel::<()>();
    let of_panic = Arc::clone(&usage);
    let flow = async move {
        let party = Party::at_pod(&of_panic, From::Strangers);
        let _place = party.enter(&HeaderMap::new());
        let _window = party.window();
        let mut charger = Charger::new(&party);
        let _piece = charger.piece(Bytes::from(vec![0; 10_000]), false);
        let _dial = of_panic.dial([10, 0, 0, 1].into()).await;
        assert!(of_panic.kept_bytes() > 0 && of_panic.exchanges() == (1, 0));
        let _ = go.await;
        panic!("on purpose");
    };
    let flow = tokio::spawn(flow);
    tokio::task::yield_now().await;
    let before = panics::count();
    panics::watch();
    assert!(began.send(()).is_ok());
    assert!(flow.await.is_err_and(|it| it.is_panic()));
    let _ = std::panic::take_hook();
    assert!(panics::count() > before);
    assert_eq!(usage.exchanges(), (0, 0));
    assert_eq!(usage.kept_bytes(), 0);
    let party = Party::at_pod(&usage, From::Strangers);
    assert!(party.enter(&HeaderMap::new()).is_ok());
    assert!(usage.dial([10, 0, 0, 1].into()).await.is_some());
}

/// A lock under which somebody panicked is taken by the next one.
#[test]
fn a_lock_is_not_lost() {
    let usage = Usage::new(&Limits::default(), &KeptBytes::new(1 << 30));
    usage.poison();
    let party = Party::at_pod(&usage, From::Strangers);
    assert!(party.enter(&HeaderMap::new()).is_ok());
}
