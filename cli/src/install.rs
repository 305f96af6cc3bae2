//! `weft install`, `weft uninstall`: print the manifests, for `kubectl apply -f -`.
//!
//! They are those of `daemonset/`, and only what nearly every cluster has to say for itself can be changed here: the
//! image, and ranges of addresses that nothing in the cluster tells. All else is for an overlay.

use std::io::Write;

use clap::Args;
use ipnet::IpNet;

use crate::outcome::Outcome;

/// What `weft install` is asked.
#[derive(Args, Debug)]
#[command(after_help = "See docs/install.md. Next: weft install | kubectl apply -f -")]
pub struct Install {
    /// The image, where it is not pulled from the one in the manifests.
    #[arg(long, value_name = "IMAGE", value_parser = image)]
    pub image: Option<String>,
    /// A range that pods get addresses from, where the CNI hands them out by itself; may be given several times.
    #[arg(long = "pod-range", value_name = "CIDR")]
    pub pod_ranges: Vec<IpNet>,
    /// A range that Services get addresses from, where the cluster has no ServiceCIDRs; may be given several times.
    #[arg(long = "service-range", value_name = "CIDR")]
    pub service_ranges: Vec<IpNet>,
    /// Only the custom resource definitions.
    #[arg(long, conflicts_with_all = ["image", "pod_ranges", "service_ranges", "skip_crds"])]
    pub crds: bool,
    /// Only the definitions of policy.linkerd.io and linkerd.io, for clusters in which Linkerd is not: where it is, they are
    /// its own.
    #[arg(long, conflicts_with_all = ["image", "pod_ranges", "service_ranges", "crds", "skip_crds"])]
    pub crds_linkerd: bool,
    /// All but the custom resource definitions.
    #[arg(long)]
    pub skip_crds: bool,
}

/// What `weft uninstall` is asked.
#[derive(Args, Debug)]
#[command(
    after_help = "See docs/uninstall.md. Next: weft uninstall --agents-are-gone | kubectl apply -f -"
)]
pub struct Uninstall {
    /// Print the manifests that remove the kernel programs: no agent runs any more, on any node. Without it, the steps are
    /// printed alone: under agents that run, what protects their pods would be taken away.
    #[arg(long)]
    pub agents_are_gone: bool,
    /// The image, where it is not pulled from the one in the manifests.
    #[arg(long, value_name = "IMAGE", value_parser = image, requires = "agents_are_gone")]
    pub image: Option<String>,
}

pub(crate) const ALL: &str = include_str!("../../daemonset/weft.yaml");
/// As the component's kustomization lists them.
const OF_LINKERD: [&str; 8] = [
    include_str!(
        "../../daemonset/components/crds-linkerd/authorizationpolicies.policy.linkerd.io.yaml"
    ),
    include_str!("../../daemonset/components/crds-linkerd/egressnetworks.policy.linkerd.io.yaml"),
    include_str!(
        "../../daemonset/components/crds-linkerd/httplocalratelimitpolicies.policy.linkerd.io.yaml"
    ),
    include_str!("../../daemonset/components/crds-linkerd/httproutes.policy.linkerd.io.yaml"),
    include_str!(
        "../../daemonset/components/crds-linkerd/meshtlsauthentications.policy.linkerd.io.yaml"
    ),
    include_str!(
        "../../daemonset/components/crds-linkerd/networkauthentications.policy.linkerd.io.yaml"
    ),
    include_str!("../../daemonset/components/crds-linkerd/servers.policy.linkerd.io.yaml"),
    include_str!("../../daemonset/components/crds-linkerd/serviceprofiles.linkerd.io.yaml"),
];
const UNINSTALL: &str = include_str!("../../daemonset/uninstall/uninstall.yaml");
/// How the manifests begin the line of an image.
const IMAGE: &str = "image: ghcr.io/weft-mesh/weft:";

/// Prints the manifests.
///
/// # Errors
/// Writing failed.
pub fn install(install: &Install) -> Result<Outcome, crate::Error> {
    std::io::stdout().write_all(install.manifests().as_bytes())?;
    Ok(Outcome::Good)
}

/// Says which steps there are, or prints what removes the kernel programs, which is one of them.
///
/// # Errors
/// Writing failed.
pub fn uninstall(uninstall: &Uninstall) -> Result<Outcome, crate::Error> {
    std::io::stdout().write_all(uninstall.text().as_bytes())?;
    Ok(Outcome::Good)
}

impl Uninstall {
    fn text(&self) -> String {
        match self.agents_are_gone {
            true => with_image(UNINSTALL, self.image.as_deref()),
            false => STEPS.to_owned(),
        }
    }
}

const STEPS: &str = "\
To remove Weft, in this order (docs/uninstall.md has the reasons):

1. Let pods leave: take labels and annotations away, of templates too, and wait until no agent has pods.
     kubectl label namespaces --all weft.dev/mesh-
     kubectl annotate namespaces --all linkerd.io/inject-
     kubectl label pods --all-namespaces --all weft.dev/mesh-
     kubectl annotate pods --all-namespaces --all linkerd.io/inject-
2. See that nodes can have the image (--image), remove the agents, and wait until they are gone.
     kubectl -n weft-system delete daemonset weft-agent
     kubectl -n weft-system wait --for=delete pod -l app.kubernetes.io/name=weft-agent --timeout=3m
3. Remove the kernel programs of all nodes.
     weft uninstall --agents-are-gone | kubectl apply -f -
     kubectl -n weft-system rollout status daemonset/weft-uninstall
4. Remove the rest, and with it the issuer's Secret and all policies.
     kubectl delete namespace weft-system
     kubectl delete clusterrole,clusterrolebinding weft-controller weft-viewer weft-tap
     kubectl delete --ignore-not-found validatingwebhookconfiguration weft-webhook
     kubectl delete --ignore-not-found clusterrole,clusterrolebinding weft-controller-webhook
     weft install --crds | kubectl delete -f -
";

impl Install {
    fn manifests(&self) -> String {
        if self.crds_linkerd {
            return OF_LINKERD.map(|it| format!("---\n{it}")).concat();
        }
        let documents = ALL.split("---\n");
        let wanted = documents.filter(|it| {
            let is_definition = it.contains("\nkind: CustomResourceDefinition\n");
            // What stands before the first says what it is.
            let is_object = it.contains("\nkind: ");
            !is_object || (is_definition && !self.skip_crds) || (!is_definition && !self.crds)
        });
        let documents = wanted.map(|it| self.with_ranges(it));
        let text = documents.collect::<Vec<_>>().join("---\n");
        with_image(&text, self.image.as_deref())
    }

    /// A document, and if it is the controller with the ranges.
    fn with_ranges(&self, document: &str) -> String {
        let is_controller = document.contains("\nkind: Deployment\n");
        let mut variables = String::new();
        for (name, ranges) in [
            ("WEFT_POD_RANGES", &self.pod_ranges),
            ("WEFT_SERVICE_RANGES", &self.service_ranges),
        ] {
            let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
            if !ranges.is_empty() {
                let value = ranges.join(",");
                variables +=
                    &format!("{ENV_INDENT}- name: {name}\n{ENV_INDENT}  value: \"{value}\"\n");
            }
        }
        match is_controller {
            true => document.replacen(ENV, &format!("{ENV}{variables}"), 1),
            false => document.to_owned(),
        }
    }
}

/// The line after which the controller's variables stand,
const ENV: &str = "        env:\n";
/// and how they are indented.
const ENV_INDENT: &str = "        ";

fn with_image(text: &str, image: Option<&str>) -> String {
    let Some(image) = image else {
        return text.to_owned();
    };
    let lines = text.lines().map(|line| match line.find(IMAGE) {
        Some(at) => format!("{}image: {image}\n", &line[..at]),
        None => format!("{line}\n"),
    });
    lines.collect()
}

/// A name of an image: what YAML could take for anything else has no place in one.
fn image(text: &str) -> Result<String, String> {
    let allowed = |it: char| it.is_ascii_alphanumeric() || "._-/:@".contains(it);
    match text.starts_with(|it: char| it.is_ascii_alphanumeric()) && text.chars().all(allowed) {
        true => Ok(text.to_owned()),
        false => Err("a name such as registry.example.org/weft:v1 is needed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::Value;
    use weft_controller::objects::decode;

    use super::*;
    use crate::command::{Cli, Command};

    fn printed(arguments: &[&str]) -> String {
        let all = ["weft", "install"].iter().chain(arguments);
        match Cli::try_parse_from(all).expect("a command line").command {
            Command::Install(install) => install.manifests(),
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
                include_str!("../../daemonset/components/webhook/webhook.yaml"),
            ),
            (
                "weft-controller-webhook",
                include_str!("../../daemonset/components/webhook/rbac.yaml"),
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
}
