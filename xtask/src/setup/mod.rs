//! What a machine must have: Debian packages, the toolchain of the kernel programs, kernel
//! features, cargo's tools. Each module finds what is there, and sets up what is not.

pub(crate) mod bpf_toolchain;
pub(crate) mod cargo_tools;
pub(crate) mod debian;
pub(crate) mod kernel;
pub(crate) mod packages;
