//! `http`: servers and clients of HTTP/1 and HTTP/2 that say what they saw, and that can be asked
//! for what ordinary ones would not do.

mod answer;
mod load;
mod raw;
mod serve;
mod transcript;

use anyhow::Result;
use clap::Subcommand;

pub(crate) use load::Tally;

/// HTTP.
#[derive(Subcommand)]
pub(crate) enum Http {
    /// Answers requests with what it saw of them, until told to end.
    Serve(serve::Serve),
    /// Keeps connections busy with requests and counts the answers.
    Load(load::Load),
    /// Sends bytes as they are given, and prints what comes back.
    Raw(raw::Raw),
    /// A server without judgement that writes down every byte of what it took for requests.
    Transcript(transcript::Transcript),
}

impl Http {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Http::Serve(serve) => serve.run(),
            Http::Load(load) => load.run(),
            Http::Raw(raw) => raw.run(),
            Http::Transcript(transcript) => transcript.run(),
        }
    }
}

/// What the answering server is called in its answers.
const SERVED_BY: &str = "x-served-by";
