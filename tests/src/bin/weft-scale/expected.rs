//! What agents have to have, by the objects: every workload, Service and endpoint, and of pods those of their node.

use std::collections::{BTreeSet, HashMap};
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use prost::Message;
use serde_json::Value;
use weft_proto::v1::{self, Kind};

use crate::agents::{Agent, State};
use crate::objects;
use crate::wire::Short;
use crate::world::{Node, World};

/// What there has to be.
pub(crate) struct Expected {
    shared: HashMap<Short, (String, Body)>,
    /// By node.
    own: HashMap<String, HashMap<Short, String>>,
}

enum Body {
    /// It is not looked at.
    Any,
    Workload {
        node: String,
        address: Ipv4Addr,
    },
    Endpoint {
        address: Ipv4Addr,
    },
}

impl Expected {
    pub(crate) fn of(world: &World) -> Expected {
        let mut shared = HashMap::new();
        let mut own: HashMap<String, HashMap<Short, String>> = HashMap::new();
        let short = |kind: Kind, name: &str| Short::of(kind as i32, name.as_bytes());
        for service in &world.services {
            let name = format!("{}/{}", service.namespace, service.name);
            shared.insert(short(Kind::Service, &name), (name, Body::Any));
            // All of them opt in.
            let namespace = service.namespace.clone();
            let key = short(Kind::MeshNamespace, &namespace);
            shared.insert(key, (namespace, Body::Any));
        }
        for pod in world.living() {
            let name = format!("{}/{}", world.services[pod.service].namespace, pod.name);
            let (node, address) = (world.nodes[pod.node].name.clone(), pod.address);
            let pods = own.entry(node.clone()).or_default();
            pods.insert(short(Kind::NodePod, &name), name.clone());
            let body = Body::Workload { node, address };
            shared.insert(short(Kind::Workload, &name), (name, body));
            if pod.ready {
                let endpoint = world.endpoint(pod);
                let body = Body::Endpoint { address };
                shared.insert(short(Kind::Endpoint, &endpoint), (endpoint, body));
            }
        }
        Expected { shared, own }
    }

    /// Whether every agent has all of it and nothing else, as the first one has it; and that one what the objects say.
    pub(crate) fn check(&self, agents: &[std::sync::Arc<Agent>]) -> Result<()> {
        let first = agents.first().context("no agents")?;
        let versions = first.state().held.clone();
        for agent in agents {
            let state = agent.state();
            self.check_one(&agent.node, &state, &versions)
                .with_context(|| format!("the agent of {}", agent.node))?;
        }
        self.check_bodies(&first.state())
    }

    fn check_one(&self, node: &str, state: &State, versions: &HashMap<Short, u64>) -> Result<()> {
        let missing = self
            .shared
            .iter()
            .filter(|(key, _)| !state.held.contains_key(key));
        let missing: Vec<&String> = missing.map(|(_, (name, _))| name).collect();
        let some = missing.iter().take(SHOWN).collect::<Vec<_>>();
        ensure!(
            missing.is_empty(),
            "{} are missing: {some:?}",
            missing.len()
        );
        for (key, (name, _)) in &self.shared {
            let same = state.held.get(key) == versions.get(key);
            ensure!(same, "{name} is of another version");
        }
        let own = self.own.get(node);
        for (key, name) in own.into_iter().flatten() {
            ensure!(
                state.held.contains_key(key),
                "its own pod {name} is missing"
            );
        }
        let expected = self.shared.len() + own.map_or(0, HashMap::len);
        let more = state.held.len() - expected;
        ensure!(more == 0, "it has {more} resources that are gone");
        Ok(())
    }

    fn check_bodies(&self, state: &State) -> Result<()> {
        for (key, (name, body)) in &self.shared {
            let told = || state.bodies.get(key).cloned().unwrap_or_default();
            match body {
                Body::Any => {}
                Body::Workload { node, address } => {
                    let told = v1::Workload::decode(told())?;
                    ensure!(
                        told.node == *node && told.addresses == [address.octets()],
                        "{name}: {told:?}"
                    );
                }
                Body::Endpoint { address } => {
                    let told = v1::Endpoint::decode(told())?;
                    let target = told.ports.iter().find(|it| it.service_port == 80);
                    ensure!(
                        told.address == address.octets()
                            && target.is_some_and(|it| it.target_port == u32::from(objects::HTTP)),
                        "{name}: {told:?}"
                    );
                }
            }
        }
        Ok(())
    }

    /// The same for an agent that tells what it has for people.
    pub(crate) fn check_dump(&self, dump: &Value) -> Result<()> {
        let list = |of: &Value, field: &str| of[field].as_array().cloned().unwrap_or_default();
        let named = |it: &Value| {
            let text = |field: &str| it[field].as_str().unwrap_or_default().to_owned();
            format!("{}/{}", text("namespace"), text("name"))
        };
        let workloads: BTreeSet<String> = list(dump, "workloads").iter().map(named).collect();
        let mut endpoints = BTreeSet::new();
        for service in list(dump, "services") {
            for port in list(&service, "ports").iter().filter(|it| it["port"] == 80) {
                for endpoint in list(port, "endpoints") {
                    let address = endpoint["address"].as_str().unwrap_or_default();
                    endpoints.insert(format!("{}@{address}", named(&service)));
                }
            }
        }
        let expected = |wanted: fn(&Body) -> bool| -> BTreeSet<String> {
            let all = self.shared.values().filter(|(_, body)| wanted(body));
            all.map(|(name, _)| name.clone()).collect()
        };
        for (what, has, wanted) in [
            (
                "workloads",
                workloads,
                expected(|it| matches!(it, Body::Workload { .. })),
            ),
            (
                "endpoints",
                endpoints,
                expected(|it| matches!(it, Body::Endpoint { .. })),
            ),
        ] {
            let lacks: Vec<_> = wanted.difference(&has).take(SHOWN).collect();
            let more: Vec<_> = has.difference(&wanted).take(SHOWN).collect();
            ensure!(
                lacks.is_empty() && more.is_empty(),
                "{what}: {} of {}; lacks {lacks:?}, has {more:?} beside",
                has.len(),
                wanted.len()
            );
        }
        Ok(())
    }
}

/// The node of the real agent: that which no simulated one is of.
pub(crate) fn real_node(world: &World) -> Result<&Node> {
    world.nodes.last().context("no nodes")
}

/// Of what is wrong.
const SHOWN: usize = 5;
