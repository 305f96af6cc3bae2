//! The cluster: which Services, pods and nodes there are, and how they change. The API server has what this says.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::Result;
use serde_json::Value;
use weft_apiserver::Store;

use crate::objects;

/// How large everything is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) services: usize,
    pub(crate) pods: usize,
    /// Simulated ones, each of a node. One node more has a real one.
    pub(crate) agents: usize,
    pub(crate) changes_per_second: usize,
    pub(crate) seconds: usize,
}

/// All that there is.
pub(crate) struct World {
    pub(crate) store: Arc<Store>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) services: Vec<Service>,
    pub(crate) pods: Vec<Pod>,
    /// Pods that were not touched yet, in no order.
    untouched: VecDeque<usize>,
    /// Pods that were made not ready, the first one first.
    unready: VecDeque<usize>,
    /// A pod that was deleted and not replaced yet.
    deleted: Option<usize>,
    steps: usize,
}

pub(crate) struct Node {
    pub(crate) name: String,
    number: usize,
    /// The last number of an address that was given to a pod; none is given twice.
    last_host: u8,
}

pub(crate) struct Service {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    /// Its pods, by slice.
    slices: Vec<Vec<usize>>,
}

#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) service: usize,
    slice: usize,
    pub(crate) node: usize,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) address: Ipv4Addr,
    pub(crate) ready: bool,
    pub(crate) gone: bool,
}

/// A change that agents are to hear of: an endpoint is there from now on, or not any more.
pub(crate) struct Step {
    pub(crate) endpoint: String,
    pub(crate) present: bool,
    writes: Vec<Write>,
}

enum Write {
    Apply(Value),
    Delete(Value),
}

impl Size {
    pub(crate) const WHOLE: Size = Size {
        services: 1000,
        pods: 20_000,
        agents: 200,
        changes_per_second: 200,
        seconds: 60,
    };
    pub(crate) const TENTH: Size = Size {
        services: 100,
        pods: 2000,
        agents: 20,
        changes_per_second: 20,
        seconds: 10,
    };
}

impl World {
    /// Writes everything into a new store.
    pub(crate) fn fill(size: Size) -> Result<World> {
        let store = Store::of_mesh();
        for namespace in ["default", "kube-system", SYSTEM] {
            store.apply(&objects::namespace(namespace, false))?;
        }
        let mut world = World {
            store,
            nodes: (0..=size.agents).map(Node::new).collect(),
            services: vec![],
            pods: Vec::with_capacity(size.pods),
            untouched: VecDeque::new(),
            unready: VecDeque::new(),
            deleted: None,
            steps: 0,
        };
        for node in &world.nodes {
            world.store.apply(&objects::node(&node.name, node.number))?;
            world.store.apply(&node.agent_pod())?;
        }
        for number in 0..size.services.div_ceil(SERVICES_PER_NAMESPACE) {
            world
                .store
                .apply(&objects::namespace(&namespace(number), true))?;
        }
        for number in 0..size.services {
            let service = Service::new(number);
            world.store.apply(&service.object())?;
            world.store.apply(&service.account())?;
            world.services.push(service);
        }
        for number in 0..size.pods {
            let service = service_of(number, size);
            world.add_pod(service, number % (size.agents + 1));
        }
        for pod in &world.pods {
            world.store.apply(&world.pod_object(pod))?;
        }
        for (number, service) in world.services.iter().enumerate() {
            for slice in 0..service.slices.len() {
                world.store.apply(&world.slice_object(number, slice))?;
            }
        }
        world.untouched = shuffled(size.pods);
        Ok(world)
    }

    /// What happens next: a pod is not ready any more, one that was so is ready again, one is deleted, another one takes
    /// its place at another address. No pod changes twice within a second or so.
    pub(crate) fn step(&mut self) -> Option<Step> {
        self.steps += 1;
        match self.steps % 4 {
            1 => self.flip(false),
            2 if self.unready.len() > UNREADY => self.flip(true),
            2 => self.flip(false),
            3 => self.delete(),
            _ => Some(self.replace()),
        }
    }

    pub(crate) fn endpoint(&self, pod: &Pod) -> String {
        let service = &self.services[pod.service];
        format!("{}/{}@{}", service.namespace, service.name, pod.address)
    }

    /// Those that are there.
    pub(crate) fn living(&self) -> impl Iterator<Item = &Pod> {
        self.pods.iter().filter(|it| !it.gone)
    }

    fn flip(&mut self, ready: bool) -> Option<Step> {
        let number = match ready {
            true => self.unready.pop_front()?,
            false => self.untouched.pop_front()?,
        };
        if !ready {
            self.unready.push_back(number);
        }
        self.pods[number].ready = ready;
        let pod = &self.pods[number];
        let writes = vec![
            Write::Apply(self.pod_object(pod)),
            Write::Apply(self.slice_object(pod.service, pod.slice)),
        ];
        Some(self.told(pod, ready, writes))
    }

    fn delete(&mut self) -> Option<Step> {
        let number = self.untouched.pop_front()?;
        let object = self.pod_object(&self.pods[number]);
        self.pods[number].gone = true;
        self.deleted = Some(number);
        let pod = self.pods[number].clone();
        self.services[pod.service].slices[pod.slice].retain(|it| *it != number);
        let slice = self.slice_object(pod.service, pod.slice);
        Some(self.told(
            &pod,
            false,
            vec![Write::Delete(object), Write::Apply(slice)],
        ))
    }

    fn replace(&mut self) -> Step {
        let replaced = self.deleted.take().unwrap_or_default();
        let (service, node) = (self.pods[replaced].service, self.pods[replaced].node);
        // Somewhere else, as a scheduler may have it.
        let number = self.add_pod(service, (node + 1) % self.nodes.len());
        let pod = &self.pods[number];
        let writes = vec![
            Write::Apply(self.pod_object(pod)),
            Write::Apply(self.slice_object(pod.service, pod.slice)),
        ];
        self.told(pod, true, writes)
    }

    fn told(&self, pod: &Pod, present: bool, writes: Vec<Write>) -> Step {
        Step {
            endpoint: self.endpoint(pod),
            present,
            writes,
        }
    }

    fn add_pod(&mut self, service: usize, node: usize) -> usize {
        let number = self.pods.len();
        let slices = &mut self.services[service].slices;
        // As the controller manager fills them.
        let free = slices.iter().position(|it| it.len() < MOST_OF_A_SLICE);
        let slice = free.unwrap_or_else(|| {
            slices.push(vec![]);
            slices.len() - 1
        });
        slices[slice].push(number);
        let name = format!(
            "{}-{}-{number:05x}",
            self.services[service].name,
            objects::TEMPLATE
        );
        self.pods.push(Pod {
            service,
            slice,
            node,
            name,
            uid: format!("00000000-0000-4000-8000-{number:012x}"),
            address: self.nodes[node].take_address(),
            ready: true,
            gone: false,
        });
        number
    }

    fn pod_object(&self, pod: &Pod) -> Value {
        let service = &self.services[pod.service];
        objects::pod(service, pod, &self.nodes[pod.node].name)
    }

    fn slice_object(&self, service: usize, slice: usize) -> Value {
        let of = &self.services[service];
        let pods = of.slices[slice].iter().map(|it| &self.pods[*it]);
        let pods = pods.map(|pod| (pod, self.nodes[pod.node].name.as_str(), pod.node));
        objects::slice(of, slice, pods)
    }
}

impl Step {
    /// Writes it.
    pub(crate) fn write(self, store: &Store) -> Result<()> {
        for write in self.writes {
            match write {
                Write::Apply(object) => store.apply(&object)?,
                Write::Delete(object) => store.delete(&object)?,
            }
        }
        Ok(())
    }
}

impl Node {
    fn new(number: usize) -> Node {
        Node {
            name: format!("node-{number}"),
            number,
            last_host: 1,
        }
    }

    /// Name and uid of the pod of its agent.
    pub(crate) fn agent(&self) -> (String, String) {
        let number = self.number;
        (
            format!("weft-agent-{number:05x}"),
            format!("00000000-0000-4000-9000-{number:012x}"),
        )
    }

    fn agent_pod(&self) -> Value {
        let (name, uid) = self.agent();
        objects::agent_pod(&name, &uid, &self.name, self.number)
    }

    fn take_address(&mut self) -> Ipv4Addr {
        self.last_host = self.last_host.wrapping_add(1);
        assert!(self.last_host > 1, "a node has no addresses left");
        Ipv4Addr::new(10, 244, self.number as u8, self.last_host)
    }
}

impl Service {
    fn new(number: usize) -> Service {
        let [high, low] = (number as u16 + 256).to_be_bytes();
        Service {
            namespace: namespace(number / SERVICES_PER_NAMESPACE),
            name: format!("service-{number}"),
            address: Ipv4Addr::new(10, 96, high, low),
            slices: vec![vec![]],
        }
    }

    fn object(&self) -> Value {
        objects::service(&self.namespace, &self.name, self.address)
    }

    fn account(&self) -> Value {
        objects::service_account(&self.namespace, &self.name)
    }
}

fn namespace(number: usize) -> String {
    format!("team-{number}")
}

/// Half of all pods are of a twentieth of the Services: clusters have few large ones and many small ones.
fn service_of(pod: usize, size: Size) -> usize {
    let large = (size.services / 20).max(1);
    let turn = pod / 2;
    match pod % 2 {
        0 => turn % large,
        _ => large + turn % (size.services - large),
    }
}

/// Numbers in an order that is the same in every run.
fn shuffled(count: usize) -> VecDeque<usize> {
    let mut numbers: Vec<usize> = (0..count).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..count).rev() {
        // Knuth's generator (TAOCP 3.3.4): no chance is needed here, only disorder.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        numbers.swap(last, (state >> 33) as usize % (last + 1));
    }
    numbers.into()
}

/// The namespace of controller and agents.
pub(crate) const SYSTEM: &str = "weft-system";
const SERVICES_PER_NAMESPACE: usize = 20;
/// `--max-endpoints-per-slice` of the controller manager.
const MOST_OF_A_SLICE: usize = 100;
/// Pods that are not ready at a time, at least.
const UNREADY: usize = 50;
