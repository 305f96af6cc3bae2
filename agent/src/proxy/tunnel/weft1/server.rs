//! What the serving side says and hears between flows. Policy and applications are the caller's
//! concern.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use super::Error;
use super::channel::{Channel, Heard};
use super::client::MOST_EARLY_BYTES;
use super::frame::{ACCEPT_FRAME, Event, LEAVING_FRAME, Open, Refuse};

/// Waits for the next flow; none if the client has closed the connection. Nothing is lost if this is
/// dropped.
///
/// # Errors
/// The connection failed, or the client broke the protocol.
pub async fn next(channel: &mut Channel) -> Result<Option<Open>, Error> {
    channel.parser().next_flow();
    let heard = poll_fn(|context| {
        if let Poll::Ready(flushed) = channel.poll_flush(context) {
            flushed?;
        }
        loop {
            match channel.hear()? {
                Some(Heard::Event(Event::Open(open))) => {
                    channel.shrink_inbox();
                    return Poll::Ready(Ok(open));
                }
                // The parser lets nothing else come here.
                Some(_) => return Poll::Ready(Err(Error::Closed)),
                None => match channel.poll_receive(false, context) {
                    Poll::Ready(received) => received?,
                    Poll::Pending => {
                        channel.shrink_inbox();
                        return Poll::Pending;
                    }
                },
            }
        }
    });
    match heard.await {
        Ok(open) => Ok(Some(open)),
        Err(error) if error.is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Accepts the flow. It is sent with the first bytes that are copied, or at once if there are none.
///
/// # Errors
/// The connection cannot be used.
pub fn accept(channel: &mut Channel) -> Result<(), Error> {
    channel.say(&ACCEPT_FRAME)
}

/// Refuses the flow, and waits until the client has ended it too.
///
/// # Errors
/// The connection failed, or the client does not stop sending.
pub async fn refuse(channel: &mut Channel, refuse: &Refuse) -> Result<(), Error> {
    channel.say(&refuse.encode())?;
    let mut discarded = 0;
    let ended = poll_fn(|context| {
        if let Poll::Ready(flushed) = channel.poll_flush(context) {
            flushed?;
        }
        loop {
            match channel.hear()? {
                Some(Heard::Event(Event::End)) => {
                    channel.shrink_inbox();
                    return Poll::Ready(Ok(()));
                }
                Some(Heard::Data(place)) => {
                    discarded += place.len();
                    if discarded > MOST_EARLY_BYTES {
                        return Poll::Ready(Err(Error::Unbidden));
                    }
                }
                Some(Heard::Event(_)) => return Poll::Ready(Err(Error::Closed)),
                None => match channel.poll_receive(false, context) {
                    Poll::Ready(received) => received?,
                    Poll::Pending => {
                        channel.shrink_inbox();
                        return Poll::Pending;
                    }
                },
            }
        }
    });
    tokio::time::timeout(END_TIMEOUT, ended)
        .await
        .unwrap_or(Err(Error::Unbidden))
}

/// Tells the client that no more flows are taken, and gives it a moment to go away: a flow that it is
/// just asking for is refused, so that it can ask elsewhere.
pub async fn leave(mut channel: Box<Channel>) {
    let farewell = async {
        channel.say(&LEAVING_FRAME)?;
        while next(&mut channel).await?.is_some() {
            let leaving = Refuse {
                status: 503,
                reason: LEAVING.to_owned(),
            };
            refuse(&mut channel, &leaving).await?;
        }
        Ok::<(), Error>(())
    };
    // However it ends, the connection does.
    let _ = tokio::time::timeout(LEAVE_TIMEOUT, farewell).await;
    channel.close();
}

/// The reason of a refusal by a server that leaves: the flow has not been looked at.
pub const LEAVING: &str = "leaving";
/// How long the client of a refused flow may take to end it.
const END_TIMEOUT: Duration = Duration::from_secs(5);
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
