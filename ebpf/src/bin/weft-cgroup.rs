//! The programs that are attached to control groups.

#![no_std]
#![no_main]

use aya_ebpf::{
    macros::{cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockOpsContext},
};
use weft_ebpf::{connect, names, probe, sock_ops};

#[cgroup_sock_addr(connect4)]
pub fn weft_connect4(ctx: SockAddrContext) -> i32 {
    connect::connect4(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn weft_connect6(ctx: SockAddrContext) -> i32 {
    connect::connect6(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn weft_getpeername4(ctx: SockAddrContext) -> i32 {
    names::getpeername4(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn weft_getpeername6(ctx: SockAddrContext) -> i32 {
    names::getpeername6(&ctx)
}

#[cgroup_sock_addr(getsockname4)]
pub fn weft_getsockname4(ctx: SockAddrContext) -> i32 {
    names::getsockname4(&ctx)
}

#[cgroup_sock_addr(getsockname6)]
pub fn weft_getsockname6(ctx: SockAddrContext) -> i32 {
    names::getsockname6(&ctx)
}

#[sock_ops]
pub fn weft_sock_ops(ctx: SockOpsContext) -> u32 {
    sock_ops::sock_ops(&ctx)
}

#[sock_ops]
pub fn weft_probe_sock_ops(ctx: SockOpsContext) -> u32 {
    probe::sock_ops(&ctx)
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
