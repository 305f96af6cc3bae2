//! What the API server serves now of the kinds that can be read, each in the newest version of which that
//! is so.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{APIGroup, APIResourceList};
use kube::Client;
use kube::core::ApiResource;

use crate::objects::ObjectKind;

/// The kinds that are served, and where.
pub(crate) type Served = BTreeMap<ObjectKind, ApiResource>;

/// Without these there is nothing to mesh, or nothing that closes what is to be closed: a server that does not have
/// them is too old, or is just starting.
pub(super) const REQUIRED: [ObjectKind; 6] = [
    ObjectKind::Namespace,
    ObjectKind::Node,
    ObjectKind::Pod,
    ObjectKind::Service,
    ObjectKind::EndpointSlice,
    ObjectKind::NetworkPolicy,
];

/// Whether objects of a kind are of use.
pub(super) fn is_of_use(kind: ObjectKind) -> bool {
    // Identities follow from pods, and owners from their labels. What nothing is made of need not be read, and
    // the controller needs no right to read it.
    kind != ObjectKind::ServiceAccount
}

/// What was found out.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// What is served.
    pub(super) served: Served,
    /// What may be served or not: the server names a version, and says, asked about that, that it does not know it. One
    /// that starts, or that is not as fresh as another, does so for a while.
    pub(super) doubtful: BTreeSet<ObjectKind>,
}

/// Asks what is served.
///
/// # Errors
/// Something could not be found out. What was known before is then better than what was just heard: a kind that is
/// wrongly taken for removed would be policies that do not hold.
pub(super) async fn look(client: &Client) -> Result<Found, kube::Error> {
    ready(client).await?;
    let mut lists = vec![client.list_core_api_resources("v1").await?];
    let mut unclear = vec![];
    for version in versions_of_use(&client.list_api_groups().await?.groups) {
        match resources(client, &version).await? {
            Some(list) => lists.push(list),
            None if is_named(client, &version).await? => match resources(client, &version).await? {
                Some(list) => lists.push(list),
                None => unclear.push(version),
            },
            // Removed since it was listed.
            None => {}
        }
    }
    let served = choose(&lists);
    let doubtful = doubtful(&served, &unclear);
    Ok(Found { served, doubtful })
}

/// What is served, for who can do without what is in doubt.
///
/// # Errors
/// Something could not be found out.
pub(crate) async fn served(client: &Client) -> Result<Served, kube::Error> {
    look(client).await.map(|it| it.served)
}

/// The resources of `group/version`; none: the server does not know it.
async fn resources(client: &Client, version: &str) -> Result<Option<APIResourceList>, kube::Error> {
    match client.list_api_group_resources(version).await {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        outcome => outcome.map(Some),
    }
}

async fn is_named(client: &Client, version: &str) -> Result<bool, kube::Error> {
    let named = versions_of_use(&client.list_api_groups().await?.groups);
    Ok(named.iter().any(|it| it == version))
}

/// The kinds that only versions could have that are named and not known.
fn doubtful(served: &Served, unclear: &[String]) -> BTreeSet<ObjectKind> {
    let may_be = |kind: &ObjectKind| {
        let versions = kind.versions().iter();
        let mut versions = versions.map(|it| format!("{}/{it}", kind.group()));
        is_of_use(*kind) && !served.contains_key(kind) && versions.any(|it| unclear.contains(&it))
    };
    ObjectKind::all().into_iter().filter(may_be).collect()
}

/// A server that starts serves kinds that are built in before those of definitions.
async fn ready(client: &Client) -> Result<(), kube::Error> {
    let request = http::Request::get("/readyz").body(vec![]);
    let request = request.map_err(kube::Error::HttpError)?;
    match client.request_text(request).await {
        // Not everybody may ask, nor does every server behind another name know it.
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => Ok(()),
        outcome => outcome.map(drop),
    }
}

/// The served versions of groups, as `group/version`, in which a kind of ours may be.
fn versions_of_use(groups: &[APIGroup]) -> Vec<String> {
    let readable: BTreeSet<(&str, &str)> = ObjectKind::all()
        .into_iter()
        .flat_map(|kind| kind.versions().iter().map(move |it| (kind.group(), *it)))
        .collect();
    let mut found = vec![];
    for group in groups {
        for version in &group.versions {
            if readable.contains(&(group.name.as_str(), version.version.as_str())) {
                found.push(version.group_version.clone());
            }
        }
    }
    found
}

fn choose(lists: &[APIResourceList]) -> Served {
    let mut served = Served::new();
    for kind in ObjectKind::all().into_iter().filter(|it| is_of_use(*it)) {
        let versions = kind.versions().iter();
        let found = versions.filter_map(|version| find(kind, version, lists));
        if let Some(resource) = found.into_iter().next() {
            served.insert(kind, resource);
        }
    }
    served
}

fn find(kind: ObjectKind, version: &str, lists: &[APIResourceList]) -> Option<ApiResource> {
    let api_version = match kind.group() {
        "" => version.to_owned(),
        group => format!("{group}/{version}"),
    };
    let list = lists.iter().find(|it| it.group_version == api_version)?;
    let resource = list.resources.iter().find(|it| {
        let can = |verb: &str| it.verbs.iter().any(|it| it == verb);
        it.kind == kind.as_str() && !it.name.contains('/') && can("list") && can("watch")
    })?;
    Some(ApiResource {
        group: kind.group().to_owned(),
        version: version.to_owned(),
        api_version,
        kind: resource.kind.clone(),
        plural: resource.name.clone(),
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResource;
    use weft_core::PolicyGroup;
    use weft_core::route::RouteKind;

    use super::*;

    fn list(api_version: &str, kinds: &[(&str, &str)], verbs: &[&str]) -> APIResourceList {
        let resource = |(name, kind): &(&str, &str)| APIResource {
            name: (*name).to_owned(),
            kind: (*kind).to_owned(),
            verbs: verbs.iter().map(|&it| it.to_owned()).collect(),
            ..APIResource::default()
        };
        APIResourceList {
            group_version: api_version.to_owned(),
            resources: kinds.iter().map(resource).collect(),
        }
    }

    #[test]
    fn the_newest_version_that_can_be_read_is_chosen() {
        const READ: &[&str] = &["get", "list", "watch"];
        const GATEWAY: &str = "gateway.networking.k8s.io";
        let http = ObjectKind::Route(RouteKind::Http);
        let server = ObjectKind::Server(PolicyGroup::Linkerd);
        let of_gateway = |version: &str, verbs: &[&str]| {
            let kinds = [
                ("httproutes/status", "HTTPRoute"),
                ("httproutes", "HTTPRoute"),
            ];
            list(&format!("{GATEWAY}/{version}"), &kinds, verbs)
        };
        for (lists, kind, expected) in [
            (vec![], http, None),
            (vec![of_gateway("v1beta1", READ)], http, Some("v1beta1")),
            (
                vec![of_gateway("v1beta1", READ), of_gateway("v1", READ)],
                http,
                Some("v1"),
            ),
            // Newer than what can be read.
            (vec![of_gateway("v2", READ)], http, None),
            (vec![of_gateway("v1", &["get"])], http, None),
            (
                vec![
                    list("policy.linkerd.io/v1beta1", &[("servers", "Server")], READ),
                    list("policy.linkerd.io/v1beta2", &[("servers", "Server")], READ),
                ],
                server,
                Some("v1beta2"),
            ),
            // Another group's kind of the same name.
            (
                vec![list("example.com/v1beta3", &[("servers", "Server")], READ)],
                server,
                None,
            ),
        ] {
            let served = choose(&lists);
            let version = served.get(&kind).map(|it| it.version.as_str());
            assert_eq!(version, expected, "{lists:?}");
        }
    }

    #[test]
    fn what_is_named_and_not_known_is_doubtful() {
        const READ: &[&str] = &["get", "list", "watch"];
        let unclear = ["gateway.networking.k8s.io/v1".to_owned()];
        let http = ObjectKind::Route(RouteKind::Http);
        let grpc = ObjectKind::Route(RouteKind::Grpc);
        let older = list(
            "gateway.networking.k8s.io/v1beta1",
            &[("httproutes", "HTTPRoute")],
            READ,
        );
        assert!(doubtful(&Served::new(), &[]).is_empty());
        let all = doubtful(&Served::new(), &unclear);
        assert!(all.contains(&http) && all.contains(&grpc), "{all:?}");
        assert!(!all.contains(&ObjectKind::Pod), "{all:?}");
        // The same objects, in another version.
        let all = doubtful(&choose(&[older]), &unclear);
        assert!(!all.contains(&http) && all.contains(&grpc), "{all:?}");
    }

    #[test]
    fn kinds_are_found_by_their_names() {
        for kind in ObjectKind::all() {
            assert_eq!(ObjectKind::find(kind.group(), kind.as_str()), Some(kind));
        }
    }
}
