//! Real processes in real namespaces, under a `/proc` that says of their control groups what a test wants. Needs root.

use std::os::unix::fs::symlink;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use weft_proto::Resource;

use super::super::{Finder, Sandbox};
use super::*;
use crate::discovery::testing;

const UID: &str = "7c9e6679-7425-40de-944b-e07fc1f90ae7";
const OTHER: &str = "11111111-2222-4333-8444-555555555555";

struct Node {
    proc: tempfile::TempDir,
    processes: Vec<Child>,
}

impl Node {
    fn new() -> Option<Self> {
        let node = nix::unistd::geteuid().is_root().then(|| Self {
            proc: tempfile::tempdir().expect("made"),
            processes: vec![],
        })?;
        fs::create_dir(node.folder(1)).expect("made");
        symlink("/proc/self/ns", node.folder(1).join("ns")).expect("made");
        node.place(1, "/init.scope");
        Some(node)
    }

    /// Starts a process where another is.
    fn beside(&mut self, pid: u32, cgroup: &str) -> u32 {
        let path = format!("--net=/proc/{pid}/ns/net");
        self.start(&["nsenter", &path], cgroup)
    }

    /// Starts a process in a namespace of its own, after all that were started before.
    fn isolated(&mut self, cgroup: &str) -> u32 {
        self.start(&["unshare", "--net"], cgroup)
    }

    /// Starts one, by a program that executes another.
    fn start(&mut self, by: &[&str], cgroup: &str) -> u32 {
        // Its start is told in hundredths of a second.
        std::thread::sleep(Duration::from_millis(20));
        let words = [by, &["sleep", "60"]].concat();
        let child = Command::new(words[0]).args(&words[1..]).spawn();
        let pid = child.as_ref().expect("started").id();
        self.processes.extend(child);
        let until = Instant::now() + Duration::from_secs(20);
        let comm = || fs::read_to_string(format!("/proc/{pid}/comm")).expect("there");
        while comm().trim() != "sleep" {
            assert!(Instant::now() < until, "it does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        let folder = self.folder(pid);
        fs::create_dir(&folder).expect("made");
        fs::write(folder.join("comm"), "app\n").expect("written");
        for name in ["ns", "stat", "root"] {
            symlink(format!("/proc/{pid}/{name}"), folder.join(name)).expect("made");
        }
        self.place(pid, cgroup);
        pid
    }

    fn folder(&self, pid: u32) -> PathBuf {
        self.proc.path().join(pid.to_string())
    }

    fn place(&self, pid: u32, cgroup: &str) {
        fs::write(self.folder(pid).join("cgroup"), format!("0::{cgroup}\n")).expect("written");
    }

    fn call(&self, pid: u32, comm: &str) {
        fs::write(self.folder(pid).join("comm"), format!("{comm}\n")).expect("written");
    }

    fn end(&mut self, pid: u32) {
        let child = self.processes.iter_mut().find(|it| it.id() == pid);
        let child = child.expect("one of these");
        child.kill().and_then(|()| child.wait()).expect("ended");
        fs::remove_dir_all(self.folder(pid)).expect("removed");
    }

    fn scan(&self, wanted: &[Wanted]) -> Vec<Result<Place, NotFound>> {
        let host = Host::look(self.proc.path()).expect("looked");
        scan(&host, wanted).expect("looked")
    }

    /// The process that a pod is known by.
    fn chosen(&self, wanted: &Wanted) -> Result<u32, NotFound> {
        let found = self.scan(std::slice::from_ref(wanted));
        let found = found.into_iter().next().expect("one outcome");
        found.map(|it| it.pid())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for child in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn wanted(uid: &str, containers: &[char], class: Option<&str>) -> Wanted {
    Wanted::new(&described(uid, containers, class))
}

fn described(uid: &str, containers: &[char], class: Option<&str>) -> NodePod {
    let Resource::NodePod(mut pod) = testing::node_pod("shop/web") else {
        unreachable!("it is of this kind")
    };
    uid.clone_into(&mut pod.uid);
    pod.netns = None;
    let containers = containers.iter().map(|it| id(*it).parse().expect("valid"));
    pod.runtime.containers = containers.collect();
    pod.runtime.class = class.map(str::to_owned);
    pod
}

fn id(digit: char) -> String {
    digit.to_string().repeat(64)
}

fn at(uid: &str, container: char) -> String {
    format!("/kubepods/burstable/pod{uid}/{}", id(container))
}

/// The sandbox is what is in no container that is known, and what has run for the longest; names count for nothing.
#[test]
fn the_sandbox_is_preferred() {
    let Some(mut node) = Node::new() else { return };
    let pause = node.isolated(&at(UID, 'a'));
    let app = node.isolated(&at(UID, 'b'));
    node.call(app, "pause");
    let of = |node: &Node, containers: &[char]| node.chosen(&wanted(UID, containers, None));
    assert_eq!(of(&node, &['b']), Ok(pause));
    node.beside(pause, &at(UID, 'c'));
    assert_eq!(of(&node, &['b']), Ok(pause));
    assert_eq!(of(&node, &['b', 'c']), Ok(pause));
    let found = node.scan(&[wanted(UID, &['b', 'c'], None)]);
    let place = found.into_iter().next().expect("one").expect("found");
    assert!(place.is_current() && place.trace == Trace::Uid);
    node.end(pause);
    assert!(!place.is_current());
}

/// Where no process is the sandbox's for certain, a container could choose what is taken for the pod's.
#[test]
fn nothing_is_chosen_that_is_not_certain() {
    let Some(mut node) = Node::new() else { return };
    // As old as it gets, and in a namespace of its own; the pod's is that of the others.
    let hostile = node.isolated(&at(UID, 'a'));
    let app = node.isolated(&at(UID, 'b'));
    node.beside(app, &at(UID, 'c'));
    let of = |node: &Node, containers: &[char]| node.chosen(&wanted(UID, containers, None));
    for containers in [
        &[][..],
        &['a', 'b', 'c'],
        &['b'],
        &['a', 'b'],
        &['a'],
        &['a', 'c'],
    ] {
        let outcome = of(&node, containers);
        assert_eq!(outcome, Err(NotFound::Ambiguous(2)), "{containers:?}");
    }
    let told = of(&node, &[]).expect_err("ambiguous").to_string();
    assert!(told.contains("drop_infra_ctr"), "{told}");
    node.end(hostile);
    // Without a process of the sandbox, the first container's.
    assert_eq!(of(&node, &['b', 'c']), Ok(app));
    assert_eq!(of(&node, &[]), Ok(app));
}

/// A namespace that a container made for itself, without any privilege, is not the pod's, however old the process is.
#[test]
fn a_namespace_of_other_users_is_never_taken() {
    let Some(mut node) = Node::new() else { return };
    let users = node.start(&["unshare", "--user", "--net"], &at(UID, 'a'));
    let other = node.isolated(&at(UID, 'b'));
    for containers in [&[][..], &['b'], &['a', 'b']] {
        let wanted = wanted(UID, containers, None);
        assert_eq!(node.chosen(&wanted), Ok(other), "{containers:?}");
    }
    node.end(other);
    let outcome = node.chosen(&wanted(UID, &[], None));
    assert_eq!(outcome, Err(NotFound::OtherUsers(1)));
    // A pod may have a user namespace.
    let mut pod = described(UID, &['b'], None);
    pod.runtime.own_users = true;
    let wanted = Wanted::new(&pod);
    assert_eq!(node.chosen(&wanted), Ok(users));
    node.start(&["unshare", "--user", "--net"], &at(UID, 'b'));
    assert_eq!(node.chosen(&wanted), Ok(users));
    node.start(&["unshare", "--user", "--net"], &at(UID, 'c'));
    assert_eq!(node.chosen(&wanted), Err(NotFound::Ambiguous(3)));
}

/// What cannot be looked at may be what matters.
#[test]
fn what_cannot_be_looked_at_fails_a_look() {
    let Some(mut node) = Node::new() else { return };
    let own = node.isolated(&at(UID, 'b'));
    let older = node.start(&["env"], &at(UID, 'a'));
    let pods = [wanted(UID, &[], None)];
    let stat = node.folder(older).join("stat");
    fs::remove_file(&stat).expect("removed");
    fs::write(&stat, "nonsense").expect("written");
    assert_eq!(
        node.chosen(&pods[0]),
        Ok(own),
        "it is in the host's network"
    );
    let other = node.beside(own, &at(UID, 'c'));
    let stat = node.folder(other).join("stat");
    fs::remove_file(&stat).expect("removed");
    fs::write(&stat, "nonsense").expect("written");
    let outcome = node.chosen(&pods[0]);
    assert!(matches!(outcome, Err(NotFound::Denied(_))), "{outcome:?}");
    node.end(other);
    // Of one of which it is not known whose it is.
    let cgroup = node.folder(older).join("cgroup");
    fs::remove_file(&cgroup).expect("removed");
    assert_eq!(node.chosen(&pods[0]), Ok(own), "it has ended");
    fs::create_dir(&cgroup).expect("made");
    let host = Host::look(node.proc.path()).expect("looked");
    let error = scan(&host, &pods).expect_err("not readable");
    assert!(error.to_string().contains(&format!("process {older}")));
    // And of the first one, which tells what the host's network is.
    fs::remove_dir_all(node.folder(1)).expect("removed");
    let error = Host::look(node.proc.path()).expect_err("there is none");
    assert!(error.to_string().contains("process 1"), "{error}");
}

#[test]
fn what_is_no_pods_is_not_taken() {
    let Some(mut node) = Node::new() else { return };
    let missing = node.chosen(&wanted(UID, &['b'], None));
    let told = missing.expect_err("nowhere").to_string();
    for part in [UID, "bbbbbbbbbbbb", "looked at 1 processes", "hostPID"] {
        assert!(told.contains(part), "{told}");
    }
    let host = node.start(&["env"], &at(UID, 'a'));
    let outcome = node.chosen(&wanted(UID, &[], None));
    assert_eq!(outcome, Err(NotFound::HostNetwork(1)));
    // One is enough that is not.
    let own = node.isolated(&at(UID, 'b'));
    assert_eq!(node.chosen(&wanted(UID, &[], None)), Ok(own));
    node.end(own);
    node.end(host);
    // Another pod's, which calls a part of its control group like this one.
    node.isolated(&format!("{}{}", at(OTHER, 'a'), at(UID, 'b')));
    let outcome = node.chosen(&wanted(UID, &['a', 'b'], None));
    assert!(
        matches!(outcome, Err(NotFound::Nowhere { .. })),
        "{outcome:?}"
    );
    let told = node.chosen(&wanted("name:shop/web", &[], None));
    let told = told.expect_err("nowhere").to_string();
    assert!(told.contains("is no UID that a kubelet has"), "{told}");
}

#[test]
fn a_namespace_of_two_pods_is_neithers() {
    let Some(mut node) = Node::new() else { return };
    let one = node.isolated(&at(UID, 'a'));
    let path = format!("--net=/proc/{one}/ns/net");
    let other = node.start(&["nsenter", &path], &at(OTHER, 'b'));
    let both = [wanted(UID, &[], None), wanted(OTHER, &[], None)];
    for outcome in node.scan(&both) {
        assert_eq!(outcome.err(), Some(NotFound::Shared));
    }
    node.end(other);
    let outcomes = node.scan(&both);
    assert!(outcomes[0].is_ok() && outcomes[1].is_err());
    // Two that say to have one UID, as a static pod's annotations can.
    let outcomes = node.scan(&[both[0].clone(), both[0].clone()]);
    assert!(
        outcomes
            .iter()
            .all(|it| it.as_ref().err() == Some(&NotFound::Shared))
    );
}

/// A forged annotation names the victim by the form of its UID that only static pods have.
#[test]
fn the_annotation_of_a_static_pod_names_no_other() {
    let Some(mut node) = Node::new() else { return };
    let claiming = |uid: &str| {
        let mut pod = described(OTHER, &[], None);
        pod.runtime.static_uid = Some(uid.to_owned());
        Wanted::new(&pod)
    };
    let victim = node.isolated(&at(UID, 'a'));
    for forged in [UID.replace('-', ""), UID.to_owned()] {
        let outcomes = node.scan(&[claiming(&forged), wanted(UID, &[], None)]);
        let [attackers, victims] = outcomes.as_slice() else {
            panic!("{outcomes:?}");
        };
        assert!(
            matches!(attackers, Err(NotFound::Nowhere { .. })),
            "{forged}: {attackers:?}"
        );
        assert_eq!(victims.as_ref().map(Place::pid).ok(), Some(victim));
    }
    // Nor is a UID that looks like a static pod's its control group.
    let of_static = UID.replace('-', "");
    node.place(victim, &at(&of_static, 'a'));
    assert!(node.chosen(&wanted(&of_static, &[], None)).is_err());
    assert_eq!(node.chosen(&claiming(&of_static)), Ok(victim));
    // Whoever is known by its own UID has the namespace.
    let own = node.isolated(&at(UID, 'b'));
    let path = format!("--net=/proc/{own}/ns/net");
    node.end(victim);
    node.start(&["nsenter", &path], &at(&of_static, 'c'));
    let outcomes = node.scan(&[claiming(&of_static), wanted(UID, &[], None)]);
    assert_eq!(outcomes[0].as_ref().err(), Some(&NotFound::Shared));
    assert_eq!(outcomes[1].as_ref().map(Place::pid).ok(), Some(own));
}

#[test]
fn where_no_uid_is_written_containers_say_it() {
    let Some(mut node) = Node::new() else { return };
    node.isolated(&format!("/k8s.io/{}", id('a')));
    let container = node.isolated(&format!("/k8s.io/{}", id('b')));
    assert_eq!(node.chosen(&wanted(UID, &['b'], None)), Ok(container));
    assert!(node.chosen(&wanted(UID, &['c'], None)).is_err());
    // Where there is one, it counts.
    node.place(container, &at(OTHER, 'b'));
    assert!(node.chosen(&wanted(UID, &['b'], None)).is_err());
}

#[test]
fn what_the_kernel_does_not_see_is_told() {
    let Some(mut node) = Node::new() else { return };
    let hypervisor = node.isolated(&format!("/kubepods/pod{UID}"));
    node.call(hypervisor, "qemu-system-x86");
    let kata = || wanted(UID, &[], Some("kata"));
    assert_eq!(
        node.chosen(&kata()),
        Err(NotFound::Sandboxed(Sandbox::Kata))
    );
    // A name alone proves nothing, nor does a RuntimeClass.
    assert_eq!(node.chosen(&wanted(UID, &[], None)), Ok(hypervisor));
    node.call(hypervisor, "qemu");
    assert_eq!(node.chosen(&kata()), Ok(hypervisor));
    node.call(hypervisor, "exe");
    fs::write(
        node.folder(hypervisor).join("cmdline"),
        "runsc-sandbox\0boot\0",
    )
    .expect("written");
    assert_eq!(
        node.chosen(&kata()),
        Err(NotFound::Sandboxed(Sandbox::Gvisor))
    );
    // What is in a container of the pod's may look like anything.
    node.place(hypervisor, &at(UID, 'a'));
    let named = wanted(UID, &['a'], Some("kata"));
    assert_eq!(node.chosen(&named), Ok(hypervisor));
    assert!(node.chosen(&kata()).is_err());
    let app = node.beside(hypervisor, &format!("/kubepods/pod{UID}"));
    assert_eq!(node.chosen(&kata()), Ok(hypervisor));
    // Or the processes have the node's root: that of the first one.
    node.end(app);
    symlink("/proc/self/root", node.folder(1).join("root")).expect("made");
    let outcome = node.chosen(&wanted(UID, &[], None));
    assert_eq!(outcome, Err(NotFound::Sandboxed(Sandbox::Gvisor)));
}

/// Found as soon as it is there, and again when it has another sandbox.
#[test]
fn a_pod_is_found_when_it_comes() {
    let Some(mut node) = Node::new() else { return };
    let finder = Finder::start(node.proc.path()).expect("started");
    let mut changes = finder.changes();
    let mut wait_until = |what: &str, is_so: &dyn Fn() -> bool| {
        let until = Instant::now() + Duration::from_secs(30);
        while !is_so() {
            assert!(Instant::now() < until, "never: {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(changes.has_changed().expect("it runs"), "{what}");
        changes.mark_unchanged();
    };
    let pod = described(UID, &[], None);
    assert_eq!(finder.finding(UID).err(), Some(NotFound::NotYet));
    finder.want([&pod].into_iter());
    let is_nowhere = || matches!(finder.finding(UID), Err(NotFound::Nowhere { .. }));
    wait_until("nowhere", &is_nowhere);
    let first = node.isolated(&at(UID, 'a'));
    let is_at = |pid: u32| finder.finding(UID).is_ok_and(|it| it.pid() == pid);
    wait_until("the first sandbox", &|| is_at(first));
    node.end(first);
    let second = node.isolated(&at(UID, 'b'));
    wait_until("the second sandbox", &|| is_at(second));
    finder.want(std::iter::empty());
    assert_eq!(finder.finding(UID).err(), Some(NotFound::NotYet));
}
