//! Becomes the program of a container that a file describes: `weft_tests::contain`. A process of its own, since a
//! container's root cannot be entered by one thread of many.

use anyhow::{Context, Result};
use weft_tests::contain::Container;

fn main() -> Result<()> {
    let file = std::env::args().nth(1).context("a file is needed")?;
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    let container: Container = serde_json::from_str(&text)?;
    match container.enter()? {}
}
