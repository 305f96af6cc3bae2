//! Whatever happens to connections and servers, nothing is lost: in the end, agents are told what a directory of the
//! same objects says.

use std::time::Duration;

use serde_json::json;
use weft_apiserver::Cut;
use weft_controller::source::kubernetes::Pace;

use crate::stage::{PACE, SHOP, Stage, apply, pod, stored, wait_for};

/// Long lists come in pages, and watches go on where they were.
#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages() {
    let store = stored(SHOP);
    for number in 0..7 {
        let address = format!("10.1.1.{}", 100 + number);
        apply(
            &store,
            &pod(&format!("p{number}"), "one", &address, "web").to_string(),
        );
    }
    let stage = Stage::with(store, |_| {}).await;
    stage.controller.wait_complete().await;
    stage.wait_same("pages").await;
    let requests = stage.server().requests();
    let of_pods = requests.iter().filter(|it| it.starts_with("/api/v1/pods?"));
    let pages = of_pods.clone().filter(|it| it.contains("limit=2")).count();
    assert_eq!(pages, 5, "{requests:?}");
    let marked = |it: &&String| it.contains("watch=") && it.contains("allowWatchBookmarks=true");
    assert!(of_pods.clone().any(|it| marked(&it)), "{requests:?}");
}

/// What changes while nobody watches is found by a list, if the server has forgotten it meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_forgot_is_found() {
    for refused in [false, true] {
        let stage = Stage::of(SHOP).await;
        stage.controller.wait_complete().await;
        // Nobody hears of what follows before it is forgotten.
        stage.server().behave(|it| {
            it.expired_is_refused = refused;
            it.refused.insert("pods".to_owned(), 500);
        });
        stage.server().disconnect();
        let problem = "Pod: cannot watch: refused by the test";
        stage.controller.wait_problem(problem).await;
        stage.delete("{apiVersion: v1, kind: Pod, metadata: {name: web-1, namespace: shop}}");
        stage.apply(&pod("new", "two", "10.1.2.10", "web").to_string());
        stage.store.compact();
        stage.server().behave(|it| it.refused.clear());
        stage.wait_same("after a compaction").await;
        stage.controller.wait_no_problem().await;
    }
}

/// The server is away for a while.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_the_server_is_away_is_found() {
    let mut stage = Stage::of(SHOP).await;
    stage.controller.wait_complete().await;
    stage.stop().await;
    stage.delete("{apiVersion: v1, kind: Pod, metadata: {name: web-1, namespace: shop}}");
    stage.apply(&pod("new", "two", "10.1.2.10", "web").to_string());
    stage.start().await;
    stage.wait_same("after an outage").await;
    stage.controller.wait_no_problem().await;
}

/// A cluster that is restored from a backup counts from an earlier version on: no watch hears what follows.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_cluster_is_found() {
    let backup = stored(SHOP);
    let mut stage = Stage::at_pace(
        stored(&format!(
            "{SHOP}\n---\n{}",
            pod("new", "one", "10.1.1.50", "web")
        )),
        Pace {
            anew: Duration::from_millis(300),
            ..PACE
        },
    )
    .await;
    stage.controller.wait_complete().await;
    stage.wait_same("before").await;
    assert!(backup.revision() < stage.store.revision());
    stage.replace(backup).await;
    stage.wait_same("after").await;
}

/// Who is cut off while the cluster is restored asks for what happened since a version that is yet to come, and hears
/// nothing; or, where others have written much since, of the rest only.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_was_restored_during_an_outage_is_found() {
    for goes_on in [false, true] {
        let mut stage = Stage::of(SHOP).await;
        stage.controller.wait_complete().await;
        let changing = pod("changing", "one", "10.1.1.60", "web");
        stage.apply(&changing.to_string());
        stage.apply(&pod("back", "two", "10.1.2.61", "web").to_string());
        let backup = stage.store.backup();
        // What the backup does not know of: something comes, something goes, something is another one.
        stage.delete("{apiVersion: v1, kind: Pod, metadata: {name: back, namespace: shop}}");
        stage.apply(&pod("new", "one", "10.1.1.50", "web").to_string());
        stage.delete("{apiVersion: v1, kind: Pod, metadata: {name: changing, namespace: shop}}");
        stage.apply(&pod("changing", "two", "10.1.2.60", "web").to_string());
        stage.delete("{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: web, namespace: shop}}");
        stage.wait_same("before").await;
        let seen = stage.store.revision();
        assert!(backup.revision() < seen);
        stage.stop().await;
        tokio::time::sleep(PACE.outage * 5 / 4).await;
        stage.store = backup;
        if goes_on {
            go_beyond(&stage, seen);
        }
        stage.start().await;
        stage.wait_same(&format!("after, {goes_on}")).await;
        // And it is heard of what follows.
        stage.apply(&pod("later", "one", "10.1.1.70", "web").to_string());
        stage.wait_same(&format!("later, {goes_on}")).await;
        stage.controller.wait_no_problem().await;
    }
}

/// Behind a load balancer nobody is told that the server was away: connections break when it is back, and another watch
/// is answered at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_was_restored_behind_a_load_balancer_is_found() {
    let short = Duration::from_millis(200);
    let shortest = Duration::from_millis(100);
    for (goes_on, silence) in [
        (false, short..HOUR),
        // Its version would not tell it from the one that was there before.
        (true, shortest..short),
    ] {
        let pace = Pace {
            silence,
            ..endless()
        };
        let (mut stage, balancer) = Stage::behind_balancer(stored(SHOP), pace).await;
        stage.controller.wait_complete().await;
        let backup = stage.store.backup();
        stage.apply(&pod("new", "one", "10.1.1.50", "web").to_string());
        stage.delete("{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: web, namespace: shop}}");
        stage.wait_same("before").await;
        let seen = stage.store.revision();
        assert!(backup.revision() < seen);
        stage.stop().await;
        tokio::time::sleep(short).await;
        stage.store = backup;
        if goes_on {
            go_beyond(&stage, seen);
        }
        stage.start().await;
        balancer.forget();
        stage.wait_same(&format!("after, {goes_on}")).await;
        stage.apply(&pod("later", "one", "10.1.1.70", "web").to_string());
        stage.wait_same(&format!("later, {goes_on}")).await;
        stage.controller.wait_no_problem().await;
    }
}

/// One that forgets connections whenever nothing came by them for a while has nobody list everything again and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_forgotten_costs_one_small_request() {
    let short = Duration::from_millis(200);
    let pace = Pace {
        // Nothing that takes long here is an outage.
        outage: HOUR,
        silence: short..HOUR,
        ..endless()
    };
    let (stage, balancer) = Stage::behind_balancer(stored(SHOP), pace).await;
    stage.controller.wait_complete().await;
    stage.wait_same("before").await;
    let of_pods = |what: &str| {
        let requests = stage.server().requests().into_iter();
        let of_pods = requests.filter(|it| it.starts_with("/api/v1/pods?"));
        of_pods.filter(|it| it.contains(what)).count()
    };
    let pages = of_pods("limit=2");
    assert_eq!(of_pods("limit=1"), 0);
    tokio::time::sleep(short).await;
    balancer.forget();
    wait_for("the version", || match of_pods("limit=1") {
        0 => Err("not asked for".to_owned()),
        _ => Ok(()),
    })
    .await;
    stage.apply(&pod("later", "one", "10.1.1.70", "web").to_string());
    stage.wait_same("later").await;
    stage.controller.wait_no_problem().await;
    assert_eq!(of_pods("limit=2"), pages);
}

/// Watches that do not end by themselves.
fn endless() -> Pace {
    Pace {
        watch_seconds: 300,
        ..PACE
    }
}

/// Others write until the cluster is beyond a version.
fn go_beyond(stage: &Stage, seen: u64) {
    let map = |number: u64| {
        json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "any", "namespace": "shop"}, "data": {"n": number.to_string()}})
    };
    let mut number = 0;
    while stage.store.revision() <= seen {
        stage.apply(&map(number).to_string());
        number += 1;
    }
}

/// A connection that breaks in the middle of an event, or ends there.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_cut_is_told_again() {
    for cut in [Cut::Break, Cut::End, Cut::BreakBefore] {
        let stage = Stage::of(SHOP).await;
        stage.controller.wait_complete().await;
        stage.server().behave(|it| {
            for plural in ["pods", "endpointslices", "servers"] {
                it.cuts.insert(plural.to_owned(), vec![cut; 3]);
            }
        });
        stage.apply(&pod("new", "one", "10.1.1.50", "web").to_string());
        stage.wait_same("an event that was cut").await;
        stage.delete("{apiVersion: policy.weft.dev/v1alpha1, kind: Server, metadata: {name: web, namespace: shop}}");
        stage.wait_same("a deletion that was cut").await;
    }
}

/// Everything at once, in an order that the number says.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost() {
    for seed in [1, 2, 3] {
        let mut stage = Stage::of(SHOP).await;
        let mut dice = Dice(seed);
        for _ in 0..120 {
            happen(&mut stage, &mut dice).await;
        }
        if stage.server.is_none() {
            stage.start().await;
        }
        stage.server().behave(|it| {
            it.cuts.clear();
            it.refused.clear();
        });
        stage.wait_same(&format!("the end of {seed}")).await;
        stage.controller.wait_reached().await;
    }
}

async fn happen(stage: &mut Stage, dice: &mut Dice) {
    match dice.roll(16) {
        0..6 => {
            // Few names and addresses, so that they are used again.
            let name = format!("p{}", dice.roll(5));
            let node = ["one", "two"][dice.roll(2)];
            let address = format!("10.1.1.{}", 100 + dice.roll(5));
            let label = ["web", "other"][dice.roll(2)];
            stage.apply(&pod(&name, node, &address, label).to_string());
        }
        6..9 => {
            let name = format!("p{}", dice.roll(5));
            let objects = stage.store.objects();
            let found = objects.iter().find(|it| it["metadata"]["name"] == name);
            if let Some(pod) = found {
                stage.delete(&pod.to_string());
            }
        }
        9 => stage.store.compact(),
        10 => match stage.server.is_some() {
            true => stage.stop().await,
            false => stage.start().await,
        },
        what => {
            let Some(server) = &stage.server else {
                return stage.start().await;
            };
            let plural = ["pods", "endpointslices", "services"][dice.roll(3)].to_owned();
            let cut = [Cut::Break, Cut::End, Cut::BreakBefore][dice.roll(3)];
            let code = [410, 403, 500, 404][dice.roll(4)];
            match what {
                11 => server.disconnect(),
                12 => server.behave(|it| it.cuts.entry(plural).or_default().push(cut)),
                13 => server.behave(|it| {
                    it.refused.insert(plural, code);
                }),
                14 => server.behave(|it| it.refused.clear()),
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

/// Numbers that look like chance and are the same each time (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap_or_default() % sides
    }
}

const HOUR: Duration = Duration::from_secs(3600);
