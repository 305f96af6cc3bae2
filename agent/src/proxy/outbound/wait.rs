//! Waiting for an endpoint of a service port, for flows and exchanges alike.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::remember_refused;
use crate::balance::queue::{Place, Queue, Waited};
use crate::discovery::ServicePortEntry;
use crate::node::LocalPod;
use crate::proxy::Context;
use crate::proxy::error::FlowError;

/// Somebody who looks for an endpoint, and may have to wait for one.
pub(in crate::proxy) struct Waiter<'a> {
    context: &'a Context,
    pod: &'a LocalPod,
    port: &'a ServicePortEntry,
    /// The client used an address of this family.
    like: IpAddr,
    queue: Option<Arc<Queue>>,
    /// How often an endpoint had appeared when this looked.
    seen: u64,
    place: Option<Place>,
}

impl<'a> Waiter<'a> {
    /// Somebody who has not looked yet.
    pub(in crate::proxy) fn new(
        context: &'a Context,
        pod: &'a LocalPod,
        port: &'a ServicePortEntry,
        like: IpAddr,
    ) -> Self {
        Self {
            context,
            pod,
            port,
            like,
            queue: None,
            seen: 0,
            place: None,
        }
    }

    /// To be called before every look: what appears after this is not missed.
    pub(in crate::proxy) fn looks(&mut self) {
        self.queue = self.port.health.known_queue(self.like).cloned();
        self.seen = self.queue.as_ref().map_or(0, |it| it.opened());
    }

    /// An endpoint has served.
    pub(in crate::proxy) fn served(&self) {
        if let Some(queue) = self.port.health.known_queue(self.like) {
            queue.served();
        }
    }

    /// There was none. Ends when it is worth another look. `are_any`: there are endpoints, of which none takes
    /// anything.
    pub(in crate::proxy) async fn found_nobody(&mut self, are_any: bool) -> Result<(), FlowError> {
        let Some(queue) = &self.queue else {
            // The first ever: from now on it is told when one appears.
            self.port.health.queue(self.like);
            return Ok(());
        };
        let limits = self.context.config.queue;
        let waited = match &mut self.place {
            Some(place) => place.wait(limits.timeout, are_any).await,
            none => match queue.enter(&self.pod.usage.waiting, limits, self.seen) {
                Ok(place) => none.insert(place).wait(limits.timeout, are_any).await,
                Err(why) => why,
            },
        };
        let (service, port) = (&self.port.service, self.port.port);
        match waited {
            Waited::Again => Ok(()),
            Waited::Failed => Err(FlowError::NoEndpoint(service.clone(), port)),
            Waited::Full => Err(FlowError::TooManyWaiting(service.clone(), port)),
        }
    }

    /// The same of a flow. Who only connects to see whether somebody is there has been told so by the
    /// connection already, wrongly: if it leaves meanwhile, the next time it hears the truth.
    pub(in crate::proxy) async fn flow_found_nobody(
        &mut self,
        are_any: bool,
        socket: &TcpStream,
        original: SocketAddr,
    ) -> Result<(), FlowError> {
        let (context, pod) = (self.context, self.pod);
        let mut waiting = pin!(self.found_nobody(are_any));
        tokio::select! {
            waited = &mut waiting => return waited,
            () = has_left(socket) => remember_refused(context, pod, original),
        }
        waiting.await
    }
}

/// Ends when the client has closed its side.
async fn has_left(socket: &TcpStream) {
    loop {
        match socket.ready(Interest::READABLE).await {
            // What it said keeps the socket ready.
            Ok(ready) if !ready.is_read_closed() => tokio::time::sleep(LOOK_AGAIN).await,
            Ok(_) | Err(_) => return,
        }
    }
}

const LOOK_AGAIN: Duration = Duration::from_millis(50);
