//! What the API server serves now of the kinds that can be read, each in the newest version of which that
//! is so.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{APIGroup, APIResourceList};
use kube::Client;
use kube::core::ApiResource;

use super::connect::explain;
use super::world::shown_elsewhere;
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
    /// What may be served or not, and why that is not clear: the server names a version, and cannot say, asked about that,
    /// what is in it. One that starts, or that is not as fresh as another, does so for a while, and so does one before an
    /// API server of somebody else's (an aggregated API) for as long as that is away.
    pub(super) doubtful: BTreeMap<ObjectKind, String>,
}

/// Versions that are named, and of which the server cannot say what is in them; and why.
type Unclear = BTreeMap<String, String>;

/// What is in a version.
enum Answer {
    Resources(APIResourceList),
    Unclear(String),
    /// It was removed since it was named.
    Nothing,
}

/// An answer about a version takes this long at most. What somebody else's API server says is waited for by everybody.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks what is served. Each version is asked about by itself: one that cannot be told holds up no other.
///
/// # Errors
/// Something could not be found out. What was known before is then better than what was just heard: a kind that is
/// wrongly taken for removed would be policies that do not hold.
pub(super) async fn look(client: &Client) -> Result<Found, kube::Error> {
    ready(client).await?;
    let mut lists = vec![client.list_core_api_resources("v1").await?];
    let mut unclear = Unclear::new();
    let versions = versions_of_use(&client.list_api_groups().await?.groups);
    let answers = versions.iter().map(|version| of_version(client, version));
    let answers = join_all(answers).await;
    for (version, answer) in versions.into_iter().zip(answers) {
        match answer? {
            Answer::Resources(list) => lists.push(list),
            Answer::Unclear(reason) => drop(unclear.insert(version, reason)),
            Answer::Nothing => {}
        }
    }
    let served = choose(&lists);
    let doubtful = doubtful(&served, &unclear);
    Ok(Found { served, doubtful })
}

/// What is in a version that is named.
///
/// # Errors
/// It is about nothing but this version that the server cannot answer.
async fn of_version(client: &Client, version: &str) -> Result<Answer, kube::Error> {
    match resources(client, version).await? {
        Answer::Nothing if is_named(client, version).await? => {}
        answer => return Ok(answer),
    }
    Ok(match resources(client, version).await? {
        Answer::Nothing => Answer::Unclear("it does not know it (404)".to_owned()),
        answer => answer,
    })
}

/// What is served, for who can do without what is in doubt.
///
/// # Errors
/// Something could not be found out.
pub(crate) async fn served(client: &Client) -> Result<Served, kube::Error> {
    look(client).await.map(|it| it.served)
}

/// The resources of `group/version`.
async fn resources(client: &Client, version: &str) -> Result<Answer, kube::Error> {
    let asked = client.list_api_group_resources(version);
    let Ok(outcome) = tokio::time::timeout(PATIENCE, asked).await else {
        let reason = format!("it does not answer within {} s", PATIENCE.as_secs());
        return Ok(Answer::Unclear(reason));
    };
    match outcome {
        Ok(list) => Ok(Answer::Resources(list)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Answer::Nothing),
        // It wants to be asked for less, or by somebody else, whatever it is. What is behind it may say so for reasons of
        // its own, which nobody else waits for: it was just asked by the same token which groups there are.
        Err(kube::Error::Api(status))
            if matches!(status.code, 401 | 429) && !is_shown_elsewhere(version) =>
        {
            Err(kube::Error::Api(status))
        }
        Err(error) => Ok(Answer::Unclear(explain(&error))),
    }
}

/// Whether an API server beside the cluster's own answers for a version.
fn is_shown_elsewhere(version: &str) -> bool {
    let group = version.split_once('/').map_or("", |(group, _)| group);
    shown_elsewhere().any(|it| it.group() == group)
}

async fn is_named(client: &Client, version: &str) -> Result<bool, kube::Error> {
    let named = versions_of_use(&client.list_api_groups().await?.groups);
    Ok(named.iter().any(|it| it == version))
}

/// The kinds that only versions could have of which it is unclear what is in them, and why that is so.
fn doubtful(served: &Served, unclear: &Unclear) -> BTreeMap<ObjectKind, String> {
    let why = |kind: ObjectKind| {
        let versions = kind.versions().iter();
        let mut versions = versions.map(|it| format!("{}/{it}", kind.group()));
        versions.find_map(|it| unclear.get(&it).cloned())
    };
    let kinds = ObjectKind::all().into_iter();
    let unserved = kinds.filter(|it| is_of_use(*it) && !served.contains_key(it));
    unserved
        .filter_map(|kind| Some((kind, why(kind)?)))
        .collect()
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
        let unclear = ("gateway.networking.k8s.io/v1", "away");
        let unclear = [unclear].map(|(version, why)| (version.to_owned(), why.to_owned()));
        let unclear = Unclear::from(unclear);
        let http = ObjectKind::Route(RouteKind::Http);
        let grpc = ObjectKind::Route(RouteKind::Grpc);
        let older = list(
            "gateway.networking.k8s.io/v1beta1",
            &[("httproutes", "HTTPRoute")],
            READ,
        );
        assert!(doubtful(&Served::new(), &Unclear::new()).is_empty());
        let all = doubtful(&Served::new(), &unclear);
        let why = |kind: &ObjectKind| all.get(kind).map(String::as_str);
        assert_eq!([why(&http), why(&grpc)], [Some("away"); 2], "{all:?}");
        assert_eq!(why(&ObjectKind::Pod), None, "{all:?}");
        // The same objects, in another version.
        let all = doubtful(&choose(&[older]), &unclear);
        assert!(
            !all.contains_key(&http) && all.contains_key(&grpc),
            "{all:?}"
        );
    }

    #[test]
    fn kinds_are_found_by_their_names() {
        for kind in ObjectKind::all() {
            assert_eq!(ObjectKind::find(kind.group(), kind.as_str()), Some(kind));
        }
    }
}
