//! What a cluster is asked before it gets a mesh.

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::version::Info;
use kube::api::ListParams;
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use weft_controller::objects::decode;

use super::rights;
use crate::controller::Reach;
use crate::controller::cluster::{Cluster, reason};
use crate::install;

/// What was found, or why it was not.
pub(super) type Found<T> = Result<T, String>;

/// All of it.
#[derive(Debug)]
pub(in crate::check) struct Facts {
    /// The API server; an error: nobody can be asked, and nothing else is known.
    pub(super) kubernetes: Found<Kubernetes>,
}

/// A cluster whose API server answers.
#[derive(Debug)]
pub(super) struct Kubernetes {
    pub(super) server: String,
    pub(super) version: Info,
    /// The namespace that Weft would be in.
    pub(super) namespace: String,
    /// What the user may not do of what the manifests take, a line each.
    pub(super) lacks: Found<Vec<String>>,
    pub(super) daemon_sets: Found<Vec<DaemonSet>>,
    /// Those of control planes of meshes.
    pub(super) deployments: Found<Vec<Deployment>>,
    /// Cilium's ConfigMap.
    pub(super) cilium: Found<Option<ConfigMap>>,
    /// Names of all definitions.
    pub(super) definitions: Found<Vec<String>>,
    /// Those of Weft.
    pub(super) own_definitions: Found<Vec<CustomResourceDefinition>>,
    pub(super) nodes: Found<Vec<Node>>,
    /// Whether the cluster says which addresses its Services have.
    pub(super) has_service_ranges: Found<bool>,
}

/// Labels of control planes of other meshes.
pub(super) const CONTROL_PLANES: [(&str, &str); 2] = [
    ("app", "istiod"),
    ("linkerd.io/control-plane-component", "destination"),
];
/// The groups of Weft's definitions end with it.
const OWN: &str = ".weft.dev";
/// How many objects are asked for at once.
const PAGE: u32 = 500;

impl Facts {
    /// Asks the cluster that is meant.
    pub(in crate::check) async fn gather(reach: &Reach) -> Self {
        let kubernetes = match reach.cluster().await {
            Ok(cluster) => Kubernetes::ask(cluster).await,
            Err(error) => Err(error.to_string()),
        };
        Self { kubernetes }
    }
}

impl Kubernetes {
    async fn ask(cluster: &Cluster) -> Found<Self> {
        let client = cluster.client();
        let version = client
            .apiserver_version()
            .await
            .map_err(|error| format!("{} does not answer: {}", cluster.server(), reason(&error)))?;
        let manifests = decode::documents(install::ALL).map_err(|it| it.reason)?;
        let lacks = rights::missing(&client, &manifests).await;
        let mut deployments = Ok(vec![]);
        for (key, value) in CONTROL_PLANES {
            let selected = ListParams::default().labels(&format!("{key}={value}"));
            match (
                &mut deployments,
                all(Api::all(client.clone()), selected).await,
            ) {
                (Ok(deployments), Ok(found)) => deployments.extend(found),
                (Ok(_), Err(error)) => deployments = Err(error),
                (Err(_), _) => {}
            }
        }
        let system: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-system");
        let cilium = system.get_opt("cilium-config").await;
        let definitions = names_of_definitions(&client).await;
        let own_definitions = match &definitions {
            Ok(names) => own(&client, names).await,
            Err(error) => Err(error.clone()),
        };
        Ok(Self {
            server: cluster.server().to_owned(),
            version,
            namespace: cluster.weft_namespace().to_owned(),
            lacks,
            daemon_sets: all(Api::all(client.clone()), ListParams::default()).await,
            deployments,
            cilium: cilium.map_err(|error| reason(&error)),
            definitions,
            own_definitions,
            nodes: all(Api::all(client.clone()), ListParams::default()).await,
            has_service_ranges: has_service_ranges(client).await,
        })
    }
}

/// All objects of a kind, page by page.
async fn all<K>(api: Api<K>, mut page: ListParams) -> Found<Vec<K>>
where
    K: Clone + std::fmt::Debug + DeserializeOwned,
{
    page.limit = Some(PAGE);
    let mut objects = vec![];
    loop {
        let listed = api.list(&page).await.map_err(|error| reason(&error))?;
        objects.extend(listed.items);
        match listed.metadata.continue_.filter(|it| !it.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(objects),
        }
    }
}

/// Without their schemas, which are much.
async fn names_of_definitions(client: &Client) -> Found<Vec<String>> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut page = ListParams::default().limit(PAGE);
    let mut names = vec![];
    loop {
        let listed = api.list_metadata(&page).await;
        let listed = listed.map_err(|error| reason(&error))?;
        names.extend(listed.items.iter().filter_map(|it| it.meta().name.clone()));
        match listed.metadata.continue_.filter(|it| !it.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(names),
        }
    }
}

async fn own(client: &Client, names: &[String]) -> Found<Vec<CustomResourceDefinition>> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut found = vec![];
    for name in names.iter().filter(|it| it.ends_with(OWN)) {
        let definition = api.get_opt(name).await;
        found.extend(definition.map_err(|error| reason(&error))?);
    }
    Ok(found)
}

async fn has_service_ranges(client: Client) -> Found<bool> {
    let group = "networking.k8s.io";
    for version in ["v1", "v1beta1"] {
        let resource = ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: format!("{group}/{version}"),
            kind: "ServiceCIDR".to_owned(),
            plural: "servicecidrs".to_owned(),
        };
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        match api.list(&ListParams::default().limit(1)).await {
            Ok(listed) => return Ok(!listed.items.is_empty()),
            // Not known there, in this version.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(reason(&error)),
        }
    }
    Ok(false)
}
