//! The frames of `weft/1`, and the order in which they may come. Pure, panic-free functions over what
//! a peer sent; `docs/wire.md` is their specification.
//!
//! A frame is a head of four bytes (kind, flags, length) and its payload. The stream of plaintext is
//! read as it comes: frames may be cut anywhere, although senders put each into one TLS record.

use std::num::NonZeroU16;

use weft_core::TUNNEL_PORT;

use crate::proxy::tunnel::claim::OpaqueBy;

/// A flow that the client asks for: a port at the address that the connection goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// The application's port.
    pub port: NonZeroU16,
    /// The port that the client application connects from, if told.
    pub source_port: Option<NonZeroU16>,
    /// By which Service's declaration the client's agent does not look into it, if it says so.
    pub opaque_by: Option<OpaqueBy>,
}

/// Why a flow is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refuse {
    /// As in HTTP: 400, 401 or 503.
    pub status: u16,
    /// A word of lower-case letters and `_`; may be empty.
    pub reason: String,
}

/// What a peer said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The client asks for a flow.
    Open(Open),
    /// The server's application has accepted.
    Accept,
    /// It has not.
    Refuse(Refuse),
    /// The last so many of the bytes that were consumed are the flow's.
    Data(usize),
    /// The peer sends no more of this flow.
    End,
    /// The server takes no more flows on this connection.
    Leaving,
}

/// What came of some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// How many of them were read.
    pub consumed: usize,
    /// What they said; nothing if more bytes are needed.
    pub event: Option<Event>,
}

/// What must not be on the wire. It ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// A kind that does not exist.
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    /// A flag that does not exist.
    #[error("a frame with unknown flags {0:#04x}")]
    Flags(u8),
    /// Longer than its kind may be, or empty where it must not be.
    #[error("a frame of kind {kind} with {length} bytes")]
    Length {
        /// Its kind.
        kind: u8,
        /// Its length.
        length: u16,
    },
    /// A frame that must not come now.
    #[error("a frame of kind {0} out of order")]
    Order(u8),
    /// A payload that is none of its kind.
    #[error("a malformed frame of kind {0}")]
    Payload(u8),
}

/// Reads what one peer sends.
#[derive(Debug)]
pub struct Parser {
    phase: Phase,
    part: Part,
}

/// What may come next from the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// At the server: the next flow.
    Unopened,
    /// At the client: nothing, until it asks for a flow.
    Unasked,
    /// At the client: the answer.
    Asked,
    /// The flow's bytes. `serves` says which side this is.
    Flowing { serves: bool },
    /// At the server: nothing, until it has ended the flow too.
    Ended,
}

/// What is being read.
#[derive(Debug)]
enum Part {
    Head {
        bytes: [u8; HEAD_BYTES],
        have: usize,
    },
    Control {
        kind: u8,
        length: usize,
        bytes: Vec<u8>,
    },
    Data {
        left: usize,
        ends: bool,
    },
}

impl Parser {
    /// For the side that serves flows.
    pub fn server() -> Self {
        Self::new(Phase::Unopened)
    }

    /// For the side that asks for them.
    pub fn client() -> Self {
        Self::new(Phase::Unasked)
    }

    fn new(phase: Phase) -> Self {
        Self {
            phase,
            part: Part::head(),
        }
    }

    /// The client has sent an open frame.
    pub fn asked(&mut self) {
        self.phase = Phase::Asked;
    }

    /// The server has ended its direction, and the client too: another flow may come.
    pub fn next_flow(&mut self) {
        if self.phase == Phase::Ended {
            self.phase = Phase::Unopened;
        }
    }

    /// Whether the peer has ended its direction, or no flow is open.
    pub fn is_between_flows(&self) -> bool {
        matches!(self.phase, Phase::Unopened | Phase::Unasked | Phase::Ended)
    }

    /// Reads from the front of `bytes` up to the next event.
    ///
    /// # Errors
    /// The peer must not have sent that; nothing more can be read.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Step, BadFrame> {
        let mut consumed = 0;
        loop {
            let rest = bytes.get(consumed..).unwrap_or_default();
            match &mut self.part {
                Part::Head { bytes: head, have } => {
                    let (taken, complete) = fill(head, have, rest);
                    consumed += taken;
                    let head = *head;
                    if !complete {
                        return Ok(Step::more(consumed));
                    }
                    self.part = self.begin(head)?;
                }
                Part::Data { left: 0, ends } => {
                    let ends = *ends;
                    self.part = Part::head();
                    if ends {
                        self.phase = match self.phase {
                            Phase::Flowing { serves: true } => Phase::Ended,
                            _ => Phase::Unasked,
                        };
                        return Ok(Step::event(consumed, Event::End));
                    }
                }
                Part::Data { left, .. } => {
                    let count = rest.len().min(*left);
                    if count == 0 {
                        return Ok(Step::more(consumed));
                    }
                    *left -= count;
                    return Ok(Step::event(consumed + count, Event::Data(count)));
                }
                Part::Control {
                    kind,
                    length,
                    bytes: have,
                } => {
                    let wanted = length.saturating_sub(have.len());
                    let taken = rest.get(..wanted.min(rest.len())).unwrap_or_default();
                    have.extend_from_slice(taken);
                    consumed += taken.len();
                    if taken.len() < wanted {
                        return Ok(Step::more(consumed));
                    }
                    let event = event(*kind, have)?;
                    self.part = Part::head();
                    self.phase = match event {
                        Event::Open(_) => Phase::Flowing { serves: true },
                        Event::Accept => Phase::Flowing { serves: false },
                        Event::Refuse(_) => Phase::Unasked,
                        _ => self.phase,
                    };
                    return Ok(Step::event(consumed, event));
                }
            }
        }
    }

    /// Checks a frame's head against what may come.
    fn begin(&self, head: [u8; HEAD_BYTES]) -> Result<Part, BadFrame> {
        let [kind, flags, high, low] = head;
        let length = u16::from_be_bytes([high, low]);
        let most = match kind {
            DATA => MOST_DATA_BYTES,
            OPEN | ACCEPT | REFUSE | LEAVING => MOST_CONTROL_BYTES,
            _ => return Err(BadFrame::Kind(kind)),
        };
        let in_order = match self.phase {
            Phase::Unopened => kind == OPEN,
            Phase::Unasked => kind == LEAVING,
            Phase::Asked => matches!(kind, ACCEPT | REFUSE | LEAVING),
            Phase::Flowing { serves: true } => kind == DATA,
            Phase::Flowing { serves: false } => matches!(kind, DATA | LEAVING),
            Phase::Ended => false,
        };
        if !in_order {
            return Err(BadFrame::Order(kind));
        }
        let ends = match (kind, flags) {
            (DATA, END) => true,
            (_, 0) => false,
            _ => return Err(BadFrame::Flags(flags)),
        };
        if usize::from(length) > most || (kind == DATA && length == 0 && !ends) {
            return Err(BadFrame::Length { kind, length });
        }
        let length = usize::from(length);
        Ok(match kind {
            DATA => Part::Data { left: length, ends },
            kind => Part::Control {
                kind,
                length,
                bytes: Vec::new(),
            },
        })
    }
}

impl Part {
    fn head() -> Self {
        Self::Head {
            bytes: [0; HEAD_BYTES],
            have: 0,
        }
    }
}

impl Step {
    fn more(consumed: usize) -> Self {
        Self {
            consumed,
            event: None,
        }
    }

    fn event(consumed: usize, event: Event) -> Self {
        Self {
            consumed,
            event: Some(event),
        }
    }
}

/// Takes bytes into what is to be filled; says how many, and whether it is full.
fn fill(into: &mut [u8; HEAD_BYTES], have: &mut usize, from: &[u8]) -> (usize, bool) {
    let missing = into.get_mut(*have..).unwrap_or_default();
    let count = missing.len().min(from.len());
    for (to, byte) in missing.iter_mut().zip(from) {
        *to = *byte;
    }
    *have += count;
    (count, *have == HEAD_BYTES)
}

fn event(kind: u8, payload: &[u8]) -> Result<Event, BadFrame> {
    match kind {
        OPEN => open(payload).map(Event::Open),
        ACCEPT => unknown_fields(payload, kind).map(|()| Event::Accept),
        REFUSE => refuse(payload).map(Event::Refuse),
        LEAVING => unknown_fields(payload, kind).map(|()| Event::Leaving),
        _ => Err(BadFrame::Kind(kind)),
    }
}

fn open(payload: &[u8]) -> Result<Open, BadFrame> {
    let bad = BadFrame::Payload(OPEN);
    let (&[port_high, port_low, source_high, source_low], rest) =
        payload.split_first_chunk().ok_or(bad)?;
    let mut claimed = None;
    fields(rest, OPEN, |kind, value| {
        if kind == OPAQUE_BY {
            claimed.get_or_insert_with(|| OpaqueBy::read(value));
        }
    })?;
    let port = NonZeroU16::new(u16::from_be_bytes([port_high, port_low])).ok_or(bad)?;
    Ok(Open {
        port,
        source_port: NonZeroU16::new(u16::from_be_bytes([source_high, source_low])),
        opaque_by: claimed.flatten(),
    })
}

fn refuse(payload: &[u8]) -> Result<Refuse, BadFrame> {
    let bad = BadFrame::Payload(REFUSE);
    let (&[high, low, length], rest) = payload.split_first_chunk().ok_or(bad)?;
    let status = u16::from_be_bytes([high, low]);
    let (reason, rest) = rest.split_at_checked(length.into()).ok_or(bad)?;
    unknown_fields(rest, REFUSE)?;
    let is_word = |byte: &u8| byte.is_ascii_lowercase() || *byte == b'_';
    if reason.len() > MOST_REASON_BYTES || !reason.iter().all(is_word) {
        return Err(bad);
    }
    if !matches!(status, 400 | 401 | 503) {
        return Err(bad);
    }
    Ok(Refuse {
        status,
        reason: String::from_utf8_lossy(reason).into_owned(),
    })
}

/// Metadata: fields of a type, a length and that many bytes, each of which may be unknown.
fn fields(mut payload: &[u8], kind: u8, mut heed: impl FnMut(u16, &[u8])) -> Result<(), BadFrame> {
    while !payload.is_empty() {
        let bad = BadFrame::Payload(kind);
        let (&[type_high, type_low, high, low], rest) = payload.split_first_chunk().ok_or(bad)?;
        let length = u16::from_be_bytes([high, low]);
        let value;
        (value, payload) = rest.split_at_checked(length.into()).ok_or(bad)?;
        heed(u16::from_be_bytes([type_high, type_low]), value);
    }
    Ok(())
}

fn unknown_fields(payload: &[u8], kind: u8) -> Result<(), BadFrame> {
    fields(payload, kind, |_, _| {})
}

impl Open {
    /// Whether the port is one that a tunnel must not lead to.
    pub fn is_reserved(&self) -> bool {
        self.port.get() == TUNNEL_PORT
    }

    /// The whole frame.
    pub fn encode(&self) -> Vec<u8> {
        let source_port = self.source_port.map_or(0, u16::from);
        let mut payload = Vec::with_capacity(4);
        payload.extend_from_slice(&self.port.get().to_be_bytes());
        payload.extend_from_slice(&source_port.to_be_bytes());
        if let Some(claim) = &self.opaque_by {
            // A name and a port: never longer than a frame of its kind may be.
            let claim = claim.to_string();
            payload.extend_from_slice(&OPAQUE_BY.to_be_bytes());
            payload.extend_from_slice(&(claim.len() as u16).to_be_bytes());
            payload.extend_from_slice(claim.as_bytes());
        }
        let [high, low] = (payload.len() as u16).to_be_bytes();
        let mut frame = vec![OPEN, 0, high, low];
        frame.append(&mut payload);
        frame
    }
}

impl Refuse {
    /// The whole frame.
    pub fn encode(&self) -> Vec<u8> {
        let reason = self.reason.as_bytes();
        let reason = &reason[..reason.len().min(MOST_REASON_BYTES)];
        let [high, low] = self.status.to_be_bytes();
        let length = reason.len() as u8;
        let mut frame = vec![REFUSE, 0, 0, 3 + length, high, low, length];
        frame.extend_from_slice(reason);
        frame
    }
}

/// The head of a data frame. `length` is at most [`MOST_DATA_BYTES`].
pub fn data_head(length: usize) -> [u8; HEAD_BYTES] {
    let [high, low] = (length.min(MOST_DATA_BYTES) as u16).to_be_bytes();
    [DATA, 0, high, low]
}

/// What of the flow's bytes comes first in what a peer has sent, as far as it is in one frame. Nothing is read by
/// that.
pub fn first_data(bytes: &[u8]) -> &[u8] {
    match bytes.split_first_chunk() {
        Some((&[DATA, _, high, low], rest)) => {
            let length = usize::from(u16::from_be_bytes([high, low]));
            rest.get(..length).unwrap_or(rest)
        }
        _ => &[],
    }
}

/// The frame that accepts a flow.
pub const ACCEPT_FRAME: [u8; HEAD_BYTES] = [ACCEPT, 0, 0, 0];
/// The frame that ends a direction.
pub const END_FRAME: [u8; HEAD_BYTES] = [DATA, END, 0, 0];
/// The frame that says that the server takes no more flows.
pub const LEAVING_FRAME: [u8; HEAD_BYTES] = [LEAVING, 0, 0, 0];
/// A frame's head.
pub const HEAD_BYTES: usize = 4;
/// The most that a data frame carries: with its head, what one TLS record takes.
pub const MOST_DATA_BYTES: usize = 16 * 1024 - HEAD_BYTES;

const MOST_CONTROL_BYTES: usize = 1024;
const MOST_REASON_BYTES: usize = 40;
const OPEN: u8 = 1;
const ACCEPT: u8 = 2;
const REFUSE: u8 = 3;
const DATA: u8 = 4;
const LEAVING: u8 = 5;
/// Metadata of an open frame: [`OpaqueBy`].
const OPAQUE_BY: u16 = 1;
/// Flag of a data frame: the last of its direction.
const END: u8 = 1;

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
