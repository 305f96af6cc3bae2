//! The cluster that is attacked: a target with a port for one friend alone and a port for all, its
//! friend on the other node, and attackers on both.

use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use weft_tests::capture::Capture;
use weft_tests::manifests::{authorization, server};
use weft_tests::scenario::{eventually, expect_echo, expect_refusal};
use weft_tests::testapp::{self, Accepted, Connected, Server};
use weft_tests::{Cluster, ClusterOptions, Pod, PodSpec};

/// The target's port that policy opens for the friend alone.
pub(crate) const GUARDED: u16 = 7000;
/// The target's port that everybody may reach: what the controls connect to.
pub(crate) const OPEN: u16 = 7001;
/// What the friend says, and nobody may read on the wire.
pub(crate) const SECRET: &str = "between-friends-only";

/// The account of clients that come in the middle of an attack, and mean no harm.
pub(crate) const NEWCOMER: &str = "newcomer";

/// What all attacks share.
pub(crate) struct Stage {
    pub(crate) cluster: Cluster,
    /// On node 1.
    pub(crate) target: Pod,
    /// On node 0, and the only one that may.
    pub(crate) friend: Pod,
    /// On node 1: the target's neighbour.
    pub(crate) near: Pod,
    /// On node 0: the friend's neighbour.
    pub(crate) far: Pod,
    /// On node 0 and no part of the mesh: nothing of Weft is between its process and the wire.
    pub(crate) outside: Pod,
    guarded: Server,
    open: Server,
    agents: Mutex<Vec<Option<u32>>>,
    /// Who else may be at the guarded port, for a while.
    further_friends: Mutex<Vec<IpAddr>>,
    /// Connections of friends to the guarded port.
    visits: AtomicUsize,
    /// How many were there before the policy was.
    before_policy: usize,
}

impl Stage {
    pub(crate) fn build(agent_args: &[&str]) -> Result<Stage> {
        let cluster = Cluster::with(ClusterOptions {
            agent_args: agent_args.iter().map(|it| (*it).to_owned()).collect(),
            ..ClusterOptions::default()
        })?;
        let target = cluster.add_pod(PodSpec::new("target").on(1))?;
        let friend = cluster.add_pod(PodSpec::new("friend").on(0))?;
        let near = cluster.add_pod(PodSpec::new("near").on(1).service_account("mallory"))?;
        let far = cluster.add_pod(PodSpec::new("far").on(0).service_account("mallory"))?;
        let outside = cluster.add_pod(PodSpec::new("outside").on(0).unmeshed())?;
        cluster.apply(&server("default", "guarded", "target", GUARDED))?;
        cluster.apply(&authorization("default", "friends", "guarded", &["friend"]))?;
        let mut stage = Stage {
            guarded: Server::start(&target, GUARDED, "echo", &[])?,
            open: Server::start(&target, OPEN, "echo", &[])?,
            agents: Mutex::new(cluster.nodes().iter().map(|it| it.agent_pid()).collect()),
            further_friends: Mutex::default(),
            visits: AtomicUsize::new(0),
            before_policy: 0,
            cluster,
            target,
            friend,
            near,
            far,
            outside,
        };
        eventually("the policy to be in effect", || {
            let mut refused = true;
            for pod in [&stage.near, &stage.far] {
                let said = testapp::say(pod, stage.guarded()[0], "may I?")?;
                refused &= said.received == 0;
            }
            ensure!(refused, "an attacker may");
            Ok(())
        })?;
        // Whoever came before the policy did.
        let before = stage.guarded.accepted()?.len();
        stage.visits.store(before, Ordering::Relaxed);
        stage.before_policy = before;
        Ok(stage)
    }

    /// The guarded port, on both addresses.
    pub(crate) fn guarded(&self) -> [SocketAddr; 2] {
        self.target.sockets(GUARDED)
    }

    /// The open port, on both addresses.
    pub(crate) fn open(&self) -> [SocketAddr; 2] {
        self.target.sockets(OPEN)
    }

    /// The attackers that are meshed: near the target, and far from it.
    pub(crate) fn attackers(&self) -> [&Pod; 2] {
        [&self.near, &self.far]
    }

    /// A further attacker, for what it will not survive. Its identity is the attackers'.
    pub(crate) fn another(&self, name: &str, node: usize) -> Result<Pod> {
        let spec = PodSpec::new(name).on(node).service_account("mallory");
        self.cluster.add_pod(spec)
    }

    /// The agents are other processes from now on, on purpose.
    pub(crate) fn agents_changed(&self) {
        let pids = self.cluster.nodes().iter().map(|it| it.agent_pid());
        if let Ok(mut agents) = self.agents.lock() {
            *agents = pids.collect();
        }
    }

    /// The friend says something to the target, on both families, and hears it back.
    pub(crate) fn visit(&self) -> Result<()> {
        for target in self.guarded() {
            self.visits.fetch_add(1, Ordering::Relaxed);
            expect_echo(&self.friend, target, SECRET)
                .with_context(|| format!("the friend's visit at {target}"))?;
        }
        Ok(())
    }

    /// The friend is about to visit in some other way than [`Stage::visit`].
    pub(crate) fn expect_visits(&self, count: usize) {
        self.visits.fetch_add(count, Ordering::Relaxed);
    }

    /// A further pod with the friend's account is about to visit.
    pub(crate) fn expect_visits_of(&self, pod: &Pod, count: usize) {
        if let Ok(mut friends) = self.further_friends.lock() {
            friends.extend(pod.addresses());
        }
        self.expect_visits(count);
    }

    /// Who was at the open port.
    pub(crate) fn seen_at_open(&self) -> Result<Vec<Accepted>> {
        self.open.accepted()
    }

    /// Runs something while the wire between the nodes is watched, with the friend visiting before and
    /// after: what the friend says must not be readable.
    pub(crate) fn watched(&self, attack: impl FnOnce() -> Result<()>) -> Result<()> {
        let capture = Capture::start(self.cluster.node(0).netns(), "eth0", self.cluster.dir())?;
        self.visit()?;
        attack()?;
        self.visit()?;
        capture.finish()?.ensure_without(SECRET)
    }

    /// What must hold after every attack.
    pub(crate) fn unharmed(&self) -> Result<()> {
        self.visit()?;
        for attacker in self.attackers() {
            expect_refusal(attacker, self.guarded()[0], "let me in")
                .context("policy no longer holds")?;
        }
        let accepted = self.guarded.accepted()?;
        let mut friends = self.friend.addresses().to_vec();
        friends.extend(self.further_friends.lock().iter().flat_map(|it| it.iter()));
        for visitor in accepted.iter().skip(self.before_policy) {
            ensure!(
                friends.contains(&visitor.accepted.ip()),
                "somebody else was at the guarded port: {visitor:?}"
            );
        }
        let visits = self.visits.load(Ordering::Relaxed);
        ensure!(
            accepted.len() <= visits,
            "{} were at the guarded port, and the friend was {visits} times",
            accepted.len()
        );
        self.no_false_identity()?;
        let agents = self
            .agents
            .lock()
            .map_err(|_| anyhow::anyhow!("poisoned"))?;
        for (node, before) in self.cluster.nodes().iter().zip(agents.iter()) {
            ensure!(node.agent_is_running(), "an agent died");
            ensure!(node.agent_pid() == *before, "an agent is another process");
            // Pods come and go in some attacks.
            eventually("the agent to be ready", || {
                let (status, body) = node.ready()?;
                ensure!(status == 200, "an agent is not ready: {body}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The guarded port was opened to the friend's identity only, and the open one to none that was
    /// not proved.
    fn no_false_identity(&self) -> Result<()> {
        let metrics = self.cluster.node(1).metrics()?;
        let friend = self.friend.identity();
        let guarded = [("srv_name", "guarded")];
        for sample in metrics.find("inbound_tcp_authz_allow_total", &guarded) {
            let id = sample.labels.get("client_id");
            ensure!(
                id == Some(&friend) && sample.labels.get("tls").is_some_and(|it| it == "true"),
                "the guarded port was opened to {sample:?}"
            );
        }
        let newcomer = self.near.identity().replace("mallory", NEWCOMER);
        let known = [friend, self.near.identity(), newcomer, String::new()];
        for sample in metrics.find("inbound_tcp_authz_allow_total", &[("pod", "target")]) {
            let id = sample.labels.get("client_id").cloned().unwrap_or_default();
            ensure!(
                known.contains(&id),
                "an identity out of nowhere: {sample:?}"
            );
        }
        Ok(())
    }
}

/// The exchange did not come about: it may be refused, reset, or lead nowhere, as long as nothing came.
pub(crate) fn expect_nothing(what: &str, said: &Connected) -> Result<()> {
    ensure!(
        said.outcome != "ok" && said.received == 0,
        "{what}: {said:?}"
    );
    Ok(())
}

/// The exchange came about: the control of an attack.
pub(crate) fn expect_all(what: &str, said: &Connected, text: &str) -> Result<()> {
    ensure!(
        said.outcome == "ok" && said.text == text,
        "{what}: {said:?}"
    );
    Ok(())
}

/// What a program of `weft-testapp` printed as its only line.
pub(crate) fn connected(out: &str) -> Result<Connected> {
    let line = out.lines().next().context("it said nothing")?;
    serde_json::from_str(line).with_context(|| format!("reading {line}"))
}
