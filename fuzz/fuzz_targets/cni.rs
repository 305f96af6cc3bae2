//! What a container runtime, other CNI plugins and the plugin's own socket bring: the configuration on the plugin's
//! standard input, the files that it is installed into, and its requests to the agent.
#![no_main]

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use weft_agent::node::cni::Request;
use weft_cni::ask::{self, Answer};
use weft_cni::call::{Config, Settings};
use weft_cni::install::lists::{Entry, Stamp, take_out};
use weft_cni::plugin::{World, answer};

/// An agent that takes note of being asked, and has all pods wait.
struct Agent(Cell<usize>);

impl World for Agent {
    fn ask(
        &self,
        _: &Path,
        _: &ask::Request,
        _: Option<&File>,
        _: Duration,
    ) -> Result<Answer, String> {
        self.0.set(self.0.get() + 1);
        Ok(Answer::Wait {
            reason: String::new(),
        })
    }

    fn say(&self, _: &str) {}
}

fuzz_target!(|bytes: &[u8]| {
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] {
        called(command, bytes);
    }
    installed(bytes);
    if let Ok(Request::Add(attachment)) = Request::parse(bytes) {
        assert!(!attachment.asked.uid.is_empty() && !attachment.container.is_empty());
        assert!(attachment.wait <= Duration::from_secs(60));
        assert!(
            attachment
                .addresses
                .iter()
                .all(|it| !it.is_loopback() && !it.is_unspecified())
        );
    }
});

/// The pod is no exempt one, so it starts only if the agent says so, which it never does.
fn called(command: &str, input: &[u8]) {
    let agent = Agent(Cell::new(0));
    let variable = |name: &str| -> Option<OsString> {
        Some(match name {
            "CNI_COMMAND" => command.into(),
            "CNI_CONTAINERID" => "c1".into(),
            "CNI_NETNS" => "/proc/self/ns/net".into(),
            "CNI_IFNAME" => "eth0".into(),
            "CNI_ARGS" => "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1".into(),
            _ => return None,
        })
    };
    let said = answer(variable, input, &agent);
    match command {
        "ADD" | "CHECK" if !is_exempt(input) => assert!(said.is_err()),
        "DEL" | "GC" => assert_eq!(said, Ok(String::new())),
        _ => {}
    }
    assert!(agent.0.get() <= 1);
    if let Err(failure) = said {
        let printed: Value = serde_json::from_str(&failure.to_json("1.0.0")).expect("JSON");
        assert!(printed["code"].as_u64().is_some_and(|it| it > 0));
    }
}

/// What is put in is there, once; without it the rest says what it said.
fn installed(file: &[u8]) {
    let Ok(file) = std::str::from_utf8(file) else {
        return;
    };
    // What cannot be compared: numbers that are too large, for one.
    if serde_json::from_str::<Value>(file).is_err() {
        return;
    }
    let entry = Entry::new(&Settings::default(), Stamp(7));
    if let Ok(list) = entry.after(file) {
        assert_eq!(entry.put_into(&list), Ok(None));
    }
    if let Ok(Some(put)) = entry.put_into(file) {
        assert_eq!(entry.put_into(&put), Ok(None));
        let out = take_out(&put).expect("a list").expect("it was in it");
        let before = match take_out(file) {
            Ok(Some(before)) => before,
            _ => file.to_owned(),
        };
        let value = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        assert_eq!(value(&out), value(&before));
    }
}

fn is_exempt(input: &[u8]) -> bool {
    let config = Config::parse(input);
    config.is_ok_and(|it| it.own.exempt.iter().any(|it| it == "shop"))
}
