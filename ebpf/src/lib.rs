//! The kernel programs of Weft. They redirect the TCP connects of meshed pods to the agent's
//! listener in the same network namespace, steer what arrives at a pod, and let both applications
//! see the addresses they would see without a mesh. `docs/interception.md` tells how it fits
//! together.
//!
//! Two objects, because they are loaded differently: `weft-cgroup` once per node, `weft-lookup`
//! once per meshed network namespace with its cookie as a constant.
//!
//! The rule everywhere: a namespace that is not in `PODS` is not touched; for one that is, whatever
//! cannot be done is refused and counted, never let through.

#![no_std]
#![feature(asm_experimental_arch)]

pub mod connect;
pub mod context;
mod log;
pub mod lookup;
pub mod maps;
pub mod names;
pub mod pending;
pub mod probe;
pub mod sock_ops;

/// Nothing here panics: no indexing, no arithmetic that can overflow in a release build. Were it
/// reached, the verifier would refuse the endless loop.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
