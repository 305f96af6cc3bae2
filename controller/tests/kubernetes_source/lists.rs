//! Lists of many pages, of which some fail, and lists beside watches: nothing is lost, nothing is taken back.

use std::time::Duration;

use serde_json::json;
use weft_apiserver::{Asked, Fault};
use weft_controller::source::kubernetes::Pace;

use crate::stage::{PACE, SHOP, Stage, apply, has, pod, stored, wait_for};

/// The world of seven more pods: with two per page, five pages.
fn many() -> std::sync::Arc<weft_apiserver::Store> {
    let store = stored(SHOP);
    for number in 0..7 {
        let address = format!("10.1.1.{}", 100 + number);
        let pod = pod(&format!("p{number}"), "one", &address, "web");
        apply(&store, &pod.to_string());
    }
    store
}

/// Requests for pages of pods: the first of a list, and further ones.
fn pages(stage: &Stage) -> [Vec<String>; 2] {
    let requests = stage.server().requests().into_iter();
    let of_pods = requests.filter(|it| it.starts_with("/api/v1/pods?") && !it.contains("watch="));
    let (further, first) = of_pods.partition(|it| it.contains("continue="));
    [first, further]
}

/// A list has an end where each of its pages fails now and then.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_fails_is_asked_for_again() {
    for code in [500, 503, 429, 403, 404] {
        let stage = Stage::with(many(), |it| {
            it.faults = vec![Fault::new("pods", Asked::Page, code, 3)];
        })
        .await;
        stage.controller.wait_complete().await;
        stage.wait_same("all pages").await;
        stage.controller.wait_reached().await;
        let [first, further] = pages(&stage);
        assert_eq!((first.len(), further.len()), (1, 4 + 3), "{further:?}");
        // The same page.
        assert!(
            further[..4].iter().all(|it| *it == further[0]),
            "{further:?}"
        );
    }
}

/// Of a list that the server has forgotten meanwhile, no page counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_is_forgotten_begins_again() {
    for times in [1, 3] {
        let stage = Stage::with(many(), |it| {
            it.faults = vec![Fault::new("pods", Asked::Page, 410, times)];
        })
        .await;
        stage.controller.wait_complete().await;
        stage.wait_same("the list that was whole").await;
        let [first, _] = pages(&stage);
        assert_eq!(first.len(), times + 1, "{first:?}");
        // Where it never has the time for all of them, as one.
        let whole = first.last().is_some_and(|it| !it.contains("limit="));
        assert_eq!(whole, times == 3, "{first:?}");
        stage.controller.wait_reached().await;
    }
}

/// Of which changes are heard late, by lists only. Once is nothing.
#[tokio::test(flavor = "multi_thread")]
async fn watches_that_expire_again_and_again_are_told() {
    let expire = |times| Fault::new("pods", Asked::Watch, 410, times);
    let stage = Stage::with(many(), |it| it.faults = vec![expire(usize::MAX)]).await;
    let problem = "Pod: cannot watch: ";
    stage.controller.wait_problem(problem).await;
    stage.controller.wait_problem("times in a row").await;
    stage.apply(&pod("late", "one", "10.1.1.99", "web").to_string());
    stage.wait_same("what a list has found").await;
    stage.server().behave(|it| it.faults.clear());
    stage.controller.wait_no_problem().await;
    let stage = Stage::with(many(), |it| it.faults = vec![expire(1)]).await;
    stage.controller.wait_complete().await;
    let watched_again = || {
        let requests = stage.server().requests().into_iter();
        let watches =
            requests.filter(|it| it.starts_with("/api/v1/pods?") && it.contains("watch="));
        let enough = watches.count() >= 2;
        enough
            .then_some(())
            .ok_or_else(|| "it watched once".to_owned())
    };
    wait_for("another watch", watched_again).await;
    stage.controller.wait_no_problem().await;
}

/// Whoever is asked to come later does.
#[tokio::test(flavor = "multi_thread")]
async fn pauses_that_the_server_asks_for_are_kept() {
    let stage = Stage::with(many(), |it| {
        it.faults = vec![
            Fault::new("pods", Asked::List, 429, 1).asking(1),
            Fault::new("pods", Asked::Page, 503, 1).asking(1),
            Fault::new("pods", Asked::Watch, 429, 1).asking(1),
        ];
    })
    .await;
    stage.controller.wait_complete().await;
    let watched_again = || {
        let requests = stage.server().request_times();
        let of_pods = requests.into_iter();
        let of_pods = of_pods.filter(|(_, it)| it.starts_with("/api/v1/pods?"));
        let of_pods: Vec<_> = of_pods.collect();
        let watches = of_pods.iter().filter(|(_, it)| it.contains("watch="));
        match watches.count() >= 2 {
            true => Ok(()),
            false => Err(format!("{of_pods:?}")),
        }
    };
    wait_for("another watch", watched_again).await;
    let requests = stage.server().request_times().into_iter();
    let of_pods = requests.filter(|(_, it)| it.starts_with("/api/v1/pods?"));
    let of_pods: Vec<_> = of_pods.collect();
    let of = |asked: &str| {
        let found = of_pods.iter().position(|(_, it)| it.contains(asked));
        found.expect("asked")
    };
    for refused in [0, of("continue="), of("watch=")] {
        let pause = of_pods[refused + 1].0 - of_pods[refused].0;
        assert!(pause >= Duration::from_secs(1), "{pause:?} {of_pods:?}");
    }
    stage.controller.wait_reached().await;
}

/// However long that would be.
#[tokio::test(flavor = "multi_thread")]
async fn no_server_can_have_it_that_nobody_asks_for_hours() {
    let pace = Pace {
        longest_asked_pause: Duration::from_millis(200),
        ..PACE
    };
    let stage = Stage::made(
        many(),
        |it| it.faults = vec![Fault::new("pods", Asked::List, 429, 1).asking(36_000)],
        pace,
    )
    .await;
    stage.controller.wait_complete().await;
    stage.wait_same("after a pause").await;
}

fn often() -> Pace {
    Pace {
        anew: Duration::from_millis(200),
        ..PACE
    }
}

/// What happens while everything is listed anew is told meanwhile, and not taken back by the list.
#[tokio::test(flavor = "multi_thread")]
async fn watches_go_on_while_everything_is_listed_anew() {
    let stage = Stage::at_pace(many(), often()).await;
    stage.controller.wait_complete().await;
    stage.server().behave(|it| {
        it.held_pages.insert("pods".to_owned());
    });
    let before = pages(&stage)[1].len();
    let asked = |more: usize| {
        let [_, further] = pages(&stage);
        let is_asked = further.len() > before + more;
        is_asked.then_some(()).ok_or_else(|| format!("{further:?}"))
    };
    wait_for("a list that is held", || asked(0)).await;
    // The list was begun before all of this.
    let gone = "{apiVersion: v1, kind: Pod, metadata: {name: p5, namespace: shop}}";
    stage.delete(gone);
    stage.apply(&pod("new", "two", "10.1.2.50", "web").to_string());
    let mut changed = pod("p6", "one", "10.1.1.106", "web");
    changed["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    stage.apply(&changed.to_string());
    stage.wait_same("changes beside a list").await;
    let expected = stage.controller.world();
    assert!(!has(&expected, "shop/p5") && has(&expected, "shop/new"));
    let lists = pages(&stage)[0].len();
    stage.server().behave(|it| it.held_pages.clear());
    // The next but one: that one is complete.
    wait_for("further lists", || {
        assert_eq!(stage.controller.world(), expected, "taken back");
        let [first, _] = pages(&stage);
        let more = first.len() > lists + 1;
        more.then_some(()).ok_or_else(|| format!("{first:?}"))
    })
    .await;
    stage.wait_same("the end").await;
    stage.controller.wait_reached().await;
}

/// A watch that works, and does not say everything.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_watch_does_not_say_is_found() {
    let stage = Stage::at_pace(many(), often()).await;
    stage.controller.wait_complete().await;
    stage.server().behave(|it| {
        for plural in ["pods", "endpointslices"] {
            it.swallowed.insert(plural.to_owned(), 100);
        }
    });
    stage.delete("{apiVersion: v1, kind: Pod, metadata: {name: p5, namespace: shop}}");
    stage.apply(&pod("new", "two", "10.1.2.50", "web").to_string());
    stage.apply(&pod("p6", "one", "10.1.1.120", "web").to_string());
    stage.wait_same("what nobody said").await;
}

/// The pages of a list that goes on for long fail, too, while the watch works.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_beside_a_watch_may_fail() {
    let stage = Stage::at_pace(many(), often()).await;
    stage.controller.wait_complete().await;
    stage.server().behave(|it| {
        it.faults = vec![
            Fault::new("pods", Asked::List, 500, 2),
            Fault::new("pods", Asked::Page, 500, usize::MAX),
        ];
    });
    let problem = "Pod: cannot list: failed by the test (500)";
    stage.controller.wait_problem(problem).await;
    stage.apply(&pod("new", "two", "10.1.2.50", "web").to_string());
    stage.wait_same("while lists fail").await;
    stage.server().behave(|it| it.faults.clear());
    stage.controller.wait_reached().await;
    stage.wait_same("when they do not any more").await;
}
