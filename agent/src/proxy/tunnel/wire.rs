//! What both ends of a tunnel agree on: how a flow is asked for and answered. Pure, panic-free
//! functions over what a peer sent; `docs/wire.md` is their specification.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use h2::ext::Protocol;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, request,
};
use weft_core::TUNNEL_PORT;

use super::claim::OpaqueBy;

/// A flow that the peer asks for: a port at the address it connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRequest {
    /// The application's port.
    pub port: NonZeroU16,
    /// The port that the client application connected from, where the peer says so.
    pub source_port: Option<NonZeroU16>,
    /// By which Service's declaration the peer does not look into it, where it says so.
    pub opaque_by: Option<OpaqueBy>,
}

/// Why a request is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Another method than CONNECT.
    #[error("the tunnel was asked for something else than CONNECT")]
    Method,
    /// CONNECT for another protocol (RFC 8441).
    #[error("extended CONNECT is not served")]
    ExtendedConnect,
    /// The authority is no `address:port`.
    #[error("the authority is not an IP address and a port")]
    Authority,
    /// The authority's address is not that of the connection.
    #[error("the authority names {asked}, but the connection goes to {connected}")]
    OtherAddress {
        /// The authority's.
        asked: IpAddr,
        /// The connection's.
        connected: IpAddr,
    },
    /// A port of the mesh itself.
    #[error("port {0} belongs to the mesh")]
    ReservedPort(u16),
    /// `weft-source-port` is no port.
    #[error("{SOURCE_PORT} is not a port")]
    SourcePort,
}

impl BadRequest {
    /// How it is answered.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// Reads the authority of a CONNECT: `IPv4:port` or `[IPv6]:port`, nothing else. The address is
/// canonical: an IPv4-mapped one is IPv4.
///
/// # Errors
/// [`BadRequest::Authority`].
pub fn parse_authority(text: &str) -> Result<(IpAddr, NonZeroU16), BadRequest> {
    let (address, port) = text.rsplit_once(':').ok_or(BadRequest::Authority)?;
    let address: IpAddr = match address
        .strip_prefix('[')
        .and_then(|it| it.strip_suffix(']'))
    {
        Some(v6) => IpAddr::V6(v6.parse().map_err(|_| BadRequest::Authority)?),
        None => IpAddr::V4(address.parse().map_err(|_| BadRequest::Authority)?),
    };
    let port = parse_port(port).ok_or(BadRequest::Authority)?;
    Ok((address.to_canonical(), port))
}

/// Reads a decimal port: 1 to 65535, no sign, no leading zero.
pub fn parse_port(text: &str) -> Option<NonZeroU16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    if digits && !text.starts_with('0') {
        text.parse().ok()
    } else {
        None
    }
}

/// Checks a request that arrived on a connection to `connected` (canonical). `ours` says whether
/// the peer is an agent of this mesh (`weft-h2/1`), whose headers are heeded.
///
/// # Errors
/// What is wrong with it.
pub fn read_request(
    head: &request::Parts,
    connected: IpAddr,
    ours: bool,
) -> Result<FlowRequest, BadRequest> {
    if head.method != Method::CONNECT {
        return Err(BadRequest::Method);
    }
    if head.extensions.get::<Protocol>().is_some() {
        return Err(BadRequest::ExtendedConnect);
    }
    let authority = head.uri.authority().ok_or(BadRequest::Authority)?;
    let (asked, port) = parse_authority(authority.as_str())?;
    if asked != connected {
        return Err(BadRequest::OtherAddress { asked, connected });
    }
    if port.get() == TUNNEL_PORT {
        return Err(BadRequest::ReservedPort(port.get()));
    }
    let (source_port, opaque_by) = if ours {
        let claim = head.headers.get(OPAQUE_SERVICE);
        let claim = claim.and_then(|it| OpaqueBy::read(it.as_bytes()));
        (read_source_port(&head.headers)?, claim)
    } else {
        (None, None)
    };
    Ok(FlowRequest {
        port,
        source_port,
        opaque_by,
    })
}

fn read_source_port(headers: &HeaderMap) -> Result<Option<NonZeroU16>, BadRequest> {
    let mut values = headers.get_all(SOURCE_PORT).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => {
            let text = value.to_str().map_err(|_| BadRequest::SourcePort)?;
            parse_port(text).map(Some).ok_or(BadRequest::SourcePort)
        }
        (Some(_), Some(_)) => Err(BadRequest::SourcePort),
    }
}

/// Asks for a flow to `destination`. The rest is for agents of this mesh only.
pub fn write_request(
    destination: SocketAddr,
    source_port: Option<u16>,
    opaque_by: Option<&OpaqueBy>,
) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = Version::HTTP_2;
    // An address and a port are always a valid authority, so the empty one never stands.
    *request.uri_mut() = destination.to_string().parse().unwrap_or_default();
    if let Some(port) = source_port {
        request
            .headers_mut()
            .insert(SOURCE_PORT, HeaderValue::from(port));
    }
    let claim = opaque_by.and_then(|it| HeaderValue::try_from(it.to_string()).ok());
    if let Some(claim) = claim {
        request.headers_mut().insert(OPAQUE_SERVICE, claim);
    }
    request
}

/// Answers a request. `reason` is sent to agents of this mesh only.
pub fn write_response(status: StatusCode, reason: Option<&'static str>) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    if let Some(reason) = reason {
        response
            .headers_mut()
            .insert(REFUSAL, HeaderValue::from_static(reason));
    }
    response
}

/// The reason that came with a refusal: a word of lower-case letters and `_`.
pub fn read_reason(headers: &HeaderMap) -> Option<String> {
    let reason = headers.get(REFUSAL)?.to_str().ok()?;
    let word = reason
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    (word && reason.len() <= 40).then(|| reason.to_owned())
}

/// The port that the client application connected from (`weft-h2/1`, request).
pub const SOURCE_PORT: HeaderName = HeaderName::from_static("weft-source-port");
/// By which Service's declaration the client's agent does not look into the flow (`weft-h2/1`, request).
pub const OPAQUE_SERVICE: HeaderName = HeaderName::from_static("weft-opaque-service");
/// Why a flow was refused, as a metric label (`weft-h2/1`, response).
pub const REFUSAL: HeaderName = HeaderName::from_static("weft-refusal");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(request: Request<()>) -> request::Parts {
        request.into_parts().0
    }

    fn connect(authority: &str) -> request::Parts {
        head(
            Request::connect(authority)
                .body(())
                .expect("a valid request"),
        )
    }

    #[test]
    fn authorities() {
        for (text, address, port) in [
            ("10.1.2.3:80", "10.1.2.3", 80),
            ("[2001:db8::1]:65535", "2001:db8::1", 65535),
            ("[::ffff:10.1.2.3]:1", "10.1.2.3", 1),
        ] {
            let (found, found_port) = parse_authority(text).expect(text);
            assert_eq!(found, address.parse::<IpAddr>().expect("valid"), "{text}");
            assert_eq!(found_port.get(), port, "{text}");
        }
        for text in [
            "",
            ":",
            ":80",
            "10.1.2.3",
            "10.1.2.3:",
            "10.1.2.3:0",
            "10.1.2.3:080",
            "10.1.2.3:+80",
            "10.1.2.3:65536",
            "10.1.2.3:80 ",
            " 10.1.2.3:80",
            "10.1.2:80",
            "010.1.2.3:80",
            "web.shop:80",
            "2001:db8::1:80",
            "[2001:db8::1]",
            "[10.1.2.3]:80",
            "[fe80::1%2]:80",
            "[::1]]:80",
            "user@10.1.2.3:80",
            "10.1.2.3:80/x",
            "10.1.2.3:８０",
        ] {
            assert_eq!(
                parse_authority(text),
                Err(BadRequest::Authority),
                "{text:?}"
            );
        }
    }

    #[test]
    fn requests_are_checked_against_their_connection() {
        let connected = "10.1.2.3".parse().expect("valid");
        let asked = |authority| read_request(&connect(authority), connected, true);
        let good = asked("10.1.2.3:80").expect("good");
        assert_eq!((good.port.get(), good.source_port), (80, None));
        assert_eq!(
            asked("10.1.2.3:15008"),
            Err(BadRequest::ReservedPort(15008))
        );
        assert!(matches!(
            asked("10.1.2.4:80"),
            Err(BadRequest::OtherAddress { .. })
        ));
        assert_eq!(asked("web:80"), Err(BadRequest::Authority));
        let get = head(Request::get("http://10.1.2.3:80/").body(()).expect("valid"));
        assert_eq!(read_request(&get, connected, true), Err(BadRequest::Method));
        let mut extended = connect("10.1.2.3:80");
        extended
            .extensions
            .insert(Protocol::from_static("websocket"));
        assert_eq!(
            read_request(&extended, connected, true),
            Err(BadRequest::ExtendedConnect)
        );
    }

    #[test]
    fn the_source_port_is_heeded_from_our_own_agents_only() {
        let connected = "10.1.2.3".parse().expect("valid");
        let mut request = connect("10.1.2.3:80");
        request.headers.insert(SOURCE_PORT, HeaderValue::from(4711));
        let port =
            |request: &_, ours| read_request(request, connected, ours).map(|it| it.source_port);
        assert_eq!(port(&request, true), Ok(NonZeroU16::new(4711)));
        assert_eq!(port(&request, false), Ok(None));
        request.headers.append(SOURCE_PORT, HeaderValue::from(4712));
        assert_eq!(port(&request, true), Err(BadRequest::SourcePort));
        for bad in ["", "0", "65536", "-1", "1 ", "x"] {
            request
                .headers
                .insert(SOURCE_PORT, HeaderValue::from_static(bad));
            assert_eq!(port(&request, true), Err(BadRequest::SourcePort), "{bad:?}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for address in ["10.1.2.3:80", "[2001:db8::1]:8080"] {
            let destination: SocketAddr = address.parse().expect("valid");
            let claim: OpaqueBy = "db:5432".parse().expect("valid");
            let request = head(write_request(destination, Some(4711), Some(&claim)));
            let read = read_request(&request, destination.ip(), true).expect("reads");
            assert_eq!(read.port.get(), destination.port());
            assert_eq!(read.source_port, NonZeroU16::new(4711));
            assert_eq!(read.opaque_by, Some(claim));
            let read = read_request(&request, destination.ip(), false).expect("reads");
            assert_eq!(read.opaque_by, None, "from a stranger");
        }
        let response = write_response(StatusCode::SERVICE_UNAVAILABLE, Some("connect_refused"));
        let reason = read_reason(response.headers());
        assert_eq!(reason.as_deref(), Some("connect_refused"));
    }

    proptest! {
        #[test]
        fn any_authority_is_read_or_refused(text in ".{0,60}") {
            let _ = parse_authority(&text);
        }

        #[test]
        fn every_address_and_port_is_an_authority(address: IpAddr, port in 1_u16..) {
            let text = SocketAddr::new(address, port).to_string();
            let (found, found_port) = parse_authority(&text).expect("valid");
            prop_assert_eq!(found, address.to_canonical());
            prop_assert_eq!(found_port.get(), port);
        }
    }
}
