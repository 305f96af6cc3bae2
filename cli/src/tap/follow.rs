//! The controllers that tell, each on a connection of its own.

use std::collections::BTreeMap;
use std::convert::Infallible;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::event::Line;
use crate::controller::{Place, Reach, ReachError, Tail};

/// The controllers.
pub(super) struct Follow<'a> {
    reach: &'a Reach,
    path: String,
    account: (&'a str, &'a str),
    open: BTreeMap<String, JoinHandle<()>>,
    sender: mpsc::Sender<Heard>,
    heard: mpsc::Receiver<Heard>,
    was_ever_heard: bool,
}

/// What came of a controller.
pub(super) enum Heard {
    Line(String, Line),
    /// It tells nothing more.
    Ended(String, ReachError),
}

/// Lines that wait to be shown.
const WAITING: usize = 256;

impl<'a> Follow<'a> {
    pub(super) fn new(reach: &'a Reach, query: &str, account: (&'a str, &'a str)) -> Self {
        let (sender, heard) = mpsc::channel(WAITING);
        Self {
            reach,
            path: format!("/tap?{query}"),
            account,
            open: BTreeMap::new(),
            sender,
            heard,
            was_ever_heard: false,
        }
    }

    /// Asks the controllers that are not asked yet.
    pub(super) async fn look(&mut self) -> Result<(), ReachError> {
        for place in self.reach.places().await? {
            let name = place.to_string();
            if self.open.contains_key(&name) {
                continue;
            }
            let (sender, path) = (self.sender.clone(), self.path.clone());
            let account = (self.account.0.to_owned(), self.account.1.to_owned());
            let following = tokio::spawn(follow(place, path, account, sender));
            self.open.insert(name, following);
        }
        Ok(())
    }

    /// What is heard next.
    pub(super) async fn next(&mut self) -> Heard {
        let heard = self.heard.recv().await;
        match heard {
            Some(heard) => {
                match &heard {
                    Heard::Line(..) => self.was_ever_heard = true,
                    Heard::Ended(name, _) => drop(self.open.remove(name)),
                }
                heard
            }
            // There is a sender here.
            None => std::future::pending().await,
        }
    }

    /// Whether a controller has ever told anything.
    pub(super) fn was_ever_heard(&self) -> bool {
        self.was_ever_heard
    }

    /// Whether none is there now.
    pub(super) fn is_alone(&self) -> bool {
        self.open.is_empty()
    }
}

impl Drop for Follow<'_> {
    fn drop(&mut self) {
        for following in self.open.values() {
            following.abort();
        }
    }
}

async fn follow(
    place: Place,
    path: String,
    (namespace, account): (String, String),
    sender: mpsc::Sender<Heard>,
) {
    let account = (namespace.as_str(), account.as_str());
    let Err(error) = told(&place, &path, account, &sender).await;
    // Whoever does not listen has ended.
    let _ = sender.send(Heard::Ended(place.to_string(), error)).await;
}

async fn told(
    place: &Place,
    path: &str,
    account: (&str, &str),
    sender: &mpsc::Sender<Heard>,
) -> Result<Infallible, ReachError> {
    let mut tail = Tail::open(place, path, account).await?;
    while let Some(line) = tail.line().await? {
        if let Some(line) = Line::read(&line) {
            // Whoever does not listen has ended.
            let _ = sender.send(Heard::Line(place.to_string(), line)).await;
        }
    }
    Err(ReachError::Broken {
        place: place.to_string(),
        path: "/tap".to_owned(),
        reason: "it has ended".to_owned(),
    })
}
