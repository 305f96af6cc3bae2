use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn read(command: Command, variables: &[(&str, &str)], input: &str) -> Result<Call, Failure> {
    let variables: HashMap<_, _> = variables.iter().copied().collect();
    let variable = |name: &str| variables.get(name).map(OsString::from);
    Call::read(command, variable, input.as_bytes())
}

const GOOD: [(&str, &str); 4] = [
    ("CNI_CONTAINERID", "c1"),
    ("CNI_NETNS", "/run/netns/a"),
    ("CNI_IFNAME", "eth0"),
    (
        "CNI_ARGS",
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1",
    ),
];
const CONFIG: &str = r#"{"cniVersion":"1.0.0","name":"n","type":"weft-cni","prevResult":{"ips":[]},"other":{"a":1}}"#;

fn without(name: &str) -> Vec<(&'static str, &'static str)> {
    GOOD.iter().filter(|it| it.0 != name).copied().collect()
}

fn with(name: &'static str, value: &'static str) -> Vec<(&'static str, &'static str)> {
    let mut all = without(name);
    all.push((name, value));
    all
}

#[test]
fn a_call_of_a_runtime_is_read() {
    let call = read(Command::Add, &GOOD, CONFIG).expect("good");
    assert_eq!(call.container, "c1");
    assert_eq!(call.netns.as_deref(), Some("/run/netns/a".as_ref()));
    let pod = PodName {
        namespace: "shop".into(),
        name: "web".into(),
        uid: Some("u1".into()),
    };
    assert_eq!(call.pod, Some(pod));
    assert_eq!(call.config.own, Settings::default());
    // Other runtimes name no pod; old ones no UID.
    for args in [
        "",
        "IgnoreUnknown=1",
        "K8S_POD_NAME=a",
        "K8S_POD_NAME=;K8S_POD_NAMESPACE=b",
    ] {
        let args = with("CNI_ARGS", args);
        assert_eq!(read(Command::Add, &args, CONFIG).expect("good").pod, None);
    }
    let args = with("CNI_ARGS", "K8S_POD_NAME=a;K8S_POD_NAMESPACE=b");
    let pod = read(Command::Add, &args, CONFIG).expect("good").pod;
    assert_eq!(pod.expect("a pod").uid, None);
}

#[test]
fn settings_are_read_and_have_defaults() {
    let config =
        |own: &str| Config::parse(format!(r#"{{"cniVersion":"1.1.0","weft":{own}}}"#).as_bytes());
    let own =
        config(r#"{"socket":"/s","whenAway":"refuse-all","waitSeconds":0,"exempt":["a"],"new":1}"#);
    let own = own.expect("good").own;
    assert_eq!(own.socket, PathBuf::from("/s"));
    assert_eq!(own.listed, PathBuf::from(LISTED));
    assert_eq!(own.when_away, WhenAway::RefuseAll);
    assert_eq!(
        (own.wait(), own.exempt),
        (Duration::from_secs(1), vec!["a".to_owned()])
    );
    let written = serde_json::to_string(&Settings::default()).expect("written");
    assert_eq!(config(&written).expect("good").own, Settings::default());
    for bad in [
        "1",
        r#"{"whenAway":"open"}"#,
        r#"{"exempt":"a"}"#,
        r#"{"waitSeconds":-1}"#,
    ] {
        let failure = config(bad).expect_err(bad);
        assert_eq!(failure.code, Code::InvalidConfiguration, "{bad}");
    }
}

/// command, variables, configuration → code
type Case<'a> = (Command, Vec<(&'a str, &'a str)>, &'a str, Code);

#[test]
fn what_is_wrong_with_a_call_has_the_specifications_codes() {
    use Code::{Decoding, IncompatibleVersion, InvalidConfiguration, InvalidEnvironment};
    let version = |version: &str| CONFIG.replace("1.0.0", version);
    let cases: [Case<'_>; 15] = [
        (
            Command::Add,
            without("CNI_CONTAINERID"),
            CONFIG,
            InvalidEnvironment,
        ),
        (
            Command::Add,
            without("CNI_IFNAME"),
            CONFIG,
            InvalidEnvironment,
        ),
        (
            Command::Add,
            without("CNI_NETNS"),
            CONFIG,
            InvalidEnvironment,
        ),
        (
            Command::Add,
            with("CNI_NETNS", ""),
            CONFIG,
            InvalidEnvironment,
        ),
        (
            Command::Check,
            without("CNI_NETNS"),
            CONFIG,
            InvalidEnvironment,
        ),
        (
            Command::Del,
            without("CNI_CONTAINERID"),
            CONFIG,
            InvalidEnvironment,
        ),
        (
            Command::Add,
            with("CNI_CONTAINERID", "../a"),
            CONFIG,
            InvalidEnvironment,
        ),
        (
            Command::Add,
            with("CNI_ARGS", "a"),
            CONFIG,
            InvalidEnvironment,
        ),
        (Command::Add, GOOD.into(), "{", Decoding),
        (Command::Add, GOOD.into(), "", Decoding),
        (Command::Add, GOOD.into(), "[]", InvalidConfiguration),
        (
            Command::Add,
            GOOD.into(),
            &version("0.2.0"),
            IncompatibleVersion,
        ),
        (
            Command::Add,
            GOOD.into(),
            "{\"prevResult\":{}}",
            IncompatibleVersion,
        ),
        (
            Command::Check,
            GOOD.into(),
            &version("0.3.1"),
            IncompatibleVersion,
        ),
        (Command::Gc, vec![], &version("1.0.0"), IncompatibleVersion),
    ];
    for (command, variables, input, code) in cases {
        let failure = read(command, &variables, input).expect_err("bad");
        assert_eq!(
            failure.code, code,
            "{command:?} {variables:?} {input}: {failure}"
        );
    }
    for previous in [
        "{\"cniVersion\":\"1.0.0\"}",
        "{\"cniVersion\":\"1.0.0\",\"prevResult\":null}",
    ] {
        let failure = read(Command::Add, &GOOD, previous).expect_err("not in a chain");
        assert_eq!(failure.code, InvalidConfiguration);
    }
    // A pod that goes has lost its namespace, and its plugins' results.
    assert!(
        read(
            Command::Del,
            &without("CNI_NETNS"),
            "{\"cniVersion\":\"0.3.0\"}"
        )
        .is_ok()
    );
}

#[test]
fn all_versions_with_chains_are_spoken() {
    for (version, _) in VERSIONS {
        let config = CONFIG.replace("1.0.0", version);
        let call = read(Command::Add, &GOOD, &config).expect("good");
        assert_eq!(call.config.version.as_str(), version);
    }
    let valid = r#"{"cniVersion":"1.1.0","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#;
    let call = read(Command::Gc, &[], valid).expect("good");
    assert_eq!(call.config.valid, ["a"]);
}

#[test]
fn too_much_is_not_read() {
    let endless = std::io::repeat(b' ');
    assert_eq!(
        read_input(endless).expect_err("too much").code,
        Code::InvalidConfiguration
    );
}

proptest! {
    #[test]
    fn whatever_comes_is_answered(input in ".{0,200}", args in ".{0,80}", container in ".{0,20}") {
        let variables = [("CNI_ARGS", args.as_str()), ("CNI_CONTAINERID", &container), ("CNI_IFNAME", "e")];
        let _ = read(Command::Del, &variables, &input);
        let read = read(Command::Del, &variables, "{\"cniVersion\":\"1.0.0\"}");
        if let Ok(call) = read {
            prop_assert!(!call.container.contains('/'));
        }
    }
}
