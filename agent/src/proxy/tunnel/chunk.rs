//! Bytes on their way into a tunnel, which tell when they have left HTTP/2's queue.
//!
//! HTTP/2 throws queued bytes away when a stream is reset. A server that answers and closes without
//! having read everything resets its connection right behind the answer, and its client would
//! rarely see that answer. So a reset waits for what was sent before it.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;

use bytes::{Buf, Bytes};
use futures::task::AtomicWaker;

/// What a tunnel's streams send.
#[derive(Debug, Default)]
pub struct Chunk {
    bytes: Bytes,
    queue: Option<Arc<Queued>>,
}

/// A stream's chunks that have not been written yet.
#[derive(Clone, Debug, Default)]
pub struct Queue(Arc<Queued>);

#[derive(Debug, Default)]
struct Queued {
    chunks: AtomicUsize,
    waiting: AtomicWaker,
}

impl Queue {
    /// Makes a chunk that is in the queue until it is dropped.
    pub fn chunk(&self, bytes: Bytes) -> Chunk {
        self.0.chunks.fetch_add(1, Ordering::Relaxed);
        Chunk {
            bytes,
            queue: Some(Arc::clone(&self.0)),
        }
    }

    /// Waits until every chunk has been written, or thrown away. For one task at a time.
    pub async fn empty(&self) {
        self.at_most(0).await;
    }

    /// Waits while so many chunks are queued that small ones would cost far more than their bytes.
    /// What the application sends meanwhile becomes one larger chunk. For one task at a time.
    pub async fn has_room(&self) {
        self.at_most(MOST_CHUNKS).await;
    }

    async fn at_most(&self, count: usize) {
        let is_reached = || self.0.chunks.load(Ordering::Acquire) <= count;
        poll_fn(|context| {
            if is_reached() {
                return Poll::Ready(());
            }
            self.0.waiting.register(context.waker());
            if is_reached() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let Some(queue) = &self.queue else { return };
        let before = queue.chunks.fetch_sub(1, Ordering::AcqRel);
        // Crossing either of the two marks that somebody may wait for.
        if before == 1 || before == MOST_CHUNKS + 1 {
            queue.waiting.wake();
        }
    }
}

const MOST_CHUNKS: usize = 64;
