//! `fuzz`: runs the targets of `fuzz/`, each for a while.
//!
//! They are built by plain cargo with the flags that libFuzzer needs, as cargo-fuzz would: that takes
//! no tool that is built first, and one build serves all targets. The flags of the sanitizers are
//! unstable; a stable compiler has them too, and `RUSTC_BOOTSTRAP` lets them be used, so that no second
//! toolchain is needed either.
//!
//! `fuzz/corpus` holds the inputs that are kept; what a run finds goes to `target/fuzz/corpus`, from
//! where `--keep` takes what covers something new.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::Command,
    sync::Mutex,
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::{
    process,
    setup::debian::{self, Package},
    ui,
    workspace::Workspace,
};

/// What to fuzz, and how.
#[derive(Args)]
pub(crate) struct Options {
    /// Only this target
    target: Option<String>,
    /// How long to run each target
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// What is looked for besides panics, overflows and failed assertions
    #[arg(long, value_enum, default_value_t = Sanitizer::Address)]
    sanitizer: Sanitizer,
    /// Targets that run at the same time; as many as there are processors if not given
    #[arg(long, value_name = "N")]
    parallel: Option<usize>,
    /// Put what was found and covers something new into fuzz/corpus at the end
    #[arg(long)]
    keep: bool,
}

/// What a build looks for.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sanitizer {
    /// Memory errors in unsafe code: slower to build and to run
    Address,
    /// Nothing more
    None,
}

/// Runs one target, or all of them. A crash is an error that says where the input was saved.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let known = targets(workspace)?;
    let wanted = |name: &&String| {
        let target = options.target.as_ref();
        target.is_none_or(|it| it == *name)
    };
    let targets: Vec<String> = known.iter().filter(wanted).cloned().collect();
    if targets.is_empty() {
        bail!("no such fuzz target; there are: {}", known.join(" "));
    }
    let fuzz = Fuzz { workspace, options };
    fuzz.build()?;
    fuzz.run_all(&targets)?;
    if options.keep {
        targets.iter().try_for_each(|name| fuzz.keep(name))?;
    }
    Ok(())
}

/// What continuous integration runs of it: every target for a while, without a sanitizer, whose build
/// takes half as long again.
pub(crate) fn run_briefly(workspace: &Workspace) -> Result<()> {
    run(workspace, &BRIEFLY)
}

/// What builds the targets for [`run_briefly`], for whoever has something else to do meanwhile.
pub(crate) fn brief_build(workspace: &Workspace) -> Result<Command> {
    let options = &BRIEFLY;
    Fuzz { workspace, options }.build_command()
}

struct Fuzz<'a> {
    workspace: &'a Workspace,
    options: &'a Options,
}

impl Fuzz<'_> {
    fn build(&self) -> Result<()> {
        process::run(&mut self.build_command()?)
    }

    fn build_command(&self) -> Result<Command> {
        if process::in_path("c++").is_none() && debian::is_debian() {
            debian::install(&[Package::new("g++", "compiles libFuzzer, which is in C++")])?;
        }
        ensure!(
            process::in_path("c++").is_some(),
            "libFuzzer needs a C++ compiler, `c++` in PATH"
        );
        let mut flags: Vec<&str> = INSTRUMENTATION.to_vec();
        if self.options.sanitizer == Sanitizer::Address {
            flags.push("-Zsanitizer=address");
        }
        let mut cargo = self.workspace.cargo();
        cargo
            .args(["build", "--release", "--bins", "--target", &host()])
            .arg("--manifest-path")
            .arg(self.workspace.path("fuzz/Cargo.toml"))
            .arg("--target-dir")
            .arg(self.folder())
            .env("RUSTFLAGS", flags.join(" "))
            .env("RUSTC_BOOTSTRAP", "1");
        Ok(cargo)
    }

    /// Runs some at a time, and all of them even if one fails.
    fn run_all(&self, targets: &[String]) -> Result<()> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let parallel = self.options.parallel.unwrap_or(processors);
        let (next, failures) = (Mutex::new(targets.iter()), Mutex::new(Vec::new()));
        let work = || {
            // A panic elsewhere is the end of this program anyway.
            let take = || next.lock().ok().and_then(|mut it| it.next());
            while let Some(name) = take() {
                if let Err(error) = self.run_one(name)
                    && let Ok(mut failures) = failures.lock()
                {
                    ui::note(&format!("{name}: FAILED"));
                    failures.push(format!("{error:#}"));
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..parallel.max(1) {
                scope.spawn(work);
            }
        });
        let failures = failures.into_inner().unwrap_or_default();
        ensure!(failures.is_empty(), "{}", failures.join("\n"));
        Ok(())
    }

    fn run_one(&self, name: &str) -> Result<()> {
        let (found, artifacts) = (self.found(name), self.workspace.path("fuzz/artifacts"));
        let artifacts = artifacts.join(name);
        for folder in [&found, &artifacts, &self.kept(name)] {
            fs::create_dir_all(folder)?;
        }
        let log = self.folder().join(format!("{name}.log"));
        let status = Command::new(self.program(name))
            .arg(format!("-max_total_time={}", self.options.seconds))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .args(["-timeout=25", "-rss_limit_mb=2048", "-print_final_stats=1"])
            .args([&found, &self.kept(name)])
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?)
            .status()
            .with_context(|| format!("starting {name}"))?;
        let said = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        if !status.success() {
            let lines: Vec<&str> = said.lines().collect();
            let end = lines[lines.len().saturating_sub(60)..].join("\n");
            bail!(
                "{name} failed; the input is in {}\n{end}",
                artifacts.display()
            );
        }
        ui::note(&format!("{name}: {}", summary(&said)));
        Ok(())
    }

    fn keep(&self, name: &str) -> Result<()> {
        let (kept, found) = (self.kept(name), self.found(name));
        process::run(
            Command::new(self.program(name))
                .arg("-merge=1")
                .args([&kept, &found]),
        )
        .with_context(|| format!("keeping what {name} found"))
    }

    fn folder(&self) -> PathBuf {
        self.workspace.path(match self.options.sanitizer {
            Sanitizer::Address => "target/fuzz",
            Sanitizer::None => "target/fuzz-plain",
        })
    }

    fn program(&self, name: &str) -> PathBuf {
        self.folder().join(host()).join("release").join(name)
    }

    /// The corpus that runs add to: not one that git knows, so that a run changes nothing.
    fn found(&self, name: &str) -> PathBuf {
        self.workspace.path("target/fuzz/corpus").join(name)
    }

    fn kept(&self, name: &str) -> PathBuf {
        self.workspace.path("fuzz/corpus").join(name)
    }
}

/// The targets: one for each file.
fn targets(workspace: &Workspace) -> Result<Vec<String>> {
    let folder = workspace.path("fuzz/fuzz_targets");
    let files = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut names = Vec::new();
    for file in files {
        if let Some(name) = file?.path().file_stem() {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// The machine's own kind, given by name so that build scripts and macros are built without
/// instrumentation.
fn host() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

/// How many inputs were run, and what they covered: from what libFuzzer says at its end.
fn summary(log: &str) -> String {
    let runs = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .unwrap_or(" ?");
    let covered = log.lines().rev().find_map(|line| {
        let (_, after) = line.split_once(" cov: ")?;
        after.split(' ').next()
    });
    format!(
        "{} runs, {} edges covered",
        runs.trim(),
        covered.unwrap_or("?")
    )
}

/// As libFuzzer wants them: counters and comparisons of every edge.
const INSTRUMENTATION: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Every target for so long that all of them take some minutes on two processors.
const BRIEFLY: Options = Options {
    target: None,
    seconds: 20,
    sanitizer: Sanitizer::None,
    parallel: None,
    keep: false,
};
