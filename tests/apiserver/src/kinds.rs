//! What the server can serve: built-in kinds, and those that a definition adds.

/// A kind of objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its API group; empty for the core's.
    pub group: String,
    /// The versions that are served, preferred one first.
    pub versions: Vec<String>,
    /// As in manifests: `EndpointSlice`.
    pub kind: String,
    /// As in paths: `endpointslices`.
    pub plural: String,
    /// What people type instead.
    pub short_names: Vec<String>,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
    /// Whether a definition adds it. Lists of other kinds do not repeat the kind in items.
    pub custom: bool,
    /// Whether what is said about its objects is written apart from them, at `/status`.
    pub status: bool,
}

impl Kind {
    /// A kind that every API server has.
    pub fn built_in(group: &str, version: &str, kind: &str, namespaced: bool) -> Self {
        Self {
            custom: false,
            namespaced,
            ..Self::custom(group, &[version], kind)
        }
    }

    /// A kind of namespaced objects that a definition adds.
    pub fn custom(group: &str, versions: &[&str], kind: &str) -> Self {
        Self {
            group: group.to_owned(),
            versions: versions.iter().map(|&it| it.to_owned()).collect(),
            kind: kind.to_owned(),
            plural: plural(kind),
            short_names: vec![],
            namespaced: true,
            custom: true,
            status: false,
        }
    }

    /// The same with a status.
    #[must_use]
    pub fn with_status(self) -> Self {
        Self {
            status: true,
            ..self
        }
    }

    /// The kinds of a cluster that nothing was installed in.
    pub fn all_built_in() -> Vec<Self> {
        vec![
            Self::built_in("", "v1", "Namespace", false),
            Self::built_in("", "v1", "Node", false),
            Self::built_in("", "v1", "Pod", true),
            Self::built_in("", "v1", "Service", true),
            Self::built_in("", "v1", "ServiceAccount", true),
            Self::built_in("", "v1", "ConfigMap", true),
            Self::built_in("", "v1", "Secret", true),
            Self::built_in("apps", "v1", "DaemonSet", true),
            Self::built_in("apps", "v1", "Deployment", true),
            Self::built_in(
                "apiextensions.k8s.io",
                "v1",
                "CustomResourceDefinition",
                false,
            ),
            Self::built_in("discovery.k8s.io", "v1", "EndpointSlice", true),
            Self::built_in("networking.k8s.io", "v1", "NetworkPolicy", true),
            Self::built_in("coordination.k8s.io", "v1", "Lease", true),
            Self::built_in("events.k8s.io", "v1", "Event", true),
            Self::built_in("networking.k8s.io", "v1", "ServiceCIDR", false),
            Self::built_in(RBAC, "v1", "ClusterRole", false),
            Self::built_in(RBAC, "v1", "ClusterRoleBinding", false),
            Self::built_in(RBAC, "v1", "Role", true),
            Self::built_in(RBAC, "v1", "RoleBinding", true),
            Self::built_in("apps", "v1", "DaemonSet", true).with_status(),
            Self::built_in("apps", "v1", "Deployment", true).with_status(),
            Self::built_in("", "v1", "ResourceQuota", true).with_status(),
            Self::built_in("policy", "v1", "PodDisruptionBudget", true).with_status(),
            Self::built_in("scheduling.k8s.io", "v1", "PriorityClass", false),
            Self::built_in(
                "apiextensions.k8s.io",
                "v1",
                "CustomResourceDefinition",
                false,
            )
            .with_status(),
            Self::built_in(
                "admissionregistration.k8s.io",
                "v1",
                "ValidatingWebhookConfiguration",
                false,
            ),
        ]
    }

    /// The kinds that a mesh adds: Weft's own, Linkerd's, and the Gateway API's.
    pub fn all_of_meshes() -> Vec<Self> {
        const WEFT: &str = "policy.weft.dev";
        const LINKERD: &str = "policy.linkerd.io";
        const GATEWAY: &str = "gateway.networking.k8s.io";
        let mut kinds = vec![];
        for group in [WEFT, LINKERD] {
            for kind in [
                "AuthorizationPolicy",
                "MeshTLSAuthentication",
                "NetworkAuthentication",
                "HTTPLocalRateLimitPolicy",
                "EgressNetwork",
            ] {
                let kind = Self::custom(group, &["v1alpha1"], kind);
                // As the definitions of each have it.
                let status = group == WEFT
                    || matches!(
                        kind.kind.as_str(),
                        "HTTPLocalRateLimitPolicy" | "EgressNetwork"
                    );
                kinds.push(Self { status, ..kind });
            }
        }
        kinds.extend([
            Self::custom(WEFT, &["v1alpha1"], "Server").with_status(),
            Self::custom(LINKERD, &["v1beta3", "v1beta2", "v1beta1"], "Server"),
            Self::custom(LINKERD, &["v1beta3", "v1beta2", "v1beta1"], "HTTPRoute").with_status(),
            Self::custom("linkerd.io", &["v1alpha2"], "ServiceProfile"),
            Self::custom(GATEWAY, &["v1", "v1beta1"], "HTTPRoute").with_status(),
            Self::custom(GATEWAY, &["v1"], "GRPCRoute").with_status(),
            Self::custom(GATEWAY, &["v1alpha3", "v1alpha2"], "TLSRoute").with_status(),
            Self::custom(GATEWAY, &["v1alpha2"], "TCPRoute").with_status(),
            Self::custom(GATEWAY, &["v1beta1"], "ReferenceGrant"),
        ]);
        kinds
    }

    /// The kinds of policies that Cilium and Calico add.
    pub fn all_of_cnis() -> Vec<Self> {
        let global = |kind: Self| Self {
            namespaced: false,
            ..kind
        };
        let mut kinds = vec![
            Self::custom("cilium.io", &["v2"], "CiliumNetworkPolicy"),
            global(Self::custom(
                "cilium.io",
                &["v2"],
                "CiliumClusterwideNetworkPolicy",
            )),
        ];
        for (group, version) in [("projectcalico.org", "v3"), ("crd.projectcalico.org", "v1")] {
            kinds.push(Self::custom(group, &[version], "NetworkPolicy"));
            kinds.push(global(Self::custom(
                group,
                &[version],
                "GlobalNetworkPolicy",
            )));
        }
        kinds
    }

    /// `apiVersion` of its objects in a version.
    pub fn api_version(&self, version: &str) -> String {
        match self.group.as_str() {
            "" => version.to_owned(),
            group => format!("{group}/{version}"),
        }
    }
}

const RBAC: &str = "rbac.authorization.k8s.io";

fn plural(kind: &str) -> String {
    let name = kind.to_lowercase();
    match name.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None if name.ends_with('s') => format!("{name}es"),
        None => format!("{name}s"),
    }
}
