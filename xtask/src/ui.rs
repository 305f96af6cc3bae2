//! What the person at the terminal reads: headlines, notes, failures. Plain text, with colour on
//! a terminal only.

use std::io::IsTerminal as _;

/// A headline over what follows.
pub(crate) fn headline(text: &str) {
    println!("\n{}", paint(BOLD_CYAN, &format!("==> {text}")));
}

/// Something that was found or done.
pub(crate) fn note(text: &str) {
    println!("    {text}");
}

/// Something that a reader must not overlook.
pub(crate) fn warning(text: &str) {
    println!("{}", paint(BOLD_YELLOW, &format!("    WARNING: {text}")));
}

/// The end of a command that did not work, with all its causes.
pub(crate) fn failure(error: &anyhow::Error) {
    eprintln!("\n{}", paint(BOLD_RED, &format!("xtask: {error}")));
    for cause in error.chain().skip(1) {
        eprintln!("  because: {cause}");
    }
}

/// `text` in a colour, where the output is a terminal.
pub(crate) fn paint(colour: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() {
        format!("{colour}{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

pub(crate) const BOLD_CYAN: &str = "\x1b[1;36m";
pub(crate) const BOLD_YELLOW: &str = "\x1b[1;33m";
pub(crate) const BOLD_RED: &str = "\x1b[1;31m";
