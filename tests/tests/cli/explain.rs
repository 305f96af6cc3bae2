//! What `weft explain` says, beside what really becomes of such a connection.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use weft_tests::Pod;
use weft_tests::apps::curl_shop;
use weft_tests::manifests::{ServiceSpec, backend, http_route};
use weft_tests::scenario::eventually;

use super::{POLICY, PORT, Scene};

/// An explanation, with the tool's exit code.
struct Said {
    code: i32,
    all: Value,
}

impl Said {
    fn of(scene: &Scene, from: &Pod, to: &str) -> Result<Self> {
        Self::asked(scene, from, to, &[])
    }

    fn asked(scene: &Scene, from: &Pod, to: &str, more: &[&str]) -> Result<Self> {
        let pod = format!("default/{}", from.name());
        let asked = ["explain", &pod, to, "-o", "json"];
        let said = scene.weft(&[&asked, more].concat())?;
        let all = serde_json::from_str(&said.stdout);
        let all = all.with_context(|| format!("{}{}", said.stdout, said.stderr))?;
        Ok(Self {
            code: said.code(),
            all,
        })
    }

    /// A step of an end, with what it is expected to be like.
    fn step(&self, side: &str, step: &str, state: &str) -> Result<&Value> {
        let ends = self.all["ends"].as_array().context("ends")?;
        let end = ends.iter().find(|it| it["side"] == side);
        let end = end.with_context(|| format!("no {side} end: {}", self.all))?;
        let steps = end["steps"].as_array().context("steps")?;
        let found = steps.iter().find(|it| it["step"] == step);
        let found = found.with_context(|| format!("no {step}: {}", self.all))?;
        ensure!(found["state"] == state, "{found}");
        Ok(found)
    }

    fn expect(&self, code: i32, outcome: &str) -> Result<()> {
        let is = self.code == code && self.all["outcome"] == outcome;
        ensure!(is, "{} and not {code}: {}", self.code, self.all);
        Ok(())
    }
}

/// The Service `shop` is there.
pub(super) fn allowed(scene: &Scene) -> Result<()> {
    let identity = json!(scene.web.identity());
    let likeliest = json!(format!("{}:{PORT}", scene.web.v4()));
    for (client, way) in [(&scene.order, "tunnel"), (&scene.neighbour, "same_node")] {
        let said = Said::of(scene, client, "shop.default.svc.cluster.local:80")?;
        said.expect(0, "reaches")?;
        for side in ["outbound", "inbound"] {
            let knowledge = said.step(side, "knowledge", "ok")?;
            ensure!(knowledge["values"]["current"] == true, "{knowledge}");
            let seen = &said.step(side, "kernel", "ok")?["values"]["seen"];
            ensure!(
                seen["redirects"] == true && seen["steered"] == true,
                "{seen}"
            );
            let listeners = json!(["outbound", "tunnel", "plaintext"]);
            ensure!(seen["listeners"] == listeners, "{seen}");
            let hooks = seen["hooks"].as_array().context("hooks")?;
            let attached = hooks.iter().all(|it| it["program"].is_u64());
            ensure!(!hooks.is_empty() && attached, "{seen}");
        }
        let pod = said.step("outbound", "pod", "ok")?;
        ensure!(
            pod["values"]["identity"] == json!(client.identity()),
            "{pod}"
        );
        let own = json!(client.v4().to_string());
        let addresses = pod["values"]["addresses"].as_array().context("addresses")?;
        ensure!(addresses.contains(&own), "{pod}");
        let destination = said.step("outbound", "destination", "ok")?;
        ensure!(
            destination["object"] == "Service/default/shop",
            "{destination}"
        );
        let protocol = said.step("outbound", "protocol", "ok")?;
        ensure!(protocol["values"]["declared"] == "detect", "{protocol}");
        let endpoint = said.step("outbound", "endpoint", "ok")?;
        ensure!(endpoint["values"]["likeliest"] == likeliest, "{endpoint}");
        let only = &endpoint["values"]["endpoints"][0];
        ensure!(
            only["share_percent"] == 100 && only["standing"] == "ready",
            "{only}"
        );
        ensure!(only["node"] == scene.cluster.node(1).name(), "{only}");
        let there = said.step("outbound", "way", "ok")?;
        ensure!(there["values"]["way"] == way, "{there}");
        ensure!(there["values"]["identity"] == identity, "{there}");
        let policy = said.step("inbound", "policy", "ok")?;
        ensure!(
            policy["values"]["by"] == "default:all-unauthenticated",
            "{policy}"
        );
    }
    // What stays in a pod does not come to the agent.
    for to in ["127.0.0.1:80", "[::1]:80", "0.0.0.0:80"] {
        let said = Said::of(scene, &scene.order, to)?;
        said.expect(0, "reaches")?;
        said.step("outbound", "destination", "ok")?;
    }
    let table = scene
        .weft(&["explain", "pod/order", "shop:80"])?
        .success()?;
    for line in [
        "√ knowledge: what this agent knows is current",
        "√ pod: default/order is in the mesh, as spiffe://",
        "√ kernel: its connects are redirected to the agent",
        "default/order may connect to shop:80",
    ] {
        ensure!(table.contains(line), "no {line:?} in {table}");
    }
    Ok(())
}

pub(super) fn outside_of_the_mesh(scene: &Scene) -> Result<()> {
    let said = Said::of(scene, &scene.outsider, "shop:80")?;
    said.expect(0, "reaches")?;
    let pod = said.step("outbound", "pod", "warning")?;
    ensure!(pod["values"]["state"] == "unmeshed", "{pod}");
    said.step("inbound", "policy", "ok")?;
    // There is none that could explain it.
    let gone = scene.weft(&["explain", "default/nobody", "shop:80"])?;
    let is_told = gone.stderr.contains("no pod default/nobody is known");
    ensure!(gone.code() == 2 && is_told, "{gone:?}");
    let to = format!("{}:{PORT}", scene.outsider.v4());
    let said = Said::of(scene, &scene.order, &to)?;
    said.expect(0, "reaches")?;
    let way = said.step("outbound", "way", "warning")?;
    ensure!(way["values"]["way"] == "plaintext", "{way}");
    Ok(())
}

pub(super) fn unknown(scene: &Scene) -> Result<()> {
    let said = Said::of(scene, &scene.order, "nothing.default:80")?;
    said.expect(2, "unknown")?;
    let name = said.step("outbound", "name", "error")?;
    ensure!(name["object"] == "Service/default/nothing", "{name}");
    let said = Said::of(scene, &scene.order, "api.example.com:443")?;
    said.expect(2, "unknown")?;
    let port = Said::of(scene, &scene.order, "shop:81")?;
    port.expect(1, "refused")?;
    port.step("outbound", "destination", "error")?;
    let nobodys = Said::of(scene, &scene.order, "10.244.1.251:80")?;
    nobodys.expect(1, "refused")?;
    nobodys.step("outbound", "destination", "error")?;
    let bad = scene.weft(&["explain", "default/order", "shop"])?;
    ensure!(
        bad.code() == 2 && bad.stderr.contains("HOST:PORT"),
        "{bad:?}"
    );
    Ok(())
}

pub(super) fn denied(scene: &Scene) -> Result<()> {
    let manifests = scene.cluster.manifests();
    let policy = POLICY.replace("SERVICE-ACCOUNT", scene.order.service_account());
    manifests.apply("policy-of-web", &policy)?;
    let target = scene.web.sockets(PORT)[0];
    eventually("the policy to be in force", || {
        let code = curl_shop(&scene.neighbour, target, "/", &[])?.code();
        ensure!(code == 403, "{code}");
        Ok(())
    })?;
    for (client, code, outcome, state, object) in [
        (
            &scene.order,
            0,
            "reaches",
            "ok",
            "AuthorizationPolicy/default/web",
        ),
        (
            &scene.neighbour,
            1,
            "refused",
            "error",
            "Server/default/web",
        ),
        (&scene.outsider, 1, "refused", "error", "Server/default/web"),
    ] {
        let said = Said::of(scene, client, &target.to_string())?;
        said.expect(code, outcome)?;
        let policy = said.step("inbound", "policy", state)?;
        ensure!(policy["object"] == object, "{policy}");
        let protocol = said.step("inbound", "protocol", "ok")?;
        ensure!(protocol["values"]["declared"] == "http1", "{protocol}");
    }
    manifests.remove("policy-of-web")?;
    eventually("the policy to be gone", || {
        let said = Said::of(scene, &scene.neighbour, &target.to_string())?;
        said.expect(0, "reaches")
    })
}

pub(super) fn opaque_ports_and_weights(scene: &Scene) -> Result<()> {
    let opaque = ServiceSpec::new("raw").select("app", "web");
    let opaque = opaque.port(80, PORT).speaks("linkerd.io/opaque");
    scene.cluster.add_service(&opaque)?;
    eventually("the Service that is opaque", || {
        let said = Said::of(scene, &scene.order, "raw:80")?;
        said.expect(0, "reaches")?;
        let protocol = said.step("outbound", "protocol", "ok")?;
        ensure!(protocol["values"]["declared"] == "opaque", "{protocol}");
        ensure!(protocol["object"] == "Service/default/raw", "{protocol}");
        // The other end sees for itself what the Service declares.
        let protocol = said.step("inbound", "protocol", "ok")?;
        ensure!(protocol["values"]["declared"] == "opaque", "{protocol}");
        Ok(())
    })?;
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1alpha2", "kind": "TCPRoute",
        "metadata": {"name": "split", "namespace": "default"},
        "spec": {
            "parentRefs": [{"kind": "Service", "group": "core", "name": "raw", "port": 80}],
            "rules": [{"backendRefs": [
                {"name": "shop", "port": 80, "weight": 9}, {"name": "nothing", "port": 80, "weight": 1},
            ]}],
        },
    });
    scene.cluster.manifests().apply_object(&route)?;
    eventually("the route with weights", || {
        let said = Said::of(scene, &scene.order, "raw:80")?;
        let route = said.step("outbound", "route", "ok")?;
        ensure!(route["object"] == "TCPRoute/default/split", "{route}");
        ensure!(route["values"]["backends"][0]["weight"] == 9, "{route}");
        let endpoint = said.step("outbound", "endpoint", "ok")?;
        ensure!(endpoint["object"] == "Service/default/shop", "{endpoint}");
        Ok(())
    })?;
    scene.cluster.manifests().remove_object(&route)
}

/// The Service `asked`, whose requests go by a route, beside what really becomes of them.
pub(super) fn requests(scene: &Scene) -> Result<()> {
    let service = ServiceSpec::new("asked")
        .select("app", "web")
        .port(80, PORT);
    let [address, _] = scene.cluster.add_service(&service)?;
    let target = (address, 80).into();
    let rules = json!([
        {
            "matches": [{"headers": [{"name": "x-canary", "value": "1"}]}],
            "filters": [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 302, "hostname": "next"}}],
        },
        {
            "matches": [{"path": {"type": "PathPrefix", "value": "/orders"}, "method": "GET"}],
            "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x-token", "value": "secret"}]}}],
            "timeouts": {"request": "5s"},
            "backendRefs": [backend("asked", 80, 9), backend("shop", 80, 1)],
        },
    ]);
    let route = http_route("default", "asked", "asked", 80, &rules);
    scene.cluster.apply(&route)?;
    eventually("the route to be in force", || {
        let code = curl_shop(&scene.order, target, "/", &[])?.code();
        ensure!(code == 404, "{code}");
        Ok(())
    })?;
    let ask = |more: &[&str]| Said::asked(scene, &scene.order, "asked:80", more);
    let said = ask(&["--path", "/orders/7"])?;
    said.expect(0, "reaches")?;
    let chosen = said.step("outbound", "route", "ok")?;
    ensure!(chosen["object"] == "HTTPRoute/default/asked", "{chosen}");
    ensure!(chosen["values"]["rule"] == 2, "{chosen}");
    ensure!(chosen["values"]["backends"][0]["weight"] == 9, "{chosen}");
    let details = json!([
        "weight 9, 90 %: Service default/asked:80, 1 of 1 endpoints ready",
        "weight 1, 10 %: Service default/shop:80, 1 of 1 endpoints ready",
        "not HTTPRoute default/asked, rule 1: it asks for header x-canary",
    ]);
    ensure!(chosen["details"] == details, "{chosen}");
    let filters = said.step("outbound", "filters", "ok")?;
    let told = json!(["changes its headers: sets x-token"]);
    ensure!(filters["details"] == told, "{filters}");
    ensure!(!said.all.to_string().contains("secret"), "{}", said.all);
    let terms = said.step("outbound", "terms", "ok")?;
    ensure!(terms["values"]["whole_seconds"] == 5.0, "{terms}");
    let endpoint = said.step("outbound", "endpoint", "ok")?;
    ensure!(endpoint["object"] == "Service/default/asked", "{endpoint}");
    said.step("inbound", "policy", "ok")?;
    // Each as it really goes.
    for (more, curl, code, outcome) in [
        (
            &["--method", "POST", "--path", "/orders"][..],
            404,
            1,
            "refused",
        ),
        (
            &["-H", "x-canary: 1", "--path", "/other"],
            302,
            0,
            "answered",
        ),
        (&["--path", "/orders"], 200, 0, "reaches"),
    ] {
        let said = ask(more)?;
        said.expect(code, outcome)?;
        let (path, arguments) = match outcome {
            "refused" => ("/orders", &["-X", "POST"][..]),
            "answered" => ("/other", &["-H", "x-canary: 1"][..]),
            _ => ("/orders", &[][..]),
        };
        let really = curl_shop(&scene.order, target, path, arguments)?.code();
        ensure!(really == curl, "{really}, and it says {}", said.all);
    }
    let bad = scene.weft(&["explain", "default/order", "asked:80", "--path", "orders"])?;
    let is_told = bad.stderr.contains("which begins with /");
    ensure!(bad.code() == 2 && is_told, "{bad:?}");
    scene.cluster.remove(&route)
}

/// A Server with a route that one client may use, and a limit.
pub(super) fn requests_at_the_server(scene: &Scene) -> Result<()> {
    let policy = ROUTES_OF_WEB.replace("SERVICE-ACCOUNT", scene.order.service_account());
    let manifests = scene.cluster.manifests();
    manifests.apply("routes-of-web", &policy)?;
    let target = scene.web.sockets(PORT)[0];
    eventually("the policy to be in force", || {
        let code = curl_shop(&scene.neighbour, target, "/open", &[])?.code();
        ensure!(code == 403, "{code}");
        Ok(())
    })?;
    for (client, path, code, curl) in [
        (&scene.order, "/open", 0, 200),
        (&scene.order, "/closed", 1, 404),
        (&scene.neighbour, "/open", 1, 403),
    ] {
        let said = Said::asked(scene, client, &target.to_string(), &["--path", path])?;
        let really = curl_shop(client, target, path, &[])?.code();
        ensure!(really == curl, "{really}, and it says {}", said.all);
        said.expect(code, if code == 0 { "reaches" } else { "refused" })?;
        match curl {
            200 => {
                let route = said.step("inbound", "route", "ok")?;
                ensure!(route["object"] == "HTTPRoute/default/open", "{route}");
                let policy = said.step("inbound", "policy", "ok")?;
                let object = "AuthorizationPolicy/default/open";
                ensure!(policy["object"] == object, "{policy}");
                let limit = said.step("inbound", "limit", "ok")?;
                let details = json!(["50 per second of all clients"]);
                ensure!(limit["details"] == details, "{limit}");
            }
            404 => {
                let route = said.step("inbound", "route", "error")?;
                let why = "not HTTPRoute default/open, rule 1: it asks for path /open/…";
                ensure!(route["details"] == json!([why]), "{route}");
            }
            _ => {
                said.step("inbound", "policy", "error")?;
            }
        }
    }
    manifests.remove("routes-of-web")?;
    eventually("the policy to be gone", || {
        let code = curl_shop(&scene.neighbour, target, "/", &[])?.code();
        ensure!(code == 200, "{code}");
        Ok(())
    })
}

pub(super) fn server_names(scene: &Scene) -> Result<()> {
    let service = ServiceSpec::new("secret")
        .select("app", "web")
        .port(443, PORT);
    scene.cluster.add_service(&service)?;
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1alpha2", "kind": "TLSRoute",
        "metadata": {"name": "by-name", "namespace": "default"},
        "spec": {
            "parentRefs": [{"kind": "Service", "group": "core", "name": "secret", "port": 443}],
            "hostnames": ["*.shop.example"],
            "rules": [{"backendRefs": [{"name": "shop", "port": 80}]}],
        },
    });
    scene.cluster.manifests().apply_object(&route)?;
    let ask = |more: &[&str]| Said::asked(scene, &scene.order, "secret:443", more);
    eventually("the route by name", || {
        let said = ask(&["--sni", "web.shop.example"])?;
        said.expect(0, "reaches")?;
        let route = said.step("outbound", "route", "ok")?;
        ensure!(route["object"] == "TLSRoute/default/by-name", "{route}");
        Ok(())
    })?;
    let said = ask(&["--sni", "other.example"])?;
    said.expect(1, "refused")?;
    let route_step = said.step("outbound", "route", "error")?;
    let why = json!(["not TLSRoute default/by-name, rule 1: it asks for another host"]);
    ensure!(route_step["details"] == why, "{route_step}");
    ask(&[])?.expect(2, "unknown")?;
    scene.cluster.manifests().remove_object(&route)
}

const ROUTES_OF_WEB: &str = "
apiVersion: policy.weft.dev/v1alpha1
kind: Server
metadata: {name: web, namespace: default}
spec:
  podSelector: {matchLabels: {app: web}}
  port: 8080
  proxyProtocol: HTTP/1
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: open, namespace: default}
spec:
  parentRefs: [{group: policy.weft.dev, kind: Server, name: web}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /open}}]
---
apiVersion: policy.weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: open, namespace: default}
spec:
  targetRef: {group: gateway.networking.k8s.io, kind: HTTPRoute, name: open}
  requiredAuthenticationRefs:
  - {kind: ServiceAccount, name: SERVICE-ACCOUNT, namespace: default}
---
apiVersion: policy.weft.dev/v1alpha1
kind: HTTPLocalRateLimitPolicy
metadata: {name: web, namespace: default}
spec:
  targetRef: {group: policy.weft.dev, kind: Server, name: web}
  total: {requestsPerSecond: 50}
";
