//! The check of extensions: which there are, and which are never run.

use super::{Finding, State};
use crate::extension::{Extension, Hider};

pub(super) fn finding(extensions: &[Extension]) -> Finding {
    let hidden = extensions.iter().filter_map(|it| {
        let (path, name) = (it.path.display(), &it.name);
        Some(match it.hidden_by.as_ref()? {
            Hider::Command => format!("{path}: weft {name} is a command of its own"),
            Hider::Earlier(earlier) => {
                format!("{path}: {} is earlier on PATH", earlier.display())
            }
        })
    });
    let runs = extensions.iter().filter(|it| it.hidden_by.is_none());
    let runs: Vec<&str> = runs.map(|it| it.name.as_str()).collect();
    let good = || match runs.is_empty() {
        true => "no extension is on PATH".to_owned(),
        false => format!("extensions are on PATH: {}", runs.join(", ")),
    };
    let bad = |count| format!("{count} extensions on PATH are never run");
    Finding::of("extensions", State::Warning, hidden.collect(), good, bad)
}
