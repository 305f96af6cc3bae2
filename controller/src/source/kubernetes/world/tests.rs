//! What batches say of what watches told.

use serde_json::{Value, json};

use super::*;
use crate::source::kubernetes::document::Form;

const POD: ObjectKind = ObjectKind::Pod;

fn pod(name: &str, label: &str) -> Trimmed {
    pod_at(name, label, 1)
}

fn pod_at(name: &str, label: &str, version: u64) -> Trimmed {
    taken(POD, written(name, label, version))
}

fn written(name: &str, label: &str, version: u64) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop", "resourceVersion": version.to_string(),
        "labels": {"is": label}}, "status": {"hostIP": "10.0.0.1"}})
}

/// As watches take objects in.
fn taken(kind: ObjectKind, object: Value) -> Trimmed {
    taken_in_version(kind, "v1", object)
}

fn taken_in_version(kind: ObjectKind, api_version: &str, object: Value) -> Trimmed {
    let form = Form {
        kind,
        api_version: api_version.to_owned(),
        believe_netns: false,
    };
    form.take(object.into())
}

/// What a batch says, as `+` upsert, `!` invalid, `-` delete.
fn batch(world: &mut World) -> Vec<String> {
    let shown = |change: Change| match change.read() {
        Event::Upsert { key, .. } => format!("+{}", key.name),
        Event::Invalid { key, fault, .. } => format!("!{} {}", key.name, fault.field),
        Event::Delete { key } => format!("-{}", key.name),
    };
    world.batch().changes.into_iter().map(shown).collect()
}

fn tell(world: &mut World, told: impl IntoIterator<Item = Told>) {
    for it in told {
        world.take(POD, it).expect("named");
    }
}

const COMPLETE: Told = Told::Complete {
    version: None,
    beside: false,
};

fn listed(pods: &[(&str, &str)]) -> Vec<Told> {
    let found = pods
        .iter()
        .map(|(name, label)| Told::Found(pod(name, label)));
    let all = [Told::Began].into_iter().chain(found);
    all.chain([COMPLETE]).collect()
}

fn namespace(name: &str) -> Trimmed {
    taken(ObjectKind::Namespace, json!({"metadata": {"name": name}}))
}

/// A world with these pods and their namespace, which was told already.
fn world(pods: &[(&str, &str)]) -> World {
    let mut world = World::new();
    world.watch(ObjectKind::Namespace);
    for told in [Told::Began, Told::Found(namespace("shop")), COMPLETE] {
        world
            .take(ObjectKind::Namespace, told)
            .expect("it has a name");
    }
    batch(&mut world);
    world.watch(POD);
    tell(&mut world, listed(pods));
    world
}

#[test]
fn the_first_batch_waits_for_every_kind() {
    let mut world = World::new();
    assert!(!world.is_due());
    world.watch(POD);
    world.watch(ObjectKind::Namespace);
    tell(&mut world, listed(&[("a", "1")]));
    assert!(!world.is_due());
    assert_eq!(world.unlisted(), [ObjectKind::Namespace]);
    for told in [Told::Began, Told::Found(namespace("shop")), COMPLETE] {
        world.take(ObjectKind::Namespace, told).expect("named");
    }
    assert!(world.is_due());
    assert_eq!(batch(&mut world), ["+shop", "+a"]);
    assert!(!world.is_due());
    // One that is installed later is waited for by nobody.
    world.watch(ObjectKind::ReferenceGrant);
    tell(&mut world, [Told::Changed(pod("a", "2"))]);
    assert!(world.is_due());
}

#[test]
fn what_a_new_list_lacks_is_gone_when_it_is_complete() {
    let mut world = world(&[("a", "1"), ("b", "1"), ("c", "1")]);
    batch(&mut world);
    let mut list = listed(&[("a", "1"), ("b", "2"), ("d", "1")]);
    let complete = list.pop();
    tell(&mut world, list);
    assert!(!world.is_due(), "half of a list");
    tell(&mut world, complete);
    assert_eq!(batch(&mut world), ["+b", "-c", "+d"]);
}

/// Or else a pod of a meshed namespace would be none of the mesh for as long as the namespace is not known.
#[test]
fn a_namespace_is_told_before_its_pods_and_outlives_them() {
    let mut world = world(&[("a", "1")]);
    assert_eq!(batch(&mut world), ["+a"]);
    let space = ObjectKind::Namespace;
    let moved = |space: &str| {
        let mut pod = written("b", "1", 1);
        pod["metadata"]["namespace"] = json!(space);
        taken(POD, pod)
    };
    tell(&mut world, [Told::Changed(moved("new"))]);
    assert!(!world.is_due(), "its namespace is not known");
    world
        .take(space, Told::Changed(namespace("new")))
        .expect("named");
    assert!(world.is_due());
    assert_eq!(batch(&mut world), ["+new", "+b"]);
    world
        .take(space, Told::Gone(namespace("new")))
        .expect("named");
    assert!(!world.is_due(), "one of its pods is still there");
    tell(&mut world, [Told::Gone(moved("new"))]);
    assert_eq!(batch(&mut world), ["-new", "-b"]);
    assert!(!world.is_due());
}

#[test]
fn a_list_that_breaks_is_begun_anew() {
    let mut world = world(&[("a", "1"), ("b", "1")]);
    batch(&mut world);
    tell(&mut world, [Told::Began, Told::Found(pod("c", "1"))]);
    // What was found by the one that broke is gone before the next.
    tell(&mut world, listed(&[("b", "1")]));
    assert_eq!(batch(&mut world), ["-a"]);
}

fn at(version: u64) -> Told {
    Told::Complete {
        version: Some(version),
        beside: true,
    }
}

/// A list as of version 10, and what the watch says beside it.
#[test]
fn a_list_beside_a_watch_takes_nothing_back() {
    let found = |pods: &[(&str, &str, u64)]| -> Vec<Told> {
        let found = pods.iter();
        let found = found.map(|(name, is, version)| Told::Found(pod_at(name, is, *version)));
        found.collect()
    };
    let changed = |name, is, version| Told::Changed(pod_at(name, is, version));
    let gone = |name, version| Told::Gone(pod_at(name, "1", version));
    for (what, list, meanwhile, follows, afterwards, follow) in [
        (
            "nothing is new",
            found(&[("a", "1", 1)]),
            vec![],
            vec![],
            vec![],
            vec![],
        ),
        (
            "a change that the watch did not say",
            found(&[("a", "2", 9)]),
            vec![],
            vec!["+a"],
            vec![],
            vec![],
        ),
        (
            "an end that the watch did not say",
            vec![],
            vec![],
            vec!["-a"],
            vec![],
            vec![],
        ),
        (
            "made later than the list is",
            found(&[("a", "1", 1)]),
            vec![changed("b", "1", 11)],
            vec!["+b"],
            vec![],
            vec![],
        ),
        (
            "changed later",
            found(&[("a", "1", 1)]),
            vec![changed("a", "2", 11)],
            vec!["+a"],
            vec![],
            vec![],
        ),
        (
            "gone later",
            found(&[("a", "1", 1)]),
            vec![gone("a", 11)],
            vec!["-a"],
            vec![],
            vec![],
        ),
        (
            "gone later, and there again",
            found(&[("a", "1", 1)]),
            vec![gone("a", 11), changed("a", "2", 12)],
            vec!["+a"],
            vec![],
            vec![],
        ),
        // The watch is behind: what it says was counted in.
        (
            "said again",
            found(&[("a", "2", 9)]),
            vec![],
            vec!["+a"],
            vec![changed("a", "0", 8), changed("a", "2", 9)],
            vec![],
        ),
        (
            "gone, and said so afterwards",
            vec![],
            vec![],
            vec!["-a"],
            vec![changed("a", "2", 8), gone("a", 9)],
            vec![],
        ),
        (
            "made anew, and its end said afterwards",
            found(&[("a", "2", 9)]),
            vec![],
            vec!["+a"],
            vec![gone("a", 8), changed("a", "2", 9)],
            vec![],
        ),
        (
            "what is newer is heard",
            found(&[("a", "2", 9)]),
            vec![],
            vec!["+a"],
            vec![changed("a", "0", 8), gone("a", 11)],
            vec!["-a"],
        ),
        // Something older was said of what the list found as it was known: the rest is heard.
        (
            "there and back",
            found(&[("a", "1", 9)]),
            vec![changed("a", "0", 8)],
            vec!["+a"],
            vec![changed("a", "1", 9)],
            vec!["+a"],
        ),
    ] {
        let mut world = world(&[("a", "1")]);
        batch(&mut world);
        let all = [Told::Began].into_iter().chain(list).chain(meanwhile);
        tell(&mut world, all.chain([at(10)]));
        assert_eq!(batch(&mut world), follows, "{what}");
        tell(&mut world, afterwards);
        assert_eq!(batch(&mut world), follow, "{what}, afterwards");
    }
}

#[test]
fn what_is_not_looked_at_is_no_change() {
    let mut world = world(&[("a", "1")]);
    batch(&mut world);
    let mut same = written("a", "1", 2);
    same["status"]["hostIP"] = json!("10.0.0.2");
    tell(&mut world, [Told::Changed(taken(POD, same))]);
    assert!(!world.is_due());
    tell(&mut world, [Told::Gone(pod("a", "1"))]);
    assert_eq!(batch(&mut world), ["-a"]);
    tell(&mut world, [Told::Changed(pod("a", "1"))]);
    assert_eq!(batch(&mut world), ["+a"]);
}

#[test]
fn the_last_of_several_changes_counts() {
    let mut world = world(&[("a", "1")]);
    batch(&mut world);
    tell(
        &mut world,
        [
            Told::Changed(pod("a", "2")),
            Told::Gone(pod("a", "2")),
            Told::Changed(pod("b", "1")),
            Told::Gone(pod("b", "1")),
            Told::Changed(pod("a", "3")),
        ],
    );
    assert_eq!(batch(&mut world), ["+a", "-b"]);
}

#[test]
fn a_bad_object_concerns_no_other() {
    let mut world = world(&[("a", "1")]);
    batch(&mut world);
    let mut bad = written("a", "1", 1);
    bad["spec"] = json!({"containers": 7});
    let bad = Told::Changed(taken(POD, bad));
    tell(&mut world, [bad, Told::Changed(pod("b", "1"))]);
    assert_eq!(batch(&mut world), ["!a spec.containers", "+b"]);
    for (document, field) in [
        (json!({}), "Pod: metadata.namespace"),
        (json!([7]), "Pod: metadata.namespace"),
        (
            json!({"metadata": {"namespace": "a", "name": "B c"}}),
            "Pod: metadata.name",
        ),
        (
            json!({"metadata": {"namespace": 7, "name": "a"}}),
            "Pod: metadata.namespace",
        ),
    ] {
        let told = Told::Changed(taken(POD, document));
        let problem = world.take(POD, told).expect_err("no name");
        assert_eq!(problem.field, field);
    }
    tell(&mut world, [Told::Changed(pod("c", "1"))]);
    assert_eq!(batch(&mut world), ["+c"]);
}

#[test]
fn another_version_of_a_kind_is_the_same_objects() {
    let mut world = world(&[("a", "1"), ("b", "1")]);
    batch(&mut world);
    world.watch(POD);
    assert!(!world.is_due());
    let other = taken_in_version(POD, "v2", written("b", "1", 1));
    tell(&mut world, [Told::Began, Told::Found(other), COMPLETE]);
    // Which cannot be read in it, here.
    assert_eq!(batch(&mut world), ["-a", "!b apiVersion"]);
    world.forget(POD);
    assert_eq!(batch(&mut world), ["-b"]);
}
