//! What may end a flow from outside while its bytes are copied: a change of policy, a pod that leaves,
//! trust that is withdrawn. All of it is rare, so it is polled when it has something to say, and not
//! each time bytes arrive.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::task::AtomicWaker;

/// Does `work` until it is done, or `end` is: that comes first where both are. Both are pinned by the
/// caller: taken by value each would be in the caller's future twice.
///
/// # Errors
/// What the end yields.
pub(super) async fn unless<T, E>(
    mut end: Pin<&mut impl Future<Output = E>>,
    mut work: Pin<&mut impl Future<Output = T>>,
) -> Result<T, E> {
    let bell = Arc::new(Bell {
        rang: AtomicBool::new(true),
        task: AtomicWaker::new(),
    });
    let waker = Waker::from(Arc::clone(&bell));
    poll_fn(|context| {
        // Before looking whether it rang, so that no ring is missed.
        bell.task.register(context.waker());
        if bell.has_rung()
            && let Poll::Ready(ended) = end.as_mut().poll(&mut Context::from_waker(&waker))
        {
            return Poll::Ready(Err(ended));
        }
        work.as_mut().poll(context).map(Ok)
    })
    .await
}

/// Tells the task that it was woken for its end's sake.
struct Bell {
    rang: AtomicBool,
    task: AtomicWaker,
}

impl Bell {
    fn has_rung(&self) -> bool {
        self.rang.load(Ordering::Acquire) && self.rang.swap(false, Ordering::AcqRel)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rang.store(true, Ordering::Release);
        self.task.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::pin;
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn the_end_is_polled_only_when_it_was_woken() {
        let (sender, receiver) = oneshot::channel::<()>();
        let polls = Cell::new(0);
        let mut receiver = pin!(receiver);
        let end = poll_fn(|context| {
            polls.set(polls.get() + 1);
            receiver.as_mut().poll(context).map(|_| "ended")
        });
        let mut sender = Some(sender);
        let work = async {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            assert_eq!(polls.get(), 1, "polled for nothing");
            let _ = sender.take().map(|it| it.send(()));
            tokio::time::sleep(Duration::from_secs(60)).await;
            "done"
        };
        assert_eq!(unless(pin!(end), pin!(work)).await, Err("ended"));
        assert_eq!(polls.get(), 2);
    }

    #[tokio::test]
    async fn work_ends_by_itself_too() {
        let never = std::future::pending::<i32>();
        assert_eq!(unless(pin!(never), pin!(async { 1 })).await, Ok(1));
        let first = unless(pin!(async { 2 }), pin!(async { 1 })).await;
        assert_eq!(first, Err(2), "the end is first");
    }
}
