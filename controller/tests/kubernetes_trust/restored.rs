//! A cluster that is restored from a backup while its controllers cannot reach it: what it was told since is gone, the
//! Lease is that of another time, and it counts from an earlier version on.

use std::pin::pin;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::behind::{Agent, Known};
use crate::stage::{DEADLINE, Running, Stage, object, token_of, wait_for};

/// What is gone when the backup is made, and comes back with it; what comes after it, and is gone again.
const CART: &str = "shop/cart";
const LATER: &str = "shop/later";

fn pod(name: &str, address: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"nodeName": "two", "serviceAccountName": "cart", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": address}]}})
}

async fn leads(controller: &Running) -> bool {
    controller.counted("weft_controller_leader ").await == 1
}

/// How long who led before may believe that it does, by a Lease that nobody else knows of.
const MAY_LEAD: Duration = Duration::from_secs(10);
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Does something, and looks meanwhile who leads: never two, and one in the end.
async fn with_one_leader(one: &Running, other: &Running, doing: impl Future<Output = ()>) {
    let (began, mut led, mut done) = (Instant::now(), 0, false);
    let mut doing = pin!(doing);
    while !done || led < 10 || began.elapsed() < MAY_LEAD {
        let both = (leads(one).await, leads(other).await);
        assert_ne!(
            both,
            (true, true),
            "{:?} after the restart",
            began.elapsed()
        );
        led += usize::from(both.0 || both.1);
        match done {
            false => done = timeout(BETWEEN_LOOKS, &mut doing).await.is_ok(),
            true => tokio::time::sleep(BETWEEN_LOOKS).await,
        }
        assert!(began.elapsed() < DEADLINE, "led {led} times, done: {done}");
    }
}

/// The Lease of the backup is one who is gone's, or there is none.
#[tokio::test(flavor = "multi_thread")]
async fn agents_have_its_state_and_one_controller_leads() {
    for has_lease in [true, false] {
        let mut stage = Stage::start().await;
        stage.until("/metrics", "weft_controller_leader 1").await;
        let other = stage.another(&[]).await;
        other.until("/ready", "ready\n").await;
        let token = token_of("agent-1", "one").signed();
        let (mut known, mut known_to_other) = (Known::default(), Known::default());
        let mut agent = Agent::comes_to(&stage, &token, &known).await;
        agent.learns(&mut known, |_, complete| complete).await;
        let token = token_of("agent-2", "two").signed();
        let mut agent_of_other = Agent::at(&other, ("two", &token), &known_to_other).await;
        agent_of_other
            .learns(&mut known_to_other, |_, complete| complete)
            .await;
        let backup = stage.store.backup();
        let lease = object(&stage.store, "Lease", "weft-controller").expect("held");
        match has_lease {
            true => {
                let mut lease = lease.as_ref().clone();
                lease["spec"]["holderIdentity"] = json!("led-then_1");
                backup.apply(&lease).expect("applied");
            }
            false => backup.delete(&lease).expect("there"),
        }
        stage.store.delete(&pod("cart", "")).expect("there");
        stage
            .store
            .apply(&pod("later", "10.1.0.9"))
            .expect("applied");
        let is_new = |known: &Known, _: bool| !known.has(CART) && known.has(LATER);
        agent.learns(&mut known, is_new).await;
        agent_of_other.learns(&mut known_to_other, is_new).await;
        assert!(backup.revision() < stage.store.revision());
        stage.stop_server().await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        stage.store = backup;
        stage.start_server().await;
        let agents = async {
            // Agents that are connected all along are told what is so now, as are those that come.
            let is_old = |known: &Known, _: bool| known.has(CART) && !known.has(LATER);
            agent.learns(&mut known, is_old).await;
            agent_of_other.learns(&mut known_to_other, is_old).await;
            drop(agent);
            let token = token_of("agent-1", "one").signed();
            let mut agent = Agent::comes_to(&other, &token, &known).await;
            agent.catches_up(&mut known).await;
            assert!(is_old(&known, true));
        };
        // Who led may still believe so now.
        with_one_leader(&stage, &other, agents).await;
        let server = json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "Server",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"podSelector": {}, "port": 80}});
        stage.store.apply(&server).expect("applied");
        wait_for("the leader to say something", || {
            let server = stage.store.object("Server", "shop", "web")?;
            (server["status"]["conditions"][0]["status"] == "True").then_some(())
        })
        .await;
    }
}
