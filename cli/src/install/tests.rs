use clap::Parser;
use serde_json::Value;
use weft_controller::objects::decode;

use super::*;
use crate::command::{Cli, Command};

fn printed(arguments: &[&str]) -> String {
    let all = ["weft", "install"].iter().chain(arguments);
    match Cli::try_parse_from(all).expect("a command line").command {
        Command::Install(install) => install.manifests().expect("manifests"),
        other => panic!("{other:?}"),
    }
}

fn kinds(text: &str) -> Vec<String> {
    let documents = decode::documents(text).expect("YAML");
    let kind = |it: &Value| it["kind"].as_str().expect("a kind").to_owned();
    documents.iter().map(kind).collect()
}

#[test]
fn without_flags_the_manifests_are_those_of_the_folder() {
    assert_eq!(printed(&[]), ALL);
    let definitions = kinds(&printed(&["--crds"]));
    assert!(
        definitions.len() == 6
            && definitions
                .iter()
                .all(|it| it == "CustomResourceDefinition")
    );
    let of_linkerd = kinds(&printed(&["--crds-linkerd"]));
    assert_eq!(of_linkerd, ["CustomResourceDefinition"; 8]);
    let rest = kinds(&printed(&["--skip-crds"]));
    assert_eq!(rest.len() + 6, kinds(ALL).len());
    assert!(rest.contains(&"DaemonSet".to_owned()));
}

#[test]
fn ranges_and_image_are_in_their_places() {
    let text = printed(&[
        "--image",
        "registry.example.org:5000/weft@sha256:0af",
        "--pod-range",
        "10.0.0.0/16",
        "--pod-range",
        "fd00::/64",
        "--service-range",
        "10.96.0.0/12",
    ]);
    let documents = decode::documents(&text).expect("YAML");
    let of = |kind: &str| {
        documents
            .iter()
            .find(|it| it["kind"] == kind)
            .expect("there")
    };
    let controller = of("Deployment");
    let container = &controller["spec"]["template"]["spec"]["containers"][0];
    let value = |name: &str| {
        let env = container["env"].as_array().expect("variables");
        env.iter()
            .find(|it| it["name"] == name)
            .map(|it| it["value"].clone())
    };
    assert_eq!(
        value("WEFT_POD_RANGES"),
        Some("10.0.0.0/16,fd00::/64".into())
    );
    assert_eq!(value("WEFT_SERVICE_RANGES"), Some("10.96.0.0/12".into()));
    assert_eq!(value("WEFT_SOURCE"), Some("kubernetes".into()));
    assert!(
        !text.contains("ghcr.io/weft-mesh/weft:"),
        "an image was left"
    );
    assert_eq!(
        text.matches("image: registry.example.org:5000/weft@sha256:0af\n")
            .count(),
        ALL.matches(IMAGE).count()
    );
    for bad in ["", "a b", "a\nb", "\"a", "-a", "a#"] {
        assert!(image(bad).is_err(), "{bad:?} was accepted");
    }
    assert!(with_image(UNINSTALL, Some("other/weft:v2")).contains("image: other/weft:v2\n"));
}

/// Nothing that kubectl would apply is printed before somebody said that agents are gone.
#[test]
fn kernel_programs_are_removed_of_agents_that_are_gone() {
    let printed = |arguments: &[&str]| {
        let all = ["weft", "uninstall"].iter().chain(arguments);
        match Cli::try_parse_from(all)?.command {
            Command::Uninstall(uninstall) => Ok(uninstall.text()),
            other => panic!("{other:?}"),
        }
    };
    let steps = printed(&[]).map_err(|it: clap::Error| it.to_string());
    let steps = steps.expect("a command line");
    let is_object = |it: &Value| it.get("kind").is_some();
    let documents = decode::documents(&steps).unwrap_or_default();
    assert!(!documents.iter().any(is_object));
    for (name, text) in [
        (
            "weft-webhook",
            include_str!("../../../daemonset/components/webhook/webhook.yaml"),
        ),
        (
            "weft-controller-webhook",
            include_str!("../../../daemonset/components/webhook/rbac.yaml"),
        ),
    ] {
        assert!(text.contains(&format!("name: {name}\n")), "{name}");
        assert!(steps.contains(&format!(" {name}\n")), "{name}");
    }
    // What no namespace takes with it.
    let of_cluster = decode::documents(ALL).expect("YAML").into_iter();
    let of_cluster = of_cluster.filter(|it| {
        let kind = it["kind"].as_str().unwrap_or_default();
        kind.starts_with("ClusterRole")
    });
    let words: Vec<&str> = steps.split_whitespace().collect();
    for object in of_cluster {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        assert!(words.contains(&name), "{name} stays");
    }
    let manifests = printed(&["--agents-are-gone"]);
    assert_eq!(
        manifests.map_err(|it| it.to_string()),
        Ok(UNINSTALL.to_owned())
    );
    assert!(printed(&["--image", "a/b:c"]).is_err());
}

/// The only object of a kind.
fn only(text: &str, kind: &str) -> Value {
    let mut documents = decode::documents(text).expect("YAML");
    documents.retain(|it| it["kind"] == kind);
    assert_eq!(documents.len(), 1, "{kind}");
    documents.remove(0)
}

#[test]
fn two_controllers_are_those_of_the_component() {
    let text = printed(&["--ha"]);
    let patch = decode::documents(HA_CONTROLLER).expect("YAML").remove(0);
    let mut expected = only(ALL, "Deployment");
    expected["spec"]["replicas"] = patch["spec"]["replicas"].clone();
    let spread = "topologySpreadConstraints";
    let patched = &patch["spec"]["template"]["spec"];
    assert_eq!(
        patched.as_object().map(|it| it.len()),
        Some(1),
        "more than {spread}"
    );
    expected["spec"]["template"]["spec"][spread] = patched[spread].clone();
    assert_eq!(only(&text, "Deployment"), expected);
    let rest = |text: &str| {
        let mut documents = decode::documents(text).expect("YAML");
        documents.retain(|it| it["kind"] != "Deployment");
        documents
    };
    assert_eq!(rest(&text), rest(ALL));
}

#[test]
fn each_key_changes_what_it_says_and_nothing_else() {
    let variable = |name: &str, value: &str| (format!("env {name}"), Value::from(value));
    let resource = |path: &str, value: &str| (format!("/resources/{path}"), Value::from(value));
    let (agent, controller) = ("DaemonSet", "Deployment");
    let cases = [
        (
            "agent.drainDeadline",
            "2m",
            agent,
            variable("WEFT_DRAIN_DEADLINE", "2m"),
        ),
        (
            "agent.logLevel",
            "info,access=off",
            agent,
            variable("WEFT_LOG", "info,access=off"),
        ),
        (
            "agent.resources.limits.memory",
            "2Gi",
            agent,
            resource("limits/memory", "2Gi"),
        ),
        (
            "agent.resources.requests.cpu",
            "250m",
            agent,
            resource("requests/cpu", "250m"),
        ),
        (
            "agent.resources.requests.memory",
            "128Mi",
            agent,
            resource("requests/memory", "128Mi"),
        ),
        (
            "controller.leafLifetime",
            "12h",
            controller,
            variable("WEFT_LEAF_LIFETIME", "12h"),
        ),
        (
            "controller.logLevel",
            "debug",
            controller,
            variable("WEFT_LOG_LEVEL", "debug"),
        ),
        (
            "controller.resources.limits.memory",
            "2Gi",
            controller,
            resource("limits/memory", "2Gi"),
        ),
        (
            "controller.resources.requests.memory",
            "256Mi",
            controller,
            resource("requests/memory", "256Mi"),
        ),
        (
            "defaultPolicy",
            "deny",
            controller,
            variable("WEFT_DEFAULT_POLICY", "deny"),
        ),
        (
            "trustDomain",
            "example.org",
            controller,
            variable("WEFT_TRUST_DOMAIN", "example.org"),
        ),
    ];
    let names = cases.each_ref().map(|it| it.0);
    assert_eq!(
        names,
        settings::KEYS.each_ref().map(|it| it.name),
        "each key is tested"
    );
    for (key, value, kind, (what, expected)) in cases {
        let text = printed(&["--set", &format!("{key}={value}")]);
        let mut changed = only(ALL, kind);
        let pod = &mut changed["spec"]["template"]["spec"];
        if key == "agent.drainDeadline" {
            // Twice the deadline, and a quarter of a minute.
            pod["terminationGracePeriodSeconds"] = 255.into();
        }
        let container = &mut pod["containers"][0];
        match what.strip_prefix("env ") {
            Some(name) => {
                let variables = container["env"].as_array_mut().expect("variables");
                let variable = serde_json::json!({"name": name, "value": expected});
                match variables.iter_mut().find(|it| it["name"] == name) {
                    Some(there) => *there = variable,
                    None => variables.insert(0, variable),
                }
            }
            None => *container.pointer_mut(&what).expect("a resource") = expected,
        }
        assert_eq!(only(&text, kind), changed, "{key}");
        let lines = text
            .lines()
            .filter(|it| !ALL.lines().any(|line| line == *it));
        assert!(lines.count() <= 3, "{key} changes more");
    }
}

#[test]
fn what_cannot_be_set_is_said() {
    let said = |settings: &[&str]| {
        let settings = settings.iter().flat_map(|it| ["--set", *it]);
        let all = ["weft", "install"].into_iter().chain(settings);
        match Cli::try_parse_from(all)
            .map_err(|it| it.to_string())?
            .command
        {
            Command::Install(install) => install.manifests().map_err(|it| it.to_string()),
            other => panic!("{other:?}"),
        }
    };
    for (setting, part) in [
        (
            "agent.loglevel=debug",
            "there is no key agent.loglevel; there are agent.drainDeadline, agent.logLevel, ",
        ),
        ("trustDomain", "KEY=VALUE is needed"),
        ("trustDomain=", "trustDomain: "),
        ("defaultPolicy=allow", "defaultPolicy: "),
        (
            "agent.drainDeadline=30",
            "agent.drainDeadline: a time of at least 1s is needed",
        ),
        (
            "controller.leafLifetime=5s",
            "a time of at least 10s is needed",
        ),
        (
            "agent.resources.requests.cpu=lots",
            "a quantity of Kubernetes is needed",
        ),
        (
            "agent.resources.limits.memory=0",
            "a quantity of Kubernetes is needed",
        ),
        ("agent.logLevel=a\"b", "a level or a filter is needed"),
        ("agent.logLevel=a\nb", "a level or a filter is needed"),
    ] {
        let error = said(&[setting]).expect_err(setting);
        assert!(error.contains(part), "{setting}: no {part:?} in {error}");
    }
    let twice = said(&["trustDomain=a.org", "trustDomain=b.org"]);
    assert_eq!(
        twice,
        Err("--set has trustDomain twice: which value is meant?".to_owned())
    );
    let all = ["weft", "install", "--crds", "--ha"];
    assert!(
        Cli::try_parse_from(all).is_err(),
        "definitions have no replicas"
    );
}

#[test]
fn as_json_it_is_one_list_of_the_same_objects() {
    let json = list(&printed(&["--ha"])).expect("a list");
    assert_eq!(json["apiVersion"], "v1");
    assert_eq!(json["kind"], "List");
    let items = decode::documents(&printed(&["--ha"])).expect("YAML");
    assert_eq!(json["items"], Value::from(items));
}
