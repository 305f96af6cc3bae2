//! Which agent may change an instance's state in the kernel, while two of them run during an
//! upgrade: the newest that has taken over.
//!
//! Every agent has a folder `agents/<number>` beside the pins, with a number above those of all
//! before it, and holds a lock on it for as long as it lives. A folder in that one says that it has
//! taken over (`owner`), another that all pods are its own (`settled`). Locks end with their
//! process, and making a folder is one step: whoever is killed at whatever moment leaves a state
//! that the next agent reads rightly. A lock on `agents` itself is held by whoever changes anything.
//!
//! Not a process id, which is used again and means nothing in another container; not the kernel's
//! maps, which know nothing of their users' lives.

use std::{
    fs::{self, DirBuilder, File, TryLockError},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::error::BpfError;

/// What an agent is to its instance's state in the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// It has not taken over yet.
    #[default]
    Starting,
    /// It serves the node's pods.
    Owner,
    /// A newer agent has taken over.
    Superseded {
        /// Whether that one has all pods by now.
        settled: bool,
    },
}

/// An agent's place in the order.
#[derive(Debug)]
pub(super) struct Ownership {
    agents: PathBuf,
    number: u64,
    /// Its lock says that this agent lives.
    _alive: File,
}

/// Nobody else changes anything until it is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Change(#[expect(dead_code, reason = "the lock is what matters")] File);

impl Ownership {
    /// Takes a number, and removes what dead agents left.
    pub(super) fn join(pin_root: &Path) -> Result<Self, BpfError> {
        let agents = pin_root.join(AGENTS);
        make(&agents)?;
        let _change = lock(&agents)?;
        let mut number = 1;
        for other in numbers(&agents)? {
            number = number.max(other + 1);
            let folder = agents.join(other.to_string());
            if !is_alive(&folder)? {
                remove(&folder)?;
            }
        }
        let own = agents.join(number.to_string());
        make(&own)?;
        let alive = File::open(&own).and_then(|file| file.lock().map(|()| file));
        let alive = alive.map_err(failed("locking", &own))?;
        Ok(Self {
            agents,
            number,
            _alive: alive,
        })
    }

    /// Waits until nobody else changes anything.
    pub(super) fn change(&self) -> Result<Change, BpfError> {
        lock(&self.agents)
    }

    /// The same, if this agent is the owner.
    pub(super) fn change_own(&self) -> Result<Change, BpfError> {
        let change = self.change()?;
        match self.standing()? {
            Standing::Owner => Ok(change),
            Standing::Starting | Standing::Superseded { .. } => Err(BpfError::NotOwner),
        }
    }

    /// Takes over from all older agents.
    pub(super) fn claim(&self, _: &Change) -> Result<(), BpfError> {
        match self.standing()? {
            Standing::Superseded { .. } => Err(BpfError::NotOwner),
            Standing::Owner => Ok(()),
            Standing::Starting => make(&self.own().join(OWNER)),
        }
    }

    /// Says that all pods are this agent's.
    pub(super) fn settle(&self, _: &Change) -> Result<(), BpfError> {
        make(&self.own().join(SETTLED))
    }

    /// Whether this agent may change anything.
    pub(super) fn standing(&self) -> Result<Standing, BpfError> {
        let mut superseded = false;
        let mut settled = false;
        for newer in numbers(&self.agents)?.filter(|it| *it > self.number) {
            let folder = self.agents.join(newer.to_string());
            superseded |= folder.join(OWNER).exists();
            settled |= folder.join(SETTLED).exists();
        }
        Ok(if superseded {
            Standing::Superseded { settled }
        } else if self.own().join(OWNER).exists() {
            Standing::Owner
        } else {
            Standing::Starting
        })
    }

    /// Whether an older agent runs.
    pub(super) fn has_predecessor(&self) -> Result<bool, BpfError> {
        self.any_alive(|it| it < self.number)
    }

    /// Whether a newer agent runs.
    pub(super) fn has_successor(&self) -> Result<bool, BpfError> {
        self.any_alive(|it| it > self.number)
    }

    fn any_alive(&self, wanted: impl Fn(u64) -> bool) -> Result<bool, BpfError> {
        for number in numbers(&self.agents)?.filter(|it| wanted(*it)) {
            if is_alive(&self.agents.join(number.to_string()))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn own(&self) -> PathBuf {
        self.agents.join(self.number.to_string())
    }
}

/// Removes all traces of agents.
pub(super) fn remove_all(pin_root: &Path) -> Result<(), BpfError> {
    remove(&pin_root.join(AGENTS))
}

fn lock(agents: &Path) -> Result<Change, BpfError> {
    let file = File::open(agents).map_err(failed("opening", agents))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Change(file)),
            Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                std::thread::sleep(RETRY);
            }
            Err(TryLockError::WouldBlock) => return Err(BpfError::Busy),
            Err(TryLockError::Error(error)) => return Err(failed("locking", agents)(error)),
        }
    }
}

/// Whether the agent of a folder runs, that is, holds its lock. Where that cannot be told, as when
/// descriptors run out, nobody is dead.
fn is_alive(folder: &Path) -> Result<bool, BpfError> {
    let file = match File::open(folder) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed("opening", folder)(error)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(failed("locking", folder)(error)),
    }
}

fn numbers(agents: &Path) -> Result<impl Iterator<Item = u64> + use<>, BpfError> {
    let entries: io::Result<Vec<_>> =
        fs::read_dir(agents).and_then(|entries| entries.map(|it| Ok(it?.file_name())).collect());
    let names = entries.map_err(failed("reading", agents))?;
    Ok(names
        .into_iter()
        .filter_map(|name| name.to_str()?.parse().ok()))
}

fn make(folder: &Path) -> Result<(), BpfError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(failed("creating", folder))
}

fn remove(folder: &Path) -> Result<(), BpfError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("removing", folder)(error))
        }
        _ => Ok(()),
    }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> BpfError {
    let path = path.to_owned();
    move |source| BpfError::File {
        what,
        path: path.clone(),
        source,
    }
}

const AGENTS: &str = "agents";
const OWNER: &str = "owner";
const SETTLED: &str = "settled";
/// A change takes milliseconds, loading all programs a second on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    /// Any file system has folders and locks.
    struct Root(PathBuf);

    impl Root {
        fn new(name: &str) -> Self {
            let name = format!("weft-ownership-{}-{name}", std::process::id());
            let root = std::env::temp_dir().join(name);
            fs::create_dir_all(&root).unwrap();
            Self(root)
        }

        fn join(&self) -> Ownership {
            Ownership::join(&self.0).unwrap()
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn claim(agent: &Ownership) -> Result<(), BpfError> {
        agent.claim(&agent.change().unwrap())
    }

    #[test]
    fn the_newest_that_claims_is_the_owner() {
        let root = Root::new("newest");
        let old = root.join();
        assert!(!old.has_predecessor().unwrap());
        assert_eq!(old.standing().unwrap(), Standing::Starting);
        assert!(matches!(old.change_own(), Err(BpfError::NotOwner)));
        claim(&old).unwrap();
        drop(old.change_own().unwrap());
        let new = root.join();
        assert!(new.has_predecessor().unwrap() && old.has_successor().unwrap());
        assert_eq!(old.standing().unwrap(), Standing::Owner);
        claim(&new).unwrap();
        assert_eq!(
            old.standing().unwrap(),
            Standing::Superseded { settled: false }
        );
        assert!(matches!(old.change_own(), Err(BpfError::NotOwner)));
        assert!(matches!(claim(&old), Err(BpfError::NotOwner)));
        new.settle(&new.change_own().unwrap()).unwrap();
        assert_eq!(
            old.standing().unwrap(),
            Standing::Superseded { settled: true }
        );
        drop(old);
        assert!(!new.has_predecessor().unwrap());
        assert_eq!(new.standing().unwrap(), Standing::Owner);
    }

    #[test]
    fn a_slow_starter_never_takes_over_from_a_newer_one() {
        let root = Root::new("slow");
        let slow = root.join();
        let fast = root.join();
        claim(&fast).unwrap();
        assert!(matches!(claim(&slow), Err(BpfError::NotOwner)));
    }

    #[test]
    fn the_dead_are_forgotten() {
        let root = Root::new("dead");
        let dead = root.join();
        claim(&dead).unwrap();
        drop(dead);
        let next = root.join();
        assert!(!next.has_predecessor().unwrap());
        assert_eq!(next.standing().unwrap(), Standing::Starting);
        assert_eq!(numbers(&next.agents).unwrap().collect::<Vec<_>>(), [2]);
        claim(&next).unwrap();
        remove_all(&root.0).unwrap();
        assert!(!next.agents.exists());
    }

    #[test]
    fn one_change_at_a_time() {
        let root = Root::new("change");
        let (old, new) = (root.join(), root.join());
        let change = old.change().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| new.change().map(drop));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            drop(change);
            waiting.join().unwrap().unwrap();
        });
    }
}
