//! What whoever reaches the webhook may send: it is answered with JSON for the uid that was sent, or with nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use weft_controller::admission;
use weft_controller::index::Settings;

fuzz_target!(|body: &[u8]| {
    let Ok(answer) = admission::answer(body, &Settings::default()) else {
        return;
    };
    let said: Value = serde_json::from_slice(&answer.to_json()).expect("JSON");
    let response = &said["response"];
    assert_eq!(response["allowed"] == true, response["status"].is_null());
    // What is not looked at need not be JSON that can be kept, as a lone surrogate cannot; and what is may be written as
    // an array.
    if let Ok(asked) = serde_json::from_slice::<Value>(body)
        && let Some(uid) = asked.get("request").and_then(|it| it.get("uid"))
    {
        assert_eq!(response["uid"], *uid);
    }
});
