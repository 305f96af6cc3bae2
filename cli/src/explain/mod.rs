//! `weft explain`: what becomes of a connection, or of a request, from a pod to a destination, and what decides each step of
//! it.
//!
//! The agents decide, by what they decide connections with, and say what they see: the one that serves the client's pod, and
//! then the one that serves the pod that it leads to. Nothing is connected.

use std::io::Write;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::controller::{self, Agent, Reach, ReachError};
use crate::outcome::Outcome;
use crate::output::{self, Format, Tone, paint, shown};

#[cfg(test)]
mod tests;

/// What `weft explain` is asked.
#[derive(Args, Debug)]
pub struct Explain {
    /// The client's pod: `shop/order-1`, or `order-1` or `pod/order-1` with its namespace beside it.
    #[arg(value_name = "POD")]
    pub pod: String,
    /// Where to, as the pod means it: `web:80`, `web.shop:80`, `web.shop.svc.cluster.local:80`, `10.0.0.1:80`,
    /// `[fd00::1]:80`.
    #[arg(value_name = "HOST:PORT")]
    pub to: String,
    /// A request with this method is explained, and not the connection alone. GET unless said (POST with --grpc).
    #[arg(long, conflicts_with = "sni")]
    pub method: Option<String>,
    /// A request for this path, with its query: `/orders?open=1`; of gRPC, `/shop.Orders/List`. / unless said.
    #[arg(long, conflicts_with = "sni")]
    pub path: Option<String>,
    /// A request with this header, again and again: `-H 'x-canary: 1'`. Its host is HOST:PORT unless said.
    #[arg(
        short = 'H',
        long = "header",
        value_name = "NAME: VALUE",
        conflicts_with = "sni"
    )]
    pub headers: Vec<String>,
    /// A call of gRPC.
    #[arg(long, conflicts_with = "sni")]
    pub grpc: bool,
    /// A connection of TLS that asks for this server name.
    #[arg(long, value_name = "NAME")]
    pub sni: Option<String>,
    /// The pod's namespace, where it does not stand beside its name. If it is not given: in a cluster that of the
    /// kubeconfig's context, or else `default`.
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// How the answer is written.
    #[arg(short, long, default_value = "table")]
    pub output: Format,
    /// Whom to ask.
    #[command(flatten)]
    pub reach: Reach,
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The client's pod.
    pod: String,
    /// As it was asked for.
    to: String,
    /// The request that it was asked for; none: the connection.
    request: Option<Request>,
    /// `reaches`, `answered`, `refused`, or `unknown`.
    outcome: Said,
    /// Why it is not known more; none: all was found out.
    missing: Option<String>,
    /// The ends, in the order in which a connection passes them.
    ends: Vec<End>,
}

/// One end, as the agent sees it that serves it.
#[derive(Debug, Serialize)]
struct End {
    /// `outbound` or `inbound`.
    side: &'static str,
    node: String,
    pod: String,
    steps: Vec<Step>,
}

/// What an agent says.
#[derive(Debug, Deserialize)]
struct Explanation {
    steps: Vec<Step>,
    outcome: Said,
    next: Option<Next>,
}

/// A step.
#[derive(Debug, Deserialize, Serialize)]
struct Step {
    step: String,
    state: State,
    fact: String,
    /// What decides it; none: no object does.
    object: Option<String>,
    details: Vec<String>,
    values: Value,
}

/// How a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Warning,
    Error,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Reaches,
    /// The mesh answers the request itself, as a route says.
    Answered,
    Refused,
    /// The other end's agent decides: what one agent says, and never the answer.
    Continues,
    Unknown,
}

/// What is to be asked at the other end.
#[derive(Debug, Deserialize)]
struct Next {
    pod: Name,
    to: String,
    from: String,
    identity: Option<String>,
    opaque_by: Option<String>,
    /// None: it is about a connection, or no request is seen.
    #[serde(default)]
    request: Option<Request>,
}

/// A request.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Request {
    method: String,
    path: String,
    /// As `name: value`.
    headers: Vec<String>,
    /// Headers whose values are not told: filters of routes have written them.
    #[serde(default)]
    hidden: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Name {
    namespace: String,
    name: String,
}

/// Where the controller says that a pod runs.
#[derive(Debug, Deserialize)]
struct Place {
    node: String,
}

/// Finds out and shows.
///
/// # Errors
/// Nobody can be asked, and why.
pub async fn run(explain: &Explain) -> Result<Outcome, crate::Error> {
    let report = report(explain).await?;
    output::show(explain.output, &report, &[], |out, colours| {
        report.write(out, colours)
    })?;
    Ok(report.outcome())
}

async fn report(asked: &Explain) -> Result<Report, ReachError> {
    let own = match &asked.namespace {
        Some(namespace) => namespace.clone(),
        None => asked.reach.namespace().await,
    };
    let (namespace, name) = pod(&asked.pod, &own)?;
    let mut report = Report {
        pod: format!("{namespace}/{name}"),
        to: asked.to.clone(),
        request: Request::of(asked),
        outcome: Said::Unknown,
        missing: None,
        ends: vec![],
    };
    let agents = asked.reach.agents().await?;
    let node = node_of(&asked.reach, &report.pod).await?;
    let query = [
        ("side", Some("outbound")),
        ("pod", Some(report.pod.as_str())),
        ("to", Some(asked.to.as_str())),
        ("sni", asked.sni.as_deref()),
    ];
    let explained = ask(&agents, &node, &query, report.request.as_ref()).await?;
    let next = report.take("outbound", node, report.pod.clone(), explained);
    let Some(next) = next else {
        return Ok(report);
    };
    let pod = format!("{}/{}", next.pod.namespace, next.pod.name);
    let query = [
        ("side", Some("inbound")),
        ("pod", Some(pod.as_str())),
        ("to", Some(&next.to)),
        ("from", Some(&next.from)),
        ("identity", next.identity.as_deref()),
        ("opaque_by", next.opaque_by.as_deref()),
    ];
    // Where the other one runs is not the first agent's to say.
    let asked = async {
        let node = node_of(&asked.reach, &pod).await?;
        let explained = ask(&agents, &node, &query, next.request.as_ref()).await?;
        Ok::<_, ReachError>((node, explained))
    };
    match asked.await {
        Ok((node, explained)) => {
            report.take("inbound", node, pod.clone(), explained);
        }
        // What the first one says is an answer, too.
        Err(error) => report.missing = Some(error.to_string()),
    }
    Ok(report)
}

/// The pod's namespace and name.
fn pod<'a>(text: &'a str, namespace: &'a str) -> Result<(&'a str, &'a str), ReachError> {
    let (namespace, name) = match text.split_once('/') {
        None => (namespace, text),
        Some(("po" | "pod" | "pods", name)) => (namespace, name),
        Some(both) => both,
    };
    match namespace.is_empty() || name.is_empty() || name.contains('/') {
        true => Err(ReachError::Refused(format!(
            "{text:?} is no pod: as shop/order-1, or pod/order-1 -n shop"
        ))),
        false => Ok((namespace, name)),
    }
}

/// Where a pod runs, as a controller knows it.
async fn node_of(reach: &Reach, pod: &str) -> Result<String, ReachError> {
    let mut refused = None;
    for at in &reach.places().await? {
        match controller::json::<Place>(at, &format!("/workloads/{pod}")).await {
            Ok(place) => return Ok(place.node),
            Err(error) => refused = Some(error),
        }
    }
    // There is one at least.
    Err(refused.unwrap_or_else(|| ReachError::NoAgents(String::new())))
}

/// Asks the agent of a node. During an upgrade there are two: the answer is that of the one that serves the pod.
async fn ask(
    agents: &[Agent],
    node: &str,
    query: &[(&str, Option<&str>)],
    request: Option<&Request>,
) -> Result<Explanation, ReachError> {
    let mut written = form_urlencoded::Serializer::new(String::new());
    if let Some(request) = request {
        written.append_pair("method", &request.method);
        written.append_pair("path", &request.path);
        for header in &request.headers {
            written.append_pair("header", header);
        }
        for name in &request.hidden {
            written.append_pair("hidden", name);
        }
    }
    for (key, value) in query {
        if let Some(value) = value {
            written.append_pair(key, value);
        }
    }
    let page = format!("explain?{}", written.finish());
    let mut best = Err(ReachError::NoAgents(format!("a controller from {node}")));
    for agent in agents.iter().filter(|it| it.status.node == node) {
        let explained = agent.json::<Explanation>(&page).await;
        if explained.as_ref().is_ok_and(Explanation::has_pod) {
            return explained;
        }
        if best.is_err() {
            best = explained;
        }
    }
    best
}

impl Request {
    /// The one that is asked about, if one is.
    fn of(asked: &Explain) -> Option<Self> {
        let is_asked = asked.method.is_some()
            || asked.path.is_some()
            || !asked.headers.is_empty()
            || asked.grpc;
        let mut headers = asked.headers.clone();
        if asked.grpc {
            headers.push("content-type: application/grpc".to_owned());
        }
        let otherwise = if asked.grpc { "POST" } else { "GET" };
        is_asked.then(|| Self {
            method: asked.method.as_deref().unwrap_or(otherwise).to_owned(),
            path: asked.path.as_deref().unwrap_or("/").to_owned(),
            headers,
            hidden: vec![],
        })
    }
}

impl Explanation {
    /// Whether the agent serves the pod.
    fn has_pod(&self) -> bool {
        let mut steps = self.steps.iter();
        steps.any(|it| it.step == "pod" && it.state != State::Error)
    }
}

impl Report {
    /// Adds what an agent says. Returns whom to ask next.
    fn take(
        &mut self,
        side: &'static str,
        node: String,
        pod: String,
        explained: Explanation,
    ) -> Option<Next> {
        let Explanation {
            steps,
            outcome,
            next,
        } = explained;
        let next = next.filter(|_| outcome == Said::Continues && side == "outbound");
        self.outcome = match outcome {
            Said::Continues => Said::Unknown,
            outcome => outcome,
        };
        self.ends.push(End {
            side,
            node,
            pod,
            steps,
        });
        next
    }

    fn outcome(&self) -> Outcome {
        match self.outcome {
            Said::Reaches | Said::Answered => Outcome::Good,
            Said::Refused => Outcome::Bad,
            Said::Continues | Said::Unknown => Outcome::Unknown,
        }
    }

    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        for end in &self.ends {
            let heading = format!("{}, {}", end.pod, end.node);
            writeln!(to, "{}", paint(&shown(&heading), Tone::Head, colours))?;
            for step in &end.steps {
                step.write(to, colours)?;
            }
            writeln!(to)?;
        }
        if let Some(missing) = &self.missing {
            let mark = paint("‼", Tone::Warn, colours);
            writeln!(to, "{mark} the other end is missing: {}\n", shown(missing))?;
        }
        let (pod, there) = (shown(&self.pod), shown(&self.to));
        let what = match &self.request {
            None => format!("connect to {there}"),
            Some(request) => {
                let (method, path) = (shown(&request.method), shown(&request.path));
                format!("ask {there} for {method} {path}")
            }
        };
        let (summary, tone) = match self.outcome {
            Said::Reaches => (format!("{pod} may {what}"), Tone::Good),
            Said::Answered => (
                format!("{pod} may {what}, and the mesh answers it"),
                Tone::Good,
            ),
            Said::Refused => (format!("{pod} cannot {what}"), Tone::Bad),
            Said::Continues | Said::Unknown => (
                format!("it cannot be said whether {pod} may {what}"),
                Tone::Warn,
            ),
        };
        writeln!(to, "{}", paint(&summary, tone, colours))
    }
}

impl Step {
    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        let (mark, tone) = match self.state {
            State::Ok => ("√", Tone::Good),
            State::Warning => ("‼", Tone::Warn),
            State::Error => ("×", Tone::Bad),
        };
        let (mark, name) = (paint(mark, tone, colours), shown(&self.step));
        write!(to, "{mark} {name}: {}", shown(&self.fact))?;
        match &self.object {
            Some(object) => writeln!(to, " [{}]", shown(object))?,
            None => writeln!(to)?,
        }
        for detail in &self.details {
            writeln!(to, "    {}", shown(detail))?;
        }
        Ok(())
    }
}
