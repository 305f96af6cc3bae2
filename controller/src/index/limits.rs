//! HTTPLocalRateLimitPolicies: what is kept of them, and which one holds for a Server.

use std::collections::HashMap;
use std::num::NonZeroU32;

use weft_core::{
    AuthorizationName, IdentityMatch, Name, ObjectName, PolicyGroup, RateLimit, RateOverride,
    ServerName,
};

use super::Index;
use super::pods::Created;
use super::policies::{self, Setting, Target};
use super::publish_policies::own_or_other;
use crate::objects::policy as written;
use crate::objects::{Fault, ObjectKey, ObjectKind};
use crate::problems::Facet;

/// All of them.
pub(super) type Limits = HashMap<AuthorizationName, LimitRecord>;

/// A policy.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LimitRecord {
    created: Option<Created>,
    /// The Server's group; none: whichever has it.
    group: Option<PolicyGroup>,
    server: Name,
    limit: RateLimit,
}

impl LimitRecord {
    /// Checks a policy.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub(super) fn check(
        name: AuthorizationName,
        created: Option<Created>,
        spec: &written::HttpLocalRateLimitPolicySpec,
        setting: Setting<'_>,
    ) -> Result<Self, Fault> {
        let Target::Server(group, server) = policies::target(&spec.target_ref, setting)? else {
            return Err(Fault::new("spec.targetRef.kind", "not a Server"));
        };
        let of = |field: &str, it: Option<written::Rate>| {
            let field = format!("spec.{field}.requestsPerSecond");
            it.map(|it| rate(&field, it.requests_per_second))
                .transpose()
        };
        let written = spec.overrides.as_deref().unwrap_or_default();
        policies::few("spec.overrides", written.len(), MAX_OVERRIDES)?;
        let mut overrides = vec![];
        for (index, it) in written.iter().enumerate() {
            let field = format!("spec.overrides[{index}]");
            let refs = format!("{field}.clientRefs");
            policies::few(&refs, it.client_refs.len(), MAX_CLIENTS)?;
            let mut clients = vec![];
            for (index, it) in it.client_refs.iter().enumerate() {
                let field = format!("{refs}[{index}]");
                if it.kind != "ServiceAccount" || !policies::is_core(it) {
                    return Err(Fault::new(format!("{field}.kind"), "not a ServiceAccount"));
                }
                if let IdentityMatch::Exact(identity) =
                    policies::service_account(&field, it, setting)?
                {
                    clients.push(identity);
                }
            }
            let field = format!("{field}.requestsPerSecond");
            overrides.push(RateOverride {
                requests_per_second: rate(&field, it.requests_per_second)?,
                clients,
            });
        }
        Ok(Self {
            created,
            group,
            server,
            limit: RateLimit {
                name,
                total: of("total", spec.total)?,
                identity: of("identity", spec.identity)?,
                overrides,
            },
        })
    }

    fn server(&self) -> ObjectName {
        ObjectName {
            namespace: self.limit.name.name.namespace.clone(),
            name: self.server.clone(),
        }
    }

    /// Sorts the older first; then by name.
    fn precedence(&self) -> (bool, Option<&Created>, &AuthorizationName) {
        (
            self.created.is_none(),
            self.created.as_ref(),
            &self.limit.name,
        )
    }
}

impl Index {
    pub(super) fn set_limit(&mut self, name: &AuthorizationName, record: Option<LimitRecord>) {
        let now = record.as_ref().map(LimitRecord::server);
        let before = match record {
            Some(record) => self.policies.limits.insert(name.clone(), record),
            None => self.policies.limits.remove(name),
        };
        let before = before.as_ref().map(LimitRecord::server);
        for server in before.into_iter().chain(now) {
            self.dirty_limits_of(&server);
            for group in [PolicyGroup::Weft, PolicyGroup::Linkerd] {
                let name = server.clone();
                self.dirty.servers.insert(ServerName { group, name });
            }
        }
        self.dirty.limits.insert(name.clone());
    }

    /// What is to be said about the policies for Servers of a name.
    pub(super) fn dirty_limits_of(&mut self, server: &ObjectName) {
        let all = self.policies.limits.iter();
        let meant = all.filter(|(_, it)| it.server() == *server);
        let meant = meant.map(|(name, _)| name.clone());
        self.dirty.limits.extend(meant);
    }

    /// The limit of a Server: the oldest policy for it.
    pub(super) fn rate_limit(&self, server: &ServerName) -> Option<&RateLimit> {
        let all = self.policies.limits.values();
        let meant = all.filter(|it| self.limited(it) == *server);
        let oldest = meant.min_by(|one, other| one.precedence().cmp(&other.precedence()));
        oldest.map(|it| &it.limit)
    }

    /// Reports a policy for a Server that is not there, or has an older one.
    pub(super) fn report_limit(&mut self, name: &AuthorizationName) {
        let key = ObjectKey {
            kind: ObjectKind::HttpLocalRateLimitPolicy(name.group),
            namespace: Some(name.name.namespace.clone()),
            name: name.name.name.clone(),
        };
        let server = self.policies.limits.get(name).map(|it| self.limited(it));
        let (known, unknown): (Vec<_>, Vec<_>) = server
            .into_iter()
            .partition(|it| self.policies.servers.contains_key(it));
        let unknown = unknown.into_iter().map(|server| {
            let reason = format!("Server {} is not known", server.name);
            Fault::new("spec.targetRef", reason)
        });
        let older = known.into_iter().filter_map(|server| {
            let limit = self.rate_limit(&server).filter(|it| it.name != *name)?;
            let reason = format!("Server {} has the older {}", server.name, limit.name);
            Some(Fault::new("spec.targetRef", reason))
        });
        let effect = "it limits nothing";
        self.report(&key, Facet::Target, unknown.collect(), effect);
        self.report(&key, Facet::Conflict, older.collect(), effect);
    }

    fn limited(&self, record: &LimitRecord) -> ServerName {
        let name = record.server();
        let has = |group| {
            let name = name.clone();
            let servers = &self.policies.servers;
            servers.contains_key(&ServerName { group, name })
        };
        let own = record.limit.name.group;
        let group = record.group.unwrap_or_else(|| own_or_other(own, has));
        ServerName { group, name }
    }
}

fn rate(field: &str, written: i64) -> Result<NonZeroU32, Fault> {
    let number = u32::try_from(written).ok().filter(|it| *it <= MAX_RATE);
    number.and_then(NonZeroU32::new).ok_or_else(|| {
        let reason = format!("not a number from 1 to {MAX_RATE}");
        Fault::new(field, reason)
    })
}

const MAX_RATE: u32 = 1_000_000;
const MAX_OVERRIDES: usize = 64;
const MAX_CLIENTS: usize = 256;
