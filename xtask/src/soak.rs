//! `soak`: what must hold for long, each run once in its long form, and a table of how it went. The
//! same tests run in their short form in `test`.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::{
    bpf, process,
    setup::{kernel, packages},
    steps::Steps,
    test, ui,
    workspace::Workspace,
};

/// What to run, and for how long.
#[derive(Args)]
pub(crate) struct Options {
    /// Only this one
    name: Option<Name>,
    /// How long `soak` goes on
    #[arg(long, value_name = "N", default_value_t = 30)]
    minutes: u32,
    /// The programs are built already: this folder has them
    #[arg(long, value_name = "FOLDER")]
    programs: Option<std::path::PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    /// Agents and controller killed 200 times at random moments under load: some five minutes
    Crashes,
    /// Certificates of 20 seconds for ten minutes under load, issuer and root replaced meanwhile
    Rotation,
    /// 600 pods that come and go while traffic flows, and what is left of them: some ten minutes
    Churn,
    /// Ten upgrades in a row under load; the same to and fro between two layouts: two minutes
    Takeover,
    /// Everything at once for half an hour, with flat memory
    Soak,
}

/// How one went.
struct Outcome {
    name: &'static str,
    held: bool,
    took: Duration,
    figures: Vec<(String, String)>,
}

/// Runs all, or the one that is named; fails at the end if one did not hold.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let mut steps = Steps::start();
    steps.step("root and kernel", kernel::check)?;
    steps.step("programs for the tests", packages::ensure)?;
    steps.step("kernel programs", || bpf::build(workspace, false))?;
    if options.programs.is_none() {
        steps.step("release build", || test::release_build(workspace))?;
    }
    steps.step("agent of another layout", || {
        bpf::build_next_layout(workspace)
    })?;
    steps.finish();
    let names = match options.name {
        Some(name) => vec![name],
        None => Name::value_variants().to_vec(),
    };
    let mut outcomes = Vec::new();
    for name in names {
        outcomes.push(run_one(workspace, options, name)?);
    }
    summarize(&outcomes)
}

fn run_one(workspace: &Workspace, options: &Options, name: Name) -> Result<Outcome> {
    let (name, test, filter) = match name {
        Name::Crashes => ("crashes", "endurance", "crashes::crashes"),
        Name::Rotation => ("rotation", "endurance", "rotation::rotation"),
        Name::Churn => ("churn", "endurance", "churn::churn"),
        Name::Takeover => ("takeover", "takeover", "takeover"),
        Name::Soak => ("soak", "endurance", "soak::soak"),
    };
    ui::headline(name);
    let figures = std::env::temp_dir().join(format!("weft-figures-{}", std::process::id()));
    let _ = fs::remove_file(&figures);
    let programs = workspace.release_programs();
    let mut cargo = workspace.cargo();
    cargo
        .args(["test", "--workspace", "--test", test, "--", filter])
        .args(["--include-ignored", "--nocapture", "--test-threads=1"])
        .env(
            "WEFT_BIN_DIR",
            options.programs.as_ref().unwrap_or(&programs),
        )
        .env("WEFT_LONG", "1")
        .env("WEFT_SOAK_MINUTES", options.minutes.to_string())
        .env("WEFT_FIGURES", &figures);
    let started = Instant::now();
    let held = match process::run(&mut cargo) {
        Ok(()) => true,
        Err(error) => {
            ui::warning(&format!("{name}: {error:#}"));
            false
        }
    };
    let text = fs::read_to_string(&figures).unwrap_or_default();
    let _ = fs::remove_file(&figures);
    let figures = text.lines().filter_map(|line| line.split_once('\t'));
    Ok(Outcome {
        name,
        held,
        took: started.elapsed(),
        figures: figures
            .map(|(what, value)| (what.to_owned(), value.to_owned()))
            .collect(),
    })
}

fn summarize(outcomes: &[Outcome]) -> Result<()> {
    ui::headline("summary");
    println!("| run | held | figure | |");
    println!("|---|---|---|---|");
    for outcome in outcomes {
        let held = if outcome.held { "yes" } else { "NO" };
        let took = format!("{:.0} s", outcome.took.as_secs_f64());
        println!("| {} | {held} | took | {took} |", outcome.name);
        for (what, value) in &outcome.figures {
            println!("| | | {what} | {value} |");
        }
    }
    let failed: Vec<&str> = outcomes
        .iter()
        .filter(|it| !it.held)
        .map(|it| it.name)
        .collect();
    if !failed.is_empty() {
        bail!("did not hold: {}", failed.join(", "));
    }
    Ok(())
}
