//! The keys that are pressed while something is shown, one by one.
//!
//! For that the terminal is told to hand over each at once and to show none; when this is dropped, also by a panic, it is as it
//! was before.

use std::io::{self, IsTerminal, Read};

use rustix::termios::{
    LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr,
};
use tokio::sync::mpsc;

/// A key that means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// One with a letter.
    Letter(char),
    /// Up or down.
    Arrow,
}

/// The keys of the terminal that is standard input.
pub(super) struct Keys {
    before: Termios,
    pressed: mpsc::Receiver<Key>,
}

/// Finds keys in what a terminal sends.
#[derive(Debug, Default)]
struct Reader {
    /// How much of the sequence of an arrow has come.
    sequence: usize,
}

/// A hand is not that fast.
const WAITING: usize = 16;
/// What comes before the letter of an arrow: in one mode of terminals or the other.
const ESCAPE: u8 = 0x1b;

impl Keys {
    /// Begins to listen; none: standard input is no terminal.
    pub(super) fn listen() -> Option<Self> {
        let input = io::stdin();
        if !input.is_terminal() {
            return None;
        }
        let before = tcgetattr(&input).ok()?;
        let mut now = before.clone();
        now.local_modes
            .remove(LocalModes::ICANON | LocalModes::ECHO);
        now.special_codes[SpecialCodeIndex::VMIN] = 1;
        now.special_codes[SpecialCodeIndex::VTIME] = 0;
        // ^Z would leave the terminal like this to the shell.
        now.special_codes[SpecialCodeIndex::VSUSP] = 0;
        tcsetattr(&input, OptionalActions::Now, &now).ok()?;
        let (sender, pressed) = mpsc::channel(WAITING);
        // Nothing ends a read of a terminal but a key: it ends with the process.
        std::thread::spawn(move || {
            let mut reader = Reader::default();
            for byte in io::stdin().lock().bytes() {
                let Ok(byte) = byte else { return };
                if let Some(key) = reader.byte(byte)
                    && sender.blocking_send(key).is_err()
                {
                    return;
                }
            }
        });
        Some(Self { before, pressed })
    }

    /// The next one; if the terminal is gone, none ever.
    pub(super) async fn next(&mut self) -> Key {
        match self.pressed.recv().await {
            Some(key) => key,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing any more.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

impl Reader {
    fn byte(&mut self, byte: u8) -> Option<Key> {
        match (self.sequence, byte) {
            (_, ESCAPE) => self.sequence = 1,
            (1, b'[' | b'O') => self.sequence = 2,
            (2, b'A' | b'B') => {
                self.sequence = 0;
                return Some(Key::Arrow);
            }
            // Some other key's.
            (2, b'@'..=b'~') => self.sequence = 0,
            (2, _) => {}
            (_, byte) => {
                self.sequence = 0;
                return byte
                    .is_ascii_alphabetic()
                    .then(|| Key::Letter(byte.to_ascii_lowercase().into()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Vec<Key> {
        let mut reader = Reader::default();
        bytes.iter().filter_map(|it| reader.byte(*it)).collect()
    }

    #[test]
    fn keys_are_letters_and_arrows() {
        let letter = |it| Key::Letter(it);
        assert_eq!(read(b"c W\n9"), [letter('c'), letter('w')]);
        assert_eq!(
            read(b"\x1b[A\x1bOBq"),
            [Key::Arrow, Key::Arrow, letter('q')]
        );
        // Left, delete, F5, and escape by itself.
        assert_eq!(
            read(b"\x1b[D\x1b[3~x\x1b[15~\x1bl"),
            [letter('x'), letter('l')]
        );
        assert_eq!(read("é\u{9b}A".as_bytes()), [letter('a')]);
    }
}
