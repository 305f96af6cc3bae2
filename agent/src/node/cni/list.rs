//! The list of namespaces that may hold meshed pods, kept on disk for when there is no agent.
//!
//! A controller that is older than this agent tells of no namespaces. So that none is known means nothing until one was
//! known: nothing is written until then, and what an earlier agent wrote stays.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

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
        let mut is_written = true;
        let names = store.mesh_namespaces();
        are_told |= !names.is_empty();
        if store.is_complete() && is_owner && are_told {
            let (listed, place) = (
                Listed::of(names.iter().map(ToString::to_string)),
                path.clone(),
            );
            let written = tokio::task::spawn_blocking(move || write(&listed, &place)).await;
            is_written = written.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| {
                let path = path.display();
                tracing::error!(%path, %error, "writing the list of namespaces for the CNI plugin; trying again");
            }).is_ok();
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changes.wait_for(|it| it.mesh_namespaces != seen) => if changed.is_err() { return },
            changed = standing.changed() => if changed.is_err() { return },
            () = sleep(TRY_AGAIN), if !is_written => {}
        }
    }
}

fn write(listed: &Listed, path: &std::path::Path) -> std::io::Result<()> {
    match Listed::read(path) {
        Ok(Some(before)) if before == *listed => Ok(()),
        _ => listed.write(path),
    }
}

const TRY_AGAIN: Duration = Duration::from_secs(5);

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

        async fn expect(&self, names: &[&str]) {
            let expected = Listed::of(names.iter().map(|it| (*it).to_owned()));
            let until = tokio::time::Instant::now() + Duration::from_secs(20);
            while !matches!(Listed::read(&self.path()), Ok(Some(it)) if it == expected) {
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
        stage.expect(&["bank", "shop"]).await;
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
        stage.expect(&["kept"]).await;
        stage.holds("shop");
        stage.expect(&["shop"]).await;
        // By now it is known that it would have told.
        stage.holds_no_more("shop");
        stage.expect(&[]).await;
        stage.stop.cancel();
        keeping.await.expect("ended");
    }
}
