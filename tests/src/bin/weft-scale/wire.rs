//! The control protocol as a simulated agent reads it: names and versions; bodies are left as they came. There are
//! hundreds of agents in one process, and what they do must not be what is measured.

use std::hash::{DefaultHasher, Hash, Hasher};

use bytes::Bytes;

/// A message of the controller.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Message {
    #[prost(message, optional, tag = "1")]
    pub(crate) push: Option<Push>,
    #[prost(message, optional, tag = "2")]
    pub(crate) looked: Option<Looked>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Push {
    #[prost(uint64, tag = "1")]
    pub(crate) id: u64,
    #[prost(message, repeated, tag = "2")]
    pub(crate) changed: Vec<Resource>,
    #[prost(message, repeated, tag = "3")]
    pub(crate) removed: Vec<Key>,
    #[prost(bool, tag = "4")]
    pub(crate) complete: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Resource {
    #[prost(message, optional, tag = "1")]
    pub(crate) key: Option<Key>,
    #[prost(fixed64, tag = "2")]
    pub(crate) version: u64,
    #[prost(bytes = "bytes", optional, tag = "5")]
    pub(crate) workload: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "8")]
    pub(crate) endpoint: Option<Bytes>,
}

#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub(crate) struct Key {
    #[prost(int32, tag = "1")]
    pub(crate) kind: i32,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) name: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Looked {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) address: Bytes,
}

/// A key as agents keep it: there are millions of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Short(u64);

impl Short {
    pub(crate) fn of(kind: i32, name: &[u8]) -> Short {
        // The same in every process, and with less than 2⁻³⁰ for two of a million to be alike.
        let mut hasher = DefaultHasher::new();
        (kind, name).hash(&mut hasher);
        Short(hasher.finish())
    }
}

impl Key {
    pub(crate) fn short(&self) -> Short {
        Short::of(self.kind, &self.name)
    }
}
