//! ServiceProfiles.

use std::sync::Arc;

use core::route::{
    BudgetSettings, Condition, Pattern, Profile, ProfileRoute, ResponseClasses, StatusRange,
};
use weft_core as core;

use super::reliability::{budget, status_range};
use super::{ConvertError, Converted, all, error, parsed, required};
use crate::v1;

/// Regular expressions of all ServiceProfiles of one table.
const MAX_PATTERNS: usize = 256;

impl From<Profile> for v1::Profile {
    fn from(profile: Profile) -> Self {
        Self {
            namespace: profile.namespace.to_string(),
            routes: profile.routes.into_iter().map(Into::into).collect(),
            backends: profile.backends.into_iter().map(Into::into).collect(),
            budget: Some(profile.budget.into()),
        }
    }
}

impl TryFrom<v1::Profile> for Profile {
    type Error = ConvertError;

    fn try_from(message: v1::Profile) -> Converted<Self> {
        Ok(Self {
            namespace: parsed("profile.namespace", &message.namespace)?,
            routes: all(message.routes)?,
            backends: all(message.backends)?,
            budget: match message.budget {
                Some(message) => budget("profile.budget", message)?,
                None => BudgetSettings::DEFAULT,
            },
        })
    }
}

impl From<ProfileRoute> for v1::ProfileRoute {
    fn from(route: ProfileRoute) -> Self {
        Self {
            name: route.name,
            condition: Some(route.condition.into()),
            reliability: Some(route.reliability.into()),
            classes: route.classes.map(|it| ResponseClasses::clone(&it).into()),
        }
    }
}

impl TryFrom<v1::ProfileRoute> for ProfileRoute {
    type Error = ConvertError;

    fn try_from(message: v1::ProfileRoute) -> Converted<Self> {
        Ok(Self {
            name: message.name,
            condition: required("profile.condition", message.condition)?.try_into()?,
            reliability: required("profile.reliability", message.reliability)?.try_into()?,
            classes: message
                .classes
                .map(|it| it.try_into().map(Arc::new))
                .transpose()?,
        })
    }
}

impl From<ResponseClasses> for v1::ResponseClasses {
    fn from(classes: ResponseClasses) -> Self {
        let list = |ranges: Vec<StatusRange>| ranges.into_iter().map(Into::into).collect();
        Self {
            failures: list(classes.failures),
            successes: list(classes.successes),
        }
    }
}

impl TryFrom<v1::ResponseClasses> for ResponseClasses {
    type Error = ConvertError;

    fn try_from(message: v1::ResponseClasses) -> Converted<Self> {
        let list = |field: &str, ranges: Vec<v1::StatusRange>| {
            let ranges = ranges.into_iter().map(|it| status_range(field, it));
            ranges.collect::<Converted<Vec<_>>>()
        };
        Ok(Self {
            failures: list("profile.classes.failures", message.failures)?,
            successes: list("profile.classes.successes", message.successes)?,
        })
    }
}

impl From<Condition> for v1::Condition {
    fn from(condition: Condition) -> Self {
        use v1::condition::Kind;
        let list = |conditions: Vec<Condition>| v1::Conditions {
            conditions: conditions.into_iter().map(Into::into).collect(),
        };
        let kind = match condition {
            Condition::Path(pattern) => Kind::Path(pattern.as_str().to_owned()),
            Condition::Method(method) => Kind::Method(method.to_string()),
            Condition::All(conditions) => Kind::All(list(conditions)),
            Condition::Any(conditions) => Kind::Any(list(conditions)),
            Condition::Not(condition) => Kind::Not(Box::new((*condition).into())),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Condition> for Condition {
    type Error = ConvertError;

    fn try_from(message: v1::Condition) -> Converted<Self> {
        use v1::condition::Kind;
        Ok(match required("condition.kind", message.kind)? {
            Kind::Path(text) => {
                let pattern = Pattern::new(&text);
                Self::Path(pattern.map_err(|reason| error("condition.path", reason))?)
            }
            Kind::Method(text) => Self::Method(parsed("condition.method", &text)?),
            Kind::All(list) => Self::All(all(list.conditions)?),
            Kind::Any(list) => Self::Any(all(list.conditions)?),
            Kind::Not(condition) => Self::Not(Box::new((*condition).try_into()?)),
        })
    }
}

/// Refuses more regular expressions than an agent should keep beside those of routes, before any is compiled.
pub(super) fn few_patterns(profiles: &[v1::Profile]) -> Converted<()> {
    let routes = profiles.iter().flat_map(|it| &it.routes);
    let conditions = routes.filter_map(|it| it.condition.as_ref());
    let patterns: usize = conditions.map(patterns).sum();
    if patterns <= MAX_PATTERNS {
        return Ok(());
    }
    let reason = format!("{patterns} regular expressions, more than {MAX_PATTERNS}");
    Err(error("route_table.profiles", reason))
}

fn patterns(condition: &v1::Condition) -> usize {
    use v1::condition::Kind;
    let list = |list: &v1::Conditions| list.conditions.iter().map(patterns).sum();
    match &condition.kind {
        Some(Kind::Path(_)) => 1,
        Some(Kind::All(conditions) | Kind::Any(conditions)) => list(conditions),
        Some(Kind::Not(condition)) => patterns(condition),
        Some(Kind::Method(_)) | None => 0,
    }
}
