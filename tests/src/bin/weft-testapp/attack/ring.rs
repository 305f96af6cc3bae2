//! `ring`: a client that does everything through `io_uring`, down to making the socket. With a thread of
//! the kernel that takes the requests, no system call of the process connects anything.
//!
//! Written against the system calls, as no other crate here needs a binding to them.

#![allow(unsafe_code)]

use std::io::{Error, Result as IoResult};
use std::mem::size_of;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;
use clap::Args;
use serde_json::json;
use socket2::{SockAddr, Socket};

use crate::client::outcome;
use crate::emit;

/// Connects, sends a text, and receives its echo.
#[derive(Args)]
pub(crate) struct Ring {
    target: SocketAddr,
    text: String,
    /// Has a thread of the kernel take the requests.
    #[arg(long)]
    polled: bool,
}

impl Ring {
    pub(crate) fn run(self) -> Result<()> {
        let mut queue = match Queue::open(self.polled) {
            Ok(queue) => queue,
            Err(error) => {
                emit(
                    &json!({"outcome": outcome(&error), "stage": "io_uring_setup",
                    "text": error.to_string()}),
                );
                return Ok(());
            }
        };
        match self.exchange(&mut queue) {
            Ok((text, peer)) => emit(&json!({"outcome": "ok", "stage": "receive",
                "received": text.len(), "text": text, "peer": peer, "eof": true})),
            Err(error) => emit(&json!({"outcome": outcome(&error), "stage": "connect",
                "text": error.to_string()})),
        }
        Ok(())
    }

    fn exchange(&self, queue: &mut Queue) -> IoResult<(String, Option<String>)> {
        let domain = if self.target.is_ipv4() {
            libc::AF_INET
        } else {
            libc::AF_INET6
        };
        let mut entry = Entry::new(OP_SOCKET, domain);
        entry.offset = libc::SOCK_STREAM as u64;
        let made = queue.run(entry)?;
        // SAFETY: the kernel has just made it for this process, and nobody else knows it.
        let socket = Socket::from(unsafe { OwnedFd::from_raw_fd(made) });
        let address = SockAddr::from(self.target);
        let mut entry = Entry::new(OP_CONNECT, socket.as_raw_fd());
        entry.address = address.as_ptr() as u64;
        entry.offset = address.len().into();
        queue.run(entry)?;
        let mut sent = 0;
        while sent < self.text.len() {
            let rest = &self.text.as_bytes()[sent..];
            let mut entry = Entry::new(OP_SEND, socket.as_raw_fd());
            entry.address = rest.as_ptr() as u64;
            entry.length = rest.len() as u32;
            sent += queue.run(entry)? as usize;
        }
        let mut echo = vec![0_u8; self.text.len()];
        let mut received = 0;
        while received < echo.len() {
            let rest = &mut echo[received..];
            let mut entry = Entry::new(OP_RECV, socket.as_raw_fd());
            entry.address = rest.as_mut_ptr() as u64;
            entry.length = rest.len() as u32;
            match queue.run(entry)? {
                0 => return Err(Error::from_raw_os_error(libc::ECONNRESET)),
                count => received += count as usize,
            }
        }
        let peer = socket.peer_addr()?.as_socket().map(|it| it.to_string());
        Ok((String::from_utf8_lossy(&echo).into_owned(), peer))
    }
}

/// A ring of one request at a time. Its mappings stay until the process ends.
struct Queue {
    ring: OwnedFd,
    params: Params,
    submissions: *mut u8,
    completions: *mut u8,
    entries: *mut Entry,
    polled: bool,
}

impl Queue {
    fn open(polled: bool) -> IoResult<Queue> {
        let mut params = Params::default();
        if polled {
            params.flags = SETUP_SQPOLL;
            params.sq_thread_idle = 1000;
        }
        // SAFETY: `params` is the structure that the call wants, and lives.
        let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, ENTRIES, &raw mut params) };
        let ring = libc::c_int::try_from(check(ring)?).map_err(Error::other)?;
        // SAFETY: made for this process by the call before.
        let ring = unsafe { OwnedFd::from_raw_fd(ring) };
        let submissions_bytes = params.sq_off.array as usize + ENTRIES * size_of::<u32>();
        let completions_bytes =
            params.cq_off.cqes as usize + params.cq_entries as usize * size_of::<Completion>();
        Ok(Queue {
            submissions: map(&ring, 0, submissions_bytes)?,
            completions: map(&ring, 0x800_0000, completions_bytes)?,
            entries: map(&ring, 0x1000_0000, ENTRIES * size_of::<Entry>())?.cast(),
            ring,
            params,
            polled,
        })
    }

    /// Hands one request in, waits, and gives its result.
    fn run(&mut self, entry: Entry) -> IoResult<i32> {
        let (sq, cq) = (self.params.sq_off, self.params.cq_off);
        // SAFETY: the offsets are the kernel's own and lie in the mappings; the kernel reads the entry
        // only after the tail has moved, and there is one request at a time. What the entry points to
        // lives in the caller until this returns.
        unsafe {
            let tail = atomic(self.submissions, sq.tail);
            let index =
                tail.load(Ordering::Relaxed) & *atomic(self.submissions, sq.ring_mask).as_ptr();
            ptr::write(self.entries.add(index as usize), entry);
            let array = self.submissions.add(sq.array as usize).cast::<u32>();
            ptr::write(array.add(index as usize), index);
            tail.fetch_add(1, Ordering::Release);
            let head = atomic(self.completions, cq.head);
            while head.load(Ordering::Relaxed)
                == atomic(self.completions, cq.tail).load(Ordering::Acquire)
            {
                let flags = ENTER_GETEVENTS | if self.polled { ENTER_SQ_WAKEUP } else { 0 };
                let fd = self.ring.as_raw_fd();
                let none = ptr::null::<u8>();
                let done = libc::syscall(libc::SYS_io_uring_enter, fd, 1, 1, flags, none, 0_usize);
                check(done)?;
            }
            let at =
                head.load(Ordering::Relaxed) & *atomic(self.completions, cq.ring_mask).as_ptr();
            let results = self.completions.add(cq.cqes as usize).cast::<Completion>();
            let result = ptr::read(results.add(at as usize)).result;
            head.fetch_add(1, Ordering::Release);
            if result < 0 {
                return Err(Error::from_raw_os_error(-result));
            }
            Ok(result)
        }
    }
}

/// A field that the kernel shares.
///
/// # Safety
/// `offset` is one of the kernel's, in a mapping that stays.
unsafe fn atomic<'a>(base: *mut u8, offset: u32) -> &'a AtomicU32 {
    // SAFETY: the caller's; such fields are aligned.
    unsafe { AtomicU32::from_ptr(base.add(offset as usize).cast()) }
}

fn map(ring: &OwnedFd, offset: i64, bytes: usize) -> IoResult<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let kind = libc::MAP_SHARED | libc::MAP_POPULATE;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let mapped = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            access,
            kind,
            ring.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    Ok(mapped.cast())
}

fn check(result: i64) -> IoResult<i64> {
    if result < 0 {
        return Err(Error::last_os_error());
    }
    Ok(result)
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    sq_off: SubmissionOffsets,
    cq_off: CompletionOffsets,
}

/// `struct io_sqring_offsets`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SubmissionOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    reserved: u32,
    user_address: u64,
}

/// `struct io_cqring_offsets`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CompletionOffsets {
    head: u32,
    tail: u32,
    ring_mask: u32,
    ring_entries: u32,
    overflow: u32,
    cqes: u32,
    flags: u32,
    reserved: u32,
    user_address: u64,
}

/// `struct io_uring_sqe`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Entry {
    opcode: u8,
    flags: u8,
    priority: u16,
    descriptor: i32,
    offset: u64,
    address: u64,
    length: u32,
    operation_flags: u32,
    user_data: u64,
    rest: [u64; 3],
}

impl Entry {
    fn new(opcode: u8, descriptor: i32) -> Entry {
        Entry {
            opcode,
            descriptor,
            ..Entry::default()
        }
    }
}

/// `struct io_uring_cqe`.
#[repr(C)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

const ENTRIES: usize = 4;
const SETUP_SQPOLL: u32 = 2;
const ENTER_GETEVENTS: u32 = 1;
const ENTER_SQ_WAKEUP: u32 = 2;
const OP_CONNECT: u8 = 16;
const OP_SEND: u8 = 26;
const OP_RECV: u8 = 27;
const OP_SOCKET: u8 = 45;
