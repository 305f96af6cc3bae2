//! What the rules of routes do to requests and responses.

use core::route::{
    Filter, HeaderEdit, Mirror, PathRewrite, Redirect, RedirectScheme, Rewrite, Share,
};
use http::{HeaderName, HeaderValue};
use weft_core as core;

use super::{ConvertError, Converted, error, non_empty, parsed, port, required};
use crate::v1;

impl From<Filter> for v1::Filter {
    fn from(filter: Filter) -> Self {
        use v1::filter::Kind;
        let kind = match filter {
            Filter::RequestHeaders(edit) => Kind::RequestHeaders(edit.into()),
            Filter::ResponseHeaders(edit) => Kind::ResponseHeaders(edit.into()),
            Filter::Redirect(redirect) => Kind::Redirect(redirect.into()),
            Filter::Rewrite(rewrite) => Kind::Rewrite(rewrite.into()),
            Filter::Mirror(mirror) => Kind::Mirror(v1::Mirror {
                target: Some(mirror.target.into()),
                numerator: mirror.share.numerator(),
                denominator: mirror.share.denominator(),
            }),
            Filter::Invalid(reason) => Kind::Invalid(reason),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Filter> for Filter {
    type Error = ConvertError;

    fn try_from(message: v1::Filter) -> Converted<Self> {
        use v1::filter::Kind;
        Ok(match required("filter.kind", message.kind)? {
            Kind::RequestHeaders(edit) => Self::RequestHeaders(edit.try_into()?),
            Kind::ResponseHeaders(edit) => Self::ResponseHeaders(edit.try_into()?),
            Kind::Redirect(redirect) => Self::Redirect(redirect.try_into()?),
            Kind::Rewrite(rewrite) => Self::Rewrite(rewrite.try_into()?),
            Kind::Mirror(mirror) => Self::Mirror(Mirror {
                target: required("mirror.target", mirror.target)?.try_into()?,
                share: Share::new(mirror.numerator, mirror.denominator)
                    .map_err(|reason| error("mirror.share", reason))?,
            }),
            Kind::Invalid(reason) => Self::Invalid(reason),
        })
    }
}

impl From<HeaderEdit> for v1::HeaderEdit {
    fn from(edit: HeaderEdit) -> Self {
        let header = |(name, value): &(HeaderName, HeaderValue)| v1::Header {
            name: name.to_string(),
            value: value.as_bytes().to_vec(),
        };
        Self {
            set: edit.set().iter().map(header).collect(),
            add: edit.added().iter().map(header).collect(),
            remove: edit.removed().iter().map(ToString::to_string).collect(),
        }
    }
}

impl TryFrom<v1::HeaderEdit> for HeaderEdit {
    type Error = ConvertError;

    fn try_from(message: v1::HeaderEdit) -> Converted<Self> {
        let header = |it: v1::Header| {
            let name = parsed("header_edit.name", &it.name)?;
            let value = HeaderValue::from_bytes(&it.value);
            let value = value.map_err(|reason| error("header_edit.value", reason))?;
            Ok((name, value))
        };
        let set = message.set.into_iter().map(header);
        let add = message.add.into_iter().map(header);
        let remove = message.remove.iter();
        let remove = remove.map(|it| parsed("header_edit.remove", it));
        Self::new(
            set.collect::<Converted<_>>()?,
            add.collect::<Converted<_>>()?,
            remove.collect::<Converted<_>>()?,
        )
        .map_err(|reason| error("header_edit", reason))
    }
}

impl From<Redirect> for v1::Redirect {
    fn from(redirect: Redirect) -> Self {
        let scheme = match redirect.scheme {
            None => v1::RedirectScheme::Unspecified,
            Some(RedirectScheme::Http) => v1::RedirectScheme::Http,
            Some(RedirectScheme::Https) => v1::RedirectScheme::Https,
        };
        Self {
            scheme: scheme.into(),
            hostname: redirect
                .hostname
                .map(|it| it.to_string())
                .unwrap_or_default(),
            path: redirect.path.map(Into::into),
            port: redirect.port.map_or(0, u32::from),
            status: redirect.status.as_u16().into(),
        }
    }
}

impl TryFrom<v1::Redirect> for Redirect {
    type Error = ConvertError;

    fn try_from(message: v1::Redirect) -> Converted<Self> {
        let scheme = match v1::RedirectScheme::try_from(message.scheme) {
            Ok(v1::RedirectScheme::Unspecified) => None,
            Ok(v1::RedirectScheme::Http) => Some(RedirectScheme::Http),
            Ok(v1::RedirectScheme::Https) => Some(RedirectScheme::Https),
            Err(_) => {
                let reason = format!("unknown scheme {}", message.scheme);
                return Err(error("redirect.scheme", reason));
            }
        };
        let status = u16::try_from(message.status).unwrap_or_default();
        let status = Self::status(status).map_err(|reason| error("redirect.status", reason))?;
        Ok(Self {
            scheme,
            hostname: hostname("redirect.hostname", message.hostname)?,
            path: message.path.map(PathRewrite::try_from).transpose()?,
            port: match message.port {
                0 => None,
                number => Some(port("redirect.port", number)?),
            },
            status,
        })
    }
}

impl From<Rewrite> for v1::Rewrite {
    fn from(rewrite: Rewrite) -> Self {
        Self {
            hostname: rewrite
                .hostname
                .map(|it| it.to_string())
                .unwrap_or_default(),
            path: rewrite.path.map(Into::into),
        }
    }
}

impl TryFrom<v1::Rewrite> for Rewrite {
    type Error = ConvertError;

    fn try_from(message: v1::Rewrite) -> Converted<Self> {
        Ok(Self {
            hostname: hostname("rewrite.hostname", message.hostname)?,
            path: message.path.map(PathRewrite::try_from).transpose()?,
        })
    }
}

fn hostname(field: &str, text: String) -> Converted<Option<http::uri::Authority>> {
    let hostname = non_empty(text).map(|it| core::route::hostname(&it));
    hostname.transpose().map_err(|reason| error(field, reason))
}

impl From<PathRewrite> for v1::PathRewrite {
    fn from(rewrite: PathRewrite) -> Self {
        use v1::path_rewrite::Kind;
        let kind = match rewrite {
            PathRewrite::Full(path) => Kind::Full(path),
            PathRewrite::Prefix(path) => Kind::Prefix(path),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::PathRewrite> for PathRewrite {
    type Error = ConvertError;

    fn try_from(message: v1::PathRewrite) -> Converted<Self> {
        use v1::path_rewrite::Kind;
        let rewrite = match required("path_rewrite.kind", message.kind)? {
            Kind::Full(path) => Self::full(&path),
            Kind::Prefix(path) => Self::prefix(&path),
        };
        rewrite.map_err(|reason| error("path_rewrite", reason))
    }
}
