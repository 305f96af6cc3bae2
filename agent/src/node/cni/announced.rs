//! Sandboxes that the CNI plugin has announced: where a pod's network namespace is, before the pod has a process or
//! an address that anybody else knows of.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_core::{NodePod, Workload, WorkloadId};

use crate::netns::Netns;

/// The sandboxes, by the UID of their pod.
#[derive(Debug, Default)]
pub struct Announced {
    table: Mutex<Table>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    by_uid: HashMap<String, Arc<Sandbox>>,
    /// Cookies of namespaces that were taken down.
    ended: BTreeSet<u64>,
    /// Sandboxes that were taken down lately, and when: whatever still sets one up comes too late.
    taken_down: HashMap<String, Instant>,
    /// Those that are being set up.
    arriving: Vec<Arc<Arrival>>,
}

/// A sandbox that is being set up.
#[derive(Debug)]
struct Arrival {
    pod: WorkloadId,
    uid: String,
    container: String,
    addresses: Vec<IpAddr>,
    taken_down: CancellationToken,
}

/// Keeps it known that a sandbox is being set up.
#[derive(Debug)]
pub struct Arriving<'a> {
    announced: &'a Announced,
    arrival: Arc<Arrival>,
}

/// The sandbox was taken down before it was set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its sandbox has been taken down meanwhile")]
pub struct TakenDown;

/// A pod's network that has been set up.
#[derive(Debug)]
pub struct Sandbox {
    /// The pod.
    pub pod: WorkloadId,
    /// Its UID, by which the kubelet has it.
    pub uid: String,
    /// What the runtime calls it.
    pub container: String,
    /// The name of the network that it is attached to.
    pub network: String,
    /// The network namespace, held until the sandbox is taken down.
    pub netns: Arc<Netns>,
    /// The kernel's cookie of it.
    pub cookie: u64,
    /// Its inode number.
    pub inode: u64,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// When it was announced.
    pub since: Instant,
    /// The same, as processes count it: see `ticks`.
    pub ticks: u64,
}

impl Announced {
    /// A sandbox is being set up, for as long as what is given is kept.
    ///
    /// # Errors
    /// It has been taken down already.
    pub fn arrives(&self, sandbox: &Sandbox) -> Result<Arriving<'_>, TakenDown> {
        let arrival = Arc::new(Arrival {
            pod: sandbox.pod.clone(),
            uid: sandbox.uid.clone(),
            container: sandbox.container.clone(),
            addresses: sandbox.addresses.clone(),
            taken_down: CancellationToken::new(),
        });
        let mut table = self.table();
        table.check(&sandbox.container)?;
        table.arriving.push(Arc::clone(&arrival));
        drop(table);
        Ok(Arriving {
            announced: self,
            arrival,
        })
    }

    /// A sandbox is there; one that the pod had before is not any more.
    ///
    /// # Errors
    /// It has been taken down already.
    pub fn put(&self, sandbox: Sandbox) -> Result<(), TakenDown> {
        let mut table = self.table();
        table.check(&sandbox.container)?;
        table.ended.remove(&sandbox.cookie);
        let before = table.by_uid.insert(sandbox.uid.clone(), Arc::new(sandbox));
        drop(table);
        // Its descriptor is closed without the lock.
        drop(before);
        self.changed();
        Ok(())
    }

    /// The sandbox of a pod.
    pub fn of(&self, pod: &NodePod) -> Option<Arc<Sandbox>> {
        let table = self.table();
        let of_static = || table.by_uid.get(pod.runtime.static_uid.as_ref()?);
        let found = table.by_uid.get(&pod.uid).or_else(of_static);
        // A UID that somebody else has written on an object of another name is not believed.
        found.filter(|it| it.pod == pod.id).cloned()
    }

    /// A pod's record, with the addresses that its sandbox has: what the API server knows may be those of the sandbox
    /// before.
    pub fn completed(&self, pod: &NodePod, record: Arc<Workload>) -> Arc<Workload> {
        let is_same = |it: &Sandbox| {
            let known = record.addresses.iter().collect::<BTreeSet<_>>();
            known == it.addresses.iter().collect()
        };
        match self.of(pod) {
            Some(sandbox) if !sandbox.addresses.is_empty() && !is_same(&sandbox) => {
                Arc::new(Workload {
                    addresses: sandbox.addresses.clone(),
                    ..Workload::clone(&record)
                })
            }
            _ => record,
        }
    }

    /// Whether a pod has other addresses than this one, as the runtime says that has just set it up.
    pub fn is_without(&self, pod: &NodePod, address: IpAddr) -> bool {
        let is_other = |it: &[IpAddr]| !it.is_empty() && !it.contains(&address);
        let arriving: Vec<_> = {
            let table = self.table();
            let those = table.arriving.iter().filter(|it| it.is_of(pod));
            those.cloned().collect()
        };
        match arriving.is_empty() {
            true => self.of(pod).is_some_and(|it| is_other(&it.addresses)),
            false => arriving.iter().all(|it| is_other(&it.addresses)),
        }
    }

    /// Takes note of a process of a pod: of what was started after a sandbox was announced, elsewhere, it follows that
    /// the sandbox is gone and nobody said so. Whatever was started before may be of an older one.
    pub fn follow(&self, pod: &NodePod, inode: u64, started: u64) {
        let is_gone = |it: &Sandbox| it.inode != inode && started > it.ticks;
        if let Some(sandbox) = self.of(pod).filter(|it| is_gone(it)) {
            let (pod, container) = (&sandbox.pod, &sandbox.container);
            tracing::warn!(%pod, container, "the pod has another sandbox, which the CNI plugin was not called for");
            self.end(container);
        }
    }

    /// Whether a pod is not where it was, as its sandbox was taken down or it has another.
    pub fn has_left(&self, pod: &NodePod, cookie: u64) -> bool {
        let is_elsewhere = self.of(pod).is_some_and(|it| it.cookie != cookie);
        is_elsewhere || self.table().ended.contains(&cookie)
    }

    /// A sandbox is taken down, or will not be set up any more.
    pub fn end(&self, container: &str) {
        let mut table = self.table();
        table.taken_down.retain(|_, at| at.elapsed() < REMEMBERED);
        table
            .taken_down
            .insert(container.to_owned(), Instant::now());
        for arrival in &table.arriving {
            if arrival.container == container {
                arrival.taken_down.cancel();
            }
        }
        drop(table);
        self.end_all(|it| it.container == container);
    }

    /// All sandboxes of a network but these were taken down.
    pub fn keep(&self, network: &str, containers: &HashSet<String>) {
        let is_over = |it: &Sandbox| it.network == network && !containers.contains(&it.container);
        // One that was just announced may be newer than the list.
        self.end_all(|it| is_over(it) && it.since.elapsed() > SETTLED);
    }

    /// Lets go of sandboxes of pods that are not described any more, and of what is remembered of namespaces that no
    /// pod is in.
    pub fn tidy(&self, pods: &[Arc<NodePod>], is_used: impl Fn(u64) -> bool) {
        let mut table = self.table();
        let uids: HashSet<&str> = pods
            .iter()
            .flat_map(|it| [Some(it.uid.as_str()), it.runtime.static_uid.as_deref()])
            .flatten()
            .collect();
        let is_over =
            |it: &Sandbox| !uids.contains(it.uid.as_str()) && it.since.elapsed() > UNDESCRIBED;
        let over: Vec<_> = table.by_uid.extract_if(|_, it| is_over(it)).collect();
        table.ended.retain(|cookie| is_used(*cookie));
        drop(table);
        drop(over);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.table().by_uid.len()
    }

    /// Counts changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn end_all(&self, is_over: impl Fn(&Sandbox) -> bool) {
        let mut table = self.table();
        let over: Vec<_> = table.by_uid.extract_if(|_, it| is_over(it)).collect();
        table.ended.extend(over.iter().map(|(_, it)| it.cookie));
        drop(table);
        if !over.is_empty() {
            self.changed();
        }
    }

    fn changed(&self) {
        self.changes.send_modify(|it| *it += 1);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change under the lock is complete in itself.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn check(&self, container: &str) -> Result<(), TakenDown> {
        let at = self.taken_down.get(container);
        match at.is_some_and(|it| it.elapsed() < REMEMBERED) {
            true => Err(TakenDown),
            false => Ok(()),
        }
    }
}

impl Arrival {
    fn is_of(&self, pod: &NodePod) -> bool {
        let is_uid = pod.uid == self.uid || pod.runtime.static_uid.as_ref() == Some(&self.uid);
        is_uid && pod.id == self.pod
    }
}

impl Arriving<'_> {
    /// Waits until it is taken down.
    pub async fn taken_down(&self) -> TakenDown {
        self.arrival.taken_down.cancelled().await;
        TakenDown
    }
}

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        let mut table = self.announced.table();
        table.arriving.retain(|it| !Arc::ptr_eq(it, &self.arrival));
    }
}

/// The time, as the kernel says of processes when they were started: in hundredths of a second since the machine was.
pub(super) fn ticks() -> std::io::Result<u64> {
    let since_boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from)?;
    Ok(u64::try_from(since_boot.as_millis() / 10).unwrap_or(u64::MAX))
}

/// How long it is remembered that a sandbox was taken down: for longer than runtimes wait for a plugin.
const REMEMBERED: Duration = Duration::from_secs(150);
/// How long a sandbox may be announced before the runtime's list of sandboxes has it.
const SETTLED: Duration = Duration::from_secs(60);
/// How long a pod may be announced before it is described, or not be any more and still be taken down.
const UNDESCRIBED: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use weft_proto::Resource;

    use super::*;
    use crate::discovery::testing;

    fn pod(id: &str) -> NodePod {
        match testing::node_pod(id) {
            Resource::NodePod(pod) => pod,
            _ => unreachable!("it is of that kind"),
        }
    }

    fn sandbox(pod: &str, uid: &str, container: &str, cookie: u64) -> Sandbox {
        Sandbox {
            pod: pod.parse().expect("valid"),
            uid: uid.into(),
            container: container.into(),
            network: "pods".into(),
            netns: Arc::new(Netns::current().expect("there is one")),
            cookie,
            inode: 1,
            addresses: vec!["10.0.0.5".parse().expect("valid")],
            since: Instant::now(),
            ticks: 1000,
        }
    }

    #[test]
    fn a_sandbox_is_found_by_the_uid_and_the_name() {
        let announced = Announced::default();
        announced
            .put(sandbox("shop/web", "uid-1", "c1", 1))
            .expect("there");
        let web = pod("shop/web");
        assert_eq!(announced.of(&web).map(|it| it.cookie), Some(1));
        assert!(announced.of(&pod("shop/other")).is_none());
        let mut mirror = pod("shop/web");
        mirror.uid = "other".into();
        assert!(announced.of(&mirror).is_none());
        mirror.runtime.static_uid = Some("uid-1".into());
        assert!(announced.of(&mirror).is_some());
    }

    #[test]
    fn another_sandbox_takes_the_place_of_the_first_and_outlives_it() {
        let announced = Announced::default();
        let web = pod("shop/web");
        announced
            .put(sandbox("shop/web", "uid-1", "c1", 1))
            .expect("there");
        assert!(!announced.has_left(&web, 1));
        announced
            .put(sandbox("shop/web", "uid-1", "c2", 2))
            .expect("there");
        assert!(announced.has_left(&web, 1) && !announced.has_left(&web, 2));
        announced.end("c1");
        assert!(!announced.has_left(&web, 2));
        announced.end("c2");
        assert!(announced.has_left(&web, 2));
        assert_eq!(announced.count(), 0);
        // Forgotten when nobody is in it any more.
        announced.tidy(&[], |_| false);
        assert!(!announced.has_left(&web, 2));
    }

    #[test]
    fn what_is_not_on_the_list_is_gone_unless_it_is_new() {
        let announced = Announced::default();
        let old = |it: Sandbox| Sandbox {
            since: Instant::now() - UNDESCRIBED * 2,
            ..it
        };
        announced
            .put(sandbox("shop/new", "u1", "c1", 1))
            .expect("there");
        announced
            .put(old(sandbox("shop/kept", "u2", "c2", 2)))
            .expect("there");
        announced
            .put(old(sandbox("shop/gone", "u3", "c3", 3)))
            .expect("there");
        announced.keep("others", &HashSet::new());
        assert_eq!(announced.count(), 3);
        announced.keep("pods", &["c2".to_owned()].into());
        assert_eq!(announced.count(), 2);
        assert!(announced.has_left(&pod("shop/gone"), 3));
        // Nor does one stay whose pod nobody describes.
        announced.tidy(&[], |_| true);
        assert_eq!(announced.count(), 1);
    }

    fn record(addresses: &[&str]) -> Arc<Workload> {
        match testing::workload("shop/web", addresses) {
            Resource::Workload(it) => Arc::new(it),
            _ => unreachable!("it is of that kind"),
        }
    }

    /// Those that are known may be of the sandbox before.
    #[test]
    fn its_addresses_count_while_it_is_there() {
        let announced = Announced::default();
        let put = announced.put(sandbox("shop/web", "uid-1", "c1", 1));
        put.expect("there");
        let web = pod("shop/web");
        let own = ["10.0.0.5".parse::<IpAddr>().expect("valid")];
        for known in [&[][..], &["10.0.0.9"]] {
            assert_eq!(announced.completed(&web, record(known)).addresses, own);
        }
        let same = record(&["10.0.0.5"]);
        assert!(Arc::ptr_eq(
            &announced.completed(&web, Arc::clone(&same)),
            &same
        ));
        announced.end("c1");
        assert!(announced.completed(&web, record(&[])).addresses.is_empty());
        let known = record(&["10.0.0.9"]);
        assert!(Arc::ptr_eq(
            &announced.completed(&web, Arc::clone(&known)),
            &known
        ));
    }

    /// As after a restart of the node, when pods have each other's addresses of before.
    #[test]
    fn a_pod_is_without_the_address_that_it_had_before() {
        let announced = Announced::default();
        let web = pod("shop/web");
        let [own, old] = ["10.0.0.5", "10.0.0.9"].map(|it| it.parse::<IpAddr>().expect("valid"));
        assert!(!announced.is_without(&web, old));
        let arriving = announced.arrives(&sandbox("shop/web", "uid-1", "c1", 1));
        let arriving = arriving.expect("there");
        assert!(announced.is_without(&web, old) && !announced.is_without(&web, own));
        assert!(!announced.is_without(&pod("shop/other"), old));
        drop(arriving);
        assert!(!announced.is_without(&web, old));
        let put = announced.put(sandbox("shop/web", "uid-1", "c1", 1));
        put.expect("there");
        assert!(announced.is_without(&web, old) && !announced.is_without(&web, own));
        let mut unknown = sandbox("shop/web", "uid-1", "c2", 2);
        unknown.addresses.clear();
        announced.put(unknown).expect("there");
        assert!(!announced.is_without(&web, old));
    }

    #[tokio::test]
    async fn what_is_taken_down_is_not_set_up_any_more() {
        let announced = Announced::default();
        let web = sandbox("shop/web", "uid-1", "c1", 1);
        let arriving = announced.arrives(&web).expect("there");
        let other = announced.arrives(&sandbox("shop/other", "uid-2", "c2", 2));
        let other = other.expect("there");
        announced.end("c1");
        assert_eq!(arriving.taken_down().await, TakenDown);
        let waited = tokio::time::timeout(Duration::from_millis(20), other.taken_down());
        assert!(waited.await.is_err());
        assert_eq!(announced.put(web), Err(TakenDown));
        // Even if its end came first.
        let again = announced.arrives(&sandbox("shop/web", "uid-1", "c1", 1));
        assert!(again.is_err());
        assert_eq!(announced.count(), 0);
        let next = announced.put(sandbox("shop/web", "uid-1", "c3", 3));
        next.expect("there");
    }

    #[test]
    fn a_process_elsewhere_that_is_newer_ends_a_sandbox() {
        let announced = Announced::default();
        let web = pod("shop/web");
        let put = announced.put(sandbox("shop/web", "uid-1", "c1", 1));
        put.expect("there");
        for (inode, started) in [(1, 2000), (2, 999), (2, 1000)] {
            announced.follow(&web, inode, started);
            assert!(!announced.has_left(&web, 1), "{inode} {started}");
        }
        announced.follow(&web, 2, 1001);
        assert!(announced.has_left(&web, 1) && announced.of(&web).is_none());
    }

    #[test]
    fn time_is_counted_as_of_processes() {
        let before = ticks().expect("told");
        let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("there");
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        let started: u64 = fields
            .split_ascii_whitespace()
            .nth(19)
            .expect("there")
            .parse()
            .expect("a number");
        assert!(before.abs_diff(started) < 6000, "{before} {started}");
    }
}
