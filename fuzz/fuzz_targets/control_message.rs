//! What a controller may send to an agent, and an agent to a controller: any bytes decode into
//! resources or are refused, and what is accepted encodes to the same again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_proto::{Resource, v1};

fuzz_target!(|bytes: &[u8]| {
    let _ = v1::AgentMessage::decode(bytes);
    let Ok(message) = v1::ControllerMessage::decode(bytes) else {
        return;
    };
    let Some(v1::controller_message::Message::Push(push)) = message.message else {
        return;
    };
    for resource in push.changed {
        if let Ok(resource) = Resource::try_from(resource) {
            let again = v1::Resource::from(resource.clone());
            assert_eq!(Resource::try_from(again), Ok(resource));
        }
    }
});
