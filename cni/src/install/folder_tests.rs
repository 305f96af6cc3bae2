use std::collections::BTreeMap;

use serde_json::Value;

use super::*;
use crate::call::Settings;

const LIST: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}"#;
const SINGLE: &str = r#"{"cniVersion":"1.0.0","name":"n","type":"ptp"}"#;

fn entry() -> Entry {
    Entry::new(&Settings::default(), Stamp(7))
}

struct Stage(tempfile::TempDir);

impl Stage {
    fn of(files: &[(&str, &str)]) -> (Self, Folder) {
        let stage = Self(tempfile::tempdir().expect("a folder"));
        for (name, text) in files {
            stage.write(name, text);
        }
        let folder = Folder::new(stage.0.path());
        (stage, folder)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.path().join(name), text).expect("written");
    }

    fn age(&self, name: &str) {
        let file = fs::File::options()
            .write(true)
            .open(self.0.path().join(name));
        let long_ago = SystemTime::now() - RECENT * 2;
        file.expect("there").set_modified(long_ago).expect("set");
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.path().join(name)).expect(name)
    }

    /// All files, and the plugins in those that are lists.
    fn all(&self) -> BTreeMap<String, Vec<String>> {
        let entries = fs::read_dir(self.0.path()).expect("a folder");
        let names = entries.map(|it| it.expect("there").file_name().into_string().expect("UTF-8"));
        let types = |name: String| {
            let list: Value = serde_json::from_str(&self.read(&name)).unwrap_or_default();
            let plugins = list["plugins"].as_array().cloned().unwrap_or_default();
            let types = plugins
                .iter()
                .map(|it| it["type"].as_str().unwrap_or_default().to_owned());
            (name, types.collect())
        };
        names.map(types).collect()
    }
}

fn all(expected: &[(&str, &[&str])]) -> BTreeMap<String, Vec<String>> {
    let types = |types: &[&str]| types.iter().map(|it| (*it).to_owned()).collect();
    let expected = expected.iter();
    expected
        .map(|(name, them)| ((*name).to_owned(), types(them)))
        .collect()
}

#[test]
fn the_first_list_gets_the_plugin() {
    let (stage, folder) = Stage::of(&[
        ("20-b.conflist", LIST),
        ("10-a.conflist", LIST),
        ("05.txt", "x"),
    ]);
    let mode = fs::Permissions::from_mode(0o600);
    fs::set_permissions(stage.0.path().join("10-a.conflist"), mode).expect("set");
    assert!(!folder.has(&entry()).expect("looked"));
    let done = folder.put(&entry()).expect("put");
    assert_eq!(done, Done::Put(stage.0.path().join("10-a.conflist")));
    assert!(folder.has(&entry()).expect("looked"));
    let mode = fs::metadata(stage.0.path().join("10-a.conflist"))
        .expect("there")
        .permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    assert!(matches!(folder.put(&entry()), Ok(Done::Nothing(_))));
    let expected: [(&str, &[&str]); 3] = [
        ("05.txt", &[]),
        ("10-a.conflist", &["bridge", "weft-cni"]),
        ("20-b.conflist", &["bridge"]),
    ];
    assert_eq!(stage.all(), all(&expected));
    // Another CNI rewrites it, or comes first.
    stage.write("10-a.conflist", LIST);
    assert!(matches!(folder.put(&entry()), Ok(Done::Put(_))));
    stage.write("00-z.conflist", LIST);
    assert!(!folder.has(&entry()).expect("looked"));
    assert!(matches!(folder.put(&entry()), Ok(Done::Put(_))));
    let taken = folder.take_out().expect("taken out");
    assert_eq!(taken.len(), 2);
    assert!(
        stage
            .all()
            .values()
            .all(|it| !it.contains(&"weft-cni".to_owned()))
    );
    assert!(folder.take_out().expect("nothing").is_empty());
}

#[test]
fn a_single_configuration_is_saved_and_comes_back() {
    let (stage, folder) = Stage::of(&[("10-a.conf", SINGLE), ("10-a.conflist", LIST)]);
    folder.put(&entry()).expect("put");
    let expected: [(&str, &[&str]); 3] = [
        ("10-a.conf.conflist", &["ptp", "weft-cni"]),
        ("10-a.conf.weft-saved", &[]),
        ("10-a.conflist", &["bridge"]),
    ];
    assert_eq!(stage.all(), all(&expected));
    assert!(folder.has(&entry()).expect("looked"));
    // Its owner writes it again.
    let again = SINGLE.replace("ptp", "macvlan");
    stage.write("10-a.conf", &again);
    assert!(!folder.has(&entry()).expect("looked"));
    folder.put(&entry()).expect("put");
    assert_eq!(stage.all()["10-a.conf.conflist"], ["macvlan", "weft-cni"]);
    folder.take_out().expect("taken out");
    let expected: [(&str, &[&str]); 2] = [("10-a.conf", &[]), ("10-a.conflist", &["bridge"])];
    assert_eq!(stage.all(), all(&expected));
    assert_eq!(stage.read("10-a.conf"), again);
    // And once more, while both are there.
    folder.put(&entry()).expect("put");
    stage.write("10-a.conf", SINGLE);
    folder.take_out().expect("taken out");
    assert_eq!(stage.all(), all(&expected));
    assert_eq!(stage.read("10-a.conf"), SINGLE);
}

#[test]
fn a_file_that_is_being_written_is_waited_for() {
    let (stage, folder) = Stage::of(&[("10-a.conflist", &LIST[..20]), ("20-b.conflist", LIST)]);
    assert!(matches!(folder.put(&entry()), Err(Trouble::File { .. })));
    assert_eq!(stage.all()["20-b.conflist"], ["bridge"]);
    // One that stays like that is skipped, as runtimes do that read more than one.
    stage.age("10-a.conflist");
    folder.put(&entry()).expect("put");
    assert_eq!(stage.all()["20-b.conflist"], ["bridge", "weft-cni"]);
    stage.write("10-a.conflist", LIST);
    folder.put(&entry()).expect("put");
    assert_eq!(stage.all()["10-a.conflist"], ["bridge", "weft-cni"]);
}

/// Runtimes use it: another file would be none that counts.
#[test]
fn a_file_without_chains_is_not_passed_over() {
    for (name, text) in [
        ("10-a.conflist", LIST.replace("1.0.0", "0.2.0")),
        ("10-a.conf", SINGLE.replace("\"cniVersion\":\"1.0.0\",", "")),
    ] {
        let (stage, folder) = Stage::of(&[(name, &text), ("20-b.conflist", LIST)]);
        stage.age(name);
        for trouble in [
            folder.put(&entry()).expect_err("no chains"),
            folder.has(&entry()).expect_err("no chains"),
        ] {
            let told = trouble.to_string();
            assert!(told.contains(name) && told.contains("cniVersion"), "{told}");
        }
        assert_eq!(stage.all()["20-b.conflist"], ["bridge"]);
        assert!(folder.take_out().expect("nothing").is_empty());
    }
}

#[test]
fn without_a_configuration_there_is_nothing_to_do() {
    let (stage, folder) = Stage::of(&[]);
    assert!(matches!(folder.put(&entry()), Err(Trouble::Nothing(_))));
    assert!(!folder.has(&entry()).expect("looked"));
    assert!(folder.take_out().expect("nothing").is_empty());
    drop(stage);
    assert!(matches!(folder.put(&entry()), Err(Trouble::Io { .. })));
    assert!(folder.take_out().expect("nothing").is_empty());
}
