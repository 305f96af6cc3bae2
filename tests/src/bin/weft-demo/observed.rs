//! The claims about what an operator sees: the command `weft`, as one would run it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weft_tests::apps::curl;
use weft_tests::cluster::binary;
use weft_tests::command::{Finished, Process, Program};

use crate::acts::Tell;
use crate::stage::Stage;

/// `weft check`.
pub(crate) fn healthy(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let said = weft(stage, &["check", "--wait", "30s"], tell)?;
    ensure!(said.code() == 0, "check finds: {}", said.stderr);
    ensure!(said.stdout.contains("all is well"), "{}", said.stdout);
    Ok(())
}

/// `weft explain`, beside what really becomes of the two callers.
pub(crate) fn explained(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    for (client, status) in [(&stage.order, 200), (&stage.intruder, 403)] {
        let pod = format!("production/{}", client.name());
        let said = weft(stage, &["explain", &pod, "payment.production:80"], tell)?;
        let answer = curl(client, stage.payment_service, "")?;
        tell(&format!("{}$ curl  ->  {}", client.name(), answer.status));
        ensure!(answer.status == status, "{answer:?}");
        ensure!(
            said.code() == i32::from(status != 200),
            "explain says something else"
        );
        let decides = match status {
            200 => "AuthorizationPolicy/production/payment-access",
            _ => "Server/production/payment-api",
        };
        ensure!(said.stdout.contains(decides), "{decides} is not named");
    }
    Ok(())
}

/// `weft stat`, `edges` and `tap`, while a caller asks again and again.
pub(crate) fn seen(stage: &mut Stage, tell: Tell<'_>) -> Result<()> {
    let asking = asking(stage, stage.payment_service)?;
    let stat = weft(stage, &["stat", "-n", "production", "--window", "3s"], tell)?;
    let row = row(&stat, "deployment/payment")?;
    ensure!(row.contains("100.00%"), "not all succeed: {row}");
    let edges = weft(
        stage,
        &["edges", "deploy/payment", "-n", "production"],
        tell,
    )?;
    let row = edges.stdout.lines().find(|line| {
        let ends = ["deployment/order", "deployment/payment", "mTLS"];
        ends.iter().all(|it| line.contains(it))
    });
    let row = row.context("no edge from order to payment by mTLS")?;
    for identity in [stage.order.identity(), stage.payment.identity()] {
        ensure!(row.contains(&identity), "no {identity} in {row}");
    }
    let watch = [
        "tap",
        "deploy/payment",
        "-n",
        "production",
        "--max-rps",
        "1",
        "--for",
        "2s",
    ];
    let tap = weft(stage, &watch, tell)?;
    for part in ["req ", "rsp ", ":method=GET", ":status=200", "tls=true"] {
        ensure!(tap.stdout.contains(part), "tap shows no {part}");
    }
    drop(asking);
    Ok(())
}

/// A curl that asks 20 times a second, until it is dropped.
fn asking(stage: &Stage, target: SocketAddr) -> Result<Process> {
    let url = format!("http://{target}/?request=[1-100000]");
    let curl = stage.order.command("curl")?;
    curl.args(["-sS", "-o", "/dev/null", "--rate", "20/s", &url])
        .spawn()
}

fn row<'a>(said: &'a Finished, name: &str) -> Result<&'a str> {
    let mut rows = said.stdout.lines();
    let row = rows.find(|it| it.contains(name));
    row.with_context(|| format!("no {name} in {}", said.stdout))
}

/// Runs the tool as root would on the controller's machine, and shows what it says.
fn weft(stage: &Stage, arguments: &[&str], tell: Tell<'_>) -> Result<Finished> {
    tell(&format!("# weft {}", arguments.join(" ")));
    let socket = stage.cluster.controller()?.admin_socket();
    let program = Program::new(binary("weft")?, None, None, stage.cluster.dir())?;
    let program = program.args(arguments);
    let program = program.env("WEFT_CONTROLLER_SOCKET", socket.display().to_string());
    let said = program.output(PATIENCE)?;
    said.stdout
        .lines()
        .for_each(|line| tell(&format!("    {line}")));
    ensure!(said.code() < 2, "weft {}: {}", arguments[0], said.stderr);
    Ok(said)
}

const PATIENCE: Duration = Duration::from_secs(60);
