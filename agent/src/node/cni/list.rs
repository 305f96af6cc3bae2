//! The list of namespaces that may hold meshed pods, kept on disk for when there is no agent.
//!
//! A controller that is older than this agent tells of no namespaces. So that none is known means nothing until one was
//! known: nothing is written until then, and what an earlier agent wrote stays.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use weft_cni::listed::Listed;

use crate::bpf::Standing;
use crate::discovery::Store;
use crate::node::Pods;

/// Writes the list whenever it is another one, once everything is known, and as long as this agent serves the node.
pub(super) async fn keep(
    store: Arc<Store>,
    pods: Arc<Pods>,
    path: PathBuf,
    stop: CancellationToken,
) {
    let mut changes = store.changes();
    let mut standing = pods.standings();
    let mut are_told = false;
    loop {
        // Before they are read, so that no change falls in between.
        let seen = changes.borrow_and_update().mesh_namespaces;
        let is_owner = *standing.borrow_and_update() == Standing::Owner;
        let mut again = None;
        let names = store.mesh_namespaces();
        are_told |= !names.is_empty();
        if store.is_complete() && is_owner && are_told {
            let (names, place) = (
                names.iter().map(ToString::to_string).collect(),
                path.clone(),
            );
            let written = tokio::task::spawn_blocking(move || write(names, &place)).await;
            again = match written.unwrap_or_else(|error| Err(io::Error::other(error))) {
                Ok(until) => until,
                Err(error) => {
                    let path = path.display();
                    tracing::error!(%path, %error, "writing the list of namespaces for the CNI plugin; trying again");
                    Some(TRY_AGAIN)
                }
            };
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changes.wait_for(|it| it.mesh_namespaces != seen) => if changed.is_err() { return },
            changed = standing.changed() => if changed.is_err() { return },
            () = sleep(again.unwrap_or_default()), if again.is_some() => {}
        }
    }
}

/// Writes the list if it is another one. How soon it is to be another one even if nothing changes.
fn write(names: Vec<String>, path: &Path) -> io::Result<Option<Duration>> {
    let before = Listed::read(path);
    let now = SystemTime::now();
    let listed = match &before {
        Ok(Some(before)) => before.next(names, now, STAY),
        Ok(None) => Listed::of(names),
        Err(error) if error.is_damaged => {
            tracing::warn!(
                %error,
                "the list of namespaces for the CNI plugin is made anew, without those whose last meshed pod left within a day"
            );
            Listed::of(names)
        }
        Err(error) => return Err(io::Error::other(error.to_string())),
    };
    if !matches!(&before, Ok(Some(before)) if *before == listed) {
        listed.write(path)?;
    }
    Ok(listed.until_next(now, STAY))
}

const TRY_AGAIN: Duration = Duration::from_secs(5);
/// How long a namespace stays on the list that holds no meshed pods any more.
const STAY: Duration = Duration::from_secs(24 * 60 * 60);

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;

    use nix::sys::stat::Mode;
    use weft_core::Name;
    use weft_proto::{Key, Kind, Resource};

    use super::*;

    struct Stage {
        folder: tempfile::TempDir,
        store: Arc<Store>,
        stop: CancellationToken,
    }

    impl Stage {
        fn new() -> Self {
            let store = Store::new();
            store.set_complete();
            Self {
                folder: tempfile::tempdir().expect("a folder"),
                store,
                stop: CancellationToken::new(),
            }
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join("namespaces.json")
        }

        fn keep(&self) -> tokio::task::JoinHandle<()> {
            let pods = Arc::new(Pods::default());
            pods.stand(Standing::Owner);
            let store = Arc::clone(&self.store);
            tokio::spawn(keep(store, pods, self.path(), self.stop.clone()))
        }

        fn holds(&self, name: &str) {
            let name: Name = name.parse().expect("valid");
            self.store
                .apply(vec![Resource::MeshNamespace(name)], vec![]);
        }

        fn holds_no_more(&self, name: &str) {
            let key = Key {
                kind: Kind::MeshNamespace,
                name: name.to_owned(),
            };
            self.store.apply(vec![], vec![key]);
        }

        /// Waits until these are on the list, of which some have left.
        async fn expect(&self, names: &[&str], left: usize) {
            let expected = names.iter().map(|it| (*it).to_owned()).collect();
            let is_so = |it: &Listed| it.namespaces == expected && it.left() == left;
            let until = tokio::time::Instant::now() + Duration::from_secs(20);
            while !matches!(Listed::read(&self.path()), Ok(Some(it)) if is_so(&it)) {
                assert!(tokio::time::Instant::now() < until, "not {names:?}");
                sleep(Duration::from_millis(5)).await;
            }
        }
    }

    /// The list that was there is a pipe, so that the first writing takes as long as is wanted.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_changes_while_the_list_is_written_is_written_too() {
        let stage = Stage::new();
        nix::unistd::mkfifo(&stage.path(), Mode::S_IRWXU).expect("made");
        stage.holds("shop");
        let keeping = stage.keep();
        let path = stage.path();
        let pipe = tokio::task::spawn_blocking(move || {
            let mut options = OpenOptions::new();
            options.write(true).open(path)
        });
        let mut pipe = pipe.await.expect("opened").expect("read");
        stage.holds("bank");
        pipe.write_all(b"no list").expect("written");
        drop(pipe);
        // Whoever reads the pipe now waits for ever.
        while !std::fs::metadata(stage.path()).is_ok_and(|it| it.is_file()) {
            sleep(Duration::from_millis(5)).await;
        }
        stage.expect(&["bank", "shop"], 0).await;
        stage.stop.cancel();
        keeping.await.expect("ended");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_is_written_until_a_controller_tells_of_namespaces() {
        let stage = Stage::new();
        let before = Listed::of(["kept".to_owned()]);
        before.write(&stage.path()).expect("written");
        let keeping = stage.keep();
        sleep(Duration::from_millis(300)).await;
        stage.expect(&["kept"], 0).await;
        stage.holds("shop");
        stage.expect(&["kept", "shop"], 1).await;
        // By now it is known that it would have told.
        stage.holds_no_more("shop");
        stage.expect(&["kept", "shop"], 2).await;
        stage.holds("kept");
        stage.expect(&["kept", "shop"], 1).await;
        stage.stop.cancel();
        keeping.await.expect("ended");
    }
}
