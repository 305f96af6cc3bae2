//! The control protocol between agents and the controller: generated messages and services in
//! [`v1`], and conversions between messages and the domain in [`convert`].
//!
//! Only this crate knows protobuf. A message becomes a [`Resource`] once, at the edge; a message
//! that is not one is refused with the field and the reason.

pub mod convert;
mod resource;

pub use convert::ConvertError;
pub use resource::{Key, Kind, Resource};

/// Version of the protocol in `Hello.protocol`.
pub const PROTOCOL_VERSION: u32 = 1;

/// The name in the controller's serving certificate, unless configured otherwise.
pub const CONTROLLER_NAME: &str = "weft-controller";

/// Largest message accepted by either side, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// Generated code of `weft.control.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("weft.control.v1");
}
