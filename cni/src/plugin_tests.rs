use std::cell::RefCell;
use std::collections::HashMap;

use serde_json::{Value, json};

use super::*;

/// An agent that always says the same, and remembers what it was asked.
struct Agent {
    answer: Result<Answer, String>,
    asked: RefCell<Vec<Request>>,
    said: RefCell<Vec<String>>,
}

impl World for Agent {
    fn ask(
        &self,
        _: &Path,
        request: &Request,
        netns: Option<&File>,
        _: Duration,
    ) -> Result<Answer, String> {
        assert_eq!(netns.is_some(), matches!(request, Request::Add(_)));
        self.asked.borrow_mut().push(request.clone());
        self.answer.clone()
    }

    fn say(&self, text: &str) {
        self.said.borrow_mut().push(text.to_owned());
    }
}

fn agent(answer: Result<Answer, &str>) -> Agent {
    Agent {
        answer: answer.map_err(str::to_owned),
        asked: RefCell::default(),
        said: RefCell::default(),
    }
}

fn wait() -> Answer {
    Answer::Wait {
        reason: "not yet".into(),
    }
}

fn away() -> Answer {
    Answer::Away {
        reason: "no controller".into(),
    }
}

struct Stage {
    folder: tempfile::TempDir,
    config: Value,
    variables: HashMap<String, String>,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let listed = folder.path().join("namespaces.json");
        let config = json!({"cniVersion": "1.1.0", "name": "n", "type": "weft-cni",
            "prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.0.0.5/24"}]},
            "weft": {"listed": listed, "exempt": ["kube-system"]}});
        let variables = [
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/proc/self/ns/net"),
            ("CNI_IFNAME", "eth0"),
            (
                "CNI_ARGS",
                "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1",
            ),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self {
            folder,
            config,
            variables: variables.into(),
        }
    }

    fn list(&self, namespaces: &[&str]) {
        let listed = Listed::of(namespaces.iter().map(|it| (*it).to_owned()));
        let path = self.folder.path().join("namespaces.json");
        listed.write(&path).expect("written");
    }

    fn in_namespace(mut self, namespace: &str) -> Self {
        let args = format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web;K8S_POD_UID=u1");
        self.variables.insert("CNI_ARGS".into(), args);
        self
    }

    fn call(&self, command: &str, agent: &Agent) -> Result<String, Failure> {
        let variable = |name: &str| match name {
            "CNI_COMMAND" => Some(command.into()),
            name => self.variables.get(name).map(OsString::from),
        };
        answer(variable, self.config.to_string().as_bytes(), agent)
    }
}

#[test]
fn an_enrolled_pod_gets_the_result_of_the_plugins_before() {
    let stage = Stage::new();
    for answer in [Answer::Enrolled, Answer::NotMeshed] {
        let agent = agent(Ok(answer));
        let result = stage.call("ADD", &agent).expect("added");
        let result: Value = serde_json::from_str(&result).expect("JSON");
        assert_eq!(result, stage.config["prevResult"]);
        let asked = agent.asked.into_inner();
        let [Request::Add(attachment)] = &asked[..] else {
            panic!("{asked:?}")
        };
        assert_eq!(attachment.pod.uid, "u1");
        assert_eq!(
            attachment.addresses,
            ["10.0.0.5".parse::<std::net::IpAddr>().expect("valid")]
        );
        assert_eq!(attachment.wait_ms, 10_000);
    }
}

#[test]
fn a_pod_that_must_wait_is_tried_again() {
    let stage = Stage::new();
    let failure = stage.call("ADD", &agent(Ok(wait()))).expect_err("refused");
    assert_eq!(failure.code, Code::TryAgainLater);
    assert!(failure.to_string().contains("not yet"));
    let failure = stage
        .call("CHECK", &agent(Ok(wait())))
        .expect_err("not enrolled");
    assert_eq!(failure.code, Code::NotEnrolled);
}

/// namespaces on the list (none: no list), when away, the pod's namespace → whether it starts
#[test]
fn who_starts_while_the_agent_is_away() {
    for (listed, when_away, namespace, starts) in [
        (None, "listed", "shop", true),
        (Some(&[][..]), "listed", "shop", true),
        (Some(&["shop"][..]), "listed", "shop", false),
        (Some(&["shop"][..]), "listed", "bank", true),
        (
            Some(&["shop", "kube-system"][..]),
            "listed",
            "kube-system",
            true,
        ),
        (None, "refuse-all", "shop", false),
        (Some(&[][..]), "refuse-all", "bank", false),
        (Some(&[][..]), "refuse-all", "kube-system", true),
    ] {
        let mut stage = Stage::new().in_namespace(namespace);
        stage.config["weft"]["whenAway"] = when_away.into();
        if let Some(listed) = listed {
            stage.list(listed);
        }
        for agent in [agent(Err("nobody listens")), agent(Ok(away()))] {
            for command in ["ADD", "CHECK"] {
                let called = stage.call(command, &agent);
                let case = format!("{command} {listed:?} {when_away} {namespace}: {called:?}");
                assert_eq!(called.is_ok(), starts, "{case}");
                if let Err(failure) = called {
                    assert_eq!(failure.code, Code::TryAgainLater, "{case}");
                    assert!(failure.details.contains("weft-cni uninstall"), "{case}");
                }
            }
        }
    }
}

#[test]
fn a_list_that_cannot_be_read_is_one_of_all_namespaces() {
    let stage = Stage::new();
    let path = stage.folder.path().join("namespaces.json");
    std::fs::write(path, "{\"version\":1,").expect("written");
    let failure = stage.call("ADD", &agent(Err("gone"))).expect_err("refused");
    assert_eq!(failure.code, Code::TryAgainLater);
}

#[test]
fn exempt_pods_and_what_is_no_pod_ask_nobody() {
    let mut stage = Stage::new().in_namespace("kube-system");
    let nobody = agent(Ok(wait()));
    assert!(stage.call("ADD", &nobody).is_ok());
    assert!(stage.call("CHECK", &nobody).is_ok());
    stage.variables.remove("CNI_ARGS");
    assert!(stage.call("ADD", &nobody).is_ok());
    assert!(stage.call("STATUS", &nobody).is_ok());
    assert!(nobody.asked.borrow().is_empty());
}

#[test]
fn a_pod_without_a_uid_is_treated_as_if_the_agent_were_away() {
    let mut stage = Stage::new();
    let args = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web";
    stage.variables.insert("CNI_ARGS".into(), args.into());
    let agent = agent(Ok(Answer::Enrolled));
    assert!(stage.call("ADD", &agent).is_ok());
    stage.list(&["shop"]);
    let failure = stage.call("ADD", &agent).expect_err("refused");
    assert!(failure.details.contains("UID"), "{failure}");
    assert!(agent.asked.borrow().is_empty());
}

#[test]
fn what_is_no_namespace_is_refused() {
    let mut stage = Stage::new();
    for path in ["/proc/self/status", "/does/not/exist"] {
        stage.variables.insert("CNI_NETNS".into(), path.into());
        let failure = stage
            .call("ADD", &agent(Ok(Answer::Enrolled)))
            .expect_err(path);
        assert_eq!(failure.code, Code::InvalidEnvironment);
    }
}

#[test]
fn a_pod_goes_whatever_happens() {
    let mut stage = Stage::new();
    stage.list(&["shop"]);
    let gone = agent(Err("gone"));
    assert_eq!(stage.call("DEL", &gone), Ok(String::new()));
    assert_eq!(stage.call("GC", &gone), Ok(String::new()));
    assert_eq!(gone.said.borrow().len(), 2);
    let expected = Request::Del {
        container: "c1".into(),
    };
    assert_eq!(gone.asked.borrow()[0], expected);
    stage.config = json!("no configuration");
    assert_eq!(stage.call("DEL", &gone), Ok(String::new()));
    assert_eq!(gone.asked.borrow().len(), 2);
}

#[test]
fn a_pod_goes_though_its_configuration_cannot_be_read() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("broken"))
        }
    }
    for (command, succeeds) in [("DEL", true), ("GC", true), ("ADD", false)] {
        let variable = |name: &str| (name == "CNI_COMMAND").then(|| command.into());
        let world = agent(Err("gone"));
        let inputs: [Box<dyn Read>; 2] = [Box::new(Broken), Box::new(std::io::repeat(b' '))];
        for input in inputs {
            let code = run(variable, input, std::io::sink(), &world);
            let is_success = format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS);
            assert_eq!(is_success, succeeds, "{command}");
        }
    }
}

#[test]
fn a_network_is_told_by_its_name() {
    let stage = Stage::new();
    let agent = agent(Ok(Answer::Enrolled));
    stage.call("ADD", &agent).expect("added");
    stage.call("GC", &agent).expect("collected");
    let asked = agent.asked.into_inner();
    assert!(matches!(&asked[0], Request::Add(it) if it.network == "n"));
    assert!(matches!(&asked[1], Request::Gc { network, .. } if network == "n"));
}

#[test]
fn answers_are_printed_as_runtimes_read_them() {
    let print = |command: &'static str, input: &str| {
        let mut output = Vec::new();
        let variable = |name: &str| (name == "CNI_COMMAND").then(|| command.into());
        let code = run(variable, input.as_bytes(), &mut output, &agent(Err("gone")));
        let text = String::from_utf8(output).expect("UTF-8");
        (
            format!("{code:?}"),
            serde_json::from_str::<Value>(&text).unwrap_or_default(),
        )
    };
    let success = format!("{:?}", ExitCode::SUCCESS);
    let failure = format!("{:?}", ExitCode::FAILURE);
    let (code, versions) = print("VERSION", "{\"cniVersion\":\"0.4.0\"}");
    let supported = json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    assert_eq!(code, success);
    assert_eq!(
        versions,
        json!({"cniVersion": "0.4.0", "supportedVersions": supported})
    );
    let (code, error) = print("ADD", "{\"cniVersion\":\"0.4.0\"}");
    assert_eq!(
        (code, &error["code"], &error["cniVersion"]),
        (failure.clone(), &json!(4), &json!("0.4.0"))
    );
    let (code, error) = print("ADD", "{\"cniVersion\":\"0.1.0\"}");
    assert_eq!((code, &error["code"]), (failure.clone(), &json!(1)));
    let (code, error) = print("EXEC", "{}");
    assert_eq!((code, &error["code"]), (failure, &json!(4)));
    let (code, nothing) = print("DEL", "");
    assert_eq!((code, nothing), (success, Value::Null));
}
