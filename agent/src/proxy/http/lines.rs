//! The ends of lines in requests of HTTP/1, and the ends of their bodies. A lone LF may be taken for the end of a line
//! (RFC 9112, section 2.2), and a coding before a length that stands beside it (section 6.3), and hyper does; but
//! who reads otherwise sees other requests. So such a one is to be refused.
//!
//! What is read is looked at on its way to hyper, and a lone LF in a head or in trailers, or the last one of a head with
//! two lengths, is made a NUL, which hyper answers with 400. To know where heads begin, bodies are counted as hyper counts them; where the two may
//! differ hyper refuses the request, or what follows is not looked at: nothing else is ever changed. Answers
//! of servers are taken as they come, as without a mesh, and written anew.

/// Follows what a client sends.
#[derive(Debug)]
pub struct Lines {
    place: Place,
    line: Line,
    head: Head,
    /// What came last was a CR.
    after_cr: bool,
}

/// Where in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Before or in the request line.
    First,
    /// In the lines after it.
    Fields,
    /// So many bytes of a body are left.
    Body(u64),
    /// In the line with a chunk's size.
    Size,
    /// So many bytes of a chunk, with its CR LF, are left.
    Chunk(u64),
    /// Behind the last chunk.
    Trailers,
    /// Behind a request that asked for something else than HTTP: the answer says what follows.
    Undecided,
    /// No longer known.
    Lost,
}

/// What of a head says where it ends.
#[derive(Clone, Copy, Debug, Default)]
struct Head {
    length: u64,
    has_length: bool,
    is_chunked: bool,
    /// It is a CONNECT, or names a protocol to change to, and asks for that.
    is_connect: bool,
    names_other: bool,
    upgrades: bool,
}

/// The beginning of a line.
#[derive(Debug)]
struct Line {
    bytes: [u8; LINE_BYTES],
    length: usize,
}

/// What an exchange that asked for something else has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switching {
    /// There is no answer yet.
    Open,
    /// It goes on with HTTP.
    Declined,
    /// It does not.
    Done,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            place: Place::First,
            line: Line {
                bytes: [0; LINE_BYTES],
                length: 0,
            },
            head: Head::default(),
            after_cr: false,
        }
    }
}

impl Lines {
    /// Looks at what has been read. `switching` is asked where it matters.
    pub fn look(&mut self, bytes: &mut [u8], switching: impl FnOnce() -> Switching) {
        if self.place == Place::Undecided && !bytes.is_empty() {
            self.place = match switching() {
                Switching::Declined => Place::First,
                // Sent before the answer it may be anything.
                Switching::Open | Switching::Done => Place::Lost,
            };
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = match self.place {
                Place::Lost => return,
                // Not to be expected so soon.
                Place::Undecided => {
                    self.place = Place::Lost;
                    return;
                }
                Place::Body(left) => self.skip(left, rest.len(), Place::Body, Place::First),
                Place::Chunk(left) => self.skip(left, rest.len(), Place::Chunk, Place::Size),
                Place::First | Place::Fields | Place::Size | Place::Trailers => self.line(rest),
            };
            rest = rest.get_mut(count..).unwrap_or_default();
        }
    }

    /// Passes bytes that are none of lines. Says how many.
    fn skip(&mut self, left: u64, there: usize, same: fn(u64) -> Place, next: Place) -> usize {
        let there = u64::try_from(there).unwrap_or(u64::MAX);
        let count = left.min(there);
        self.place = match left - count {
            0 => next,
            left => same(left),
        };
        // It is no more than there is.
        usize::try_from(count).unwrap_or(usize::MAX)
    }

    /// Looks at a line, or a part of it. Says how long that is.
    fn line(&mut self, bytes: &mut [u8]) -> usize {
        let Some(end) = bytes.iter().position(|it| *it == b'\n') else {
            self.line.add(bytes);
            self.after_cr = bytes.last() == Some(&b'\r');
            return bytes.len();
        };
        let before = end.checked_sub(1).and_then(|it| bytes.get(it));
        let is_whole = before.map_or(self.after_cr, |it| *it == b'\r');
        if !is_whole {
            // Of the size of a chunk hyper judges itself.
            if self.place != Place::Size
                && let Some(byte) = bytes.get_mut(end)
            {
                *byte = 0;
            }
            self.place = Place::Lost;
            return bytes.len();
        }
        self.line.add(bytes.get(..end).unwrap_or_default());
        self.after_cr = false;
        match self.ended() {
            Some(place) => self.place = place,
            // A length that is written at such length, or beside a coding, is no honest one.
            None => {
                if let Some(byte) = bytes.get_mut(end) {
                    *byte = 0;
                }
                self.place = Place::Lost;
            }
        }
        self.line.length = 0;
        end + 1
    }

    /// A line is there as a whole, its CR included. Says what follows; nothing if it is not to be taken.
    fn ended(&mut self) -> Option<Place> {
        let line = self.line.beginning();
        Some(match self.place {
            Place::First if line.is_empty() => Place::First,
            Place::First => {
                self.head = Head {
                    is_connect: line.starts_with(b"CONNECT"),
                    ..Head::default()
                };
                Place::Fields
            }
            Place::Fields if line.is_empty() => self.head.next()?,
            Place::Fields => {
                self.head.heed(line, self.line.is_whole())?;
                Place::Fields
            }
            Place::Size => match size(line)? {
                0 => Place::Trailers,
                // With the CR LF behind it.
                size => Place::Chunk(size.checked_add(2)?),
            },
            Place::Trailers if line.is_empty() => self.head.behind(),
            place => place,
        })
    }
}

impl Head {
    /// Nothing if the line cannot be taken.
    fn heed(&mut self, line: &[u8], is_whole: bool) -> Option<()> {
        let Some(colon) = line.iter().position(|it| *it == b':') else {
            return Some(());
        };
        let (name, value) = line.split_at(colon);
        if name.eq_ignore_ascii_case(b"content-length") {
            let value = value.get(1..).unwrap_or_default().trim_ascii();
            let number = std::str::from_utf8(value).ok().filter(|_| is_whole)?;
            self.length = number.parse().ok()?;
            self.has_length = true;
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.is_chunked = true;
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            self.names_other = true;
        } else if name.eq_ignore_ascii_case(b"connection") {
            // Of a long list it is not known: it may be in there.
            let value = value.get(1..).unwrap_or_default();
            let mut options = value.split(|it| *it == b',').map(<[u8]>::trim_ascii);
            self.upgrades |= !is_whole || options.any(|it| it.eq_ignore_ascii_case(b"upgrade"));
        }
        Some(())
    }

    fn switches(self) -> bool {
        self.is_connect || self.names_other && self.upgrades
    }

    /// What follows it. Nothing if it says in two ways where its body ends: then it is not to be taken.
    fn next(self) -> Option<Place> {
        Some(match self {
            Self {
                is_chunked: true,
                has_length: true,
                ..
            } => return None,
            Self {
                is_chunked: true, ..
            } => Place::Size,
            // A body belongs to what nobody knows yet.
            Self { length, .. } if length > 0 && self.switches() => Place::Lost,
            Self { length: 0, .. } => self.behind(),
            Self { length, .. } => Place::Body(length),
        })
    }

    /// What follows its body.
    fn behind(self) -> Place {
        if self.switches() {
            Place::Undecided
        } else {
            Place::First
        }
    }
}

impl Line {
    fn add(&mut self, bytes: &[u8]) {
        let room = self.bytes.get_mut(self.length..).unwrap_or_default();
        for (to, byte) in room.iter_mut().zip(bytes) {
            *to = *byte;
        }
        self.length = self.length.saturating_add(bytes.len());
    }

    /// The line without its CR, as far as it is kept.
    fn beginning(&self) -> &[u8] {
        let length = self.length.saturating_sub(1).min(LINE_BYTES);
        self.bytes.get(..length).unwrap_or_default()
    }

    /// Whether all of it is kept.
    fn is_whole(&self) -> bool {
        self.length <= LINE_BYTES
    }
}

/// A chunk's size: hexadecimal, and what may follow it.
fn size(line: &[u8]) -> Option<u64> {
    let digits = line.iter().take_while(|it| it.is_ascii_hexdigit()).count();
    let digits = Some(digits).filter(|it| *it < LINE_BYTES)?;
    let digits = std::str::from_utf8(line.get(..digits)?).ok()?;
    u64::from_str_radix(digits, 16).ok()
}

/// What is kept of a line: enough for a length and what little may stand around it.
const LINE_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What becomes of it, read in pieces of so many bytes.
    fn looked(text: &str, piece: usize, switching: Switching) -> String {
        let mut lines = Lines::default();
        let mut bytes = text.as_bytes().to_vec();
        for piece in bytes.chunks_mut(piece) {
            lines.look(piece, || switching);
        }
        String::from_utf8_lossy(&bytes).replace('\0', "!")
    }

    #[test]
    fn lone_line_feeds() {
        let get = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        let post = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\na\nb\nc";
        let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
            3;x\r\n\n\n\n\r\na\r\n0123456\n89\r\n0\r\nt: 1\r\n\r\n";
        let upgrade = "GET / HTTP/1.1\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n";
        // Nothing comes of a protocol that is named and not asked for.
        let named =
            "POST / HTTP/1.1\r\nupgrade: x\r\nconnection: close\r\ncontent-length: 5\r\n\r\n";
        for (text, is) in [
            ("\n", "!"),
            ("GET / HTTP/1.1\n", "GET / HTTP/1.1!"),
            (
                "\r\nGET / HTTP/1.1\r\na: b\n\r\n",
                "\r\nGET / HTTP/1.1\r\na: b!\r\n",
            ),
            (
                "GET / HTTP/1.1\r\na: b\r\n\n",
                "GET / HTTP/1.1\r\na: b\r\n!",
            ),
            (get, get),
            (post, post),
            (chunked, chunked),
            (&format!("{get}\n"), &format!("{get}!")),
            (&format!("{post}{get}X\n"), &format!("{post}{get}X!")),
            (&format!("{chunked}{get}\n"), &format!("{chunked}{get}!")),
            (
                &chunked.replace("t: 1\r", "t: 1"),
                &chunked.replace("t: 1\r\n", "t: 1!"),
            ),
            (&format!("{upgrade}{get}\n"), &format!("{upgrade}{get}!")),
            (
                &format!("{named}a\nb\nc{get}\n"),
                &format!("{named}a\nb\nc{get}!"),
            ),
        ] {
            for piece in [1, 2, 3, 7, 1000] {
                // The answer to an upgrade is not there yet for what comes with it.
                if piece > 1 && text.starts_with(upgrade) {
                    continue;
                }
                let found = looked(text, piece, Switching::Declined);
                assert_eq!(found, is, "in pieces of {piece}");
            }
        }
    }

    #[test]
    fn what_a_connection_was_switched_to_is_left_alone() {
        for head in [
            "GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
            "CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n",
        ] {
            let text = format!("{head}a\nb\n\nGET / HTTP/1.1\n");
            for piece in [1, 5, 1000] {
                for switching in [Switching::Done, Switching::Open] {
                    assert_eq!(looked(&text, piece, switching), text);
                }
            }
        }
    }

    #[test]
    fn two_ways_to_say_where_a_body_ends() {
        let [length, coding] = ["content-length: 3\r\n", "transfer-encoding: chunked\r\n"];
        for (fields, is_taken) in [
            ([length, coding], false),
            ([coding, length], false),
            ([coding, "content-length: 0\r\n"], false),
            ([coding, ""], true),
            ([length, ""], true),
        ] {
            let text = format!("POST / HTTP/1.1\r\n{}\r\n", fields.concat());
            for piece in [1, 7, 1000] {
                let found = looked(&text, piece, Switching::Declined);
                assert_eq!(found == text, is_taken, "{found:?}");
            }
        }
    }

    #[test]
    fn lengths_that_hide() {
        for line in [
            format!("content-length:{}5", " ".repeat(80)),
            format!("content-length: {}5", "0".repeat(80)),
            "content-length: 5, 5".to_owned(),
        ] {
            let found = looked(
                &format!("POST / HTTP/1.1\r\n{line}\r\n"),
                10,
                Switching::Open,
            );
            assert!(found.ends_with('!'), "{found:?}");
        }
    }

    proptest! {
        #[test]
        fn cutting_changes_nothing(
            text in "((GET|POST) / HTTP/1.1\r?\n|(content-length|transfer-encoding|upgrade|a): ?[0-9a-c]{0,3}\r?\n|\r?\n|[0-9]\r\n){0,12}",
            piece in 1_usize..20,
        ) {
            let whole = looked(&text, usize::MAX, Switching::Open);
            prop_assert_eq!(looked(&text, piece, Switching::Open), whole);
        }

        #[test]
        fn only_line_feeds_are_changed(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut looked = bytes.clone();
            Lines::default().look(&mut looked, || Switching::Declined);
            for (before, after) in bytes.iter().zip(&looked) {
                prop_assert!(before == after || (*before == b'\n' && *after == 0));
            }
        }
    }
}
