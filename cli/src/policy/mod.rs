//! `weft policy test`: would this client be allowed to do that?
//!
//! Answered from manifests alone, by the index that a controller has and the decisions that agents make, so that the
//! answer is the mesh's and not a second opinion. For continuous integration of repositories that hold a cluster's
//! manifests: the exit code says it.

use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use ipnet::IpNet;
use serde::Serialize;
use weft_controller::problems::Problem;
use weft_core::{AccessPolicy, Name, TrustDomain};

use crate::outcome::Outcome;
use crate::output::{self, Cell, Format, Table, Tone, paint, shown};
use cases::Case;
use decide::{Decision, Word};
use world::World;

mod addresses;
mod cases;
mod decide;
mod manifests;
mod who;
mod world;

#[cfg(test)]
mod tests;

/// What `weft policy test` is asked.
#[derive(Args, Debug)]
#[command(after_long_help = EXAMPLES)]
pub struct PolicyTest {
    /// A file or folder of manifests, or `-` for standard input; may be given several times.
    #[arg(short = 'f', long = "filename", value_name = "PATH", required = true)]
    pub files: Vec<PathBuf>,
    /// The namespace of what is named without one, in the questions and in manifests.
    #[arg(short, long, default_value = "default")]
    pub namespace: Name,
    /// Who connects: `deploy/order`, `shop/pod/order-1`, `sa/order`, `spiffe://…`, or an address.
    #[arg(long, value_name = "WHO", required_unless_present = "cases")]
    pub from: Option<String>,
    /// To what: `deploy/payment`, `svc/payment`, `shop/sts/db`.
    #[arg(long, value_name = "WHAT", required_unless_present = "cases")]
    pub to: Option<String>,
    /// The port: the application's, or the Service's if WHAT is one. May be a name.
    #[arg(long, value_name = "PORT", required_unless_present = "cases")]
    pub port: Option<String>,
    /// The method of an HTTP request; GET if only --path is given. Without both, a connection is asked about.
    #[arg(long, value_name = "METHOD", conflicts_with = "cases")]
    pub method: Option<String>,
    /// The path of an HTTP request, with its query; / if only --method is given.
    #[arg(long, value_name = "PATH", conflicts_with = "cases")]
    pub path: Option<String>,
    /// A header of the request, `name: value`; may be given several times.
    #[arg(long = "header", value_name = "HEADER", conflicts_with = "cases")]
    pub headers: Vec<String>,
    /// The host that the request is for, where routes have hostnames.
    #[arg(long, value_name = "HOST", conflicts_with = "cases")]
    pub host: Option<String>,
    /// The request is a call of gRPC, and its path `/package.Service/Method`.
    #[arg(long, conflicts_with = "cases", requires = "path")]
    pub grpc: bool,
    /// The client's address, where networks matter and the manifests have none.
    #[arg(long, value_name = "IP", conflicts_with = "cases")]
    pub address: Option<IpAddr>,
    /// The address of the pod that is connected to, the same.
    #[arg(long, value_name = "IP", conflicts_with = "cases")]
    pub to_address: Option<IpAddr>,
    /// A range that pods get addresses from: the cluster's networks. May be given several times.
    #[arg(long = "pod-range", value_name = "CIDR")]
    pub pod_ranges: Vec<IpNet>,
    /// What the answer should be.
    #[arg(long, default_value = "allow", conflicts_with = "cases")]
    pub expect: Word,
    /// A YAML file with a list of questions, each with what is expected.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "to", "port"])]
    pub cases: Option<PathBuf>,
    /// All pods count as part of the mesh, unless they or their namespace say `disabled`.
    #[arg(long)]
    pub assume_meshed: bool,
    /// Anything wrong with the manifests is a failure.
    #[arg(long)]
    pub strict: bool,
    /// The mesh's trust domain.
    #[arg(long, default_value = "cluster.local")]
    pub trust_domain: TrustDomain,
    /// What holds for ports that no Server selects, as the controller's flag of this name.
    #[arg(long, default_value = "all-unauthenticated", value_parser = access_policy)]
    pub default_policy: AccessPolicy,
    /// How the answer is written.
    #[arg(short, long, default_value = "table")]
    pub output: Format,
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Manifests cannot be read.
    #[error(transparent)]
    Manifests(#[from] manifests::ManifestError),
    /// The file of questions cannot be read.
    #[error(transparent)]
    Cases(#[from] cases::CasesError),
    /// A question has no answer.
    #[error("{case}: {reason}")]
    Question {
        /// The question.
        case: String,
        /// What is wrong with it.
        reason: who::WhoError,
    },
}

/// All answers.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Whether all are as expected, and with `--strict` nothing is wrong with the manifests.
    pub ok: bool,
    /// One for each question.
    pub results: Vec<Answer>,
    /// What is wrong with the manifests.
    pub problems: Vec<Problem>,
}

/// An answer.
#[derive(Debug, Serialize)]
pub struct Answer {
    /// The question.
    pub name: String,
    /// Whether it is as expected.
    pub ok: bool,
    /// What was expected.
    pub expected: Word,
    /// What would happen.
    #[serde(flatten)]
    pub decision: Decision,
}

/// Answers the questions, and says whether all answers are as expected.
///
/// # Errors
/// Nothing can be said, and why.
pub fn run(test: &PolicyTest) -> Result<Outcome, crate::Error> {
    let report = report(test)?;
    let mut out = std::io::stdout().lock();
    match test.output {
        Format::Json => output::json(&mut out, &report)?,
        Format::Table => report.write(&mut out, output::colours())?,
    }
    Ok(Outcome::of(report.ok))
}

/// The answers.
///
/// # Errors
/// Nothing can be said, and why.
pub fn report(test: &PolicyTest) -> Result<Report, PolicyError> {
    let cases = match &test.cases {
        Some(path) => cases::read(path)?,
        None => vec![Case::of(test)],
    };
    let manifests = manifests::read(&test.files, test)?;
    let world = World::new(manifests, test);
    let mut results = Vec::with_capacity(cases.len());
    for case in cases {
        let decision = decide::decide(&world, &case, &test.namespace);
        let decision = decision.map_err(|reason| PolicyError::Question {
            case: case.to_string(),
            reason,
        })?;
        results.push(Answer {
            name: case.to_string(),
            ok: decision.word == case.expect,
            expected: case.expect,
            decision,
        });
    }
    let problems = world.problems();
    let is_clean = problems.is_empty() || !test.strict;
    let ok = is_clean && results.iter().all(|it| it.ok);
    Ok(Report {
        ok,
        results,
        problems,
    })
}

impl Report {
    fn write(&self, to: &mut impl Write, colours: bool) -> std::io::Result<()> {
        let mut table = Table::new(["", "QUESTION", "ANSWER", "DECIDED BY"]);
        for answer in &self.results {
            let (mark, tone) = match answer.ok {
                true => ("√", Tone::Good),
                false => ("×", Tone::Bad),
            };
            let word = match answer.ok {
                true => answer.decision.word.to_string(),
                false => format!("{}, expected {}", answer.decision.word, answer.expected),
            };
            table.row([
                Cell::new(mark).tone(tone),
                shown(&answer.name).into(),
                Cell::new(word).tone(tone),
                shown(&answer.decision.by).into(),
            ]);
        }
        table.write(to, colours)?;
        for answer in &self.results {
            for note in &answer.decision.notes {
                let mark = paint("‼", Tone::Warn, colours);
                writeln!(to, "{mark} {}: {}", shown(&answer.name), shown(note))?;
            }
        }
        for problem in &self.problems {
            let mark = paint("‼", Tone::Warn, colours);
            writeln!(to, "{mark} {}", shown(&problem.to_string()))?;
        }
        Ok(())
    }
}

fn access_policy(text: &str) -> Result<AccessPolicy, weft_core::UnknownAccessPolicy> {
    text.parse()
}

const EXAMPLES: &str = "\
Examples:
  May the order Deployment make a request of the payment Service?
    weft policy test -f manifests/ -n shop --from deploy/order --to svc/payment --port 80 \\
      --method POST --path /charges

  Nobody without an identity may connect to the database:
    kustomize build overlays/production | weft policy test -f - -n shop \\
      --from 10.0.0.9 --to sts/db --port 5432 --expect deny

  Many questions at once, in a file:
    weft policy test -f manifests/ --cases policy-tests.yaml

    # policy-tests.yaml
    - name: orders are charged
      from: shop/deploy/order
      to: shop/svc/payment
      port: 80
      method: POST
      path: /charges
      expect: allow
    - name: nobody else reads the ledger
      from: shop/deploy/web
      to: shop/deploy/ledger
      port: 8080
      expect: deny";
