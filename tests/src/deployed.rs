//! What the manifests of `daemonset/` say, run: containers with the command line, environment, mounts, user and rights that
//! are written there, of the programs in the image's archive.
//!
//! It does what a kubelet does, for the fields that these manifests have. A field that it does not know is an error, so
//! that nothing can be written there unnoticed. Where a pod's network and process ids are the host's, and whom it asks for
//! names, must be what its containers are run with.
//!
//! Known, and without effect here: what is the scheduler's and the controllers' (`affinity`, `nodeSelector`, `tolerations`,
//! `topologySpreadConstraints`, `priorityClassName`, `imagePullPolicy`, `terminationGracePeriodSeconds`, and of `resources`
//! all but the limit of memory that a container is told), `serviceAccountName`, and the profiles of AppArmor and SELinux.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::contain::{Container, Mount};

/// The objects of `daemonset/weft.yaml` and `daemonset/uninstall`, and the image that they name.
#[derive(Clone, Debug)]
pub struct Deployed {
    objects: Vec<Value>,
    archive: PathBuf,
    programs: Vec<PathBuf>,
}

/// What a kubelet knows when it makes a pod's containers.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The node's name.
    pub node: String,
    /// A folder for what is the pod's alone.
    pub pod_dir: PathBuf,
    /// Paths of the host that are elsewhere on this machine, as it is several nodes.
    pub host_paths: BTreeMap<PathBuf, PathBuf>,
    /// What is in projected volumes.
    pub projected: Option<PathBuf>,
    /// The token of the pod's service account for the API server, and what belongs to it.
    pub service_account: Option<PathBuf>,
    /// The lines of `/etc/resolv.conf`; with some, it is the cluster's name server that is asked.
    pub resolv_conf: String,
    /// Whether the containers are in the node's network namespace.
    pub host_network: bool,
    /// Whether they look at processes of the node. They always see them, as this machine has one set of process ids.
    pub host_pids: bool,
    /// Variables that containers have besides, or with another value, than the manifest says.
    pub environment: BTreeMap<String, String>,
    /// Capabilities that are withheld.
    pub without: Vec<String>,
}

/// A probe, by what it asks.
#[derive(Clone, Debug)]
pub enum Probe {
    /// A command in the container.
    Exec(Vec<String>),
    /// A port and path of HTTP.
    Http(u16, String),
}

impl Deployed {
    /// Reads the manifests, and unpacks the image's archive into a folder: that in `WEFT_IMAGE`, else where
    /// `cargo xtask image` puts it.
    pub fn read(dir: &Path) -> Result<Deployed> {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut objects = Vec::new();
        for name in ["daemonset/weft.yaml", "daemonset/uninstall/uninstall.yaml"] {
            let text = fs::read_to_string(workspace.join(name)).context(name)?;
            objects.extend(serde_saphyr::from_multiple::<Value>(&text)?);
        }
        let archive = std::env::var_os("WEFT_IMAGE")
            .map_or_else(|| workspace.join("target/weft-image.tar"), PathBuf::from);
        ensure!(
            archive.is_file(),
            "there is no {}: run `cargo xtask image --profile dev`",
            archive.display()
        );
        let programs = unpack(&archive, &dir.join("image"))?;
        Ok(Deployed {
            objects,
            archive,
            programs,
        })
    }

    /// What a file of a component changes.
    pub fn component(file: &str) -> Result<Value> {
        let components = Path::new(env!("CARGO_MANIFEST_DIR")).join("../daemonset/components");
        let text = fs::read_to_string(components.join(file)).context(file.to_owned())?;
        Ok(serde_saphyr::from_str(&text)?)
    }

    /// The image's archive.
    pub fn archive(&self) -> &Path {
        &self.archive
    }

    /// An object.
    pub fn object(&self, kind: &str, name: &str) -> Result<&Value> {
        let found = |it: &&Value| it["kind"] == kind && it["metadata"]["name"] == name;
        let found = self.objects.iter().find(found);
        found.with_context(|| format!("no {kind} {name}"))
    }

    /// All objects of a kind.
    pub fn objects<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects.iter().filter(move |it| it["kind"] == kind)
    }

    /// The pod's specification in an object that makes pods.
    pub fn pod(&self, kind: &str, name: &str) -> Result<&Value> {
        let pod = &self.object(kind, name)?["spec"]["template"]["spec"];
        let fields = pod.as_object().context("no template")?;
        for field in fields.keys() {
            ensure!(POD.contains(&field.as_str()), "{name}: what is {field}?");
        }
        Ok(pod)
    }

    /// The program of the image.
    pub fn program(&self, name: &str) -> Result<&Path> {
        let found = self.programs.iter().find(|it| it.ends_with(name));
        Ok(found.with_context(|| format!("the image has no {name}"))?)
    }

    /// A container of a pod as it is to be run.
    pub fn container(&self, pod: &Value, name: &str, facts: &Facts) -> Result<Container> {
        let found = containers(pod).find(|it| it["name"] == name);
        let found = found.with_context(|| format!("no container {name}"))?;
        expect_namespaces(pod, facts)?;
        for field in found.as_object().context("no container")?.keys() {
            ensure!(
                CONTAINER.contains(&field.as_str()),
                "{name}: what is {field}?"
            );
        }
        let command = strings(&found["command"])?;
        let program = command.first().context("no command")?;
        self.program(program.trim_start_matches('/'))?;
        let root = facts.pod_dir.join(format!("root-{name}"));
        fs::create_dir_all(&root)?;
        let security = Security {
            of_pod: &pod["securityContext"],
            own: &found["securityContext"],
        };
        let mut capabilities = security.capabilities()?;
        capabilities.retain(|it| !facts.without.contains(it));
        Ok(Container {
            root,
            image: self.programs.clone(),
            mounts: mounts(pod, found, facts)?,
            read_only_root: security.flag("readOnlyRootFilesystem")? == Some(true),
            capabilities,
            no_new_privileges: security.flag("allowPrivilegeEscalation")? == Some(false),
            default_seccomp: security.text("/seccompProfile/type") == Some("RuntimeDefault"),
            user: security.number("runAsUser")?,
            group: security.number("runAsGroup")?,
            command,
            environment: environment(found, facts)?,
        })
    }

    /// A probe of a container: `readinessProbe`, `livenessProbe`, `startupProbe`.
    pub fn probe(pod: &Value, name: &str, probe: &str) -> Result<Probe> {
        let found = containers(pod).find(|it| it["name"] == name);
        let found = found.with_context(|| format!("no container {name}"))?;
        let probe = &found[probe];
        if !probe["exec"].is_null() {
            return Ok(Probe::Exec(strings(&probe["exec"]["command"])?));
        }
        let get = &probe["httpGet"];
        let named = |it: &&Value| it["name"] == get["port"];
        let port = found["ports"].as_array().into_iter().flatten().find(named);
        let port = port.and_then(|it| it["containerPort"].as_u64());
        let path = get["path"].as_str().context("what kind of probe?")?;
        let port = u16::try_from(port.context("no port of this name")?)?;
        Ok(Probe::Http(port, path.to_owned()))
    }
}

/// What a pod and a container say about rights; the container's word counts.
struct Security<'a> {
    of_pod: &'a Value,
    own: &'a Value,
}

impl<'a> Security<'a> {
    fn find(&self, path: &str) -> Option<&'a Value> {
        self.own.pointer(path).or(self.of_pod.pointer(path))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        for field in [self.own, self.of_pod]
            .into_iter()
            .filter_map(Value::as_object)
        {
            for name in field.keys() {
                ensure!(SECURITY.contains(&name.as_str()), "what is {name}?");
            }
        }
        Ok(self.find(&format!("/{name}")).and_then(Value::as_bool))
    }

    fn text(&self, path: &str) -> Option<&'a str> {
        self.find(path).and_then(Value::as_str)
    }

    fn number(&self, name: &str) -> Result<u32> {
        let number = self.find(&format!("/{name}")).and_then(Value::as_u64);
        let number = number.with_context(|| format!("{name} is the image's to choose"))?;
        Ok(number.try_into()?)
    }

    fn capabilities(&self) -> Result<Vec<String>> {
        let drop = strings(&self.own["capabilities"]["drop"])?;
        ensure!(
            drop == ["ALL"],
            "not all capabilities are dropped: {drop:?}"
        );
        match &self.own["capabilities"]["add"] {
            Value::Null => Ok(vec![]),
            add => strings(add),
        }
    }
}

/// The pod says what its containers are run with.
fn expect_namespaces(pod: &Value, facts: &Facts) -> Result<()> {
    let says = |field: &str| pod[field] == true;
    ensure!(
        says("hostNetwork") == facts.host_network,
        "hostNetwork is {}",
        pod["hostNetwork"]
    );
    ensure!(
        says("hostPID") == facts.host_pids,
        "hostPID is {}",
        pod["hostPID"]
    );
    let policy = pod["dnsPolicy"].as_str().unwrap_or("ClusterFirst");
    let asks_cluster = match policy {
        "ClusterFirst" => !facts.host_network,
        "ClusterFirstWithHostNet" => true,
        "Default" => false,
        _ => bail!("what is the dnsPolicy {policy}?"),
    };
    ensure!(
        asks_cluster || facts.resolv_conf.is_empty(),
        "with the dnsPolicy {policy} nobody asks the cluster's name server"
    );
    Ok(())
}

fn environment(container: &Value, facts: &Facts) -> Result<Vec<(String, String)>> {
    let mut variables = BTreeMap::new();
    for entry in container["env"].as_array().into_iter().flatten() {
        let name = entry["name"].as_str().context("a variable without name")?;
        let from = &entry["valueFrom"];
        let field = from["fieldRef"]["fieldPath"].as_str();
        let resource = from["resourceFieldRef"]["resource"].as_str();
        let value = match (field, resource) {
            (Some("spec.nodeName"), None) => facts.node.clone(),
            (None, Some("limits.memory")) => {
                let limit = container["resources"]["limits"]["memory"].as_str();
                bytes(limit.context("no limit of memory")?)?.to_string()
            }
            (None, None) => entry["value"].as_str().context("no value")?.to_owned(),
            _ => bail!("{name}: what is {from}?"),
        };
        variables.insert(name.to_owned(), value);
    }
    variables.extend(facts.environment.clone());
    Ok(variables.into_iter().collect())
}

/// An amount as manifests write it.
fn bytes(quantity: &str) -> Result<u64> {
    let digits = quantity.find(|it: char| !it.is_ascii_digit());
    let (number, unit) = quantity.split_at(digits.unwrap_or(quantity.len()));
    let unit = match unit {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => bail!("what is {unit} in {quantity}?"),
    };
    Ok(number.parse::<u64>()? * unit)
}

fn mounts(pod: &Value, container: &Value, facts: &Facts) -> Result<Vec<Mount>> {
    let etc = facts.pod_dir.join("etc");
    fs::create_dir_all(&etc)?;
    let mut mounts = Vec::new();
    let mut add = |source: PathBuf, target: &str, read_only: bool| {
        let target = target.into();
        mounts.push(Mount {
            source,
            target,
            read_only,
        });
    };
    for (name, text) in [
        ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ("resolv.conf", &facts.resolv_conf),
    ] {
        let file = etc.join(name);
        fs::write(&file, text)?;
        add(file, &format!("/etc/{name}"), false);
    }
    let none = Vec::new();
    let wanted = container["volumeMounts"].as_array().unwrap_or(&none);
    for mount in wanted {
        for field in mount.as_object().context("no mount")?.keys() {
            let known = ["name", "mountPath", "readOnly"].contains(&field.as_str());
            ensure!(known, "what is {field} of a mount?");
        }
        let volumes = pod["volumes"].as_array().unwrap_or(&none);
        let volume = volumes.iter().find(|it| it["name"] == mount["name"]);
        let source = source(volume.context("no such volume")?, facts)?;
        let target = mount["mountPath"].as_str().context("no mountPath")?;
        add(source, target, mount["readOnly"] == true);
    }
    let has_token = pod["automountServiceAccountToken"] != false;
    if let Some(account) = facts.service_account.as_ref().filter(|_| has_token) {
        add(account.clone(), SERVICE_ACCOUNT, true);
    }
    Ok(mounts)
}

/// Where a volume is on this machine.
fn source(volume: &Value, facts: &Facts) -> Result<PathBuf> {
    let name = volume["name"].as_str().context("a volume without name")?;
    if volume.get("projected").is_some() {
        let projected = facts.projected.clone();
        return projected.with_context(|| format!("{name}: nothing is projected"));
    }
    if volume.get("emptyDir").is_some() {
        let folder = facts.pod_dir.join("volumes").join(name);
        fs::create_dir_all(&folder)?;
        return Ok(folder);
    }
    let path = volume["hostPath"]["path"].as_str();
    let path = Path::new(path.with_context(|| format!("what kind of volume is {name}?"))?);
    let here = facts.host_paths.get(path).map_or(path, PathBuf::as_path);
    match volume["hostPath"]["type"].as_str() {
        Some("Directory") => ensure!(here.is_dir(), "{} is no folder", here.display()),
        Some("DirectoryOrCreate") => fs::create_dir_all(here)?,
        other => bail!("{name}: what is the type {other:?}?"),
    }
    Ok(here.to_owned())
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["initContainers", "containers"].into_iter();
    lists.filter_map(|it| pod[it].as_array()).flatten()
}

fn strings(list: &Value) -> Result<Vec<String>> {
    let list = list.as_array().context("no list")?;
    let text = |it: &Value| it.as_str().map(str::to_owned).context("no text");
    list.iter().map(text).collect()
}

/// The files of an image's one layer.
fn unpack(archive: &Path, into: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(into)?;
    let tar = |args: &[&str], archive: &Path, into: &Path| -> Result<()> {
        let mut tar = Command::new("tar");
        tar.args(args).arg(archive).arg("-C").arg(into);
        ensure!(tar.status()?.success(), "unpacking {}", archive.display());
        Ok(())
    };
    let blobs = into.join("blobs");
    fs::create_dir_all(&blobs)?;
    tar(&["-xf"], archive, &blobs)?;
    let list: Value = serde_json::from_slice(&fs::read(blobs.join("manifest.json"))?)?;
    let layers = strings(&list[0]["Layers"])?;
    ensure!(layers.len() == 1, "{} layers", layers.len());
    let files = into.join("files");
    fs::create_dir_all(&files)?;
    tar(&["-xzf"], &blobs.join(&layers[0]), &files)?;
    fs::remove_dir_all(&blobs)?;
    let entries = fs::read_dir(&files)?.map(|it| Ok(it?.path()));
    entries.collect()
}

/// Where programs look for the token of their pod.
pub(crate) const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The fields of a pod that are followed, or that are for others than the kubelet.
const POD: [&str; 15] = [
    "affinity",
    "automountServiceAccountToken",
    "containers",
    "dnsPolicy",
    "hostNetwork",
    "hostPID",
    "initContainers",
    "nodeSelector",
    "priorityClassName",
    "securityContext",
    "serviceAccountName",
    "terminationGracePeriodSeconds",
    "tolerations",
    "topologySpreadConstraints",
    "volumes",
];
const CONTAINER: [&str; 12] = [
    "command",
    "env",
    "image",
    "imagePullPolicy",
    "livenessProbe",
    "name",
    "ports",
    "readinessProbe",
    "resources",
    "securityContext",
    "startupProbe",
    "volumeMounts",
];
const SECURITY: [&str; 9] = [
    "allowPrivilegeEscalation",
    "appArmorProfile",
    "capabilities",
    "readOnlyRootFilesystem",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "seLinuxOptions",
    "seccompProfile",
];
