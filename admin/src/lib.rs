//! Administrative endpoints: where they listen, and how they are served.

mod serve;
mod socket;

pub use serve::{Accept, Lasting, Limits, Loopback, serve};
pub use socket::Socket;
