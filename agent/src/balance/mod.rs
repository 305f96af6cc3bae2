//! Endpoint choice: which endpoint of a service port a flow goes to, and which comes next when
//! connecting to it fails. Pure: the caller owns the counter and the list.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The order in which a flow tries endpoints: round robin over flows, then around the list, each
/// endpoint once and at most [`MOST_TRIES`].
#[derive(Debug)]
pub struct Tries<'a, T> {
    endpoints: &'a [T],
    at: usize,
    left: usize,
}

/// Starts the tries of one flow; `next` is the service port's own counter.
pub fn round_robin<'a, T>(next: &AtomicUsize, endpoints: &'a [T]) -> Tries<'a, T> {
    let at = match endpoints.len() {
        0 => 0,
        count => next.fetch_add(1, Ordering::Relaxed) % count,
    };
    Tries {
        endpoints,
        at,
        left: endpoints.len().min(MOST_TRIES),
    }
}

impl<'a, T> Iterator for Tries<'a, T> {
    type Item = &'a T;

    fn next(&mut self) -> Option<&'a T> {
        self.left = self.left.checked_sub(1)?;
        let endpoint = self.endpoints.get(self.at)?;
        self.at = (self.at + 1) % self.endpoints.len();
        Some(endpoint)
    }
}

/// A flow gives up after so many endpoints: a client waits meanwhile.
pub const MOST_TRIES: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    fn tries(next: &AtomicUsize, endpoints: &[u8]) -> Vec<u8> {
        round_robin(next, endpoints).copied().collect()
    }

    #[test]
    fn each_flow_starts_one_further_and_goes_around() {
        let next = AtomicUsize::new(0);
        assert_eq!(tries(&next, &[1, 2, 3, 4]), [1, 2, 3]);
        assert_eq!(tries(&next, &[1, 2, 3, 4]), [2, 3, 4]);
        assert_eq!(tries(&next, &[1, 2, 3, 4]), [3, 4, 1]);
        assert_eq!(tries(&next, &[1, 2]), [2, 1]);
        assert_eq!(tries(&next, &[7]), [7]);
        assert_eq!(tries(&next, &[]), [0_u8; 0]);
    }

    #[test]
    fn the_counter_wraps() {
        let next = AtomicUsize::new(usize::MAX);
        assert_eq!(tries(&next, &[1, 2]).len(), 2);
        assert_eq!(tries(&next, &[1, 2]), [1, 2]);
    }
}
