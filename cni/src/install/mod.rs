//! Installs the plugin on a node, keeps it installed, and takes it away.
//!
//! `install` runs for as long as the node has an agent: other CNIs rewrite their configuration when they start, and new
//! ones appear. It leaves all as it is when it is told to end: an upgrade must not let pods start outside of the mesh.
//! What takes the plugin away is `uninstall`, and nothing else.

pub mod folder;
pub mod lists;
mod watch;

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Args, Parser, Subcommand};

use crate::call::{EXEMPT, LISTED, SOCKET, Settings, WhenAway};
use crate::files;
use folder::{Done, Folder, Trouble};
use lists::{Entry, Stamp, TYPE};
use watch::{Watch, Woken};

/// The CNI plugin of the Weft service mesh. Container runtimes call it with CNI_COMMAND set; people install it.
#[derive(Debug, Parser)]
#[command(name = "weft-cni", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What it can be asked to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Copy the plugin to the node, put it into the network configuration that counts, and repair that whenever somebody
    /// changes it, until SIGTERM or SIGINT. The plugin stays installed then.
    Install(Install),
    /// Succeed if the plugin is installed.
    Status(Install),
    /// Take the plugin out of all network configurations, and delete it and the agent's list. Do this on every node when
    /// the mesh leaves the cluster: without agents, it keeps pods waiting.
    Uninstall(Uninstall),
}

/// Where the node has its configuration and its plugins.
#[derive(Debug, Args)]
pub struct Folders {
    /// The runtime's folder of network configurations, as it is mounted here.
    #[arg(long, env = "WEFT_CNI_CONF_DIR", default_value = "/host/etc/cni/net.d")]
    pub conf_dir: PathBuf,

    /// The runtime's folder of plugins, as it is mounted here.
    #[arg(long, env = "WEFT_CNI_BIN_DIR", default_value = "/host/opt/cni/bin")]
    pub bin_dir: PathBuf,
}

/// How to install it.
#[derive(Debug, Args)]
pub struct Install {
    /// Where.
    #[command(flatten)]
    pub folders: Folders,

    /// The agent's socket (its `--cni-socket`), as the node has it.
    #[arg(long, env = "WEFT_CNI_SOCKET", default_value = SOCKET)]
    pub socket: PathBuf,

    /// The agent's list of namespaces (its `--cni-namespaces`), as the node has it.
    #[arg(long, env = "WEFT_CNI_NAMESPACES", default_value = LISTED)]
    pub namespaces: PathBuf,

    /// Namespaces whose pods never wait for the agent: with what has to run before there is one, or a controller for it.
    #[arg(
        long = "exempt-namespace",
        value_name = "NAMESPACE",
        env = "WEFT_CNI_EXEMPT",
        value_delimiter = ',',
        default_values = EXEMPT
    )]
    pub exempt: Vec<String>,

    /// What becomes of pods while the agent cannot be asked, or has no controller: `listed` keeps those waiting whose
    /// namespace is on the agent's list, `refuse-all` all but those of exempt namespaces.
    #[arg(long, env = "WEFT_CNI_WHEN_AWAY", value_enum, default_value_t = WhenAway::Listed)]
    pub when_away: WhenAway,

    /// How many seconds a pod waits for the agent before the kubelet has to try again, with a new sandbox.
    #[arg(long, env = "WEFT_CNI_WAIT_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub wait_seconds: u64,

    /// Where it is noted when it was installed first, for installers that are started again. During an upgrade there are two
    /// for a while, of which the later one is right, and one that counted as new whenever it is started again would bring back
    /// what the newer one has replaced. A file in a folder that lives as long as the pod.
    #[arg(long, env = "WEFT_CNI_INSTALLED", value_name = "FILE")]
    pub installed: Option<PathBuf>,

    /// Install it and return, instead of keeping it installed.
    #[arg(long)]
    pub once: bool,
}

/// How to take it away.
#[derive(Debug, Args)]
pub struct Uninstall {
    /// Where.
    #[command(flatten)]
    pub folders: Folders,

    /// The agent's list of namespaces, as it is mounted here; it is deleted if it is there.
    #[arg(long, env = "WEFT_CNI_NAMESPACES", default_value = LISTED)]
    pub namespaces: PathBuf,

    /// Leave the program there. CRI-O takes pods down by the configuration that they were set up with: where the plugin
    /// is missing then, pods that were started with it do not end. Without agent and list it does nothing.
    #[arg(long)]
    pub keep_binary: bool,
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The configuration is not as it should be.
    #[error(transparent)]
    Folder(#[from] Trouble),
    /// The system refused something.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system says.
        error: io::Error,
    },
    /// The plugin is not installed.
    #[error("{0}")]
    Missing(String),
    /// Not all of it could be taken away.
    #[error("not everything was removed: {0}")]
    Left(String),
}

/// Does it.
///
/// # Errors
/// Why it was not done.
pub fn run(cli: Cli) -> Result<(), InstallError> {
    match cli.command {
        Command::Install(install) if install.once => install.put(&mut install.turn()?).map(drop),
        Command::Install(install) => install.keep(),
        Command::Status(install) => install.status(),
        Command::Uninstall(uninstall) => uninstall.run(),
    }
}

/// Whose turn it is, of the installers of a node.
#[derive(Clone, Copy, Debug)]
struct Turn {
    /// When the first installer of this pod was run.
    stamp: Stamp,
    /// Whether none of them has installed anything yet.
    is_first: bool,
}

impl Install {
    fn entry(&self, stamp: Stamp) -> Entry {
        let settings = Settings {
            socket: self.socket.clone(),
            listed: self.namespaces.clone(),
            exempt: self.exempt.clone(),
            when_away: self.when_away,
            wait_seconds: self.wait_seconds,
        };
        Entry::new(&settings, stamp)
    }

    /// Installs it. The program comes first: a configuration that names a plugin that is not there lets no pod start.
    /// What a newer installer has put there stays, and what an older one has does not, whoever was the first to repair what
    /// another CNI has written over: each is told of what the other does.
    fn put(&self, turn: &mut Turn) -> Result<Done, InstallError> {
        let folder = Folder::new(&self.folders.conf_dir);
        let binary = self.folders.binary();
        let is_newest = folder.installed_at().is_some_and(|it| it <= turn.stamp);
        if (turn.is_first || is_newest || !binary.is_file()) && self.folders.copy_binary()? {
            say(&format!("copied to {}", binary.display()));
        }
        let done = folder.put(&self.entry(turn.stamp))?;
        if let Done::Put(path) = &done {
            say(&format!("put into {}", path.display()));
        }
        if let Some(note) = self.installed.as_ref().filter(|_| turn.is_first) {
            let Stamp(at) = turn.stamp;
            let noted = files::replace(note, at.to_string().as_bytes(), 0o644);
            noted.map_err(|error| io_error(&format!("writing {}", note.display()), error))?;
        }
        turn.is_first = false;
        Ok(done)
    }

    /// That of the first installer of this pod, or, if this is it, the newest of the node.
    fn turn(&self) -> Result<Turn, InstallError> {
        if let Some(note) = &self.installed {
            match fs::read_to_string(note) {
                // Of a version that noted nothing there: any other one is newer.
                Ok(text) => {
                    let stamp = text.trim().parse().map(Stamp).unwrap_or_default();
                    let is_first = false;
                    return Ok(Turn { stamp, is_first });
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(io_error(&format!("reading {}", note.display()), error));
                }
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |it| u64::try_from(it.as_millis()).unwrap_or(u64::MAX));
        // Clocks can be set back.
        let before = Folder::new(&self.folders.conf_dir).installed_at();
        let least = before.map_or(0, |Stamp(at)| at.saturating_add(1));
        Ok(Turn {
            stamp: Stamp(now.max(least)),
            is_first: true,
        })
    }

    /// Keeps it installed.
    fn keep(&self) -> Result<(), InstallError> {
        let watch = Watch::new().map_err(|error| io_error("watching folders", error))?;
        let mut pace = Pace::default();
        let mut said = String::new();
        let mut turn = self.turn()?;
        loop {
            // Folders that were made anew are others.
            for folder in [&self.folders.conf_dir, &self.folders.bin_dir] {
                let watched = fs::create_dir_all(folder).and_then(|()| watch.folder(folder));
                watched.map_err(|error| io_error(&folder.display().to_string(), error))?;
            }
            let mut pause = LOOK_AGAIN;
            match self.put(&mut turn) {
                Ok(Done::Nothing(_)) => said.clear(),
                Ok(Done::Put(path)) => {
                    said.clear();
                    if pace.is_fast() {
                        say(&format!(
                            "somebody else rewrites {} again and again",
                            path.display()
                        ));
                        std::thread::sleep(SLOWED);
                    }
                }
                Err(error) => {
                    let error = error.to_string();
                    if said != error {
                        say(&error);
                        said = error;
                    }
                    pause = TRY_AGAIN;
                }
            }
            let woken = watch.wait(pause);
            if woken.map_err(|error| io_error("waiting for changes", error))? == Woken::Ends {
                say("ends; the plugin stays installed");
                return Ok(());
            }
        }
    }

    fn status(&self) -> Result<(), InstallError> {
        let binary = self.folders.binary();
        if !binary.is_file() {
            let reason = format!("{} is missing", binary.display());
            return Err(InstallError::Missing(reason));
        }
        let folder = Folder::new(&self.folders.conf_dir);
        match folder.has(&self.entry(Stamp::default()).of_anybody())? {
            true => Ok(()),
            false => {
                let shown = folder.path().display();
                let reason =
                    format!("the network configuration that counts in {shown} is without it");
                Err(InstallError::Missing(reason))
            }
        }
    }
}

impl Uninstall {
    fn run(&self) -> Result<(), InstallError> {
        let mut left = Vec::new();
        // First what names the program, then the program.
        match Folder::new(&self.folders.conf_dir).take_out() {
            Ok(changed) => {
                for path in changed {
                    say(&format!("taken out of {}", path.display()));
                }
            }
            Err(troubles) => left.extend(troubles.iter().map(ToString::to_string)),
        }
        let binary = self.folders.binary();
        // A program that a configuration still names must stay: no pod could start.
        let keeps = self.keep_binary || !left.is_empty();
        let files = [(!keeps).then_some(binary), Some(self.namespaces.clone())];
        for path in files.into_iter().flatten() {
            match fs::remove_file(&path) {
                Ok(()) => say(&format!("removed {}", path.display())),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => left.push(format!("{}: {error}", path.display())),
            }
        }
        match left.is_empty() {
            true => Ok(()),
            false => Err(InstallError::Left(left.join("; "))),
        }
    }
}

impl Folders {
    fn binary(&self) -> PathBuf {
        self.bin_dir.join(TYPE)
    }

    /// Whether it was another one before.
    fn copy_binary(&self) -> Result<bool, InstallError> {
        let place = self.binary();
        let own = Path::new("/proc/self/exe");
        let failed = |error| io_error(&format!("copying the plugin to {}", place.display()), error);
        let own = fs::read(own).map_err(failed)?;
        if fs::read(&place).is_ok_and(|it| it == own) {
            return Ok(false);
        }
        fs::create_dir_all(&self.bin_dir).map_err(failed)?;
        files::replace(&place, &own, 0o755).map_err(failed)?;
        Ok(true)
    }
}

/// How often something was repaired lately.
#[derive(Debug, Default)]
struct Pace(Vec<Instant>);

impl Pace {
    fn is_fast(&mut self) -> bool {
        let now = Instant::now();
        self.0
            .retain(|it| now.duration_since(*it) < Duration::from_secs(60));
        self.0.push(now);
        self.0.len() > REPAIRS_PER_MINUTE
    }
}

fn io_error(what: &str, error: io::Error) -> InstallError {
    InstallError::Io {
        what: what.to_owned(),
        error,
    }
}

fn say(text: &str) {
    eprintln!("weft-cni: {text}");
}

/// Changes are told; but not by every file system.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
const TRY_AGAIN: Duration = Duration::from_secs(1);
const REPAIRS_PER_MINUTE: usize = 20;
const SLOWED: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}"#;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn parsed(folder: &Path, command: &[&str]) -> Cli {
        let folder = folder.display();
        let mut args = vec!["weft-cni".to_owned()];
        args.extend(command.iter().map(|it| (*it).to_owned()));
        args.push(format!("--conf-dir={folder}/conf"));
        args.push(format!("--bin-dir={folder}/bin"));
        args.push(format!("--namespaces={folder}/namespaces.json"));
        Cli::try_parse_from(args).expect("valid")
    }

    #[test]
    fn what_is_not_said_is_as_the_plugin_has_it_by_default() {
        let Command::Install(install) = Cli::parse_from(["weft-cni", "install"]).command else {
            unreachable!("it is that command")
        };
        let stamp = Stamp(1);
        let by_default = Entry::new(&Settings::default(), stamp);
        assert_eq!(install.entry(stamp), by_default);
    }

    #[test]
    fn installed_found_and_taken_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let conf = folder.path().join("conf");
        let installs = || run(parsed(folder.path(), &["install", "--once"]));
        let status = || run(parsed(folder.path(), &["status"]));
        fs::create_dir(&conf).expect("made");
        // The program is there first, however long the configuration takes.
        assert!(matches!(
            installs(),
            Err(InstallError::Folder(Trouble::Nothing(_)))
        ));
        assert!(folder.path().join("bin/weft-cni").is_file());
        assert!(matches!(status(), Err(InstallError::Missing(_))));
        fs::write(conf.join("10-a.conflist"), LIST).expect("written");
        for _ in 0..2 {
            installs().expect("installed");
            status().expect("installed");
        }
        fs::write(folder.path().join("namespaces.json"), "{}").expect("written");
        for _ in 0..2 {
            run(parsed(folder.path(), &["uninstall"])).expect("taken away");
            assert!(status().is_err());
        }
        assert!(!folder.path().join("bin/weft-cni").exists());
        assert!(!folder.path().join("namespaces.json").exists());
        let left = fs::read_to_string(conf.join("10-a.conflist")).expect("there");
        assert!(!left.contains("weft"), "{left}");
    }

    /// An upgrade, in which the older installer is started again while the newer one runs.
    #[test]
    fn an_older_installer_that_comes_back_only_repairs_until_the_newer_one_sees_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let list = folder.path().join("conf/10-a.conflist");
        fs::create_dir(folder.path().join("conf")).expect("made");
        fs::write(&list, LIST).expect("written");
        let installs = |pod: &str, seconds: &str| {
            let note = folder.path().join(pod).display().to_string();
            let own = ["--installed", &note, "--wait-seconds", seconds];
            let command = [&["install", "--once"][..], &own].concat();
            run(parsed(folder.path(), &command)).expect("installed");
            fs::read_to_string(&list).expect("there")
        };
        let waits = |text: &str, seconds: u64| {
            let list: serde_json::Value = serde_json::from_str(text).expect("JSON");
            assert_eq!(list["plugins"][1]["weft"]["waitSeconds"], seconds, "{text}");
        };
        waits(&installs("older", "5"), 5);
        waits(&installs("newer", "7"), 7);
        let binary = folder.path().join("bin/weft-cni");
        fs::write(&binary, "newer").expect("written");
        waits(&installs("older", "5"), 7);
        assert_eq!(fs::read(&binary).expect("there"), b"newer");
        // What is missing is put back by whoever sees it.
        fs::write(&list, LIST).expect("written");
        fs::remove_file(&binary).expect("removed");
        waits(&installs("older", "5"), 5);
        assert!(binary.is_file());
        // The newer one is told of it, and takes its place back, its program too.
        fs::write(&binary, "older").expect("written");
        waits(&installs("newer", "7"), 7);
        assert_ne!(fs::read(&binary).expect("there"), b"older");
        fs::write(&binary, "newer").expect("written");
        waits(&installs("older", "5"), 7);
        assert_eq!(fs::read(&binary).expect("there"), b"newer");
        // Who comes later is newer still, also after the clock was set back.
        let text = fs::read_to_string(&list).expect("there");
        let Stamp(at) = lists::installed_at(&text).expect("a stamp");
        let ahead = text.replace(&at.to_string(), "99999999999999");
        fs::write(&list, ahead).expect("written");
        waits(&installs("newest", "9"), 9);
    }

    #[test]
    fn the_program_may_stay() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir(folder.path().join("conf")).expect("made");
        fs::write(folder.path().join("conf/a.conflist"), LIST).expect("written");
        run(parsed(folder.path(), &["install", "--once"])).expect("installed");
        run(parsed(folder.path(), &["uninstall", "--keep-binary"])).expect("taken away");
        assert!(folder.path().join("bin/weft-cni").exists());
    }
}
