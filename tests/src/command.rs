//! Programs started in a network namespace and a cgroup, with their output in files.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::wait::{DEADLINE, wait_for, wait_until};

/// A program to run somewhere: see [`crate::Pod::command`] and [`crate::cluster::Node`].
#[derive(Debug)]
pub struct Program {
    command: Command,
    name: String,
    logs: PathBuf,
}

impl Program {
    /// `program` in this namespace and cgroup; its output goes to files in `logs`.
    pub fn new(
        program: impl AsRef<OsStr>,
        netns: Option<&Netns>,
        cgroup: Option<&Cgroup>,
        logs: &Path,
    ) -> Result<Program> {
        let program = program.as_ref();
        let mut command = Command::new(program);
        // Ctrl-C at a terminal goes to us alone: we end our children in order.
        command.process_group(0);
        command.stdin(Stdio::null());
        crate::sys::place_child(
            &mut command,
            netns.map(Netns::open).transpose()?,
            cgroup.map_or(Ok(vec![]), Cgroup::procs)?,
        );
        let name = Path::new(program)
            .file_name()
            .unwrap_or(program)
            .to_string_lossy()
            .into_owned();
        Ok(Program {
            command,
            name,
            logs: logs.to_owned(),
        })
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Program {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Program {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Program {
        self.command.env(key, value);
        self
    }

    /// The name in logs and messages, if it is not the program's own.
    pub fn named(mut self, name: &str) -> Program {
        name.clone_into(&mut self.name);
        self
    }

    /// Leaves its standard input open; see [`Process::close_stdin`].
    pub fn with_stdin(mut self) -> Program {
        self.command.stdin(Stdio::piped());
        self
    }

    /// Starts it.
    pub fn spawn(mut self) -> Result<Process> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        fs::create_dir_all(&self.logs)?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let stdout = self.logs.join(format!("{}-{count}.out", self.name));
        let stderr = self.logs.join(format!("{}-{count}.err", self.name));
        self.command
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?);
        let mut child = self
            .command
            .spawn()
            .with_context(|| format!("starting {}", self.name))?;
        let stdin = child.stdin.take();
        Ok(Process {
            name: self.name,
            child,
            stdin,
            stdout,
            stderr,
        })
    }

    /// Runs it to its end and gives all it printed, whatever its exit status; kills it at the
    /// deadline.
    pub fn output(self, deadline: Duration) -> Result<Finished> {
        let mut process = self.spawn()?;
        let waited = process.wait(deadline);
        let finished = Finished {
            name: process.name.clone(),
            status: match waited {
                Ok(status) => status,
                Err(error) => {
                    let shown = format!("{}{}", process.stdout(), process.stderr());
                    return Err(error.context(shown));
                }
            },
            stdout: process.stdout(),
            stderr: process.stderr(),
        };
        // Short programs come by the hundred; their files would only fill the folder.
        let _ = fs::remove_file(&process.stdout);
        let _ = fs::remove_file(&process.stderr);
        Ok(finished)
    }

    /// [`Program::output`] within [`DEADLINE`], failing unless the exit status is 0.
    pub fn run(self) -> Result<String> {
        self.output(DEADLINE)?.success()
    }
}

/// What a program printed and how it ended.
#[derive(Clone, Debug)]
pub struct Finished {
    name: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    #[cfg(test)]
    pub(crate) fn new(status: ExitStatus, stdout: &str) -> Finished {
        Finished {
            name: String::new(),
            status,
            stdout: stdout.to_owned(),
            stderr: String::new(),
        }
    }

    /// The output, if the exit status was 0.
    pub fn success(self) -> Result<String> {
        ensure!(
            self.status.success(),
            "{} ended with {}\n{}{}",
            self.name,
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }

    /// The exit code, or 128 plus the signal as shells say it.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .or(self.status.signal().map(|signal| 128 + signal))
            .unwrap_or(-1)
    }
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Its name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// All it printed so far.
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout)
    }

    /// All it printed to standard error so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr)
    }

    /// The files with its output and its standard error.
    pub fn logs(&self) -> [&Path; 2] {
        [&self.stdout, &self.stderr]
    }

    /// Waits until its output or standard error has a line with this text, and gives the line.
    pub fn wait_for_line(&mut self, text: &str, deadline: Duration) -> Result<String> {
        let what = format!("{} to print {text:?}", self.name);
        wait_for(&what, deadline, || {
            let ended = !self.is_running();
            let printed = format!("{}{}", self.stdout(), self.stderr());
            let found = printed
                .lines()
                .find(|line| line.contains(text))
                .map(str::to_owned);
            if found.is_none() && ended {
                let end = tail(&printed, 20);
                return Ok(Some(Err(anyhow!(
                    "{} ended without {text:?}: {end}",
                    self.name
                ))));
            }
            Ok(found.map(Ok))
        })?
    }

    /// Waits until a socket in its network namespace listens on the port, on any address.
    pub fn wait_listening(&mut self, port: u16) -> Result<()> {
        let pid = self.pid();
        wait_until(
            &format!("{} to listen on port {port}", self.name),
            DEADLINE,
            || !self.is_running() || listening(pid).iter().any(|address| address.port() == port),
        )?;
        ensure!(
            self.is_running(),
            "{} ended: {}",
            self.name,
            tail(&self.stderr(), 20)
        );
        Ok(())
    }

    /// Writes to its standard input.
    pub fn write_stdin(&mut self, text: &str) -> Result<()> {
        let stdin = self
            .stdin
            .as_mut()
            .context("its standard input is not open")?;
        Ok(stdin.write_all(text.as_bytes())?)
    }

    /// Ends its standard input, for programs that stop then.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Closes its standard input, waits for its end and gives its output.
    pub fn finish(mut self, deadline: Duration) -> Result<String> {
        self.close_stdin();
        let status = self.wait(deadline)?;
        ensure!(
            status.success(),
            "{} ended with {status}: {}",
            self.name,
            self.stderr()
        );
        Ok(self.stdout())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(nix::sys::signal::kill(
            Pid::from_raw(self.pid().try_into()?),
            signal,
        )?)
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > deadline {
                bail!("{} did not end within {deadline:?}", self.name);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// SIGTERM, then its end within the deadline.
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        if self.is_running() {
            self.signal(Signal::SIGTERM)?;
        }
        self.wait(deadline)
    }

    /// SIGKILL, and its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The memory it holds now, in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        crate::usage::resident_bytes(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.kill();
        }
    }
}

/// The addresses that TCP sockets listen on in the network namespace of this process.
pub fn listening(pid: u32) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let mut fields = line.split_whitespace().skip(1);
            let (Some(local), Some(_), Some(LISTEN)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            found.extend(parse_proc_address(local));
        }
    }
    found
}

/// `0100007F:1F90`, or four such words for IPv6, as `/proc/net/tcp` writes them.
fn parse_proc_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for at in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    match bytes.len() {
        4 => Some((<[u8; 4]>::try_from(bytes).ok()?, port).into()),
        16 => Some((<[u8; 16]>::try_from(bytes).ok()?, port).into()),
        _ => None,
    }
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// `TCP_LISTEN` in `/proc/net/tcp`.
const LISTEN: &str = "0A";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_addresses() {
        if cfg!(target_endian = "little") {
            assert_eq!(
                parse_proc_address("0100007F:1F90"),
                "127.0.0.1:8080".parse().ok()
            );
        }
        let v6 = parse_proc_address("00000000000000000000000000000000:0050");
        assert_eq!(v6, "[::]:80".parse().ok());
        assert_eq!(parse_proc_address("zz"), None);
    }
}
