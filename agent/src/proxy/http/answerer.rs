//! Who answers on a connection to a server, and so whether it may speak for the mesh: what an application says of why
//! the mesh has answered is not for anybody to believe.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::HeaderMap;
use hyper::body::Frame;

use super::answer::ERROR;

/// Who answers on a connection.
#[derive(Clone, Debug)]
pub(in crate::proxy) enum Answerer {
    /// An agent of this mesh, which lets nobody else speak for it.
    Agent,
    /// An application, or somebody who passes on what one says as it is.
    Application,
    /// An application, and once this is true somebody of this agent who translates for it.
    Translated(Arc<AtomicBool>),
}

impl Answerer {
    /// Takes out of an answer's head what only the mesh may say, unless it has said so.
    pub(super) fn check(&self, headers: &mut HeaderMap) {
        if !self.is_of_mesh() {
            headers.remove(ERROR);
        }
    }

    /// Whether somebody of this agent translates for it.
    pub(super) fn is_translated(&self) -> bool {
        match self {
            Self::Agent | Self::Application => false,
            Self::Translated(is) => is.load(Ordering::Acquire),
        }
    }

    fn is_of_mesh(&self) -> bool {
        match self {
            Self::Agent => true,
            Self::Application => false,
            Self::Translated(is) => is.load(Ordering::Acquire),
        }
    }
}

/// Takes the same out of what follows an answer's head, where nobody but an application has anything to say: an agent
/// that ends an answer is the last one on its way.
pub(super) fn check_rest<D>(rest: Frame<D>) -> Frame<D> {
    match rest.into_trailers() {
        Ok(mut trailers) => {
            trailers.remove(ERROR);
            Frame::trailers(trailers)
        }
        Err(rest) => rest,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn applications_do_not_speak_for_the_mesh() {
        let translated = |is: bool| Answerer::Translated(Arc::new(is.into()));
        for (answerer, is_believed) in [
            (Answerer::Agent, true),
            (Answerer::Application, false),
            (translated(false), false),
            (translated(true), true),
        ] {
            let mut headers = HeaderMap::new();
            for value in ["denied", "not_http"] {
                headers.append(ERROR, HeaderValue::from_static(value));
            }
            answerer.check(&mut headers);
            assert_eq!(headers.contains_key(ERROR), is_believed, "{answerer:?}");
        }
    }

    #[test]
    fn nor_in_trailers() {
        let lines = [("weft-error", "denied"), ("grpc-status", "0")];
        let lines = lines.map(|(name, value)| {
            let name = http::HeaderName::from_static(name);
            (name, HeaderValue::from_static(value))
        });
        let trailers = Frame::<()>::trailers(HeaderMap::from_iter(lines));
        let left = check_rest(trailers).into_trailers().expect("trailers");
        assert!(left.len() == 1 && left.contains_key("grpc-status"));
        let data = check_rest(Frame::data(7)).into_data();
        assert_eq!(data.ok(), Some(7));
    }
}
