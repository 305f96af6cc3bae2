//! What a stream sends, and its codec. A resource is encoded when it changes, once for all agents: with hundreds of them,
//! encoding it for each would be most of the work when a controller starts.

use std::sync::Arc;

use bytes::BufMut;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use weft_proto::v1;

use crate::views::Told;

/// A message to an agent.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// A change of its state.
    Push(Push),
    /// Any other.
    Other(v1::ControllerMessage),
}

/// A push whose changed resources are encoded already.
#[derive(Debug)]
pub(super) struct Push {
    pub(super) changed: Vec<Arc<Told>>,
    /// All else; nothing is changed in it.
    pub(super) rest: v1::Push,
}

/// The codec of the stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StreamCodec;

/// The tag of `ControllerMessage.push`,
const PUSH: u32 = 1;
/// and that of `Push.changed`.
const CHANGED: u32 = 2;

impl Push {
    /// How long it is, without the tag and the length of `ControllerMessage.push`.
    fn len(&self) -> usize {
        let changed = self.changed.iter().map(|it| {
            let len = it.encoded.len();
            key_len(CHANGED) + encoded_len_varint(len as u64) + len
        });
        changed.sum::<usize>() + self.rest.encoded_len()
    }

    /// Writes it as the `ControllerMessage` that it is, of this length.
    fn encode(&self, len: usize, to: &mut impl BufMut) {
        encode_key(PUSH, WireType::LengthDelimited, to);
        encode_varint(len as u64, to);
        for resource in &self.changed {
            encode_key(CHANGED, WireType::LengthDelimited, to);
            encode_varint(resource.encoded.len() as u64, to);
            to.put_slice(&resource.encoded);
        }
        self.rest.encode_raw(to);
    }
}

impl Codec for StreamCodec {
    type Encode = Outgoing;
    type Decode = v1::AgentMessage;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for StreamCodec {
    type Item = Outgoing;
    type Error = Status;

    fn encode(&mut self, message: Outgoing, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        match message {
            Outgoing::Push(push) => {
                let len = push.len();
                // It would grow to twice of what is needed, for each agent.
                to.reserve(key_len(PUSH) + encoded_len_varint(len as u64) + len);
                push.encode(len, to);
            }
            // It grows as needed.
            Outgoing::Other(message) => message.encode_raw(to),
        }
        Ok(())
    }
}

impl Decoder for StreamCodec {
    type Item = v1::AgentMessage;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<v1::AgentMessage>, Status> {
        let message = v1::AgentMessage::decode(from);
        message
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
impl Outgoing {
    /// As the agent reads it.
    pub(super) fn read(&self) -> v1::ControllerMessage {
        let mut bytes = vec![];
        match self {
            Self::Push(push) => push.encode(push.len(), &mut bytes),
            Self::Other(message) => message.encode_raw(&mut bytes),
        }
        v1::ControllerMessage::decode(bytes.as_slice()).expect("what an agent can read")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use weft_proto::{Key, Kind};

    use super::*;

    /// Resources of which some take more than one byte to say their length, and one that is none.
    fn resources() -> Vec<v1::Resource> {
        let bundle = |len: usize| v1::Resource {
            key: Some(v1::Key {
                kind: v1::Kind::TrustBundle.into(),
                name: "n".repeat(len),
            }),
            version: u64::MAX - len as u64,
            body: Some(v1::resource::Body::TrustBundle(v1::TrustBundle::default())),
        };
        let mut all: Vec<_> = [1, 100, 130, 20_000, 3_000_000].map(bundle).into();
        all.push(v1::Resource::default());
        all
    }

    #[test]
    fn a_push_is_read_as_the_message_that_it_stands_for() {
        let key = |name: &str| Key {
            kind: Kind::Workload,
            name: name.into(),
        };
        let rest = v1::Push {
            id: 300,
            changed: vec![],
            removed: vec![key("a/b").into(), key("").into()],
            complete: true,
            position: HashMap::from([("Pod".into(), 7), ("Node".into(), u64::MAX)]),
        };
        for rest in [rest, v1::Push::default()] {
            for changed in [resources(), vec![]] {
                let told = |it: &v1::Resource| Arc::new(Told::new(key("any"), it));
                let push = Push {
                    changed: changed.iter().map(told).collect(),
                    rest: rest.clone(),
                };
                let message = v1::ControllerMessage {
                    message: Some(v1::controller_message::Message::Push(v1::Push {
                        changed,
                        ..rest.clone()
                    })),
                };
                let mut bytes = vec![];
                push.encode(push.len(), &mut bytes);
                assert_eq!(bytes.len(), message.encoded_len());
                assert_eq!(Outgoing::Push(push).read(), message);
            }
        }
    }
}
