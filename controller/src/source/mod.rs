//! Where objects come from. A source turns whatever it watches into [`Batch`]es; what the
//! objects mean is the [index](crate::index)'s concern, and the same for every source.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::objects::{Fault, Object, ObjectKey, decode};
use crate::problems::Origin;
use crate::progress::Reached;

pub mod directory;
pub mod kubernetes;

/// A source of objects.
pub trait Source: Send + 'static {
    /// Sends batches until it is cancelled or the receiver is gone. The first batch is everything
    /// that is there.
    ///
    /// # Errors
    /// The source cannot go on at all.
    fn run(
        self,
        batches: mpsc::Sender<Batch>,
        stop: CancellationToken,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// Changes that are to take effect as one.
#[derive(Debug, Default)]
pub struct Batch {
    /// The changes, at most one per object.
    pub changes: Vec<Change>,
    /// How far the source has come with them.
    pub reached: Reached,
}

/// A change of an object, as it waits to be taken in.
#[derive(Clone, Debug)]
pub enum Change {
    /// What an object says was read already, or it is gone.
    Read(Event),
    /// The object is new or different, and what it says is yet to be read.
    Written(Written),
}

/// An object as text. Read it takes many times as much, and the first batch of a large cluster has very many: these are
/// read one by one.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its name.
    pub key: ObjectKey,
    /// The object, in JSON.
    pub text: Box<str>,
    /// Where it was found.
    pub origin: Origin,
}

/// A change of an object.
#[derive(Clone, Debug)]
pub enum Event {
    /// The object is new or different.
    Upsert {
        /// Its name.
        key: ObjectKey,
        /// The object.
        object: Box<Object>,
        /// Where it was found.
        origin: Origin,
    },
    /// The object exists, and cannot be read.
    Invalid {
        /// Its name.
        key: ObjectKey,
        /// What is wrong with it.
        fault: Fault,
        /// The document as written: what can still be read of it can be closed.
        document: Arc<serde_json::Value>,
        /// Where it was found.
        origin: Origin,
    },
    /// The object is gone.
    Delete {
        /// Its name.
        key: ObjectKey,
    },
}

impl From<Vec<Event>> for Batch {
    /// Changes from where nothing is counted.
    fn from(events: Vec<Event>) -> Self {
        Self {
            changes: events.into_iter().map(Change::Read).collect(),
            reached: Reached::default(),
        }
    }
}

impl Change {
    /// The object concerned.
    pub fn key(&self) -> &ObjectKey {
        match self {
            Self::Read(event) => event.key(),
            Self::Written(written) => &written.key,
        }
    }

    /// Whether the object is gone.
    pub fn is_end(&self) -> bool {
        matches!(self, Self::Read(Event::Delete { .. }))
    }

    /// What it says.
    pub fn read(self) -> Event {
        match self {
            Self::Read(event) => event,
            Self::Written(written) => written.read(),
        }
    }
}

impl From<Event> for Change {
    fn from(event: Event) -> Self {
        Self::Read(event)
    }
}

impl Written {
    /// What it says, or that it cannot be read.
    pub fn read(&self) -> Event {
        let (key, origin) = (self.key.clone(), self.origin.clone());
        match serde_json::from_str(&self.text) {
            Ok(document) => Event::read(key, Arc::new(document), origin),
            Err(reason) => Event::Invalid {
                key,
                fault: Fault::new("", reason),
                document: Arc::default(),
                origin,
            },
        }
    }
}

impl Event {
    /// What an object that is new or different says, or that it cannot be read.
    pub fn read(key: ObjectKey, document: Arc<serde_json::Value>, origin: Origin) -> Self {
        match decode::decode(&key, &document) {
            Ok(object) => Self::Upsert {
                key,
                object: Box::new(object),
                origin,
            },
            Err(fault) => Self::Invalid {
                key,
                fault,
                document,
                origin,
            },
        }
    }

    /// The object concerned.
    pub fn key(&self) -> &ObjectKey {
        match self {
            Self::Upsert { key, .. } | Self::Invalid { key, .. } | Self::Delete { key } => key,
        }
    }
}
