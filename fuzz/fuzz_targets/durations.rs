//! What a request may say about how long its client waits: any text is a time or none, and what is told to the
//! server is read as no longer than it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_core::route::{
    GrpcCodes, StatusRange, annotated_duration, duration, grpc_timeout, write_grpc_timeout,
};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Some(time) = grpc_timeout(text) {
        let told = grpc_timeout(&write_grpc_timeout(time)).expect("what is written is read");
        assert!(told <= time);
    }
    if let Ok(Some(time)) = duration(text) {
        assert!(!time.is_zero());
        assert_eq!(annotated_duration(text), Ok(Some(time)));
    }
    let _ = annotated_duration(text);
    let _ = GrpcCodes::list(text);
    for range in StatusRange::list(text).into_iter().flatten() {
        assert!(range.first <= range.last);
    }
});
