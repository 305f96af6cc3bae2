//! Makes the pods that are enrolled those that are wanted.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinSet;
use weft_core::{NodePod, Workload, WorkloadId};

use super::closed::{self, Closed};
use super::find::{Finder, NotFound, Place};
use super::opt_in::{self, Nobodys, OptIn};
use super::{EnrollError, LocalPod, NodeConfig, PodThreads, listen, loopback};
use crate::bpf::{BpfError, ListenerRole, PodEntry, Standing};
use crate::identity::{CertificateState, CertificateStatus};
use crate::netns::Netns;
use crate::proxy::{self, Context};

/// The node's pods, as this agent has them.
pub(super) struct Node {
    pub(super) context: Arc<Context>,
    /// What this agent is to the kernel's state.
    pub(super) standing: Standing,
    /// Cookie of the agent's own namespace.
    host_cookie: Option<u64>,
    pub(super) finder: Finder,
    config: NodeConfig,
    enrolled: HashMap<WorkloadId, Entry>,
    /// Whether older agents know that this one has all pods.
    settled: bool,
    /// Pods that are in the kernel's maps and that this agent does not serve.
    closed: Closed,
    /// Cookies of pods that are gone and could not be removed from the kernel's maps.
    not_unenrolled: BTreeSet<u64>,
    draining: JoinSet<()>,
}

/// Why a pod is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    /// It takes no part in the mesh any more, although it lives.
    OptedOut,
    /// It is not described any more. Its processes may live on.
    NotDescribed,
    /// Its sockets are not the node's, so nothing of it passes here.
    NotMeshable,
    /// Another pod, or another identity, in the same namespace.
    Replaced,
    /// Its namespace does not exist any more, or another has its name.
    NamespaceGone,
}

struct Entry {
    pod: Arc<LocalPod>,
    description: Arc<NodePod>,
    record: Arc<Workload>,
    /// The process that it is known by, if it was found by one.
    place: Option<Arc<Place>>,
}

impl Entry {
    /// Whether the process that it is known by has ended. Others of its processes may run.
    fn is_lost(&self) -> bool {
        self.place.as_ref().is_some_and(|it| !it.is_current())
    }
}

/// The network namespace of a pod.
struct Opened {
    netns: Arc<Netns>,
    cookie: u64,
    inode: u64,
    place: Option<Arc<Place>>,
}

impl Node {
    /// # Errors
    /// The thread that finds pods cannot be started.
    pub(super) fn new(context: Arc<Context>, config: NodeConfig) -> io::Result<Self> {
        Ok(Self {
            context,
            finder: Finder::start(&config.proc)?,
            config,
            standing: Standing::default(),
            host_cookie: Netns::current().and_then(|netns| netns.cookie()).ok(),
            enrolled: HashMap::new(),
            settled: false,
            closed: Closed::default(),
            not_unenrolled: BTreeSet::new(),
            draining: JoinSet::new(),
        })
    }

    /// Takes note of what this agent is to the kernel's state, and shows it.
    pub(super) fn stand(&mut self, standing: Standing) {
        if standing != self.standing {
            tracing::info!(?standing, "which agent serves this node");
            self.standing = standing;
        }
        self.context.pods.stand(standing);
    }

    /// Whether there is a certificate for every pod.
    pub(super) fn is_prepared(&self) -> bool {
        let held = |it: &CertificateStatus| {
            matches!(
                it.state,
                CertificateState::Held | CertificateState::InDanger
            )
        };
        self.want_identities(&self.context.store.node_pods());
        self.context.identities.status().iter().all(held)
    }

    /// Lets the listeners close.
    pub(super) fn stop_accepting(&self) {
        for entry in self.enrolled.values() {
            entry.pod.stop_accepting.cancel();
        }
    }

    /// Lets the listeners close and the flows finish.
    pub(super) fn step_down(&mut self) {
        self.stop_accepting();
        let grace = self.context.config.drain_deadline;
        for entry in self.enrolled.values() {
            let pod = Arc::clone(&entry.pod);
            self.draining
                .spawn(async move { pod.finish_flows(grace).await });
        }
    }

    /// Waits until the flows of a pod that was let go have ended; false if there is none.
    pub(super) async fn drained_one(&mut self) -> bool {
        self.draining.join_next().await.is_some()
    }

    /// Makes what is enrolled what is wanted, as far as possible now and if that is up to this
    /// agent.
    pub(super) fn reconcile(&mut self) {
        // Asked first: what is complete by now is in what is read next.
        let complete = self.context.store.is_complete();
        let wanted = self.context.store.node_pods();
        self.unenroll_what_failed();
        self.follow_processes(&wanted);
        self.remove_unwanted(&wanted);
        self.want_identities(&wanted);
        self.want_places(&wanted);
        let enrolled = &self.enrolled;
        let is_used = |cookie| enrolled.values().any(|it| it.pod.cookie == cookie);
        self.context.pods.announced().tidy(&wanted, is_used);
        let mut waiting = Vec::new();
        for description in wanted {
            if let Err(error) = self.ensure(&description) {
                waiting.push((description.id.clone(), error));
            }
        }
        // Nobody is taken for gone who is still looked for.
        let looked = |(_, error): &(_, EnrollError)| {
            !matches!(error, EnrollError::NotFound(NotFound::NotYet))
        };
        if complete && self.standing == Standing::Owner && waiting.iter().all(looked) {
            self.remove_closed();
            self.settle(&waiting);
        }
        self.publish(waiting);
    }

    /// Notes other processes of pods whose own has ended that they were known by, and the first of pods that the CNI
    /// plugin has announced: one that is somewhere else says that the announcement does not hold any more.
    fn follow_processes(&mut self, wanted: &[Arc<NodePod>]) {
        let announced = self.context.pods.announced();
        for pod in wanted.iter().filter(|it| it.netns.is_none()) {
            if let Ok(place) = self.finder.finding(&pod.uid)
                && place.is_current()
                && let Ok(started) = place.started()
            {
                announced.follow(pod, place.inode, started);
            }
        }
        let is_unplaced = |it: &Entry| it.place.is_none() && it.description.netns.is_none();
        let entries = self.enrolled.values_mut();
        for entry in entries.filter(|it| it.is_lost() || is_unplaced(it)) {
            if let Ok(place) = self.finder.finding(&entry.pod.uid)
                && place.inode == entry.pod.netns_inode
            {
                entry.place = Some(place);
            }
        }
    }

    /// Has those found of which it is not known where they are, or not any more. What the source says is believed; what
    /// the CNI plugin says only until there is a process: it may not be called for the next sandbox.
    fn want_places(&self, wanted: &[Arc<NodePod>]) {
        let is_missing = |it: &&Arc<NodePod>| {
            let entry = self.enrolled.get(&it.id);
            let is_placed = |it: &Entry| it.place.is_some() && !it.is_lost();
            it.netns.is_none() && !entry.is_some_and(is_placed)
        };
        let is_served = !matches!(self.standing, Standing::Superseded { .. });
        let missing = wanted.iter().filter(is_missing).filter(|_| is_served);
        self.finder.want(missing.map(|it| &**it));
    }

    /// Whether a pod has a new sandbox: none of its processes is where it was enrolled. That none is found at all says
    /// nothing.
    fn has_moved(&self, description: &NodePod, entry: &Entry) -> bool {
        if self.context.pods.announced().of(description).is_some() {
            // That one holds, until it is found out that it does not.
            return false;
        }
        let found = || self.finder.finding(&entry.pod.uid);
        entry.is_lost() && found().is_ok_and(|it| it.inode != entry.pod.netns_inode)
    }

    /// Why a pod that the CNI plugin has announced cannot be in the mesh: that shows only when it has processes. Once one
    /// was seen that is the node's, no other changes that.
    fn not_meshable(&self, description: &NodePod, entry: Option<&Entry>) -> Option<NotFound> {
        let is_placed = entry.is_some_and(|it| it.place.is_some());
        if is_placed || description.netns.is_some() {
            return None;
        }
        let found = self.finder.finding(&description.uid).err();
        found.filter(|it| matches!(it, NotFound::Sandboxed(_)))
    }

    fn is_not_meshable(&self, description: &NodePod, entry: &Entry) -> bool {
        self.not_meshable(description, Some(entry)).is_some()
    }

    /// Lets go of pods that are no longer described, came back as somebody else, or whose
    /// namespace is gone.
    fn remove_unwanted(&mut self, wanted: &[Arc<NodePod>]) {
        let wanted: HashMap<_, _> = wanted.iter().map(|it| (&it.id, it)).collect();
        let mut gone = Vec::new();
        for (id, entry) in &self.enrolled {
            let leaving = match wanted.get(id) {
                _ if self.is_opted_out(&entry.pod) => Leaving::OptedOut,
                None => Leaving::NotDescribed,
                Some(description) if is_gone(description, &entry.pod) => Leaving::NamespaceGone,
                Some(it) if self.has_moved(it, entry) => Leaving::NamespaceGone,
                Some(it) if self.is_not_meshable(it, entry) => Leaving::NotMeshable,
                Some(description) if self.has_left(description, &entry.pod) => {
                    Leaving::NamespaceGone
                }
                Some(description) if description.uid != entry.pod.uid => Leaving::Replaced,
                Some(_) if self.is_somebody_else(&entry.pod) => Leaving::Replaced,
                Some(_) => continue,
            };
            gone.push((id.clone(), leaving));
        }
        for (id, leaving) in gone {
            if let Some(entry) = self.enrolled.remove(&id) {
                tracing::info!(pod = %id, uid = entry.pod.uid, why = ?leaving, "pod leaves the mesh");
                self.release(entry, leaving);
            }
        }
    }

    /// Whether the CNI plugin said that the pod's sandbox is gone, or another.
    fn has_left(&self, description: &NodePod, pod: &LocalPod) -> bool {
        let announced = self.context.pods.announced();
        announced.has_left(description, pod.cookie)
    }

    /// A pod's record; as long as nobody else knows an address of the pod, with those that the CNI plugin said.
    fn record(&self, description: &NodePod) -> Option<Arc<Workload>> {
        let record = self.context.store.workload(&description.id)?;
        let announced = self.context.pods.announced();
        Some(announced.completed(description, record))
    }

    /// Whether the pod's record names another identity than it is enrolled with. A record that is
    /// missing says nothing: as long as the pod is described it is not let go.
    fn is_somebody_else(&self, pod: &LocalPod) -> bool {
        let record = self.context.store.workload(&pod.id);
        let identity = record.as_ref().and_then(|it| it.identity());
        identity.is_some_and(|it| *it != pod.identity)
    }

    fn is_opted_out(&self, pod: &LocalPod) -> bool {
        let addresses = &pod.record.load().addresses;
        closed::is_opted_out(&self.context.store, Some(&pod.id), addresses)
    }

    /// Stops to serve a pod, and lets its flows finish if it still lives. It is refused from then on,
    /// unless it takes no part in the mesh.
    fn release(&mut self, entry: Entry, leaving: Leaving) {
        let pod = entry.pod;
        let is_outside = matches!(leaving, Leaving::OptedOut | Leaving::NotMeshable);
        if is_outside {
            self.unenroll(pod.cookie);
        } else if self.standing == Standing::Owner {
            let path = entry.description.netns.as_deref();
            self.closed.close(&self.context.bpf, &pod, path);
        }
        pod.left.cancel();
        pod.stop_accepting.cancel();
        let grace = match leaving {
            Leaving::NamespaceGone => Duration::ZERO,
            Leaving::OptedOut
            | Leaving::NotMeshable
            | Leaving::NotDescribed
            | Leaving::Replaced => self.context.config.drain_deadline,
        };
        let context = Arc::clone(&self.context);
        self.draining.spawn(async move {
            pod.finish_flows(grace).await;
            // Without flows this may run before it is taken out of the index.
            let current = context.pods.by_id(&pod.id);
            if current.is_none_or(|current| Arc::ptr_eq(&current, &pod)) {
                context.telemetry.forget_pod(&pod.id);
            }
            // The namespace may live on, outside of the mesh or as somebody else.
            let others = context.pods.all();
            let mut others = others.iter().filter(|it| !Arc::ptr_eq(it, &pod));
            let taken = others.any(|it| it.cookie == pod.cookie);
            if is_outside && !taken {
                // Harmless where it stays.
                let _ = loopback::remove_way_back(&pod.netns);
            }
        });
    }

    fn unenroll(&mut self, cookie: u64) {
        if self.standing != Standing::Owner {
            return;
        }
        if let Err(error) = self.context.bpf.unenroll(cookie) {
            tracing::error!(cookie, %error, "removing a pod from the kernel's maps; trying again");
            self.not_unenrolled.insert(cookie);
        }
    }

    fn unenroll_what_failed(&mut self) {
        for cookie in std::mem::take(&mut self.not_unenrolled) {
            if !self.enrolled.values().any(|it| it.pod.cookie == cookie) {
                self.unenroll(cookie);
            }
        }
    }

    /// Enrolls a pod, or brings an enrolled one up to date.
    fn ensure(&mut self, description: &Arc<NodePod>) -> Result<(), EnrollError> {
        let record = self.record(description);
        let owner = self.standing == Standing::Owner;
        let Some(entry) = self.enrolled.get_mut(&description.id) else {
            if !owner {
                return Err(BpfError::NotOwner.into());
            }
            let entry = self.enroll(description, record)?;
            self.enrolled.insert(description.id.clone(), entry);
            return Ok(());
        };
        // Whatever is missing for the rest.
        entry.pod.set_by_tunnels_only(description.by_tunnels_only);
        let record = record.ok_or(EnrollError::NoRecord)?;
        if entry.description == *description && entry.record == record {
            return Ok(());
        }
        if owner {
            self.context.bpf.update(&PodEntry {
                cookie: entry.pod.cookie,
                addresses: record.addresses.clone(),
                probe_ports: description.probe_ports.clone(),
            })?;
        }
        if entry.record.addresses != record.addresses {
            add_way_back(&entry.pod.netns, &entry.pod.id);
        }
        entry.pod.record.store(Arc::clone(&record));
        entry.record = record;
        entry.description = Arc::clone(description);
        Ok(())
    }

    /// Enrolls a pod. If that is not possible as soon as its namespace is known, it is refused
    /// everything meanwhile.
    fn enroll(
        &self,
        description: &Arc<NodePod>,
        record: Option<Arc<Workload>>,
    ) -> Result<Entry, EnrollError> {
        if record.as_ref().is_some_and(|it| it.identity().is_none()) {
            return Err(EnrollError::NoRecord);
        }
        let opened = self.open(description, record.as_deref())?;
        let cookie = opened.cookie;
        if self.host_cookie.is_none_or(|host| host == cookie) {
            return Err(EnrollError::HostNetns);
        }
        if let Some(other) = self.enrolled.values().find(|it| it.pod.cookie == cookie) {
            return Err(EnrollError::NetnsShared(other.pod.id.clone()));
        }
        let addresses = record.as_ref().map(|it| it.addresses.clone());
        let entry = PodEntry {
            cookie,
            addresses: addresses.unwrap_or_default(),
            probe_ports: description.probe_ports.clone(),
        };
        let opt_in = self.begin_opt_in(&description.id, &opened);
        let begun = record
            .ok_or(EnrollError::NoRecord)
            .and_then(|record| self.listen(description, record, &opened, &entry));
        let outcome = begun.map_err(|error| {
            let refused = self.context.bpf.refuse(&entry, opened.netns.as_fd());
            match refused {
                Ok(()) => EnrollError::Refused(Box::new(error)),
                Err(refusing) => {
                    let pod = &description.id;
                    tracing::error!(%pod, error = %refusing, "refusing a pod that cannot be enrolled");
                    error
                }
            }
        });
        let is_in = matches!(outcome, Ok(_) | Err(EnrollError::Refused(_)));
        if let Some(opt_in) = opt_in.filter(|_| is_in) {
            let (ended, nobodys) = opt_in.finish(&description.id, &entry);
            self.context.pods.count_ended(ended);
            if let Some(nobodys) = nobodys {
                self.end_nobodys(nobodys);
            }
        }
        outcome
    }

    /// Looks again at connections of a pod that has just joined. Those of an agent that took over meanwhile would be taken
    /// for the pod's.
    fn end_nobodys(&self, nobodys: Nobodys) {
        let context = Arc::clone(&self.context);
        tokio::spawn(async move {
            tokio::time::sleep(opt_in::SETTLED).await;
            if context.pods.standing() == Standing::Owner {
                context.pods.count_ended(nobodys.end());
            }
        });
    }

    /// Looks at the connections of a pod that was not in the mesh until now, under no agent. One that was has none to
    /// be ended.
    fn begin_opt_in(&self, id: &WorkloadId, opened: &Opened) -> Option<OptIn> {
        let is_new = || match self.context.bpf.is_enrolled(opened.cookie) {
            Ok(is_enrolled) => !is_enrolled,
            Err(error) => {
                tracing::warn!(pod = %id, %error, "asking whether the pod was in the mesh");
                false
            }
        };
        let begin = self.config.end_connections && is_new();
        begin.then(|| OptIn::begin(id, &opened.netns)).flatten()
    }

    /// The network namespace of a pod: the one that the CNI plugin handed over, or where the source says, or where the
    /// pod's processes are.
    fn open(
        &self,
        description: &NodePod,
        record: Option<&Workload>,
    ) -> Result<Opened, EnrollError> {
        if let Some(error) = self.not_meshable(description, None) {
            return Err(error.into());
        }
        if let Some(sandbox) = self.context.pods.announced().of(description) {
            return Ok(Opened {
                netns: Arc::clone(&sandbox.netns),
                cookie: sandbox.cookie,
                inode: sandbox.inode,
                place: None,
            });
        }
        if let Some(path) = description.netns.as_deref() {
            return open_netns(path);
        }
        let found = self.finder.finding(&description.uid);
        // Its processes may have ended since.
        let found = found.and_then(|it| {
            if it.is_current() {
                return Ok(it);
            }
            self.finder.look_again();
            Err(NotFound::NotYet)
        });
        let place = found.map_err(|error| match error {
            NotFound::Nowhere { .. } | NotFound::HostNetwork(_)
                if is_starting(description, record) =>
            {
                EnrollError::NotStarted
            }
            error => error.into(),
        })?;
        let cookie = place.netns.cookie().map_err(|error| EnrollError::Netns {
            path: format!("of its process {}", place.pid()),
            error,
        })?;
        Ok(Opened {
            netns: Arc::clone(&place.netns),
            cookie,
            inode: place.inode,
            place: Some(place),
        })
    }

    /// Opens listeners in a pod and lets the kernel and the proxy know of them.
    fn listen(
        &self,
        description: &Arc<NodePod>,
        record: Arc<Workload>,
        opened: &Opened,
        entry: &PodEntry,
    ) -> Result<Entry, EnrollError> {
        let identity = record.identity().ok_or(EnrollError::NoRecord)?.clone();
        let cookie = entry.cookie;
        add_way_back(&opened.netns, &description.id);
        let [outbound, tunnel, plaintext] =
            listen::open(&opened.netns).map_err(EnrollError::Listen)?;
        let listeners = [
            (ListenerRole::Outbound, outbound.as_fd()),
            (ListenerRole::Tunnel, tunnel.as_fd()),
            (ListenerRole::Plaintext, plaintext.as_fd()),
        ];
        let usage = self.context.new_usage();
        let place = (Arc::clone(&opened.netns), opened.inode);
        let threads = PodThreads::start().map_err(EnrollError::Threads)?;
        let pod = LocalPod::new(
            description,
            &record,
            identity,
            cookie,
            place,
            usage,
            threads,
        );
        let pod = Arc::new(pod);
        self.context.pods.begins(&pod);
        let bpf = &self.context.bpf;
        bpf.enroll(entry, pod.netns.as_fd(), listeners)?;
        self.serve(&pod, outbound, tunnel, plaintext)?;
        tracing::info!(pod = %pod.id, uid = pod.uid, identity = %pod.identity, cookie, "pod joins the mesh");
        Ok(Entry {
            pod,
            description: Arc::clone(description),
            record,
            place: opened.place.clone(),
        })
    }

    /// Hands the listeners to the proxy.
    fn serve(
        &self,
        pod: &Arc<LocalPod>,
        outbound: std::net::TcpListener,
        tunnel: std::net::TcpListener,
        plaintext: std::net::TcpListener,
    ) -> Result<(), EnrollError> {
        // Those of its sockets, too.
        let _on_its_threads = pod.threads.handle().enter();
        let outbound = TcpListener::from_std(outbound).map_err(EnrollError::Listen)?;
        let tunnel = TcpListener::from_std(tunnel).map_err(EnrollError::Listen)?;
        let plaintext = TcpListener::from_std(plaintext).map_err(EnrollError::Listen)?;
        let parts = || (Arc::clone(&self.context), Arc::clone(pod));
        let (context, it) = parts();
        pod.accepting
            .spawn(proxy::outbound::serve(context, it, outbound));
        let (context, it) = parts();
        pod.accepting
            .spawn(proxy::inbound::serve_tunnel(context, it, tunnel));
        let (context, it) = parts();
        pod.accepting
            .spawn(proxy::inbound::serve_plaintext(context, it, plaintext));
        Ok(())
    }

    /// Removes what is in the kernel's maps and need not be. Called when everything is known.
    fn remove_closed(&mut self) {
        let context = &self.context;
        let ours = self.enrolled.values().map(|it| it.pod.cookie).collect();
        if let Err(error) = self.closed.find(&context.bpf, &ours) {
            tracing::error!(%error, "listing the pods in the kernel's maps");
        }
        let removable = self
            .closed
            .take_removable(&context.bpf, &context.store, &ours);
        for cookie in removable {
            self.unenroll(cookie);
        }
    }

    /// Lets go of what earlier agents had in the kernel once nobody needs it any more.
    pub(super) fn retire_predecessors(&self) {
        if self.standing == Standing::Owner
            && let Err(error) = self.context.bpf.retire_predecessors()
        {
            tracing::error!(%error, "removing what an earlier agent left");
        }
    }

    /// Whether the kernel programs are attached where they should be. Attaches those again that are
    /// not.
    pub(super) fn check_hooks(&self) -> bool {
        let bpf = &self.context.bpf;
        let mut repaired = Vec::new();
        let mut check = || {
            repaired.extend(bpf.repair()?);
            for pod in self.enrolled.values().map(|it| &it.pod) {
                if bpf.repair_pod(pod.cookie, pod.netns.as_fd())? {
                    repaired.push(format!("sk_lookup of {}", pod.id));
                }
            }
            bpf.verify().map(drop)
        };
        let problem = match check() {
            Ok(()) => None,
            Err(BpfError::NotOwner) => return true,
            Err(error) => Some(format!("{:#}", anyhow::Error::from(error))),
        };
        if let Some(problem) = &problem
            && self.context.pods.hooks().problem.as_ref() != Some(problem)
        {
            tracing::error!(problem, "the kernel programs are not as they should be");
        }
        if !repaired.is_empty() {
            tracing::error!(?repaired, "kernel programs were detached by somebody else");
        }
        let whole = problem.is_none();
        self.context.pods.set_hooks(problem, repaired.len() as u64);
        whole
    }

    /// Lets an older agent close its listeners, once it has no pod that this one could not take.
    fn settle(&mut self, waiting: &[(WorkloadId, EnrollError)]) {
        let not_taken = |(_, error): &(_, EnrollError)| {
            let error = match error {
                EnrollError::Refused(error) => error,
                error => error,
            };
            matches!(
                error,
                EnrollError::Listen(_) | EnrollError::Threads(_) | EnrollError::Bpf(_)
            )
        };
        if self.settled || waiting.iter().any(not_taken) {
            return;
        }
        match self.context.bpf.settle() {
            Ok(()) => self.settled = true,
            Err(error) => tracing::error!(%error, "telling older agents that they may go"),
        }
    }

    /// Asks for the certificates of all described pods, so that they come while pods are enrolled,
    /// and gives up those of others.
    fn want_identities(&self, wanted: &[Arc<NodePod>]) {
        let records = wanted
            .iter()
            .filter_map(|it| self.context.store.workload(&it.id));
        let identities: BTreeSet<_> = records.filter_map(|it| it.identity().cloned()).collect();
        self.context.identities.want(&identities);
    }

    /// Makes the present state visible to the proxy and to readiness.
    fn publish(&self, waiting: Vec<(WorkloadId, EnrollError)>) {
        // Not worth a word for each pod: readiness says it once.
        let of_another = |it: &EnrollError| matches!(it, EnrollError::Bpf(BpfError::NotOwner));
        let waiting = waiting.into_iter().filter(|(_, it)| !of_another(it));
        let waiting = waiting.collect();
        let pods = self.enrolled.values().map(|it| Arc::clone(&it.pod));
        self.context.pods.publish(pods, waiting);
    }
}

fn is_gone(description: &NodePod, pod: &LocalPod) -> bool {
    let path = description.netns.as_deref();
    path.is_some_and(|path| closed::is_gone(path, pod.netns_inode))
}

/// Without it IPv6 connections work, but resets may be lost: no reason to keep the pod out.
fn add_way_back(netns: &Netns, pod: &WorkloadId) {
    if let Err(error) = loopback::add_way_back(netns) {
        tracing::warn!(%pod, %error, "adding the route to ::1 that answers without a socket need");
    }
}

fn open_netns(path: &Path) -> Result<Opened, EnrollError> {
    let open = || {
        let netns = Netns::open(path)?;
        Ok(Opened {
            cookie: netns.cookie()?,
            inode: netns.inode()?,
            netns: Arc::new(netns),
            place: None,
        })
    };
    open().map_err(|error| EnrollError::Netns {
        path: path.display().to_string(),
        error,
    })
}

/// Whether a pod has nothing yet that runs and connects.
fn is_starting(description: &NodePod, record: Option<&Workload>) -> bool {
    let has_address = record.is_some_and(|it| !it.addresses.is_empty());
    !has_address && description.runtime.containers.is_empty()
}
