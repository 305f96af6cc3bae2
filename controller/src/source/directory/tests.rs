use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use tempfile::TempDir;

use super::*;
use crate::source::Change;

struct Folder {
    folder: TempDir,
    scanner: Scanner,
    problems: Problems,
}

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("made");
        let problems = Problems::default();
        let scanner = Scanner::new(folder.path().to_owned(), problems.clone());
        Self {
            folder,
            scanner,
            problems,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        write(&self.path(name), content);
    }

    /// Events until nothing is on its way any more, as `+` upsert, `!` invalid, `-` delete.
    fn scan(&mut self) -> Vec<String> {
        let mut pending = Pending::default();
        loop {
            let scan = self.scanner.scan();
            pending.add(scan.events);
            if !scan.unsettled {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut changes = shown(pending.take());
        changes.sort();
        changes
    }

    fn problems(&self) -> Vec<String> {
        let shown = |it: Problem| {
            let file = it.file.unwrap_or_default();
            let file = file.rsplit('/').next().unwrap_or_default().to_owned();
            let document = it.document.map_or(String::new(), |it| format!("#{it}"));
            format!("{file}{document} {}: {}", it.field, it.reason)
        };
        self.problems.list().into_iter().map(shown).collect()
    }
}

fn shown(batch: Batch) -> Vec<String> {
    let shown = |change: Change| match change.read() {
        Event::Upsert { key, .. } => format!("+{key}"),
        Event::Invalid { key, fault, .. } => format!("!{key} {}", fault.field),
        Event::Delete { key } => format!("-{key}"),
    };
    batch.changes.into_iter().map(shown).collect()
}

/// Writes a file that counts as settled.
fn write(path: &Path, content: &str) {
    fs::write(path, content).expect("written");
    let file = fs::File::options().write(true).open(path).expect("opened");
    let before = SystemTime::now() - Duration::from_secs(1);
    file.set_modified(before).expect("set");
}

fn pod(name: &str) -> String {
    format!("---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}}}\n")
}

#[test]
fn documents_come_and_go() {
    let mut folder = Folder::new();
    assert!(folder.scan().is_empty());
    folder.write("a.yaml", &(pod("a") + "---\n# nothing\n" + &pod("b")));
    folder.write("b.yml", &pod("c"));
    folder.write(
        "c.json",
        r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one"}}"#,
    );
    folder.write("ignored.txt", "no manifest");
    folder.write(".hidden.yaml", &pod("hidden"));
    folder.write(
        "d.yaml",
        "{apiVersion: apps/v1, kind: Deployment, metadata: {name: not-ours}}",
    );
    assert_eq!(
        folder.scan(),
        [
            "+Node one",
            "+Pod default/a",
            "+Pod default/b",
            "+Pod default/c"
        ]
    );
    assert!(folder.scan().is_empty());
    folder.write("a.yaml", &pod("b"));
    assert_eq!(
        folder.scan(),
        ["+Pod default/b", "-Pod default/a"],
        "its document is another"
    );
    fs::remove_file(folder.path("b.yml")).expect("removed");
    assert_eq!(folder.scan(), ["-Pod default/c"]);
    assert!(folder.problems().is_empty());
}

#[test]
fn lists_are_their_items() {
    let mut folder = Folder::new();
    folder.write(
        "a.yaml",
        "
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: a}}
- {apiVersion: v1, kind: Pod, metadata: {name: b}, spec: {containers: 7}}
- {apiVersion: v1, kind: Pod, metadata: {}}
---
apiVersion: v1
kind: PodList
items:
- {metadata: {name: c, namespace: shop}}
",
    );
    let events = folder.scan();
    let invalid = "!Pod default/b items[1].spec.containers";
    assert_eq!(events, [invalid, "+Pod default/a", "+Pod shop/c"]);
    assert_eq!(
        folder.problems(),
        ["a.yaml#1 items[2].metadata.name: missing"]
    );
}

#[test]
fn what_cannot_be_read_keeps_what_it_said() {
    let mut folder = Folder::new();
    let good = pod("a") + &pod("b");
    folder.write("a.yaml", &good);
    folder.scan();
    let long = "#".repeat(33 * 1024 * 1024);
    for (bad, problem) in [
        ("a: [", "a.yaml : not YAML"),
        ("a: 1\na: 2\n", "a.yaml : not YAML"),
        ("\u{0}", "a.yaml : not YAML"),
        (long.as_str(), "a.yaml : larger than"),
    ] {
        folder.write("a.yaml", bad);
        assert!(folder.scan().is_empty());
        let problems = folder.problems();
        assert!(problems[0].starts_with(problem), "{problems:?}");
    }
    fs::write(folder.path("a.yaml"), [0xff, 0xfe, 0xfd]).expect("written");
    write_time(&folder.path("a.yaml"));
    assert!(folder.scan().is_empty());
    // One document that could be the missing one.
    folder.write("a.yaml", &(pod("a") + "---\n{apiVersion: v1, kind: Pod}\n"));
    assert!(folder.scan().is_empty());
    assert_eq!(folder.problems(), ["a.yaml#2 metadata.name: missing"]);
    folder.write("a.yaml", &pod("a"));
    assert_eq!(folder.scan(), ["-Pod default/b"]);
    assert!(folder.problems().is_empty());
    // A directory that is away, and back.
    let away = folder.folder.path().with_extension("away");
    fs::rename(folder.folder.path(), &away).expect("moved");
    let scan = folder.scanner.scan();
    assert!(!scan.readable && scan.events.is_empty());
    assert_eq!(folder.problems().len(), 1);
    fs::rename(&away, folder.folder.path()).expect("moved");
    assert!(folder.scan().is_empty());
    assert!(folder.problems().is_empty());
}

fn write_time(path: &Path) {
    let file = fs::File::options().write(true).open(path).expect("opened");
    let before = SystemTime::now() - Duration::from_secs(1);
    file.set_modified(before).expect("set");
}

#[test]
fn what_is_no_file_is_not_read() {
    let mut folder = Folder::new();
    nix::unistd::mkfifo(&folder.path("fifo.yaml"), nix::sys::stat::Mode::S_IRWXU).expect("made");
    symlink("nowhere", folder.path("dangling.yaml")).expect("made");
    let scan = folder.scanner.scan();
    assert!(scan.events.is_empty() && !scan.whole);
    let problems = folder.problems();
    assert!(
        problems[0].starts_with("dangling.yaml : cannot be read"),
        "{problems:?}"
    );
    assert!(
        problems[1].starts_with("fifo.yaml : not a regular file"),
        "{problems:?}"
    );
}

#[test]
fn the_first_of_two_definitions_counts() {
    let mut folder = Folder::new();
    let labelled = |label: &str| {
        format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a, labels: {{x: {label}}}}}}}")
    };
    folder.write("b.yaml", &labelled("first"));
    folder.write("c.yaml", &labelled("second"));
    assert_eq!(folder.scan(), ["+Pod default/a"]);
    let problems = folder.problems();
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0].starts_with("c.yaml#1 metadata.name: "),
        "{problems:?}"
    );
    assert!(problems[0].contains("b.yaml, document 1, defines the same object"));
    folder.write("c.yaml", &labelled("third"));
    assert!(folder.scan().is_empty());
    fs::remove_file(folder.path("b.yaml")).expect("removed");
    assert_eq!(folder.scan(), ["+Pod default/a"]);
    assert!(folder.problems().is_empty());
}

#[test]
fn folders_and_links_are_followed() {
    let mut folder = Folder::new();
    fs::create_dir_all(folder.path("deep/er")).expect("made");
    folder.write("deep/er/a.yaml", &pod("a"));
    symlink("..", folder.path("deep/loop")).expect("made");
    let events = folder.scan();
    assert_eq!(events, ["+Pod default/a"]);
    assert!(folder.problems().is_empty(), "a loop ends");
}

/// A file that somebody writes to is not read before they are done.
#[test]
fn a_file_being_written_waits() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &(pod("a") + &pod("b")));
    folder.scan();
    fs::write(folder.path("a.yaml"), pod("a")).expect("written");
    let scan = folder.scanner.scan();
    assert!(scan.unsettled && scan.events.is_empty());
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(folder.scan(), ["-Pod default/b"]);
}

/// As the kubelet mounts a ConfigMap: links to a link to a folder, which is exchanged.
#[tokio::test]
async fn a_mounted_config_map_is_followed() {
    let folder = tempfile::tempdir().expect("made");
    let path = |name: &str| folder.path().join(name);
    let version = |name: &str, content: &str| {
        fs::create_dir(path(name)).expect("made");
        write(&path(name).join("a.yaml"), content);
        symlink(name, path("..data_tmp")).expect("made");
        fs::rename(path("..data_tmp"), path("..data")).expect("moved");
    };
    version("..one", &pod("a"));
    symlink("..data/a.yaml", path("a.yaml")).expect("made");
    let (sender, mut batches) = mpsc::channel(1);
    let stop = CancellationToken::new();
    let source = Directory::new(folder.path().to_owned(), Problems::default());
    let running = tokio::spawn(source.run(sender, stop.clone()));
    let first = batches.recv().await.expect("sent");
    assert_eq!(shown(first), ["+Pod default/a"]);
    let started = Instant::now();
    version("..two", &(pod("a") + &pod("b")));
    fs::remove_dir_all(path("..one")).expect("removed");
    let second = batches.recv().await.expect("sent");
    assert_eq!(shown(second), ["+Pod default/b"]);
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    stop.cancel();
    running.await.expect("no panic").expect("no error");
}

/// A document that moves from one file to another is never gone in between, whichever is written
/// first.
#[test]
fn a_document_that_moves_is_not_deleted() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &(pod("a") + &pod("moves")));
    folder.scan();
    folder.write("a.yaml", &pod("a"));
    fs::write(folder.path("b.yaml"), pod("moves")).expect("written");
    assert_eq!(folder.scan(), ["+Pod default/moves"]);
    // The other file comes a moment later.
    folder.write("b.yaml", "# nothing\n");
    assert!(folder.scanner.scan().events.is_empty());
    folder.write("c.yaml", &pod("moves"));
    assert_eq!(folder.scan(), ["+Pod default/moves"]);
}

#[test]
fn an_emptied_directory_is_not_mounted() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &pod("a"));
    folder.scan();
    fs::remove_file(folder.path("a.yaml")).expect("removed");
    std::thread::sleep(GONE_LONGER);
    assert!(folder.scan().is_empty());
    assert_eq!(folder.problems().len(), 1, "{:?}", folder.problems());
    folder.write("b.yaml", "# nothing\n");
    assert_eq!(folder.scan(), ["-Pod default/a"]);
    assert!(folder.problems().is_empty());
}

/// A kind or group that is misspelt does not delete what was in force.
#[test]
fn a_misspelt_kind_is_no_deletion() {
    const GOOD: (&str, &str) = ("policy.linkerd.io/v1beta1", "Server");
    let document = |(version, kind): (&str, &str)| {
        format!(
            "---\n{{apiVersion: {version}, kind: {kind}, metadata: {{name: s}},
               spec: {{podSelector: {{}}, port: 80}}}}\n"
        )
    };
    for (version, kind, field) in [
        ("policy.linkerd.io/v1beta1", "server", "kind"),
        ("policy.linkerd.io/v1beta1", "Sever", "kind"),
        ("policy.linkerd.oi/v1beta1", "Server", "apiVersion"),
        ("polcy.linkerd.io/v1beta1", "Server", "apiVersion"),
        ("v1", "Server", "apiVersion"),
        ("linkerd.io/v1beta1", "Server", "kind"),
        ("apps/v1", "Deployment", "kind"),
    ] {
        let mut folder = Folder::new();
        folder.write("a.yaml", &document(GOOD));
        folder.scan();
        folder.write("a.yaml", &document((version, kind)));
        assert!(folder.scan().is_empty(), "{version} {kind}");
        let problems = folder.problems();
        assert_eq!(problems.len(), 1, "{version} {kind}");
        assert!(
            problems[0].starts_with(&format!("a.yaml#1 {field}: ")),
            "{problems:?}"
        );
        folder.write("a.yaml", &document(GOOD));
        folder.scan();
        assert!(folder.problems().is_empty());
    }
}

#[test]
fn foreign_kinds_are_told_apart() {
    let mut folder = Folder::new();
    let document = |version: &str, kind: &str| {
        format!("{{apiVersion: {version}, kind: {kind}, metadata: {{name: s}}}}")
    };
    for (version, kind, reported) in [
        ("security.istio.io/v1", "AuthorizationPolicy", false),
        ("policy/v1", "PodDisruptionBudget", false),
        ("v1", "ConfigMap", false),
        ("v1", "pod", true),
        ("policy.linkerd.io/v1beta1", "ServerAuthorization", true),
        ("crd.projectcalico.org/v1", "StagedNetworkPolicy", true),
        (
            "policy.networking.k8s.io/v1alpha1",
            "AdminNetworkPolicy",
            true,
        ),
        ("cilium.io/v2", "CiliumNetworkpolicy", true),
        ("clium.io/v2", "CiliumClusterwideNetworkPolicy", true),
        ("projectcalico.com/v3", "GlobalNetworkPolicy", true),
        ("cilium.io/v2", "CiliumEndpoint", false),
        ("network.k8s.io/v1", "NetworkPolicy", true),
        ("extensions/v1beta1", "NetworkPolicy", true),
        ("networking.k8s.io/v1", "Networkpolicy", true),
    ] {
        folder.write("a.yaml", &document(version, kind));
        assert!(folder.scan().is_empty());
        assert_eq!(folder.problems().len(), usize::from(reported), "{kind}");
    }
}

const GONE_LONGER: Duration = Duration::from_millis(300);
