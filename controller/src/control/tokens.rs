//! Join tokens: how nodes prove who they are where there is no Kubernetes. A file of lines
//! `node token`; a node may have several while they are exchanged.

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use weft_core::Name;

use crate::objects::Fault;
use crate::problems::{Problem, Problems, Scope};

/// The tokens in force.
#[derive(Debug)]
pub struct Tokens {
    file: PathBuf,
    problems: Problems,
    known: ArcSwap<Known>,
    generation: watch::Sender<u64>,
}

#[derive(Default)]
struct Known {
    stamp: Option<(u64, u64, i64, i64)>,
    tokens: Vec<(Name, Vec<u8>)>,
}

/// Shorter tokens could be guessed.
const SHORTEST_TOKEN: usize = 16;
const LONGEST_TOKEN: usize = 1024;
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read or is not of the form.
    pub fn open(file: PathBuf, problems: Problems) -> Result<Self, Fault> {
        let known = Known::read(&file)?;
        Ok(Self {
            file,
            problems,
            known: ArcSwap::from_pointee(known),
            generation: watch::Sender::new(0),
        })
    }

    /// Reads the file again if it changed. What cannot be used is reported, and what was in force
    /// stays.
    pub fn reload(&self) {
        let problems = match stamp(&self.file) {
            Ok(stamp) if Some(stamp) == self.known.load().stamp => vec![],
            Ok(_) => match Known::read(&self.file) {
                Ok(known) => {
                    tracing::info!(tokens = known.tokens.len(), "read the join tokens anew");
                    self.known.store(Arc::new(known));
                    self.generation.send_modify(|it| *it += 1);
                    vec![]
                }
                Err(fault) => vec![self.problem(fault)],
            },
            Err(fault) => vec![self.problem(fault)],
        };
        self.problems.replace(Scope::Tokens, problems);
    }

    /// The node that a token belongs to.
    pub fn node_of(&self, token: &[u8]) -> Option<Name> {
        let known = self.known.load();
        // All are compared, and each as a whole: time tells nothing about any of them.
        let mut found = None;
        for (node, expected) in &known.tokens {
            if same(token, expected) {
                found = Some(node.clone());
            }
        }
        found
    }

    /// Changes whenever the tokens do.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    fn problem(&self, fault: Fault) -> Problem {
        let file = self.file.display().to_string();
        Problem::of_file(file, None, fault, "the tokens before stay in force")
    }
}

impl Known {
    fn read(file: &Path) -> Result<Self, Fault> {
        let unreadable = |error: std::io::Error| Fault::new("", error);
        let stamp = stamp(file)?;
        let mut text = String::new();
        std::fs::File::open(file)
            .and_then(|it| it.take(MAX_FILE_BYTES).read_to_string(&mut text))
            .map_err(unreadable)?;
        Ok(Self {
            stamp: Some(stamp),
            tokens: parse(&text)?,
        })
    }
}

impl std::fmt::Debug for Known {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the tokens.
        let nodes = self.tokens.iter().map(|(node, _)| node);
        formatter.debug_list().entries(nodes).finish()
    }
}

fn parse(text: &str) -> Result<Vec<(Name, Vec<u8>)>, Fault> {
    let mut tokens = vec![];
    let mut owners: HashMap<&str, &str> = HashMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let refuse = |reason: &str| Fault::new(format!("line {}", index + 1), reason);
        let mut words = line.split_whitespace();
        let (Some(node), Some(token), None) = (words.next(), words.next(), words.next()) else {
            return Err(refuse("not of the form `node token`"));
        };
        let name: Name = node.parse().map_err(|_| refuse("not a node's name"))?;
        if !(SHORTEST_TOKEN..=LONGEST_TOKEN).contains(&token.len()) || !token.is_ascii() {
            return Err(refuse("a token has 16 to 1024 ASCII characters"));
        }
        if owners.insert(token, node).is_some_and(|it| it != node) {
            return Err(refuse("the token of another node"));
        }
        tokens.push((name, token.as_bytes().to_vec()));
    }
    Ok(tokens)
}

fn stamp(file: &Path) -> Result<(u64, u64, i64, i64), Fault> {
    let it = std::fs::metadata(file).map_err(|error| Fault::new("", error))?;
    Ok((it.ino(), it.size(), it.mtime(), it.mtime_nsec()))
}

/// Compares without leaving early; only the length shows.
fn same(one: &[u8], other: &[u8]) -> bool {
    let pairs = one.iter().zip(other);
    let difference = pairs.fold(0, |difference, (a, b)| {
        std::hint::black_box(difference | (a ^ b))
    });
    one.len() == other.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_and_compared() {
        let text =
            "# comment\n\none 0123456789abcdef\none fedcba9876543210\ntwo abcdefghijklmnopq\n";
        let directory = tempfile::tempdir().expect("made");
        let file = directory.path().join("tokens");
        std::fs::write(&file, text).expect("written");
        let problems = Problems::default();
        let tokens = Tokens::open(file.clone(), problems.clone()).expect("valid");
        for (token, node) in [
            ("0123456789abcdef", Some("one")),
            ("fedcba9876543210", Some("one")),
            ("abcdefghijklmnopq", Some("two")),
            ("abcdefghijklmnop", None),
            ("0123456789abcdeF", None),
            ("", None),
        ] {
            let found = tokens.node_of(token.as_bytes());
            assert_eq!(found.as_ref().map(Name::as_str), node, "{token}");
        }

        std::fs::write(&file, "one short\n").expect("written");
        tokens.reload();
        assert!(tokens.node_of(b"0123456789abcdef").is_some());
        assert_eq!(problems.list()[0].field, "line 1");

        std::fs::write(&file, "three 0123456789abcdef\n").expect("written");
        tokens.reload();
        let found = tokens.node_of(b"0123456789abcdef").expect("known");
        assert_eq!(found.as_str(), "three");
        assert_eq!(problems.count(), 0);
    }

    #[test]
    fn unclear_files_are_refused() {
        for (text, line) in [
            ("one", "line 1"),
            ("\none 0123456789abcdef x", "line 2"),
            ("One 0123456789abcdef", "line 1"),
            ("one 0123456789abcdef\ntwo 0123456789abcdef", "line 2"),
        ] {
            assert_eq!(parse(text).expect_err("refused").field, line);
        }
    }
}
