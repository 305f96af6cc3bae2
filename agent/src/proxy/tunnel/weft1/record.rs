//! TLS 1.3's records (RFC 8446, section 5), sealed and opened where they lie.
//!
//! The handshake is rustls's; from then on it hands its keys over, as it does for TLS in a kernel.
//! Its own connections copy every byte twice and read a few kilobytes at a time, which costs a bulk
//! flow more than the encryption itself. What is here is the record's form, the nonce's counter and
//! key updates; the ciphers are aws-lc's, the keys and their schedule rustls's.

use std::fmt;
use std::ops::Range;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::kernel::KernelConnection;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

/// What is wrong with a record, or with what it says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// Not a protected record of TLS 1.3, or too long.
    #[error("bytes that are no TLS record")]
    Form,
    /// Not what the peer sent.
    #[error("a TLS record was forged or damaged")]
    Forged,
    /// A message that must not come after the handshake.
    #[error("an unexpected TLS message")]
    Message,
    /// The peer gives up.
    #[error("the peer ended TLS with alert {0}")]
    Alert(u8),
    /// The cipher or its keys cannot be used.
    #[error("no keys: {0}")]
    Keys(String),
}

/// What an opened record carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// Data, at this place of the record.
    Data(Range<usize>),
    /// The peer sends nothing more.
    Closed,
    /// The peer has changed its keys; whether ours must follow.
    KeyUpdate {
        /// It wants new keys from us too.
        requested: bool,
    },
}

/// Both directions' records.
pub struct Records {
    seal: Direction,
    open: Direction,
    keys: Box<dyn Keys>,
    /// Key updates without data between them.
    idle_updates: u8,
}

struct Direction {
    key: LessSafeKey,
    iv: [u8; NONCE_BYTES],
    sequence: u64,
}

/// Yields the keys that come next.
trait Keys: Send + Sync {
    fn next_to_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
    fn next_to_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
}

impl<T: Send + Sync> Keys for KernelConnection<T> {
    fn next_to_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_tx_secret()
    }

    fn next_to_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        self.update_rx_secret()
    }
}

impl Records {
    /// Takes over from the handshake.
    ///
    /// # Errors
    /// [`BadRecord::Keys`]: a cipher other than AES-GCM.
    pub fn new<T: Send + Sync + 'static>(
        secrets: ExtractedSecrets,
        keys: KernelConnection<T>,
    ) -> Result<Self, BadRecord> {
        Ok(Self {
            seal: Direction::new(&secrets.tx)?,
            open: Direction::new(&secrets.rx)?,
            keys: Box::new(keys),
            idle_updates: 0,
        })
    }

    /// Makes a record of the `length` bytes that lie at [`HEAD_BYTES`] of `record`, behind which
    /// there is room for [`TAIL_BYTES`]. Says how long it is.
    ///
    /// # Errors
    /// No room, or too long.
    pub fn seal(&mut self, record: &mut [u8], length: usize) -> Result<usize, BadRecord> {
        self.seal.seal(record, length, APPLICATION_DATA)
    }

    /// Whether so many records were sealed that the keys should be changed.
    pub fn wants_new_keys(&self) -> bool {
        self.seal.sequence >= RECORDS_PER_KEY
    }

    /// Writes the message that changes the keys, and changes them. Says how long the record is.
    ///
    /// # Errors
    /// No room, or no keys.
    pub fn change_keys(&mut self, record: &mut [u8]) -> Result<usize, BadRecord> {
        let message = [KEY_UPDATE, 0, 0, 1, 0];
        let written = self.seal_message(record, &message, HANDSHAKE)?;
        let next = self.keys.next_to_seal();
        self.seal = Direction::new(&next.map_err(|error| BadRecord::Keys(error.to_string()))?)?;
        Ok(written)
    }

    /// Writes the alert that says that nothing more is sent. Says how long the record is.
    ///
    /// # Errors
    /// No room.
    pub fn close(&mut self, record: &mut [u8]) -> Result<usize, BadRecord> {
        self.seal_message(record, &[1, CLOSE_NOTIFY], ALERT)
    }

    fn seal_message(
        &mut self,
        record: &mut [u8],
        message: &[u8],
        kind: u8,
    ) -> Result<usize, BadRecord> {
        let place = record.get_mut(HEAD_BYTES..HEAD_BYTES + message.len());
        place.ok_or(BadRecord::Form)?.copy_from_slice(message);
        self.seal.seal(record, message.len(), kind)
    }

    /// Opens a whole record where it lies.
    ///
    /// # Errors
    /// What is wrong with it; nothing more can be read.
    pub fn open(&mut self, record: &mut [u8]) -> Result<Opened, BadRecord> {
        let (kind, length) = self.open.open(record)?;
        let place = HEAD_BYTES..HEAD_BYTES + length;
        let bytes = record.get(place.clone()).ok_or(BadRecord::Form)?;
        match (kind, bytes) {
            (APPLICATION_DATA, _) => {
                self.idle_updates = 0;
                Ok(Opened::Data(place))
            }
            (ALERT, [_, CLOSE_NOTIFY]) => Ok(Opened::Closed),
            (ALERT, [_, alert]) => Err(BadRecord::Alert(*alert)),
            (HANDSHAKE, [KEY_UPDATE, 0, 0, 1, requested @ (0 | 1)]) => {
                let requested = *requested == 1;
                self.idle_updates += 1;
                if self.idle_updates > MOST_IDLE_UPDATES {
                    return Err(BadRecord::Message);
                }
                let next = self.keys.next_to_open();
                let next = next.map_err(|error| BadRecord::Keys(error.to_string()))?;
                self.open = Direction::new(&next)?;
                Ok(Opened::KeyUpdate { requested })
            }
            _ => Err(BadRecord::Message),
        }
    }
}

/// The length of the record that begins with `bytes`, if as much of it is there as says so.
///
/// # Errors
/// No protected record begins so.
pub fn length(bytes: &[u8]) -> Result<Option<usize>, BadRecord> {
    let Some(&[kind, major, minor, high, low]) = bytes.first_chunk::<HEAD_BYTES>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let fits = (TAIL_BYTES..=MOST_SEALED_BYTES).contains(&length);
    if [kind, major, minor] != PROTECTED || !fits {
        return Err(BadRecord::Form);
    }
    Ok(Some(HEAD_BYTES + length))
}

impl Direction {
    fn new((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> Result<Self, BadRecord> {
        let (cipher, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            _ => return Err(BadRecord::Keys("an unknown cipher".to_owned())),
        };
        let wrong = |_| BadRecord::Keys("keys of the wrong size".to_owned());
        let key = UnboundKey::new(cipher, key.as_ref()).map_err(wrong)?;
        let iv = <[u8; NONCE_BYTES]>::try_from(iv.as_ref());
        Ok(Self {
            key: LessSafeKey::new(key),
            iv: iv.map_err(|_| BadRecord::Keys("a nonce of the wrong size".to_owned()))?,
            sequence: *sequence,
        })
    }

    /// Each record has its own: the counter goes up with every one, and ends before it could come
    /// round.
    fn nonce(&mut self, most: u64) -> Result<Nonce, BadRecord> {
        let mut nonce = self.iv;
        let counter = self.sequence.to_be_bytes();
        for (byte, count) in nonce[NONCE_BYTES - 8..].iter_mut().zip(counter) {
            *byte ^= count;
        }
        if self.sequence >= most {
            return Err(BadRecord::Keys("too many records with one key".to_owned()));
        }
        self.sequence += 1;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    fn seal(&mut self, record: &mut [u8], length: usize, kind: u8) -> Result<usize, BadRecord> {
        let end = HEAD_BYTES + length + TAIL_BYTES;
        let record = record.get_mut(..end).ok_or(BadRecord::Form)?;
        if length > MOST_PLAIN_BYTES {
            return Err(BadRecord::Form);
        }
        let [high, low] = ((length + TAIL_BYTES) as u16).to_be_bytes();
        let head = [PROTECTED[0], PROTECTED[1], PROTECTED[2], high, low];
        let (place, rest) = record.split_at_mut(HEAD_BYTES);
        place.copy_from_slice(&head);
        let (text, tag_place) = rest.split_at_mut(length + 1);
        text[length] = kind;
        let nonce = self.nonce(MOST_SEALED_PER_KEY)?;
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(head), text)
            .map_err(|_| BadRecord::Keys("sealing failed".to_owned()))?;
        tag_place.copy_from_slice(tag.as_ref());
        Ok(end)
    }

    /// Yields the kind and the length of what lies behind the head.
    fn open(&mut self, record: &mut [u8]) -> Result<(u8, usize), BadRecord> {
        let (head, text) = record
            .split_first_chunk_mut::<HEAD_BYTES>()
            .ok_or(BadRecord::Form)?;
        let nonce = self.nonce(MOST_OPENED_PER_KEY)?;
        let text = self
            .key
            .open_in_place(nonce, Aad::from(*head), text)
            .map_err(|_| BadRecord::Forged)?;
        // The kind is behind the text; padding of zeros may follow.
        let last = text.iter().rposition(|byte| *byte != 0);
        let last = last.ok_or(BadRecord::Message)?;
        if last > MOST_PLAIN_BYTES {
            return Err(BadRecord::Form);
        }
        Ok((text[last], last))
    }
}

/// Nothing of the keys.
impl fmt::Debug for Records {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Records")
    }
}

/// A record's head.
pub const HEAD_BYTES: usize = 5;
/// What is behind a record's text: its kind and the tag.
pub const TAIL_BYTES: usize = 1 + 16;
/// The most text of a record.
pub const MOST_PLAIN_BYTES: usize = 16 * 1024;
/// The most that follows the head of a record that is received (RFC 8446, section 5.2).
const MOST_SEALED_BYTES: usize = MOST_PLAIN_BYTES + 256;

/// Application data of "TLS 1.2": what every protected record pretends to be.
const PROTECTED: [u8; 3] = [APPLICATION_DATA, 3, 3];
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const KEY_UPDATE: u8 = 24;
const CLOSE_NOTIFY: u8 = 0;
const NONCE_BYTES: usize = 12;
/// When keys are changed: half of what AES-GCM allows (RFC 8446, section 5.5).
const RECORDS_PER_KEY: u64 = if cfg!(test) { 50 } else { 1 << 23 };
const MOST_SEALED_PER_KEY: u64 = 1 << 24;
/// Opening is harmless, as one forgery ends the connection; the counter only must not come round.
const MOST_OPENED_PER_KEY: u64 = 1 << 36;
/// Key updates cost; a peer of good will sends one in millions of records.
const MOST_IDLE_UPDATES: u8 = 8;

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
