//! NetworkPolicies of Kubernetes, at the ports that clients asked for, where a CNI sees only the tunnel's or nothing.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft_tests::apps::{curl_shop, curl_with};
use weft_tests::command::Program;
use weft_tests::hbone::Attempt;
use weft_tests::manifests::{ServiceSpec, authorization, namespace, server};
use weft_tests::metrics::wait_for_metric;
use weft_tests::pki::Authority;
use weft_tests::scenario::{REFUSED, eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Pulse, Server};
use weft_tests::webapp::HttpServer;
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec};

/// A server, and clients on both nodes, in the mesh and outside: some with the label that policies let in.
struct Scene {
    far: Pod,
    near: Pod,
    plain: Pod,
    plain_near: Pod,
    /// Without the label, on both nodes and outside of the mesh.
    other: Pod,
    other_near: Pod,
    other_plain: Pod,
    /// Of another namespace.
    foreign: Pod,
    api: Pod,
    http: HttpServer,
    _servers: [Server; 2],
    cluster: Cluster,
}

#[test]
fn network_policies() {
    run("network policies", &[]);
}

/// The same between agents that speak HTTP/2 only.
#[test]
fn network_policies_http2() {
    run("network policies, weft-h2", &["--tunnel", "weft-h2"]);
}

/// The same where flows of one node go by tunnels too.
#[test]
fn network_policies_by_tunnels() {
    let scene = Scene::build(&[], &["--force-tunnels"]).expect("a cluster");
    let mut checks = Checks::new("network policies, by tunnels");
    checks.check("who and where is let in", || rules(&scene));
    checks.finish();
}

fn run(title: &str, agent_args: &[&str]) {
    let scene = Scene::build(agent_args, &[]).expect("a cluster");
    let mut checks = Checks::new(title);
    let mut check = |name: &str, run: fn(&Scene) -> Result<()>| {
        checks.check(name, || run(&scene));
    };
    check("who and where is let in", rules);
    check("requests are answered with 403", requests);
    check("HBONE", hbone);
    check("an address without its identity", address_alone);
    check("namespaces and their labels", namespaces);
    check("networks, and what the node is", networks);
    check("the mesh's own policy counts too", both);
    check("nobody is let in, but the pod itself", nobody);
    check("a policy that was never readable closes", unreadable);
    check("a change ends what it no longer allows", live_change);
    check("a change holds for the next request", next_request);
    checks.finish();
}

impl Scene {
    fn build(agent_args: &[&str], controller_args: &[&str]) -> Result<Scene> {
        let owned = |args: &[&str]| args.iter().map(|it| (*it).to_owned()).collect();
        let cluster = Cluster::with(ClusterOptions {
            agent_args: owned(agent_args),
            controller_args: owned(controller_args),
            ..ClusterOptions::default()
        })?;
        let add = |spec: PodSpec| cluster.add_pod(spec);
        let client = |name: &str, node| PodSpec::new(name).on(node).label("role", "client");
        let far = add(client("far", 0))?;
        let near = add(client("near", 1))?;
        let plain = add(client("plain", 0).unmeshed())?;
        let plain_near = add(client("plain-near", 1).unmeshed())?;
        let other = add(PodSpec::new("other").on(0))?;
        let other_near = add(PodSpec::new("other-near").on(1))?;
        let other_plain = add(PodSpec::new("other-plain").on(0).unmeshed())?;
        let foreign = add(client("foreign", 0).namespace("elsewhere"))?;
        let api = PodSpec::new("api").on(1).port("main", OPEN);
        let api = add(api.probe("livenessProbe", json!({"tcpSocket": {"port": SHUT}})))?;
        let servers = [
            Server::start(&api, OPEN, "echo", &[])?,
            Server::start(&api, SHUT, "echo", &[])?,
        ];
        let http = HttpServer::start(&api, HTTP, &[])?;
        let scene = Scene {
            far,
            near,
            plain,
            plain_near,
            other,
            other_near,
            other_plain,
            foreign,
            api,
            http,
            _servers: servers,
            cluster,
        };
        for pod in scene.clients().into_iter().chain(scene.others()) {
            expect_echo(pod, scene.at(OPEN), "before")?;
        }
        Ok(scene)
    }

    fn clients(&self) -> [&Pod; 4] {
        [&self.far, &self.near, &self.plain, &self.plain_near]
    }

    fn others(&self) -> [&Pod; 4] {
        let Scene {
            other,
            other_near,
            other_plain,
            foreign,
            ..
        } = self;
        [other, other_near, other_plain, foreign]
    }

    fn at(&self, port: u16) -> SocketAddr {
        self.api.sockets(port)[0]
    }

    /// Puts a policy with these rules for the server into force, which lets none of `shut` in and all of `open`.
    fn apply(&self, ingress: &Value, open: &[&Pod], shut: &[&Pod]) -> Result<()> {
        self.cluster.apply(&policy(ingress))?;
        eventually("the policy to be in effect", || {
            for pod in open {
                expect_echo(pod, self.at(OPEN), "let in")?;
            }
            for pod in shut {
                expect_refusal(pod, self.at(OPEN), "shut out")?;
            }
            Ok(())
        })
    }

    /// Only pods with the label.
    fn only_clients(&self) -> Result<()> {
        self.apply(&clients_only(), &self.clients(), &self.others())
    }

    /// `weft-testapp` with a pod's address, that no hook of the mesh sees.
    fn unseen(&self, pod: &Pod) -> Result<Program> {
        let program = testapp::path()?.display().to_string();
        Program::new(program, Some(pod.netns()), None, pod.dir())
    }
}

/// By the name of a port, from pods with a label; IPv4 and IPv6.
fn rules(scene: &Scene) -> Result<()> {
    scene.only_clients()?;
    for family in [0, 1] {
        for pod in scene.clients() {
            expect_echo(pod, scene.api.sockets(OPEN)[family], "let in")?;
            expect_refusal(pod, scene.api.sockets(SHUT)[family], "shut out")?;
        }
        for pod in scene.others() {
            expect_refusal(pod, scene.api.sockets(OPEN)[family], "shut out")?;
        }
    }
    for pod in [&scene.other, &scene.other_near, &scene.foreign] {
        let identity = pod.identity();
        let labels = [
            ("client_id", identity.as_str()),
            ("pod", "api"),
            ("authz_name", "networkpolicy:default/only-clients"),
        ];
        let node = scene.cluster.node(1);
        wait_for_metric(node, "inbound_tcp_authz_deny_total", &labels, 2.0)?;
    }
    Ok(())
}

fn requests(scene: &Scene) -> Result<()> {
    let ports = json!([{"port": HTTP}, {"port": OPEN}]);
    let mut rules = clients_only();
    rules[0]["ports"] = ports;
    scene.cluster.apply(&policy(&rules))?;
    for pod in scene.clients() {
        eventually("requests to be let in", || {
            let shown = curl_shop(pod, scene.at(HTTP), "/x", &[])?;
            ensure!(shown.code() == 200, "{} got {shown:?}", pod.name());
            Ok(())
        })?;
    }
    let before = scene.http.requests()?.len();
    for pod in scene.others() {
        let shown = curl_shop(pod, scene.at(HTTP), "/x", &[])?;
        ensure!(shown.code() == 403, "{} got {shown:?}", pod.name());
        let reason = shown.header("weft-error");
        ensure!(
            reason == Some("network_policy"),
            "{} got {shown:?}",
            pod.name()
        );
    }
    ensure!(scene.http.requests()?.len() == before);
    let labels = [("reason", "network_policy"), ("pod", "api")];
    wait_for_metric(scene.cluster.node(1), "weft_refused_total", &labels, 4.0)?;
    scene.only_clients()
}

/// Whoever has a key and not the address is not the pod, and the other way round.
fn hbone(scene: &Scene) -> Result<()> {
    let authority = Authority::of_cluster(scene.cluster.controller()?.ca_dir())?;
    let far = scene.far.identity();
    let other = scene.other.identity();
    let node = scene.cluster.node(0).netns();
    for (from, identity, expected) in [
        (scene.far.netns(), &far, 200),
        (scene.far.netns(), &other, 401),
        (scene.other.netns(), &far, 401),
        (node, &far, 401),
        // Of a pod without an identity the address is all that is known.
        (scene.plain.netns(), &other, 200),
        (scene.other_plain.netns(), &far, 401),
    ] {
        let identity = authority.sign(identity)?;
        let attempt = Attempt::hbone(scene.at(OPEN), identity).sending(b"hello");
        let answer = attempt.run(from)?;
        ensure!(
            answer.status == expected,
            "expected {expected} from {}: {answer:?}",
            from.name()
        );
    }
    Ok(())
}

/// What a pod with `NET_RAW` could do on a network that believes everybody.
fn address_alone(scene: &Scene) -> Result<()> {
    for target in scene.api.sockets(OPEN) {
        let args = ["--send", "x", "--half-close"];
        let by = |pod: &Pod| testapp::connect_with(scene.unseen(pod)?, target, &args);
        by(&scene.far)?.expect(&REFUSED)?;
        by(&scene.near)?.expect(&REFUSED)?;
        by(&scene.plain)?.expect(&["ok"])?;
    }
    Ok(())
}

fn namespaces(scene: &Scene) -> Result<()> {
    let by_label = json!([{"from": [
        {"namespaceSelector": {"matchLabels": {"team": "shop"}}, "podSelector": {}},
    ]}]);
    let label = |it: &Value| scene.cluster.apply(&namespace("elsewhere", it));
    label(&json!({"team": "shop"}))?;
    let inside = [&scene.far, &scene.near, &scene.plain];
    scene.apply(&by_label, &[&scene.foreign], &inside)?;
    label(&json!({}))?;
    eventually("the namespace to be another team's", || {
        expect_refusal(&scene.foreign, scene.at(OPEN), "shut out").map(drop)
    })?;
    let by_name = json!([{"from": [
        {"namespaceSelector": {"matchExpressions": [{"key": "kubernetes.io/metadata.name",
            "operator": "In", "values": ["elsewhere"]}]}},
        {"podSelector": {"matchExpressions": [{"key": "role", "operator": "Exists"}]}},
    ]}]);
    let open = [&scene.foreign, &scene.far, &scene.near, &scene.plain];
    scene.apply(&by_name, &open, &[&scene.other, &scene.other_plain])?;
    // A pod that comes later.
    let spec = PodSpec::new("late").on(0).label("role", "client");
    let late = scene.cluster.add_pod(spec)?;
    eventually("the pod to be let in", || {
        expect_echo(&late, scene.at(OPEN), "late").map(drop)
    })?;
    scene.cluster.remove_pod(late)
}

/// Processes of the pod's own node are nobody, but for the kubelet's probes.
fn networks(scene: &Scene) -> Result<()> {
    let node = scene.cluster.node(1);
    let ask = || curl_with(node.host_command("curl")?, scene.at(HTTP), "node");
    scene.only_clients()?;
    let reply = ask()?;
    ensure!(reply.status == 403, "a process of the node got {reply:?}");
    let probe = |port| {
        let program = node.kubelet_command(&testapp::path()?.display().to_string())?;
        let args = ["--send", "probe", "--half-close"];
        testapp::connect_with(program, scene.at(port), &args)
    };
    probe(SHUT)?.expect(&["ok"])?;
    probe(OPEN)?.expect(&REFUSED)?;
    let except = format!("{}/32", scene.other.v4());
    let of_pods = json!([{"from": [{"ipBlock": {"cidr": "10.244.0.0/16", "except": [except]}}]}]);
    let open = [&scene.far, &scene.near, &scene.plain, &scene.foreign];
    scene.apply(&of_pods, &open, &[&scene.other])?;
    let reply = ask()?;
    ensure!(
        reply.status != 403,
        "the node's address is let in: {reply:?}"
    );
    let [_, v6] = scene.api.sockets(OPEN);
    expect_refusal(&scene.far, v6, "another family").map(drop)
}

fn both(scene: &Scene) -> Result<()> {
    scene.apply(&json!([{}]), &[&scene.far, &scene.other], &[])?;
    let guard = server("default", "main", "api", OPEN);
    let rule = authorization("default", "main", "main", &["other"]);
    scene.cluster.apply(&rule)?;
    scene.cluster.apply(&guard)?;
    eventually("the Server to be in effect", || {
        expect_refusal(&scene.near, scene.at(OPEN), "denied")?;
        expect_echo(&scene.other, scene.at(OPEN), "allowed").map(drop)
    })?;
    scene.apply(&clients_only(), &[], &[&scene.near, &scene.other])?;
    scene.cluster.remove(&guard)?;
    scene.cluster.remove(&rule)?;
    scene.only_clients()
}

fn nobody(scene: &Scene) -> Result<()> {
    let all: Vec<&Pod> = scene.clients().into_iter().chain(scene.others()).collect();
    scene.apply(&json!([]), &[], &all)?;
    let service = ServiceSpec::new("api").select("app", "api").port(80, OPEN);
    let mut own: Vec<SocketAddr> = scene.api.sockets(OPEN).into();
    let addresses: [IpAddr; 2] = scene.cluster.add_service(&service)?;
    own.extend(addresses.map(|it| SocketAddr::new(it, 80)));
    for target in own {
        eventually("the pod to reach itself", || {
            expect_echo(&scene.api, target, "myself").map(drop)
        })?;
    }
    Ok(())
}

fn unreadable(scene: &Scene) -> Result<()> {
    scene.apply(&json!([{}]), &[&scene.far, &scene.other], &[])?;
    let mut odd = policy(&json!([{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "excpet": []}}]}]));
    odd["metadata"]["name"] = json!("only-clients");
    odd["spec"]["ingress"][0]["from"][0]["ipBlock"]["excpet"] = json!(["10.244.0.0/16"]);
    scene.cluster.apply(&odd)?;
    eventually("the controller to report it", || {
        let log = scene.cluster.controller()?.log();
        ensure!(log.contains("spec.ingress[0].from[0].ipBlock.excpet"));
        Ok(())
    })?;
    expect_echo(&scene.other, scene.at(OPEN), "what was in force stays")?;
    odd["metadata"]["name"] = json!("never-good");
    scene.cluster.apply(&odd)?;
    scene.cluster.apply(&policy(&json!([])))?;
    eventually("it to close", || {
        expect_refusal(&scene.far, scene.at(OPEN), "closed").map(drop)
    })?;
    scene.cluster.remove(&odd)?;
    scene.only_clients()
}

fn live_change(scene: &Scene) -> Result<()> {
    scene.apply(&json!([{}]), &[&scene.far, &scene.other], &[])?;
    let target = scene.at(OPEN);
    let mut ended = vec![];
    for pod in scene.others() {
        ended.push((pod.name(), Pulse::start(pod, target)?));
    }
    let mut kept = vec![];
    for pod in scene.clients() {
        kept.push((pod.name(), Pulse::start(pod, target)?));
    }
    scene.cluster.apply(&policy(&clients_only()))?;
    for (name, pulse) in &mut ended {
        let end = pulse.wait_broken(Duration::from_secs(20))?;
        ensure!(end.outcome == "reset", "{name}: {end:?}");
    }
    for (name, pulse) in kept {
        let end = pulse.stop()?;
        ensure!(end.outcome == "ok" && end.pulses > 1, "{name}: {end:?}");
    }
    let labels = [("reason", "policy_changed"), ("pod", "api")];
    wait_for_metric(scene.cluster.node(1), "weft_refused_total", &labels, 4.0).map(drop)
}

/// On a connection that stays, and of an answer that has begun.
fn next_request(scene: &Scene) -> Result<()> {
    for pod in [&scene.other, &scene.other_near] {
        scene.apply(&json!([{}]), &[pod], &[])?;
        let long = "/stream?chunks=400&interval=50&bytes=10";
        let seen = || -> Result<usize> {
            let requests = scene.http.requests()?;
            Ok(requests.iter().filter(|it| it.path == long).count())
        };
        let before = seen()?;
        let stream = std::thread::scope(|scope| {
            let stream = scope.spawn(|| curl_shop(pod, scene.at(HTTP), long, &[]));
            eventually("the answer to have begun", || {
                ensure!(seen()? > before, "not yet");
                Ok(())
            })?;
            scene.cluster.apply(&policy(&clients_only()))?;
            let stream = stream.join();
            stream.map_err(|_| anyhow::anyhow!("a thread failed"))?
        })?;
        ensure!(stream.exit != 0, "{}: {stream:?}", pod.name());
        let shown = curl_shop(pod, scene.at(HTTP), "/x", &[])?;
        ensure!(shown.code() == 403, "{}: {shown:?}", pod.name());
    }
    Ok(())
}

fn clients_only() -> Value {
    json!([{
        "from": [{"podSelector": {"matchLabels": {"role": "client"}}}],
        "ports": [{"port": "main"}],
    }])
}

fn policy(ingress: &Value) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "only-clients", "namespace": "default"},
        "spec": {"podSelector": {"matchLabels": {"app": "api"}}, "ingress": ingress}})
}

const OPEN: u16 = 7100;
const SHUT: u16 = 7101;
const HTTP: u16 = 7102;
