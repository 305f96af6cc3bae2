//! `weft install`, `weft uninstall`: print the manifests, for `kubectl apply -f -`.
//!
//! They are those of `daemonset/`, and only what many clusters have to say for themselves can be changed here: the image,
//! ranges of addresses that nothing in the cluster tells, a second controller, and the keys of `settings`. All else is for
//! an overlay. The text is changed, not what it says: whoever keeps it has its comments, too.

use std::io::Write;

use clap::{Args, ValueEnum};
use ipnet::IpNet;
use serde_json::json;
use weft_controller::objects::decode;

use crate::outcome::Outcome;
use crate::output;

mod settings;

pub use settings::Setting;
use settings::{Part, with_variable};

/// What `weft install` is asked.
#[derive(Args, Debug)]
#[command(after_help = settings::help())]
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
    /// Two controllers, on different machines where two can be used: as the component ha.
    #[arg(long)]
    pub ha: bool,
    /// Another value for one of the keys below; may be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub settings: Vec<Setting>,
    /// Only the custom resource definitions.
    #[arg(long, conflicts_with_all = ["image", "pod_ranges", "service_ranges", "ha", "settings", "skip_crds"])]
    pub crds: bool,
    /// Only the definitions of policy.linkerd.io and linkerd.io, for clusters in which Linkerd is not: where it is, they are
    /// its own.
    #[arg(
        long,
        conflicts_with_all = ["image", "pod_ranges", "service_ranges", "ha", "settings", "crds", "skip_crds"]
    )]
    pub crds_linkerd: bool,
    /// All but the custom resource definitions.
    #[arg(long)]
    pub skip_crds: bool,
    /// How the manifests are written.
    #[arg(short, long, default_value = "yaml")]
    pub output: ManifestFormat,
}

/// Which form manifests have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ManifestFormat {
    /// With comments.
    #[default]
    Yaml,
    /// A List of all objects.
    Json,
}

/// Why there are no manifests.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A key is set to two values.
    #[error("--set has {0} twice: which value is meant?")]
    Twice(&'static str),
    /// What was made of the manifests is none.
    #[error("the manifests cannot be read back: {0}: please report it")]
    Unreadable(String),
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

pub(crate) const ALL: &str = include_str!("../../../daemonset/weft.yaml");
/// As the component's kustomization lists them.
const OF_LINKERD: [&str; 8] = [
    include_str!(
        "../../../daemonset/components/crds-linkerd/authorizationpolicies.policy.linkerd.io.yaml"
    ),
    include_str!(
        "../../../daemonset/components/crds-linkerd/egressnetworks.policy.linkerd.io.yaml"
    ),
    include_str!(
        "../../../daemonset/components/crds-linkerd/httplocalratelimitpolicies.policy.linkerd.io.yaml"
    ),
    include_str!("../../../daemonset/components/crds-linkerd/httproutes.policy.linkerd.io.yaml"),
    include_str!(
        "../../../daemonset/components/crds-linkerd/meshtlsauthentications.policy.linkerd.io.yaml"
    ),
    include_str!(
        "../../../daemonset/components/crds-linkerd/networkauthentications.policy.linkerd.io.yaml"
    ),
    include_str!("../../../daemonset/components/crds-linkerd/servers.policy.linkerd.io.yaml"),
    include_str!("../../../daemonset/components/crds-linkerd/serviceprofiles.linkerd.io.yaml"),
];
const UNINSTALL: &str = include_str!("../../../daemonset/uninstall/uninstall.yaml");
/// How the manifests begin the line of an image.
const IMAGE: &str = "image: ghcr.io/weft-mesh/weft:";

/// Prints the manifests.
///
/// # Errors
/// They are not what was meant, or writing failed.
pub fn install(install: &Install) -> Result<Outcome, crate::Error> {
    let text = install.manifests()?;
    let mut out = std::io::stdout().lock();
    match install.output {
        ManifestFormat::Yaml => out.write_all(text.as_bytes())?,
        ManifestFormat::Json => output::json(&mut out, &list(&text)?)?,
    }
    Ok(Outcome::Good)
}

/// As one object, which kubectl applies like the documents one by one.
fn list(manifests: &str) -> Result<serde_json::Value, InstallError> {
    let items = decode::documents(manifests);
    let items = items.map_err(|fault| InstallError::Unreadable(fault.reason))?;
    Ok(json!({"apiVersion": "v1", "kind": "List", "items": items}))
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
    fn manifests(&self) -> Result<String, InstallError> {
        if self.crds_linkerd {
            return Ok(OF_LINKERD.map(|it| format!("---\n{it}")).concat());
        }
        for (at, setting) in self.settings.iter().enumerate() {
            let key = setting.key();
            if self.settings[..at].iter().any(|it| it.key() == key) {
                return Err(InstallError::Twice(key.name));
            }
        }
        let documents = ALL.split("---\n");
        let wanted = documents.filter(|it| {
            let is_definition = it.contains("\nkind: CustomResourceDefinition\n");
            // What stands before the first says what it is.
            let is_object = it.contains("\nkind: ");
            !is_object || (is_definition && !self.skip_crds) || (!is_definition && !self.crds)
        });
        let documents: Vec<String> = wanted.map(|it| self.changed(it)).collect();
        Ok(with_image(&documents.join("---\n"), self.image.as_deref()))
    }

    /// A document with all that is to be in it.
    fn changed(&self, document: &str) -> String {
        let mut document = document.to_owned();
        if Part::Controller.is(&document) {
            for (name, ranges) in [
                ("WEFT_POD_RANGES", &self.pod_ranges),
                ("WEFT_SERVICE_RANGES", &self.service_ranges),
            ] {
                let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
                if !ranges.is_empty() {
                    document = with_variable(&document, name, &ranges.join(","));
                }
            }
            if self.ha {
                document = with_replicas(&document);
            }
        }
        let settings = self.settings.iter();
        settings.fold(document, |document, it| it.apply(document))
    }
}

/// What the component ha patches the controller with.
const HA_CONTROLLER: &str = include_str!("../../../daemonset/components/ha/controller.yaml");

/// The controller's Deployment as the component ha has it.
fn with_replicas(document: &str) -> String {
    // The last of what the component has, and indented as it is here.
    let spread = HA_CONTROLLER.find("      topologySpreadConstraints:\n");
    let spread = spread.map_or("", |at| &HA_CONTROLLER[at..]);
    let before = "      serviceAccountName: weft-controller\n";
    document
        .replacen(
            "  # Two in components/ha.\n  replicas: 1\n",
            "  replicas: 2\n",
            1,
        )
        .replacen(before, &format!("{before}{spread}"), 1)
}

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
mod tests;
