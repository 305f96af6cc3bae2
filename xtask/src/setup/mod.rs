//! What a machine must have: Debian packages, the toolchain of the kernel programs, kernel
//! features. Each module finds what is there, and sets up what is not.

pub(crate) mod bpf_toolchain;
pub(crate) mod debian;
