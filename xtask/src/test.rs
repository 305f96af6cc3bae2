//! `test`: everything that continuous integration runs, in the order in which it is cheapest to
//! fail, and stopping at the first failure.
//!
//! Every build is one of the whole workspace: cargo unites the features of the packages that it is
//! asked for, so that asking for some of them would compile most dependencies a second time.

use std::{collections::BTreeSet, fs, path::Path, process::Command, thread};

use anyhow::{Context as _, Result, bail};

use crate::{
    bpf, checks, crds, fuzz, image,
    lanes::{self, Suite},
    manifests, process,
    setup::{kernel, packages},
    steps::Steps,
    workspace::Workspace,
};

/// Runs all checks and all tests; with a filter, only the tests whose names contain it, and what
/// must be built for them.
pub(crate) fn run(workspace: &Workspace, filter: Option<&str>) -> Result<()> {
    let mut steps = Steps::start();
    steps.step("root and kernel", kernel::check)?;
    steps.step("programs for the tests", packages::ensure)?;
    if filter.is_none() {
        steps.step("format", || checks::format(workspace))?;
    }
    steps.step("kernel programs", || bpf::build_for_test(workspace))?;
    if filter.is_none() {
        steps.step("clippy", || checks::clippy(workspace))?;
        steps.step("docs", || checks::docs(workspace))?;
        steps.step_with_warning("dependencies", || checks::dependencies(workspace))?;
    }
    steps.step("unit tests", || unit(workspace, filter))?;
    steps.step("release build", || release_build(workspace))?;
    if filter.is_none() {
        steps.step("custom resource definitions", || {
            let controller = workspace.release_programs().join(crds::CONTROLLER);
            crds::check(workspace, &controller)
        })?;
    }
    if filter.is_none() {
        steps.step("manifests", || manifests::run(workspace, true))?;
    }
    steps.step("image", || image::write_built(workspace))?;
    steps.step("agent of another layout", || {
        bpf::build_next_layout(workspace)
    })?;
    steps.step("end-to-end tests", || end_to_end(workspace, filter))?;
    if filter.is_none() {
        steps.step("fuzzing", || fuzz::run_briefly(workspace))?;
    }
    steps.finish();
    Ok(())
}

/// Builds the programs that Weft ships, which the demo and the end-to-end tests run, and the demo.
pub(crate) fn release_build(workspace: &Workspace) -> Result<()> {
    process::run(
        workspace
            .static_cargo("build")
            .args(["--release", "--bins"])
            .args(["--workspace", "--exclude", "xtask"]),
    )
}

/// The tests that share nothing with each other: all that are inside a crate, and those in the
/// `tests/` of the pure ones.
fn unit(workspace: &Workspace, filter: Option<&str>) -> Result<()> {
    let mut tests = BTreeSet::new();
    for folder in PURE {
        tests.extend(integration_tests(&workspace.path(folder))?);
    }
    let mut inside = test_command(workspace);
    inside.args(["--lib", "--bins"]);
    for test in &tests {
        inside.args(["--test", test]);
    }
    process::run(inside.args(filter))?;
    process::run(test_command(workspace).arg("--doc").args(filter))
}

/// The tests of the whole machine. Those that share nothing but its kernel run side by side; what they all need is built
/// before, and what comes after them is built meanwhile, by what CPU time they leave.
fn end_to_end(workspace: &Workspace, filter: Option<&str>) -> Result<()> {
    let mut names = vec![ADVERSARY.to_owned()];
    for folder in WHOLE_MACHINE {
        let tests = integration_tests(&workspace.path(folder))?;
        if tests.is_empty() {
            bail!("{folder} has no end-to-end tests, which cannot be right");
        }
        names.extend(tests);
    }
    let command = |names: &[&str]| {
        let mut command = test_command(workspace);
        command.args(names.iter().flat_map(|it| ["--test", *it]));
        command.env("WEFT_BIN_DIR", workspace.release_programs());
        command.env("WEFT_IMAGE", workspace.path(image::ARCHIVE));
        command
    };
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let one_at_a_time = ["--", "--test-threads=1"];
    if filter.is_some() {
        return process::run(command(&all).args(filter).args(one_at_a_time));
    }
    process::run(command(&all).arg("--no-run"))?;
    let suite = |name: &str, part: Vec<&str>| {
        let mut command = command(&[name]);
        command.args(one_at_a_time).args(part);
        let name = name.to_owned();
        Suite { name, command }
    };
    let (alone, beside): (Vec<&str>, Vec<&str>) = all.iter().partition(|it| ALONE.contains(it));
    let mut suites = vec![];
    for name in beside {
        if name == HTTP {
            suites.push(Suite {
                name: format!("{HTTP} (endpoints)"),
                ..suite(HTTP, OF_ENDPOINTS.into())
            });
            let others = OF_ENDPOINTS.iter().flat_map(|it| ["--skip", *it]);
            suites.push(suite(HTTP, others.collect()));
        } else {
            suites.push(suite(name, vec![]));
        }
    }
    // A long one that begins last is what all wait for.
    suites.sort_by_key(|suite| {
        let mut longest = LONGEST.iter();
        let place = longest.position(|it| suite.name.starts_with(it));
        place.unwrap_or(usize::MAX)
    });
    let build = Suite {
        name: "building the fuzz targets".to_owned(),
        command: idly(&fuzz::brief_build(workspace)?),
    };
    thread::scope(|scope| {
        let built = scope.spawn(|| lanes::run(vec![build], 1));
        let passed = lanes::run(suites, LANES);
        let built = built.join();
        passed?;
        built.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let alone = alone.iter().map(|it| suite(it, vec![]));
    lanes::run(alone.collect(), 1)
}

/// The same command by the CPU time that others leave.
fn idly(command: &Command) -> Command {
    let mut idle = Command::new("nice");
    idle.args(["-n", "19"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => idle.env(name, value),
            None => idle.env_remove(name),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        idle.current_dir(folder);
    }
    idle
}

/// The names of cargo's integration tests in a folder: its files, and its folders with a `main.rs`.
fn integration_tests(folder: &Path) -> Result<Vec<String>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let is_test = path.extension().is_some_and(|extension| extension == "rs")
            || path.join("main.rs").is_file();
        if is_test && let Some(name) = path.file_stem() {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn test_command(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--workspace"]);
    cargo
}

/// Where the tests are that any machine can run, many at a time.
const PURE: [&str; 3] = ["core/tests", "proto/tests", "controller/tests"];
/// Where the tests are that need root and the machine to themselves.
const WHOLE_MACHINE: [&str; 2] = ["agent/tests", "tests/tests"];
/// The adversarial suite, which has a folder of its own: `tests/adversary`.
const ADVERSARY: &str = "adversary";
/// Suites that others would be in the way of, or that would be in the way of others: they take all of the CPUs, of the
/// memory, or of a table of the kernel's.
const ALONE: [&str; 5] = [
    "fairness",
    "kernel_inbound",
    "kernel_life",
    "kernel_programs",
    "scale",
];
/// The suites that take the longest, the longest first.
const LONGEST: [&str; 3] = [ADVERSARY, HTTP, "endurance"];
/// A suite so long that it is two,
const HTTP: &str = "http";
/// of which one has these modules: how endpoints are chosen, fail, and are asked again.
const OF_ENDPOINTS: [&str; 10] = [
    "balancing::",
    "breaking::",
    "retiring::",
    "retries::",
    "retried::",
    "rollout::",
    "splits::",
    "timeouts::",
    "topology::",
    "waiting::",
];
/// How many suites run side by side: they wait for most of their time, so that two CPUs do.
const LANES: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integration_tests_are_files_and_folders() {
        let folder = std::env::temp_dir().join(format!("weft-xtask-tests-{}", std::process::id()));
        fs::create_dir_all(folder.join("policy")).unwrap();
        fs::create_dir_all(folder.join("common")).unwrap();
        for file in ["flows.rs", "policy/main.rs", "common/mod.rs", "data.yaml"] {
            fs::write(folder.join(file), "").unwrap();
        }
        assert_eq!(integration_tests(&folder).unwrap(), ["flows", "policy"]);
        fs::remove_dir_all(&folder).unwrap();
        assert!(integration_tests(&folder).unwrap().is_empty());
    }
}
