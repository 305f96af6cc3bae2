//! `weft diagnostics`: all that controllers and agents say of themselves, in a folder, for somebody who helps.
//!
//! Nothing of it is a secret: no key, no token, no request. It does name pods, Services, addresses and policies.

use std::fs::DirBuilder;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::controller::{self, Agent, Reach, each};
use crate::outcome::Outcome;
use crate::output::shown;

/// What `weft diagnostics` is asked.
#[derive(Args, Debug)]
pub struct Diagnostics {
    /// The folder that is made; it must not be there.
    #[arg(long, value_name = "DIR", default_value = "weft-diagnostics")]
    pub dir: PathBuf,
    /// Whom to ask.
    #[command(flatten)]
    pub reach: Reach,
}

/// The folder cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}: {reason}: --dir names a folder that is not there yet")]
pub struct DiagnosticsError {
    path: PathBuf,
    reason: io::Error,
}

/// Of a controller,
const OF_CONTROLLER: [(&str, &str); 5] = [
    ("/status", "status.json"),
    ("/agents", "agents.json"),
    ("/problems", "problems.json"),
    ("/routes", "routes.json"),
    ("/metrics", "metrics.txt"),
];
/// and of an agent.
const OF_AGENT: [(&str, &str); 4] = [
    ("ready", "ready.json"),
    ("pods", "pods.json"),
    ("config_dump", "config_dump.json"),
    ("metrics", "metrics.txt"),
];

/// Collects it. What is not to be had is told in the folder, too, and makes the exit code 1.
///
/// # Errors
/// The folder cannot be written.
pub async fn run(diagnostics: &Diagnostics) -> Result<Outcome, crate::Error> {
    let dir = &diagnostics.dir;
    make(dir)?;
    let mut failures = vec![];
    // If they cannot be found, that is told with the agents.
    let places = diagnostics.reach.places().await.unwrap_or_default();
    for (number, place) in places.iter().enumerate() {
        let folder = dir.join(format!("controller-{number}"));
        make(&folder)?;
        for (path, file) in OF_CONTROLLER {
            match controller::get(place, path).await {
                Ok(bytes) => write(&folder.join(file), &bytes)?,
                Err(error) => failures.push(format!("controller {number}: {path}: {error}")),
            }
        }
    }
    match diagnostics.reach.agents().await {
        Ok(agents) => {
            let collected = each(&agents, |agent| async move {
                let pages = pages(&agent).await;
                (agent, pages)
            });
            for (agent, pages) in collected.await {
                let status = &agent.status;
                // Both are of the forms that a controller gives: no path leads out of the folder.
                let name = format!("agent-{}-{}", status.node, status.incarnation);
                let folder = dir.join(name.replace('/', "_"));
                make(&folder)?;
                for (file, page) in pages {
                    match page {
                        Ok(bytes) => write(&folder.join(file), &bytes)?,
                        Err(error) => failures.push(format!("{}: {file}: {error}", status.node)),
                    }
                }
            }
        }
        Err(error) => failures.push(error.to_string()),
    }
    if !failures.is_empty() {
        write(
            &dir.join("missing.txt"),
            (failures.join("\n") + "\n").as_bytes(),
        )?;
        for failure in &failures {
            eprintln!("‼ {}", shown(failure));
        }
    }
    println!("{}", dir.display());
    Ok(Outcome::of(failures.is_empty()))
}

type Page = (&'static str, Result<hyper::body::Bytes, String>);

async fn pages(agent: &Agent) -> Vec<Page> {
    let mut pages = vec![];
    for (page, file) in OF_AGENT {
        let page = agent.page(page).await;
        pages.push((file, page.map_err(|it| it.to_string())));
    }
    pages
}

/// For this user only: it names what runs in the cluster.
fn make(folder: &Path) -> Result<(), DiagnosticsError> {
    let made = DirBuilder::new().mode(0o700).create(folder);
    made.map_err(|reason| DiagnosticsError {
        path: folder.to_owned(),
        reason,
    })
}

fn write(path: &Path, content: &[u8]) -> Result<(), DiagnosticsError> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(content));
    written.map_err(|reason| DiagnosticsError {
        path: path.to_owned(),
        reason,
    })
}
