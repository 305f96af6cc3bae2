//! What the demo plays on: the cluster, its pods and their programs.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result};
use weft_tests::apps::{Nginx, Redis};
use weft_tests::capture::Capture;
use weft_tests::cluster::Node;
use weft_tests::manifests::ServiceSpec;
use weft_tests::{Cluster, DEADLINE, Pod, PodSpec, wait_for};

use crate::split::Catalog;
use crate::stock::Stock;

/// Two nodes; on node 0 the pods `order`, `intruder` and `cache`, on node 1 `payment`.
pub(crate) struct Stage {
    // Programs and pods end before the cluster they live in.
    pub(crate) nginx: Nginx,
    _redis: Redis,
    pub(crate) order: Pod,
    pub(crate) intruder: Pod,
    pub(crate) cache: Pod,
    pub(crate) payment: Pod,
    /// The address of the Service `payment`, port 80.
    pub(crate) payment_service: SocketAddr,
    /// What the act about splits adds.
    pub(crate) catalog: Option<Catalog>,
    /// What the acts about single requests add.
    pub(crate) stock: Option<Stock>,
    pub(crate) cluster: Cluster,
}

impl Stage {
    /// Builds all of it, telling what it does.
    pub(crate) fn set(tell: &mut dyn FnMut(&str)) -> Result<Stage> {
        let start = Instant::now();
        let cluster = Cluster::start()?;
        tell(&format!(
            "two nodes with their agents are ready after {} ms",
            start.elapsed().as_millis()
        ));
        let pod = |name: &str, account: &str, node: usize| {
            let spec = PodSpec::new(name).namespace("production");
            cluster.add_pod(spec.service_account(account).deployment(name).on(node))
        };
        let order = pod("order", "order-service", 0)?;
        let intruder = pod("intruder", "intruder", 0)?;
        let cache = pod("cache", "cache", 0)?;
        let payment = pod("payment", "payment", 1)?;
        for pod in [&order, &intruder, &cache, &payment] {
            tell(&format!(
                "pod {:<8} on node {} at {} and {}, {}",
                pod.name(),
                pod.node_index(),
                pod.v4(),
                pod.v6(),
                pod.identity()
            ));
        }
        let nginx = Nginx::start(&payment, 8080)?;
        let redis = Redis::start(&cache, 6379)?;
        let service = ServiceSpec::new("payment").namespace("production");
        let [v4, _] = cluster.add_service(&service.select("app", "payment").port(80, 8080))?;
        wait_for_service(&cluster, "payment", 1)?;
        tell(&format!(
            "nginx serves in payment behind the Service payment at {v4}:80, redis in cache; \
             none of them knows of the mesh"
        ));
        Ok(Stage {
            nginx,
            _redis: redis,
            order,
            intruder,
            cache,
            payment,
            payment_service: (v4, 80).into(),
            catalog: None,
            stock: None,
            cluster,
        })
    }

    /// What the first act about single requests has added.
    pub(crate) fn stock(&self) -> Result<&Stock> {
        self.stock.as_ref().context("its pods are not there")
    }

    /// Captures what leaves and enters a node.
    pub(crate) fn capture(&self, node: usize) -> Result<Capture<'_>> {
        let node: &Node = self.cluster.node(node);
        Capture::start(node.netns(), "eth0", node.dir())
    }

    /// The address and port that redis listens on.
    pub(crate) fn redis(&self) -> (IpAddr, u16) {
        (self.cache.v4().into(), 6379)
    }

    /// Prints commands to try.
    pub(crate) fn invite(&self) {
        let node = self.cluster.node(0);
        println!("The mesh stays up until Ctrl-C. In another terminal, as root:\n");
        let order = self.order.netns().name();
        println!(
            "   # a call through the mesh, as the pod order (in its cgroup, so that it is redirected)"
        );
        println!(
            "   sh -c 'echo $$ > {}/cgroup.procs; exec ip netns exec {order} curl -s http://{}/'",
            self.order.cgroup().path().display(),
            self.payment_service
        );
        println!("   # the wire between the nodes");
        println!(
            "   ip netns exec {} tcpdump -ni eth0 tcp",
            node.netns().name()
        );
        if let Ok(controller) = self.cluster.controller() {
            println!(
                "   # what the mesh does: weft stat, edges, tap, authz, identity, endpoints, ..."
            );
            println!(
                "   export WEFT_CONTROLLER_SOCKET={}; weft check",
                controller.admin_socket().display()
            );
        }
        println!("   # metrics, state and log of the agent of node 0");
        println!(
            "   ip netns exec {} curl -s http://{}/metrics",
            node.netns().name(),
            node.admin_address()
        );
        println!(
            "   curl -s --unix-socket {} http://agent/config_dump",
            node.admin_socket().display()
        );
        println!(
            "   # policy and weights: edit, add or remove a manifest here; it is in effect within a second"
        );
        println!("   ls {}\n", self.cluster.manifests().dir().display());
    }

    /// Sleeps until the signal handler ends the process.
    pub(crate) fn wait_for_interrupt(&self) {
        loop {
            std::thread::park();
        }
    }
}

/// Waits until the client's agent knows a Service with so many endpoints.
pub(crate) fn wait_for_service(cluster: &Cluster, name: &str, endpoints: usize) -> Result<()> {
    wait_for("the agent to know the Service", DEADLINE, || {
        let known = cluster.node(0).known_service(name)?;
        let known = known.filter(|it| {
            let known = it["ports"][0]["endpoints"].as_array();
            known.is_some_and(|it| it.len() >= endpoints)
        });
        Ok(known.map(drop))
    })
}
