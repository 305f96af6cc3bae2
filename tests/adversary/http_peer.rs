//! Somebody holds another workload's valid certificate, and speaks HTTP in flows of its own making: no agent
//! on its side has read what arrives. Policy lets it ask for one path; it wants another.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft_tests::Checks;
use weft_tests::hostile::ambiguous;
use weft_tests::manifests::server;
use weft_tests::scenario::eventually;
use weft_tests::webapp::{HttpServer, Transcript};
use weft_tests::weft1::{Tunnel, data};

use crate::peer;
use crate::stage::Stage;

/// The target's servers that read with different care, each at a port that a route opens one path of.
struct Scene<'a> {
    stage: &'a Stage,
    hyper: HttpServer,
    /// One believes lengths, the other chunks.
    careless: [Transcript; 2],
}

/// Every request with two readings, and targets that name somebody else: none but the path that is allowed
/// reaches an application.
pub(crate) fn all(stage: &Stage, checks: &mut Checks) {
    let scene = Scene::start(stage).expect("servers behind a route");
    checks.check("the control: what is allowed", || scene.control());
    for attack in ambiguous(OPEN, "/hidden") {
        checks.check(&format!("{}, in a peer's flow", attack.name), || {
            scene.attack(&attack.bytes, &attack.hidden)
        });
    }
    for (number, (name, request)) in ELSEWHERE.into_iter().enumerate() {
        checks.check(name, || {
            let hidden = format!("/elsewhere-{number}");
            scene.attack(request.replace("/hidden", &hidden).as_bytes(), &hidden)
        });
    }
    checks.check("the target's friend, after all of it", || stage.unharmed());
}

impl<'a> Scene<'a> {
    fn start(stage: &'a Stage) -> Result<Scene<'a>> {
        let target = &stage.target;
        for port in PORTS {
            let name = format!("http-{port}");
            let mut declared = server("default", &name, "target", port);
            declared["spec"]["proxyProtocol"] = json!("HTTP/1");
            stage.cluster.apply(&declared)?;
            stage.cluster.apply(&route(&name))?;
            stage.cluster.apply(&opened(&name))?;
        }
        let [hyper, lengths, chunks] = PORTS;
        let careless = |port, trust| Transcript::start(target, port, &["--trust", trust]);
        let scene = Scene {
            stage,
            hyper: HttpServer::start(target, hyper, &[])?,
            careless: [careless(lengths, "length")?, careless(chunks, "chunks")?],
        };
        eventually("the routes to be in effect", || {
            for port in PORTS {
                for (path, code) in [(OPEN, "200"), ("/closed", "404")] {
                    let answer = scene.ask(port, get(path).as_bytes())?;
                    ensure!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
                }
            }
            Ok(())
        })?;
        Ok(scene)
    }

    /// Sends these bytes in a flow of its own, ends it, and reads what comes back, to its end.
    fn ask(&self, port: u16, bytes: &[u8]) -> Result<String> {
        let target = self.stage.target.sockets(port)[0];
        let identity = peer::identity(self.stage)?;
        let mut tunnel = Tunnel::connect(self.stage.outside.netns(), target, &identity)?;
        tunnel.open(port, 0, b"")?;
        tunnel.accepted()?;
        tunnel.send(&data(bytes))?;
        // An agent may also cut what it refuses, as soon as it has seen it.
        let _ = tunnel.send(&weft_tests::weft1::END);
        let mut answer = Vec::new();
        while let Ok(frame) = tunnel.frame() {
            answer.extend(frame.payload);
            if frame.flags & 1 == 1 {
                break;
            }
        }
        Ok(answer.escape_ascii().to_string().replace("\\r\\n", "\n"))
    }

    fn control(&self) -> Result<()> {
        for port in PORTS {
            let two = get(OPEN) + &get(&format!("{OPEN}/second"));
            let answer = self.ask(port, two.as_bytes())?;
            let answers = answer.matches("HTTP/1.1 200 ").count();
            ensure!(answers == 2, "port {port}: {answer}");
        }
        ensure!(
            self.saw(&format!("{OPEN}/second"))? == PORTS.len(),
            "they did not all see it"
        );
        Ok(())
    }

    fn attack(&self, bytes: &[u8], hidden: &str) -> Result<()> {
        for port in PORTS {
            let answer = self.ask(port, bytes)?;
            let served = answer.matches("HTTP/1.1 200 ").count();
            ensure!(served <= 1, "port {port} served both: {answer}");
        }
        let saw = self.saw(hidden)?;
        ensure!(saw == 0, "{saw} applications saw {hidden}");
        // Nor does it go before the next one's request, on a connection that was kept.
        for port in PORTS {
            let answer = self.ask(port, get(OPEN).as_bytes())?;
            ensure!(answer.starts_with("HTTP/1.1 200 "), "port {port}: {answer}");
        }
        let saw = self.saw(hidden)?;
        ensure!(saw == 0, "{saw} applications saw {hidden} afterwards");
        Ok(())
    }

    /// How many of the applications were asked for a path, in whatever form.
    fn saw(&self, path: &str) -> Result<usize> {
        let is_of = |target: &str| {
            let target = target.split('?').next().unwrap_or(target);
            target.ends_with(path)
        };
        let requests = self.hyper.requests()?;
        let mut count = usize::from(requests.iter().any(|it| is_of(&it.path)));
        for server in &self.careless {
            let heads = server.heads()?;
            let targets = heads.iter().map(|head| {
                let line = head.split("\\r\\n").find(|line| !line.is_empty());
                line.and_then(|line| line.split(' ').nth(1)).unwrap_or("")
            });
            count += usize::from(targets.into_iter().any(is_of));
        }
        Ok(count)
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: shop\r\n\r\n")
}

/// For the path that is allowed and all below it.
fn route(server: &str) -> Value {
    json!({"apiVersion": "policy.linkerd.io/v1beta3", "kind": "HTTPRoute",
        "metadata": {"name": server, "namespace": "default"},
        "spec": {"parentRefs": [{"group": "policy.weft.dev", "kind": "Server", "name": server}],
            "rules": [{"matches": [{"path": {"value": OPEN}}]}]}})
}

/// To the attackers' own account.
fn opened(route: &str) -> Value {
    json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"name": route, "namespace": "default"},
        "spec": {"targetRef": {"kind": "HTTPRoute", "name": route},
            "requiredAuthenticationRefs":
                [{"kind": "ServiceAccount", "name": "mallory", "namespace": "default"}]}})
}

/// Targets that say more than a path, or that name somebody else; and what would make a tunnel of the connection.
const ELSEWHERE: [(&str, &str); 9] = [
    (
        "a whole URL with another path",
        "GET http://shop/hidden HTTP/1.1\r\nHost: shop\r\n\r\n",
    ),
    (
        "a whole URL, and a Host that looks like the path",
        "GET http://shop/hidden HTTP/1.1\r\nHost: /open\r\n\r\n",
    ),
    (
        "a whole URL whose host begins like the path",
        "GET http://open/hidden HTTP/1.1\r\nHost: open\r\n\r\n",
    ),
    (
        "a whole URL with the path in its user",
        "GET http://x/open@shop/hidden HTTP/1.1\r\nHost: shop\r\n\r\n",
    ),
    (
        "a whole URL of another scheme",
        "GET file:///hidden HTTP/1.1\r\nHost: shop\r\n\r\n",
    ),
    (
        "a whole URL that goes up",
        "GET http://shop/open/../hidden HTTP/1.1\r\nHost: shop\r\n\r\n",
    ),
    (
        "CONNECT, and a request behind it",
        "CONNECT shop:80 HTTP/1.1\r\nHost: shop:80\r\n\r\nGET /hidden HTTP/1.1\r\nHost: shop\r\n\r\n",
    ),
    (
        "an upgrade that nobody asked for, and a request behind it",
        "GET /open HTTP/1.1\r\nHost: shop\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nGET /hidden HTTP/1.1\r\nHost: shop\r\n\r\n",
    ),
    (
        "another path for proxies to believe",
        "GET /open HTTP/1.1\r\nHost: shop\r\nX-Original-URL: /hidden\r\nX-Rewrite-URL: /hidden\r\n\r\nGET /hidden HTTP/1.1\r\nHost: shop\r\n\r\n",
    ),
];

/// The path that is allowed.
const OPEN: &str = "/open";
const PORTS: [u16; 3] = [7181, 7182, 7183];
