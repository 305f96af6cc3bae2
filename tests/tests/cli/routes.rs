//! What `weft stat-outbound`, `stat-inbound` and `routes` say of requests that really go by routes.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::PodSpec;
use weft_tests::apps::curl_shop;
use weft_tests::manifests::{ServiceSpec, backend, http_route};
use weft_tests::scenario::eventually;
use weft_tests::webapp::HttpLoad;

use super::{POLICY, PORT, Scene};

fn rows(scene: &Scene, arguments: &[&str]) -> Result<Vec<Value>> {
    let all = scene.json(&[arguments, &["--window", "3s"]].concat())?;
    ensure!(all["missing"] == json!([]), "{all}");
    Ok(all["rows"].as_array().context("rows")?.clone())
}

/// Two Services with the same pod behind them, and a route that splits what is asked of the first.
pub(super) fn outbound(scene: &Scene) -> Result<()> {
    let service = |name: &str| {
        let service = ServiceSpec::new(name).select("app", "web").port(80, PORT);
        let service = service.annotation("retry.linkerd.io/http", "5xx");
        scene
            .cluster
            .add_service(&service.annotation("retry.linkerd.io/limit", "1"))
    };
    let [address, _] = service("split")?;
    service("split-next")?;
    let backends = [backend("split", 80, 1), backend("split-next", 80, 1)];
    let route = http_route(
        "default",
        "split",
        "split",
        80,
        &json!([{"backendRefs": backends}]),
    );
    scene.cluster.apply(&route)?;
    let target = (address, 80).into();
    eventually("the Service to answer", || {
        let code = curl_shop(&scene.order, target, "/", &[])?.code();
        ensure!(code == 200, "{code}");
        Ok(())
    })?;
    let load = HttpLoad::start(&scene.order, target, &["--pause-ms", "10"])?;
    eventually("both backends, and a retry", || {
        scene.server.configure_some(&scene.web, 0, 503, 4)?;
        let rows = rows(scene, &["stat-outbound", "pod/order"])?;
        let row = rows.iter().find(|it| it["route"]["name"] == "split");
        let row = row.with_context(|| format!("no route in {rows:?}"))?;
        ensure!(
            row["parent"]["name"] == "split" && row["parent"]["port"] == "80",
            "{row}"
        );
        ensure!(row["requests_per_second"].as_f64() > Some(1.0), "{row}");
        ensure!(row["latency_ms"]["p99"].as_f64() > Some(0.0), "{row}");
        let backends = row["backends"].as_array().context("backends")?;
        let names: Vec<&Value> = backends.iter().map(|it| &it["backend"]["name"]).collect();
        ensure!(names == ["split", "split-next"], "{row}");
        let busy = backends
            .iter()
            .all(|it| it["requests_per_second"].as_f64() > Some(0.0));
        ensure!(busy, "{row}");
        // The server failed while it was looked at, or before.
        scene.server.configure_some(&scene.web, 0, 503, 4)?;
        ensure!(row["retries_per_second"].as_f64() > Some(0.0), "{row}");
        Ok(())
    })?;
    let stat = ["stat", "pod/order", "--direction", "outbound"];
    let of_order = rows(scene, &stat)?;
    let retries = of_order[0]["retries_per_second"].as_f64();
    ensure!(retries > Some(0.0), "{of_order:?}");
    let table = scene
        .weft(&["stat-outbound", "--window", "2s"])?
        .success()?;
    for part in ["HTTPRoute/split", "├─► split:80", "└─► split-next:80"] {
        ensure!(table.contains(part), "no {part:?} in {table}");
    }
    load.stop()?;
    scene.server.configure(&scene.web, 0, 200)
}

pub(super) fn inbound(scene: &Scene) -> Result<()> {
    let manifests = scene.cluster.manifests();
    // It has no connection yet: what was decided about one when it began is what its requests are counted by.
    let asker = scene.cluster.add_pod(PodSpec::new("asker").on(0))?;
    let policy = POLICY.replace("SERVICE-ACCOUNT", asker.service_account());
    manifests.apply("policy-of-web", &policy)?;
    let target = scene.web.sockets(PORT)[0];
    eventually("the policy to be in force", || {
        let code = curl_shop(&scene.neighbour, target, "/", &[])?.code();
        ensure!(code == 403, "{code}");
        Ok(())
    })?;
    let load = HttpLoad::start(&asker, target, &["--pause-ms", "10"])?;
    eventually("requests at the Server", || {
        let rows = rows(scene, &["stat-inbound", "pod/web"])?;
        let row = rows.iter().find(|it| it["server"] == "web");
        let row = row.with_context(|| format!("no Server in {rows:?}"))?;
        ensure!(row["success_rate"].as_f64() > Some(0.9), "{row}");
        ensure!(row["requests_per_second"].as_f64() > Some(1.0), "{row}");
        Ok(())
    })?;
    load.stop()?;
    let table = scene.weft(&["stat-inbound", "--window", "1s"])?.success()?;
    ensure!(table.contains("SERVER → ROUTE"), "{table}");
    manifests.remove("policy-of-web")?;
    scene.cluster.remove_pod(asker)?;
    eventually("the policy to be gone", || {
        let code = curl_shop(&scene.neighbour, target, "/", &[])?.code();
        ensure!(code == 200, "{code}");
        Ok(())
    })
}

/// The Service `split` is there, with its route.
pub(super) fn routes(scene: &Scene) -> Result<()> {
    let of_split = |name: &str| {
        let rows = rows(scene, &["routes", "svc/split"])?;
        let row = rows.iter().find(|it| it["route"]["name"] == name);
        row.cloned()
            .with_context(|| format!("no {name} in {rows:?}"))
    };
    let split = of_split("split")?;
    ensure!(split["problems"] == json!([]), "{split}");
    let backends = [backend("nobody", 80, 1)];
    let route = http_route(
        "default",
        "broken",
        "split",
        80,
        &json!([{"backendRefs": backends}]),
    );
    scene.cluster.apply(&route)?;
    eventually("the route to have what is wrong with it", || {
        let broken = of_split("broken")?;
        ensure!(
            broken["problems"][0]
                .as_str()
                .is_some_and(|it| it.contains("nobody")),
            "{broken}"
        );
        Ok(())
    })?;
    let table = scene
        .weft(&["routes", "split", "--window", "1s"])?
        .success()?;
    ensure!(
        table.contains("HTTPRoute/split") && table.contains("in force"),
        "{table}"
    );
    scene.cluster.remove(&route)?;
    let split = http_route("default", "split", "split", 80, &json!([]));
    scene.cluster.remove(&split)
}
