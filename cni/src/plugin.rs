//! What the plugin does at each command, and what while there is no agent.
//!
//! An agent that cannot be asked is not asked again and again here, unless it went away while it was asked, as it does when
//! a newer one takes over: the kubelet tries again, with a new sandbox. Until then no container of the pod runs, so nothing of it is in plaintext. Namespaces that are exempt never wait: what there
//! must be for an agent to know anything runs in them.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use crate::ask::{self, Answer, Attachment, Pod, Request};
use crate::call::{self, Call, Command, Config, PodName, Settings, VERSIONS, WhenAway};
use crate::failure::{Code, Failure};
use crate::listed::Listed;
use crate::result;

/// How the plugin reaches the rest of the world.
pub trait World {
    /// Asks the agent.
    ///
    /// # Errors
    /// Why there is no answer, as a sentence.
    fn ask(
        &self,
        socket: &Path,
        request: &Request,
        netns: Option<&File>,
        wait: Duration,
    ) -> Result<Answer, String>;

    /// Says something for whoever reads the runtime's log.
    fn say(&self, text: &str);
}

/// The real one.
#[derive(Clone, Copy, Debug)]
pub struct Host;

impl World for Host {
    fn ask(
        &self,
        socket: &Path,
        request: &Request,
        netns: Option<&File>,
        wait: Duration,
    ) -> Result<Answer, String> {
        ask::ask(socket, request, netns, wait).map_err(|error| error.to_string())
    }

    fn say(&self, text: &str) {
        // The runtime may have closed it.
        let _ = writeln!(std::io::stderr(), "weft-cni: {text}");
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    cni_version: String,
    supported_versions: [&'static str; VERSIONS.len()],
}

/// Does what the runtime wants, and answers on `output`.
pub fn run(
    variable: impl Fn(&str) -> Option<OsString>,
    input: impl Read,
    mut output: impl Write,
    world: &impl World,
) -> ExitCode {
    let (text, code) = match call::read_input(input) {
        // It goes, whatever cannot be read of it.
        Err(failure) if is_taking_down(&variable) => {
            world.say(&failure.to_string());
            (String::new(), ExitCode::SUCCESS)
        }
        Err(failure) => (failure.to_json(call::NEWEST), ExitCode::FAILURE),
        Ok(input) => match answer(variable, &input, world) {
            Ok(text) => (text, ExitCode::SUCCESS),
            Err(failure) => {
                let version = Config::version_of(&input);
                (failure.to_json(&version), ExitCode::FAILURE)
            }
        },
    };
    match writeln!(output, "{text}").and_then(|()| output.flush()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn is_taking_down(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    variable("CNI_COMMAND").is_some_and(|it| it == "DEL" || it == "GC")
}

/// What to print.
///
/// # Errors
/// What else to print.
pub fn answer(
    variable: impl Fn(&str) -> Option<OsString>,
    input: &[u8],
    world: &impl World,
) -> Result<String, Failure> {
    let command = variable("CNI_COMMAND").unwrap_or_default();
    match Command::parse(&command.to_string_lossy())? {
        Command::Version => versions(input),
        // What is taken down must not stay because something about it is not understood.
        command @ (Command::Del | Command::Gc) => {
            match Call::read(command, variable, input) {
                Ok(call) => let_go(&call, world),
                Err(failure) => world.say(&failure.to_string()),
            }
            Ok(String::new())
        }
        command => {
            let call = Call::read(command, variable, input)?;
            match command {
                Command::Add => add(&call, world),
                Command::Check => check(&call, world).map(|()| String::new()),
                // Pods of exempt namespaces can be added at any time, the agent's own among them. A node that says that
                // it is not ready would keep them out.
                _ => Ok(String::new()),
            }
        }
    }
}

fn versions(input: &[u8]) -> Result<String, Failure> {
    let versions = Versions {
        cni_version: Config::version_of(input),
        supported_versions: VERSIONS.map(|it| it.0),
    };
    serde_json::to_string(&versions)
        .map_err(|error| Failure::new(Code::Io, "writing the versions").because(error.to_string()))
}

fn add(call: &Call, world: &impl World) -> Result<String, Failure> {
    let Some(previous) = &call.config.previous else {
        return Err(Failure::new(Code::InvalidConfiguration, "no prevResult"));
    };
    // Before anybody is asked: what cannot be passed on fails anyway.
    let result = result::passed_on(previous, call.config.version)?;
    if let Some(pod) = call.waiting() {
        let addresses = result::addresses(previous)?;
        enroll(call, pod, addresses, world)?;
    }
    Ok(result)
}

fn enroll(
    call: &Call,
    pod: &PodName,
    addresses: Vec<std::net::IpAddr>,
    world: &impl World,
) -> Result<(), Failure> {
    let own = &call.config.own;
    let path = call.netns.as_deref().unwrap_or(Path::new(""));
    let netns = open_netns(path)?;
    let Some(uid) = &pod.uid else {
        let reason =
            "the runtime does not say the pod's UID (containerd does since 1.6, CRI-O since 1.22)";
        return while_away(own, pod, reason, world);
    };
    let wait = own.wait();
    let request = Request::Add(Attachment {
        pod: pod.with_uid(uid),
        container: call.container.clone(),
        network: call.config.name.clone(),
        addresses,
        wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
    });
    // The agent, which knows more of why it takes so long, is to speak first.
    match world.ask(&own.socket, &request, Some(&netns), wait + MARGIN) {
        Ok(Answer::Enrolled | Answer::NotMeshed | Answer::Done) => Ok(()),
        Ok(Answer::Wait { reason }) => {
            let message = format!("pod {} waits for the mesh", pod.shown());
            Err(Failure::new(Code::TryAgainLater, message).because(reason))
        }
        Ok(Answer::Away { reason }) | Err(reason) => while_away(own, pod, &reason, world),
    }
}

fn check(call: &Call, world: &impl World) -> Result<(), Failure> {
    let Some(pod) = call.waiting() else {
        return Ok(());
    };
    let own = &call.config.own;
    let Some(uid) = &pod.uid else {
        return Ok(());
    };
    let request = Request::Check {
        pod: pod.with_uid(uid),
        container: call.container.clone(),
    };
    match world.ask(&own.socket, &request, None, own.wait()) {
        Ok(Answer::Enrolled | Answer::NotMeshed | Answer::Done) => Ok(()),
        Ok(Answer::Wait { reason }) => {
            let message = format!("pod {} is not in the mesh", pod.shown());
            Err(Failure::new(Code::NotEnrolled, message).because(reason))
        }
        Ok(Answer::Away { reason }) | Err(reason) => while_away(own, pod, &reason, world),
    }
}

/// The agent, if there is one, need not keep the namespace any longer. It finds out by itself, too.
fn let_go(call: &Call, world: &impl World) {
    let request = match call.command {
        Command::Gc => Request::Gc {
            network: call.config.name.clone(),
            containers: call.config.valid.clone(),
        },
        _ => Request::Del {
            container: call.container.clone(),
        },
    };
    if let Err(reason) = world.ask(&call.config.own.socket, &request, None, LET_GO_WAIT) {
        world.say(&reason);
    }
}

/// What becomes of a pod of which nobody can say whether it is meshed.
fn while_away(
    own: &Settings,
    pod: &PodName,
    reason: &str,
    world: &impl World,
) -> Result<(), Failure> {
    let why = match own.when_away {
        WhenAway::RefuseAll => "all pods wait while it is away".to_owned(),
        WhenAway::Listed => match Listed::read(&own.listed) {
            Ok(Some(listed)) if listed.namespaces.contains(&pod.namespace) => {
                format!("namespace {} may hold meshed pods", pod.namespace)
            }
            Ok(_) => {
                let shown = pod.shown();
                world.say(&format!(
                    "{reason}; pod {shown} starts, as nobody opted in there"
                ));
                return Ok(());
            }
            Err(error) => format!("which namespaces may hold meshed pods is not known: {error}"),
        },
    };
    let message = format!("pod {} waits for Weft's agent", pod.shown());
    let details = format!(
        "{reason}; {why}. The kubelet tries again. If Weft was removed from this node, run `weft-cni uninstall` on it"
    );
    Err(Failure::new(Code::TryAgainLater, message).because(details))
}

fn open_netns(path: &Path) -> Result<File, Failure> {
    let shown = path.display();
    let failed = |reason: String| {
        Failure::new(Code::InvalidEnvironment, format!("CNI_NETNS: {shown}")).because(reason)
    };
    // Whatever is there, it is not waited for.
    let mut options = File::options();
    let flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_NOCTTY;
    let opened = options.read(true).custom_flags(flags.bits()).open(path);
    let netns = opened.map_err(|error| failed(error.to_string()))?;
    match ask::is_netns(netns.as_fd()) {
        Ok(true) => Ok(netns),
        Ok(false) => Err(failed("it is no network namespace".to_owned())),
        Err(error) => Err(failed(error.to_string())),
    }
}

impl Call {
    /// The pod, if it is one that may have to wait.
    fn waiting(&self) -> Option<&PodName> {
        let exempt = &self.config.own.exempt;
        self.pod
            .as_ref()
            .filter(|it| !exempt.contains(&it.namespace))
    }
}

impl PodName {
    fn with_uid(&self, uid: &str) -> Pod {
        Pod {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: uid.to_owned(),
        }
    }

    fn shown(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// How much longer the plugin waits than it says to the agent.
const MARGIN: Duration = Duration::from_secs(2);
/// A pod that goes is not kept by an agent that is slow.
const LET_GO_WAIT: Duration = Duration::from_secs(2);

#[cfg(test)]
#[path = "plugin_tests.rs"]
mod tests;
