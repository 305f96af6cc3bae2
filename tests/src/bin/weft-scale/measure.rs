//! The run: everything starts, agents get everything, there is rest, changes, and what is left of them is compared.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::sync::watch;
use weft_apiserver::tokens::Token;
use weft_tests::usage::{peak_bytes, resident_bytes};
use weft_tests::wait_for;

use crate::agents::{Agent, Common};
use crate::board::Board;
use crate::churn::{self, Done};
use crate::cpu::{Who, cpu_seconds};
use crate::expected::Expected;
use crate::report::Report;
use crate::stage::{CONTROLLER, SERVING, SIMULATING, Stage};
use crate::watcher::{self, Delays};
use crate::world::{Size, World};

/// The processes that are measured.
#[derive(Clone, Copy)]
struct Pids {
    controller: u32,
    /// The real one.
    agent: Option<u32>,
}

/// What they all have used and received at a moment.
struct Moment {
    at: Instant,
    cpu: [f64; 4],
    received: u64,
    pushes: u64,
}

/// Measures everything.
pub(crate) fn measure(size: Size, with_agent: bool) -> Result<Report> {
    let mut report = Report::default();
    say("makes a cluster");
    let mut world = World::fill(size)?;
    let mut stage = Stage::build(&world.store, with_agent)?;
    let pids = start(&mut stage, &world, &mut report)?;
    let (common, agents) = connect(&mut stage, &world, size, pids, &mut report)?;
    let pids = match with_agent {
        true => Pids {
            agent: Some(stage.start_agent(&world, &common.roots)?),
            ..pids
        },
        false => pids,
    };
    wait_agent(&stage, pids, &Expected::of(&world))?;
    rest(pids, &agents, &mut report)?;
    let delays = Delays::default();
    let watching = watcher::run(
        stage.plain(),
        world.store.revision(),
        common.clone(),
        delays.clone(),
    );
    stage.simulating.spawn(watching);
    say("changes pods");
    common
        .asking
        .send_replace(Some(Duration::from_secs(size.seconds as u64)));
    let before = Moment::now(pids, &agents)?;
    let done = churn::run(&mut world, size, &common.board)?;
    let after = Moment::now(pids, &agents)?;
    let ended = Instant::now();
    let expected = Expected::of(&world);
    wait_for("all agents to have what the objects say", DEADLINE, || {
        expected.check(&agents).map(Some)
    })?;
    let settled = ended.elapsed();
    wait_agent(&stage, pids, &expected)?;
    let seconds = after.at.duration_since(before.at).as_secs_f64();
    report_delays(&agents, &delays, &mut report);
    let count = agents.len() as f64;
    let per_second = |it: u64| it as f64 / seconds / count;
    report.row(
        "agent-bytes",
        per_second(after.received - before.received) / 1e3,
        "kB/s",
    );
    report.row(
        "agent-pushes",
        per_second(after.pushes - before.pushes),
        "pushes/s",
    );
    let cores = |it: usize| (after.cpu[it] - before.cpu[it]) / seconds;
    report.row("controller-cpu", cores(0), "CPUs");
    if pids.agent.is_some() {
        report.row("agent-cpu", cores(1), "CPUs");
    }
    report.row("apiserver-cpu", cores(2), "CPUs");
    report.row("simulated-cpu", cores(3), "CPUs");
    report.row(
        "controller-memory-after",
        mib(resident_bytes(pids.controller)?),
        "MiB",
    );
    report.row(
        "controller-memory-peak",
        mib(peak_bytes(pids.controller)?),
        "MiB",
    );
    if let Some(agent) = pids.agent {
        report.row("agent-memory-after", mib(resident_bytes(agent)?), "MiB");
    }
    say("compared");
    conclude(&agents, (size, with_agent), &done, settled, &mut report)?;
    Ok(report)
}

/// Starts the controller, alone.
fn start(stage: &mut Stage, world: &World, report: &mut Report) -> Result<Pids> {
    say("starts the controller");
    let began = Instant::now();
    let controller = stage.start_controller()?;
    stage.wait_controller(DEADLINE)?;
    report.row("ready", began.elapsed().as_secs_f64(), "s");
    report.row("ready-cpu", cpu_seconds(Who::Process(controller))?, "CPU s");
    report.row(
        "controller-memory-ready",
        mib(resident_bytes(controller)?),
        "MiB",
    );
    report.row(
        "controller-memory-ready-peak",
        mib(peak_bytes(controller)?),
        "MiB",
    );
    say(&format!("{} objects are read", world.store.objects().len()));
    Ok(Pids {
        controller,
        agent: None,
    })
}

/// Lets all simulated agents connect at once, and waits until they have everything.
fn connect(
    stage: &mut Stage,
    world: &World,
    size: Size,
    pids: Pids,
    report: &mut Report,
) -> Result<(Arc<Common>, Vec<Arc<Agent>>)> {
    let common = Arc::new(Common {
        controller: CONTROLLER,
        roots: stage.roots(&world.store)?,
        board: Board::default(),
        asking: watch::Sender::default(),
    });
    let agents: Vec<Arc<Agent>> = (0..size.agents)
        .map(|number| {
            let node = &world.nodes[number];
            let (pod, uid) = node.agent();
            let services = world.services.iter().cycle().skip(number * 7);
            let asks = services.take(ASKS).map(|it| it.address).collect();
            let token = Token::of_agent(&pod, &uid, &node.name).signed();
            Agent::new(number, &node.name, token, asks)
        })
        .collect();
    let before = cpu_seconds(Who::Process(pids.controller))?;
    say("connects agents");
    for agent in &agents {
        stage.simulating.spawn(agent.clone().run(common.clone()));
    }
    wait_for("all agents to have everything", DEADLINE, || {
        let lacking = agents.iter().filter(|it| it.state().complete.is_none());
        let lacking = lacking.count();
        ensure!(
            lacking == 0,
            "{lacking} have not: {:?}",
            agents[0].state().tried
        );
        Ok(Some(()))
    })?;
    Expected::of(world).check(&agents)?;
    let states = agents.iter().map(|it| it.state());
    let complete: Vec<_> = states.filter_map(|it| it.complete).collect();
    let tries: usize = agents.iter().map(|it| it.state().tried.len()).sum();
    if tries > 0 {
        report.note(format!(
            "{tries} streams had to be opened again before their agents had everything."
        ));
    }
    let mut times: Vec<f64> = complete.iter().map(|it| it.0.as_secs_f64()).collect();
    report.row("full-state-p50", quantile(&mut times, 0.5), "s");
    report.row("full-state-last", quantile(&mut times, 1.0), "s");
    let bytes: u64 = complete.iter().map(|it| it.1).sum();
    report.row(
        "full-state-bytes",
        bytes as f64 / 1e6 / agents.len() as f64,
        "MB/agent",
    );
    let cpu = cpu_seconds(Who::Process(pids.controller))? - before;
    report.row("full-state-cpu", cpu, "CPU s");
    Ok((common, agents))
}

/// Waits until the real agent has what the objects say.
fn wait_agent(stage: &Stage, pids: Pids, expected: &Expected) -> Result<()> {
    if pids.agent.is_none() {
        return Ok(());
    }
    wait_for("the real agent to have everything", DEADLINE, || {
        expected.check_dump(&stage.agent_dump()?).map(Some)
    })
}

/// What things are like while nothing happens.
fn rest(pids: Pids, agents: &[Arc<Agent>], report: &mut Report) -> Result<()> {
    say("rests");
    let before = Moment::now(pids, agents)?;
    std::thread::sleep(REST);
    let after = Moment::now(pids, agents)?;
    let seconds = after.at.duration_since(before.at).as_secs_f64();
    report.row(
        "controller-cpu-rest",
        (after.cpu[0] - before.cpu[0]) / seconds,
        "CPUs",
    );
    report.row(
        "controller-memory",
        mib(resident_bytes(pids.controller)?),
        "MiB",
    );
    if let Some(agent) = pids.agent {
        report.row("agent-memory", mib(resident_bytes(agent)?), "MiB");
    }
    Ok(())
}

fn report_delays(agents: &[Arc<Agent>], told: &Delays, report: &mut Report) {
    let ms = |it: Duration| it.as_secs_f64() * 1e3;
    let mut delays = vec![];
    let mut answers = vec![];
    for agent in agents {
        let state = agent.state();
        delays.extend(state.heard.delays().map(ms));
        answers.extend(state.answers.iter().copied().map(ms));
    }
    report.row("delay-p50", quantile(&mut delays, 0.5), "ms");
    report.row("delay-p99", quantile(&mut delays, 0.99), "ms");
    report.row("delay-most", quantile(&mut delays, 1.0), "ms");
    report.note(format!(
        "{} times an agent heard of a change; {} questions were answered.",
        delays.len(),
        answers.len()
    ));
    let mut told: Vec<f64> = match told.lock() {
        Ok(told) => told.iter().copied().map(ms).collect(),
        Err(_) => vec![],
    };
    report.row("delay-apiserver-p50", quantile(&mut told, 0.5), "ms");
    report.row("delay-apiserver-p99", quantile(&mut told, 0.99), "ms");
    report.row("answer-p50", quantile(&mut answers, 0.5), "ms");
    report.row("answer-p99", quantile(&mut answers, 0.99), "ms");
}

fn conclude(
    agents: &[Arc<Agent>],
    (size, with_agent): (Size, bool),
    done: &Done,
    settled: Duration,
    report: &mut Report,
) -> Result<()> {
    report.row(
        "changes",
        done.changes as f64 / done.took.as_secs_f64(),
        "changes/s",
    );
    let broken: Vec<String> = agents
        .iter()
        .flat_map(|it| it.state().broken.clone())
        .collect();
    ensure!(
        broken.is_empty(),
        "{} streams broke, one of them: {}",
        broken.len(),
        broken[0]
    );
    let real = if with_agent { " and a real one" } else { "" };
    report.note(format!(
        "{} Services, {} pods, {} simulated agents{real}; {} changes in {:.0} s, the latest made {:.0} ms late. \
         All agents had what the objects say {:.1} s after the last one.",
        size.services,
        size.pods,
        size.agents,
        done.changes,
        done.took.as_secs_f64(),
        done.late.as_secs_f64() * 1e3,
        settled.as_secs_f64(),
    ));
    Ok(())
}

impl Moment {
    fn now(pids: Pids, agents: &[Arc<Agent>]) -> Result<Moment> {
        let who = [
            Who::Process(pids.controller),
            pids.agent.map_or(Who::Threads("none"), Who::Process),
            Who::Threads(SERVING),
            Who::Threads(SIMULATING),
        ];
        let mut cpu = [0.0; 4];
        for (used, who) in cpu.iter_mut().zip(who) {
            *used = cpu_seconds(who)?;
        }
        Ok(Moment {
            at: Instant::now(),
            cpu,
            received: agents.iter().map(|it| it.received()).sum(),
            pushes: agents.iter().map(|it| it.state().pushes).sum(),
        })
    }
}

/// Of values in any order. 0 where there are none.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    let at = (last as f64 * part).round() as usize;
    values.get(at).copied().unwrap_or_default()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0 / 1024.0
}

/// Says what happens now, and when.
fn say(what: &str) {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    eprintln!(
        "weft-scale: {:6.1} s: {what}",
        BEGAN.elapsed().as_secs_f64()
    );
}

const DEADLINE: Duration = Duration::from_secs(120);
const REST: Duration = Duration::from_secs(5);
/// Services that each agent asks for during the changes.
const ASKS: usize = 50;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_sorted() {
        let mut values = vec![3.0, 1.0, 2.0];
        assert_eq!(quantile(&mut values, 0.5), 2.0);
        assert_eq!(quantile(&mut values, 1.0), 3.0);
        assert_eq!(quantile(&mut [], 0.5), 0.0);
    }
}
