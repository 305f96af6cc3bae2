//! What a controller may send to an agent, and an agent to a controller: any bytes decode into
//! resources or are refused, and what is accepted encodes to the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_proto::convert::{address_bytes, address_from};
use weft_proto::v1::agent_message::Message as FromAgent;
use weft_proto::v1::controller_message::Message as FromController;
use weft_proto::{Key, Resource, v1};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = v1::AgentMessage::decode(bytes) {
        from_agent(message);
    }
    if let Ok(message) = v1::ControllerMessage::decode(bytes) {
        from_controller(message);
    }
});

fn from_agent(message: v1::AgentMessage) {
    match message.message {
        Some(FromAgent::Hello(hello)) => hello.held.into_iter().for_each(|it| key(it.key)),
        Some(FromAgent::Answer(answer)) => answer.rejected.into_iter().for_each(|it| key(it.key)),
        Some(FromAgent::Want(want)) => address(&want.address),
        None => {}
    }
}

fn from_controller(message: v1::ControllerMessage) {
    match message.message {
        Some(FromController::Push(push)) => {
            push.removed.into_iter().for_each(|it| key(Some(it)));
            for resource in push.changed {
                if let Ok(resource) = Resource::try_from(resource) {
                    let again = v1::Resource::from(resource.clone());
                    assert_eq!(Resource::try_from(again), Ok(resource));
                }
            }
        }
        Some(FromController::Looked(looked)) => address(&looked.address),
        // Names of kinds, which are only told.
        Some(FromController::Behind(_)) | None => {}
    }
}

fn key(sent: Option<v1::Key>) {
    if let Some(key) = sent.and_then(|it| Key::try_from(it).ok()) {
        assert_eq!(Key::try_from(v1::Key::from(key.clone())), Ok(key));
    }
}

fn address(bytes: &[u8]) {
    if let Ok(address) = address_from("address", bytes) {
        let again = address_bytes(address);
        assert_eq!(address_from("address", &again), Ok(address));
    }
}
