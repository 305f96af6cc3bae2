//! `cargo xtask demo`: the mesh's main job, shown with its evidence on this machine.
//!
//! Two nodes made of namespaces and cgroups, a controller and two agents (the shipped binaries),
//! and unmodified programs as pods. Each [`act`](acts) makes one claim of the README true or false
//! and says how one can see it; the exit code is 0 only if all were true.

mod acts;
mod observed;
mod split;
mod stage;
mod stock;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use weft_tests::run;

use acts::ACTS;
use stage::Stage;

fn main() -> ExitCode {
    let mut keep = false;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--keep" => keep = true,
            "-h" | "--help" => {
                println!("{HELP}");
                return ExitCode::SUCCESS;
            }
            other => {
                eprintln!("weft-demo: unknown argument {other:?}\n\n{HELP}");
                return ExitCode::from(2);
            }
        }
    }
    match demo(keep) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("\nweft-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Plays all acts; true if every claim held.
fn demo(keep: bool) -> Result<bool> {
    run::clean_up_on_interrupt()?;
    run::cleanup_stale();
    heading("Setting the stage: two nodes, a controller, two agents, four pods");
    let mut stage = Stage::set(&mut |line| println!("   {line}"))?;
    let mut outcomes = Vec::new();
    for (number, act) in ACTS.iter().enumerate() {
        heading(&format!("{}. {}", number + 1, act.claim));
        let start = Instant::now();
        let result = (act.play)(&mut stage, &mut |line| println!("   {line}"));
        let held = result.is_ok();
        match result {
            Ok(()) => println!("   => true ({} ms)", start.elapsed().as_millis()),
            Err(error) => println!("   => NOT TRUE: {error:#}"),
        }
        outcomes.push((act, held));
    }
    let all = outcomes.iter().all(|(_, held)| *held);
    if !all {
        println!("\nThe last lines of every log:\n{}", stage.cluster.logs(40));
    }
    heading("Summary");
    for (number, (act, held)) in outcomes.iter().enumerate() {
        let mark = if *held { "true    " } else { "NOT TRUE" };
        println!("   {:>2}. {mark}  {}", number + 1, act.claim);
    }
    println!();
    if keep {
        stage.invite();
        stage.wait_for_interrupt();
    }
    drop(stage);
    Ok(all)
}

fn heading(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m");
}

const HELP: &str = "\
Shows the mesh's main job on this machine, with evidence. Needs root.

Usage: weft-demo [--keep]

  --keep   leave everything up after the last act, print commands to play with, and clean up on
           Ctrl-C
  --help   this text

The binaries weft-controller, weft-agent and weft are taken from WEFT_BIN_DIR, or from the workspace's
target folder. The exit code is 0 only if every claim was true.";
