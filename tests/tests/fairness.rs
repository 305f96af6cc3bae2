//! Pods that take all they can get, and their neighbours. How long a neighbour waits is measured by
//! `cargo xtask bench --only fairness`; here it is that nobody is refused for another's sake, that
//! what is too much is refused at once and counted, and that it costs the agent bounded memory.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::Pid;
use serde::Deserialize;
use socket2::{Domain, Socket, Type};
use weft_tests::cluster::{Node, binary};
use weft_tests::command::Process;
use weft_tests::metrics::wait_for_metric;
use weft_tests::scenario::{eventually, expect_echo};
use weft_tests::testapp::{self, Load, Server};
use weft_tests::webapp::HttpServer;
use weft_tests::{Checks, Cluster, ClusterOptions, Pod, PodSpec, wait_for};

/// What the agents of the first test are told.
const FLOWS: u64 = 400;
const BUFFERED_MIB: u64 = 16;
const EXCHANGES: u64 = 64;

struct Pods {
    flooder: Pod,
    /// Floods come here,
    flooded: Pod,
    /// and this one has a server of its own.
    neighbour: Pod,
    server: Pod,
    stranger: Pod,
}

#[test]
fn floods() {
    let args = [
        ("--max-flows-per-pod", FLOWS),
        ("--max-buffered-mib-per-pod", BUFFERED_MIB),
        ("--max-exchanges-per-pod", EXCHANGES),
    ];
    let cluster = Cluster::with(ClusterOptions {
        agent_args: args
            .iter()
            .flat_map(|(flag, value)| [(*flag).to_owned(), value.to_string()])
            .collect(),
        ..ClusterOptions::default()
    })
    .expect("a cluster");
    let add = |spec| cluster.add_pod(spec).expect("a pod");
    let pods = Pods {
        flooder: add(PodSpec::new("flooder").on(0)),
        flooded: add(PodSpec::new("flooded").on(1)),
        neighbour: add(PodSpec::new("neighbour").on(0)),
        server: add(PodSpec::new("server").on(1)),
        stranger: add(PodSpec::new("stranger").on(0).unmeshed()),
    };
    let _flooded = serve(&pods.flooded, PORT).expect("a server");
    let _server = Server::start(&pods.server, PORT, "echo", &["--quiet"]).expect("a server");
    let mut checks = Checks::new("fairness");
    checks.check("the limits are in the log", || limits_are_said(&cluster));
    checks.check("a flood of connections", || connections(&cluster, &pods));
    checks.check("more flows than there may be, none of them read", || {
        stalled(&cluster, &pods)
    });
    checks.check("a server's other client", || other_client(&cluster, &pods));
    checks.check("bulk on many connections", || bulk(&cluster, &pods));
    for flood in &HTTP_FLOODS {
        checks.check(&format!("HTTP: {}", flood.script), || {
            http_flood(&cluster, &pods, flood)
        });
    }
    checks.check(
        "a stranger that begins handshakes and never ends one",
        || handshakes(&cluster, &pods),
    );
    checks.finish();
}

fn limits_are_said(cluster: &Cluster) -> Result<()> {
    let log = cluster.node(0).agent_log();
    let line = log.lines().find(|it| it.contains("limits: per pod"));
    let line = line.context("the log does not tell the limits")?;
    let (flows, kept) = (format!("{FLOWS} flows"), format!("{BUFFERED_MIB} MiB kept"));
    ensure!(line.contains(&flows) && line.contains(&kept), "{line}");
    Ok(())
}

fn connections(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let flood = Flood::start(&pods.flooder, target(&pods.flooded), "connections", 64)?;
    unharmed(pods, Duration::from_secs(3))?;
    let counts = flood.stop()?;
    ensure!(
        counts.of("ok") > 100,
        "within its limits it goes on: {counts:?}"
    );
    ensure!(
        counts.of("hung") == 0,
        "nobody may be left hanging: {counts:?}"
    );
    gone(cluster.node(0), "flooder")
}

fn stalled(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let before = cluster.node(0).agent_resident_bytes()?;
    let flood = Flood::start(&pods.flooder, target(&pods.flooded), "stalled", 600)?;
    let node = cluster.node(0);
    let of_flooder = |reason| [("reason", reason), ("pod", "flooder")];
    wait_for_metric(
        node,
        "weft_refused_total",
        &of_flooder("too_many_flows"),
        150.0,
    )?;
    much_is_kept(cluster)?;
    unharmed(pods, Duration::from_secs(3))?;
    for node in cluster.nodes() {
        let kept = node.metrics()?;
        for sample in kept.find("weft_pod_buffered_bytes", &[]) {
            // Those beyond 256 go by HTTP/2 and count with their window.
            let most = (BUFFERED_MIB << 20) + 256 * (40 << 10) + (FLOWS - 256) * (300 << 10);
            ensure!(sample.value <= most as f64, "{}: {sample:?}", node.name());
        }
    }
    let memory = node.agent_resident_bytes()?;
    ensure!(
        memory < before + (128 << 20),
        "the agent grew from {before} to {memory} bytes"
    );
    let told = node.agent_log();
    let told = told
        .lines()
        .filter(|line| line.contains("a limit is reached") && line.contains("too_many_flows"));
    ensure!((1..=20).contains(&told.count()), "told once in a while");
    let counts = flood.stop()?;
    ensure!(
        counts.of("ok") >= FLOWS,
        "those within the limit: {counts:?}"
    );
    ensure!(counts.of("reset") > 0, "those beyond it: {counts:?}");
    ensure!(
        counts.of("hung") == 0,
        "nobody may be left hanging: {counts:?}"
    );
    gone(node, "flooder")
}

/// Whatever one client does not read, none of its flows is ended for it, and no flow of another client
/// of the same server.
fn other_client(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let beside = Server::start(&pods.flooded, BESIDE, "echo", &["--quiet"])?;
    let flood = Flood::start(&pods.flooder, target(&pods.flooded), "stalled", 300)?;
    much_is_kept(cluster)?;
    let to = SocketAddr::new(pods.flooded.v4().into(), BESIDE);
    unharmed_at(pods, to, Duration::from_secs(3))?;
    let counts = flood.stop()?;
    ensure!(counts.of("reset") == 0, "{counts:?}");
    drop(beside);
    gone(cluster.node(0), "flooder")
}

/// Waits until a pod keeps so much that its flows read in small steps.
fn much_is_kept(cluster: &Cluster) -> Result<()> {
    wait_for("much to be kept", Duration::from_secs(20), || {
        let mut most = 0.0_f64;
        for node in cluster.nodes() {
            let metrics = node.metrics()?;
            let kept = metrics.find("weft_pod_buffered_bytes", &[]);
            most = kept.fold(most, |most, it| most.max(it.value));
        }
        Ok((most > (BUFFERED_MIB << 19) as f64).then_some(()))
    })
}

fn bulk(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let flood = Flood::start(&pods.flooder, target(&pods.flooded), "bulk", 64)?;
    unharmed(pods, Duration::from_secs(3))?;
    let counts = flood.stop()?;
    ensure!(counts.of("ok") >= 64, "{counts:?}");
    gone(cluster.node(0), "flooder")
}

/// A client of HTTP that means harm: the neighbour is answered, the agents' memory stays bounded, and the flood itself
/// is held off as its kind is.
fn http_flood(cluster: &Cluster, pods: &Pods, flood: &HttpFlood) -> Result<()> {
    let server = HttpServer::start(&pods.flooded, HTTP, &[])?;
    let node = cluster.node(0);
    let refused = || -> Result<f64> {
        // By its own agent, or by its server's, which lets one client have half.
        let labels = [("reason", "too_many_exchanges")];
        let nodes = cluster.nodes().iter();
        let counts = nodes.map(|it| Ok(it.metrics()?.sum("weft_refused_total", &labels)));
        counts.sum()
    };
    let before = (refused()?, memory(cluster)?);
    let target = SocketAddr::new(pods.flooded.v4().into(), HTTP).to_string();
    let mut client = testapp::command(&pods.flooder)?
        .named("http-flood")
        .args(["attack", "http", &target, flood.script])
        .args(flood.more.iter().copied())
        .spawn()?;
    unharmed(pods, Duration::from_secs(3))?;
    let grown = memory(cluster)?.saturating_sub(before.1) >> 20;
    ensure!(grown < MOST_MIB, "the agents grew by {grown} MiB");
    client.wait(Duration::from_secs(90))?;
    let end: HttpFloodEnd = serde_json::from_str(client.stdout().trim())
        .with_context(|| format!("the flood said {:?}", client.stdout()))?;
    ensure!(end.open > 0, "nothing was tried: {end:?}");
    let came = HttpFloodCame {
        refused: refused()? - before.0,
        seen: server.requests()?.len() as u64,
        end,
    };
    ensure!((flood.is_held_off)(&came), "not held off: {came:?}");
    // Connections to servers are kept for the next request.
    eventually("the flood to be gone", || {
        for name in ["weft_pod_open_exchanges", "weft_pod_buffered_bytes"] {
            let left = node.metrics()?.sum(name, &[("pod", "flooder")]);
            ensure!(left == 0.0, "{left} of {name}");
        }
        Ok(())
    })
}

/// What a client of HTTP does that means harm, and how it is held off.
struct HttpFlood {
    script: &'static str,
    /// Arguments beside it.
    more: &'static [&'static str],
    is_held_off: fn(&HttpFloodCame) -> bool,
}

/// What came of it.
#[derive(Debug)]
struct HttpFloodCame {
    /// How often agents refused a request as one too many.
    refused: f64,
    /// Requests that the server has seen.
    seen: u64,
    end: HttpFloodEnd,
}

/// What a client says at its end that follows a script.
#[derive(Debug, Deserialize)]
struct HttpFloodEnd {
    open: u64,
    ended: u64,
    statuses: BTreeMap<String, u64>,
    frames: BTreeMap<u8, u64>,
}

impl HttpFloodCame {
    /// All of its connections were ended, and none of its requests went on.
    fn is_ended(&self) -> bool {
        self.end.ended == self.end.open && self.seen == 0
    }

    fn statuses(&self, status: &str) -> u64 {
        self.end.statuses.get(status).copied().unwrap_or(0)
    }

    fn frames(&self, kind: u8) -> u64 {
        self.end.frames.get(&kind).copied().unwrap_or(0)
    }
}

/// What both agents hold, in bytes.
fn memory(cluster: &Cluster) -> Result<u64> {
    let nodes = cluster.nodes().iter();
    nodes.map(Node::agent_resident_bytes).sum()
}

/// From a stranger's address there may be 32; workloads have places of their own.
fn handshakes(cluster: &Cluster, pods: &Pods) -> Result<()> {
    let tunnel = SocketAddr::new(pods.server.v4().into(), 15008);
    let open = || -> Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.connect(&tunnel.into())?;
        Ok(socket)
    };
    let silent = (0..80).map(|_| pods.stranger.netns().run(open)?);
    let silent = silent.collect::<Result<Vec<_>>>()?;
    let labels = [("reason", "too_many_handshakes"), ("pod", "server")];
    wait_for_metric(cluster.node(1), "weft_refused_total", &labels, 40.0)?;
    let newcomer = cluster.add_pod(PodSpec::new("newcomer").on(0))?;
    expect_echo(&newcomer, target(&pods.server), "a tunnel of its own")?;
    drop(silent);
    cluster.remove_pod(newcomer)
}

/// The neighbour's requests, each on a connection of its own, all succeed.
fn unharmed(pods: &Pods, time: Duration) -> Result<()> {
    unharmed_at(pods, target(&pods.server), time)
}

fn unharmed_at(pods: &Pods, server: SocketAddr, time: Duration) -> Result<()> {
    let load = Load::start(
        &pods.neighbour,
        server,
        &["--parallel", "2", "--pause-ms", "20"],
    )?;
    let end = Instant::now() + time;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
    }
    let counts = load.stop()?;
    ensure!(
        counts.of("ok") == counts.total() && counts.of("ok") > 0,
        "the neighbour's connections: {counts:?}"
    );
    Ok(())
}

/// All flows of the pod have ended, and it keeps nothing.
fn gone(node: &Node, pod: &str) -> Result<()> {
    eventually("the flood to be gone", || {
        let metrics = node.metrics()?;
        let open = metrics.sum("tcp_open_connections", &[("pod", pod)]);
        let kept = metrics.sum("weft_pod_buffered_bytes", &[("pod", pod)]);
        ensure!(open == 0.0 && kept == 0.0, "{open} flows keep {kept} bytes");
        Ok(())
    })
}

/// On two CPUs, so that a flood makes them short on any machine: its pod's threads no longer come first, a neighbour's still
/// do, and what the flood costs is told.
#[test]
fn who_uses_much_does_not_come_first() -> Result<()> {
    let own = sched_getaffinity(Pid::from_raw(0))?;
    let mut two = CpuSet::new();
    let allowed = (0..CpuSet::count()).filter(|cpu| own.is_set(*cpu).unwrap_or(false));
    for cpu in allowed.take(2) {
        two.set(cpu)?;
    }
    // Of this thread, and of all that it starts.
    sched_setaffinity(Pid::from_raw(0), &two)?;
    let cluster = Cluster::start()?;
    let add = |name, node| cluster.add_pod(PodSpec::new(name).on(node));
    let (flooder, flooded) = (add("flooder", 0)?, add("flooded", 1)?);
    let (neighbour, server) = (add("neighbour", 0)?, add("server", 1)?);
    let _flooded = serve(&flooded, PORT)?;
    let _server = Server::start(&server, PORT, "echo", &["--quiet"])?;
    let node = cluster.node(0);
    let agent = node.agent_pid().context("an agent")?;
    let patience = Duration::from_secs(60);
    let all_first = || {
        let priorities = priorities_of_pods(agent)?;
        let mut all = priorities.into_iter();
        let is_so = |it: &(i64, usize)| it.0 < PLAIN && it.1 == 4;
        Ok(all.next().filter(|it| is_so(it) && all.len() == 0))
    };
    let (first, _) = wait_for("two pods whose threads come first", patience, all_first)?;
    let flood = Flood::start(&flooder, target(&flooded), "bulk", 64)?;
    let args = ["--parallel", "2", "--pause-ms", "20"];
    let load = Load::start(&neighbour, target(&server), &args)?;
    let one = BTreeMap::from([(first, 2), (PLAIN, 2)]);
    wait_for("one pod's threads not to come first", patience, || {
        Ok((priorities_of_pods(agent)? == one).then_some(()))
    })?;
    let counts = load.stop()?;
    ensure!(counts.of("ok") == counts.total(), "{counts:?}");
    let counts = flood.stop()?;
    ensure!(counts.of("ok") == 64 && counts.total() == 64, "{counts:?}");
    let metrics = node.metrics()?;
    let used = |pod| metrics.sum("weft_pod_cpu_seconds_total", &[("pod", pod)]);
    let (flooder, neighbour) = (used("flooder"), used("neighbour"));
    ensure!(
        neighbour > 0.0 && flooder > 2.0 * neighbour,
        "{flooder} s, {neighbour} s"
    );
    wait_for("all to come first again", patience, all_first)?;
    gone(node, "flooder")
}

/// How many threads of pods an agent has with each priority, as the kernel says it (proc_pid_stat(5)): 20 and the nice
/// value, and less than 0 if it is of a real-time policy.
fn priorities_of_pods(agent: u32) -> Result<BTreeMap<i64, usize>> {
    let mut counts = BTreeMap::new();
    for task in std::fs::read_dir(format!("/proc/{agent}/task"))? {
        let stat = std::fs::read_to_string(task?.path().join("stat"))?;
        let (name, fields) = stat.rsplit_once(')').context("a name in parentheses")?;
        if name.ends_with("(weft-pod") {
            // The 18th field, of which two are before.
            let priority = fields.split_whitespace().nth(15).context("a priority")?;
            *counts.entry(priority.parse()?).or_default() += 1;
        }
    }
    Ok(counts)
}

/// As many flows as the descriptors allow, 8,000 at most, from one pod and as many to it at once.
#[test]
fn thousands_both_ways() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let count = (hard * 2 / 5).min(8000);
    let cluster = Cluster::start()?;
    let both = cluster.add_pod(PodSpec::new("both").on(0))?;
    let far_server = cluster.add_pod(PodSpec::new("far-server").on(1))?;
    let far_client = cluster.add_pod(PodSpec::new("far-client").on(1))?;
    let neighbour = cluster.add_pod(PodSpec::new("neighbour").on(0))?;
    let near = cluster.add_pod(PodSpec::new("near").on(0))?;
    let _servers = [serve(&far_server, PORT)?, serve(&both, PORT)?];
    let _near = Server::start(&near, PORT, "echo", &["--quiet"])?;
    let node = cluster.node(0);
    let descriptors = || Ok(node.metrics()?.sum("process_open_fds", &[]));
    let before: Result<f64> = descriptors();
    let before = before?;
    let held = [
        hold(&both, target(&far_server), count)?,
        hold(&far_client, target(&both), count)?,
    ];
    for direction in ["outbound", "inbound"] {
        let labels = [("pod", "both"), ("direction", direction), ("peer", "src")];
        let open = node.metrics()?.sum("tcp_open_connections", &labels);
        ensure!(open == count as f64, "{open} of {count} flows {direction}");
    }
    println!(
        "{count} flows each way, {} descriptors and {} MiB in the agent",
        descriptors().unwrap_or_default(),
        node.agent_resident_bytes()? >> 20
    );
    expect_echo(&neighbour, target(&near), "there is room for others")?;
    for process in held {
        process.finish(Duration::from_secs(30))?;
    }
    // Tunnels stay for a while, for the next flows.
    eventually("the flows to be gone", || {
        let now = descriptors()?;
        ensure!(now < before + 2000.0, "{before} descriptors, now {now}");
        Ok(())
    })
}

fn hold(pod: &Pod, target: SocketAddr, count: u64) -> Result<Process> {
    let mut process = bench(pod, "hold")?
        .arg(target.to_string())
        .args(["--count", &count.to_string(), "--tries", "5"])
        .with_stdin()
        .spawn()?;
    let held = process.wait_for_line("held", Duration::from_secs(90));
    let held = held.map_err(|error| error.context(process.stderr()))?;
    ensure!(
        held.contains(&count.to_string()),
        "{held}: {}",
        process.stderr()
    );
    Ok(process)
}

/// The server of the benchmarks: thousands of connections cost it nothing.
fn serve(pod: &Pod, port: u16) -> Result<Process> {
    let mut process = bench(pod, "serve")?
        .args(["--listen", &format!("0.0.0.0:{port}")])
        .spawn()?;
    process.wait_listening(port)?;
    Ok(process)
}

struct Flood(Process);

#[derive(Debug, Deserialize)]
struct Counts {
    counts: BTreeMap<String, u64>,
}

impl Flood {
    fn start(pod: &Pod, target: SocketAddr, kind: &str, workers: u64) -> Result<Self> {
        let mut process = bench(pod, "flood")?
            .arg(target.to_string())
            .args(["--kind", kind, "--workers", &workers.to_string()])
            .with_stdin()
            .spawn()?;
        process.wait_for_line("flooding", Duration::from_secs(60))?;
        Ok(Self(process))
    }

    fn stop(self) -> Result<Counts> {
        let out = self.0.finish(Duration::from_secs(30))?;
        let line = out.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("the flood said {out:?}"))
    }
}

impl Counts {
    fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    fn of(&self, outcome: &str) -> u64 {
        self.counts.get(outcome).copied().unwrap_or(0)
    }
}

fn bench(pod: &Pod, subcommand: &str) -> Result<weft_tests::command::Program> {
    let program = binary("weft-bench")?;
    let program = pod.command(&program.display().to_string())?;
    Ok(program.named(subcommand).arg(subcommand))
}

fn target(pod: &Pod) -> SocketAddr {
    SocketAddr::new(pod.v4().into(), PORT)
}

/// The priority of threads that have none of their own.
const PLAIN: i64 = 20;
const PORT: u16 = 7600;
const BESIDE: u16 = 7601;
const HTTP: u16 = 7602;
const HTTP_FLOODS: [HttpFlood; 6] = [
    HttpFlood {
        script: "slow heads",
        // A head may take half a minute.
        more: &["--hold-ms", "60000"],
        is_held_off: HttpFloodCame::is_ended,
    },
    HttpFlood {
        // More requests at once than a pod may have open: those beyond are answered with 503 and counted.
        script: "slow bodies",
        more: &[],
        is_held_off: |it| {
            let answered = it.statuses("503");
            let are_few = it.seen <= EXCHANGES && it.seen + answered == it.end.open;
            are_few && answered > 0 && it.refused >= answered as f64
        },
    },
    HttpFlood {
        // It is ended before they are looked at.
        script: "ten thousand streams",
        more: &[],
        is_held_off: HttpFloodCame::is_ended,
    },
    HttpFlood {
        script: "a head of megabytes",
        more: &[],
        is_held_off: |it| it.is_ended() && it.statuses("431") == it.end.open,
    },
    HttpFlood {
        script: "ten thousand fields",
        more: &[],
        // Each is answered, as too many.
        is_held_off: |it| it.seen == 0 && it.frames(HEADERS) == it.end.open,
    },
    HttpFlood {
        script: "continuations without end",
        more: &[],
        is_held_off: HttpFloodCame::is_ended,
    },
];
const HEADERS: u8 = 1;
/// By how much both agents may grow: see the adversarial suite.
const MOST_MIB: u64 = 256;
