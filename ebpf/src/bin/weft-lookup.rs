//! The program that is attached to every meshed network namespace.

#![no_std]
#![no_main]

use aya_ebpf::{macros::sk_lookup, programs::SkLookupContext};
use weft_ebpf::lookup;

#[sk_lookup]
pub fn weft_sk_lookup(ctx: SkLookupContext) -> u32 {
    lookup::sk_lookup(&ctx)
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
