use super::policies::{POD, WEFT, authorization, server};
use super::*;

/// What cannot be used is reported with its field; what was in force stays, both what was closed
/// and what was open.
#[test]
fn invalid_policies_stay_as_they_were() {
    let tls = "---\n{apiVersion: policy.weft.dev/v1alpha1, kind: MeshTLSAuthentication,
        metadata: {name: a, namespace: production}, spec: {identities: ['*']}}\n";
    let network = "---\n{apiVersion: policy.weft.dev/v1alpha1, kind: NetworkAuthentication,
        metadata: {name: n, namespace: production}, spec: {networks: [{cidr: 10.0.0.0/8, except: [10.9.0.0/16]}]}}\n";
    let good_server = server("policy.weft.dev/v1alpha1", "port: 8080");
    let required = "{kind: MeshTLSAuthentication, name: a}, {kind: NetworkAuthentication, name: n}";
    let good_policy = authorization(WEFT, "kind: Server, name: payment-api", required);
    let mut cluster = Cluster::of(&(POD.to_owned() + &good_server + &good_policy + tls + network));
    assert!(cluster.allows(8080, Some("production/order")));
    let told = cluster.told("one");
    for (bad, good, field) in [
        (
            good_server.replace("port: 8080", "port: 0"),
            good_server.as_str(),
            "spec.port",
        ),
        (
            good_server.replace("port: 8080", "port: '8080'"),
            &good_server,
            "spec.port",
        ),
        (
            good_server.replace("port: 8080", "prot: 8080"),
            &good_server,
            "spec",
        ),
        (
            good_server.replace("matchLabels", "matchLabel"),
            &good_server,
            "spec.podSelector.matchLabel",
        ),
        (
            good_server.replace("podSelector", "podSelectors"),
            &good_server,
            "spec.podSelectors",
        ),
        (
            good_server.replace("8080", "8080, proxyProtocol: HTTP"),
            &good_server,
            "spec.proxyProtocol",
        ),
        (
            good_server.replace(
                "matchLabels: {app: payment}",
                "matchExpressions: [{key: a, operator: Is}]",
            ),
            &good_server,
            "spec.podSelector.matchExpressions[0].operator",
        ),
        (
            good_policy.replace("kind: Server", "kind: Pod"),
            &good_policy,
            "spec.targetRef.kind",
        ),
        (
            good_policy.replace("requiredAuthenticationRefs", "required"),
            &good_policy,
            "spec",
        ),
        (
            good_policy.replace("name: n}", "name: N}"),
            &good_policy,
            "spec.requiredAuthenticationRefs[1].name",
        ),
        (tls.replace("'*'", "'*.local'"), tls, "spec.identities[0]"),
        (
            tls.replace("'*'", "'spiffe://x'"),
            tls,
            "spec.identities[0]",
        ),
        (tls.replace("{identities: ['*']}", "{}"), tls, "spec"),
        (
            tls.replace("identities: ['*']", "identityRefs: [{kind: Pod, name: a}]"),
            tls,
            "spec.identityRefs[0].kind",
        ),
        (
            network.replace("10.0.0.0/8", "10.0.0.0/33"),
            network,
            "spec.networks[0].cidr",
        ),
        (
            network.replace("10.9.0.0/16", "10.9"),
            network,
            "spec.networks[0].except[0]",
        ),
        (
            network.replace("except", "excpet"),
            network,
            "spec.networks[0].excpet",
        ),
        (
            network.replace("[{cidr: 10.0.0.0/8, except: [10.9.0.0/16]}]", "[]"),
            network,
            "spec.networks",
        ),
    ] {
        cluster.apply(&bad);
        assert_eq!(cluster.told("one"), told, "{bad}");
        let problems = cluster.problems();
        assert_eq!(problems.len(), 1, "{bad}: {problems:?}");
        assert!(
            problems[0].starts_with(&format!("{field}: ")),
            "{field}: {problems:?}"
        );
        cluster.apply(good);
        assert!(cluster.problems().is_empty());
        assert_eq!(cluster.told("one"), told);
    }
}

/// A Server that cannot be read, and never could: nobody gets in where it may have meant.
#[test]
fn a_server_that_was_never_valid_closes() {
    let bad = "port: 8080, acessPolicy: all-unauthenticated";
    let text = server("policy.weft.dev/v1alpha1", bad);
    let opens = authorization(WEFT, "kind: Server, name: payment-api", "");
    for (written, closed, open) in [
        (text.clone(), vec![8080], vec![9090]),
        (
            text.replace("port: 8080", "port: admin"),
            vec![9090],
            vec![8080],
        ),
        (
            text.replace("port: 8080", "port: [8080]"),
            vec![8080, 9090],
            vec![],
        ),
        (
            text.replace("matchLabels", "matchLabel"),
            vec![8080],
            vec![9090],
        ),
        (
            text.replace("{matchLabels: {app: payment}}", "7"),
            vec![8080],
            vec![9090],
        ),
        (
            text.replace("app: payment", "app: else"),
            vec![],
            vec![8080, 9090],
        ),
    ] {
        let mut cluster = Cluster::of(&(POD.to_owned() + &written + &opens));
        for port in closed {
            assert!(
                !cluster.allows(port, Some("production/order")),
                "{written}: {port}"
            );
        }
        for port in open {
            assert!(cluster.allows(port, None), "{written}: {port}");
        }
        assert!(!cluster.problems().is_empty());
        // Once it can be read, it is a Server like others.
        cluster.apply(&server("policy.weft.dev/v1alpha1", "port: 8080"));
        assert!(cluster.allows(8080, None), "opened by the policy");
        assert!(cluster.problems().is_empty(), "{:?}", cluster.problems());
        cluster.delete(&opens);
        assert!(!cluster.allows(8080, None));
        cluster.delete(&written);
        assert!(cluster.allows(8080, None));
    }
}

/// One object must not become so large that it ends the streams of all agents.
#[test]
fn what_is_too_large_for_agents_is_not_told() {
    let tls = |count: usize| {
        let identities: Vec<_> = (0..count)
            .map(|it| format!("spiffe://cluster.local/ns/production/sa/an-account-number-{it}"))
            .collect();
        let identities = identities.join(", ");
        format!(
            "---\n{{apiVersion: {WEFT}/v1alpha1, kind: MeshTLSAuthentication,
            metadata: {{name: a, namespace: production}}, spec: {{identities: [{identities}]}}}}\n"
        )
    };
    let required = "{kind: MeshTLSAuthentication, name: a}";
    let policy = authorization(WEFT, "kind: Server, name: payment-api", required);
    let policies = |count: usize| -> String {
        let named = |it| policy.replacen("name: ", &format!("name: p{it}-"), 1);
        (0..count).map(named).collect()
    };
    let base = POD.to_owned() + &server("policy.weft.dev/v1alpha1", "port: 8080");
    // Too many in one object: that object does not count.
    let cluster = Cluster::of(&(base.clone() + &tls(2049) + &policies(1)));
    assert!(!cluster.allows(8080, Some("production/an-account-number-1")));
    assert!(cluster.problems()[1].starts_with("spec.identities: 2049 entries"));

    // Large by repetition, in number and in bytes: nobody gets in where nothing was told before,
    for (identities, copies) in [(2048, 9), (1800, 9)] {
        let large = base.clone() + &tls(identities) + &policies(copies);
        let cluster = Cluster::of(&large);
        assert!(
            cluster
                .server("policy.weft.dev/production/payment-api")
                .is_none()
        );
        assert!(!cluster.allows(8080, Some("production/an-account-number-1")));
        assert_eq!(cluster.problems().len(), 1, "{:?}", cluster.problems());
        assert_eq!(cluster.not_programmed(), 2 + copies);

        // and else what was told before holds, until it is smaller again.
        let mut cluster = Cluster::of(&(base.clone() + &tls(2) + &policies(1)));
        let told = cluster.told("one");
        cluster.apply(&large);
        assert_eq!(cluster.told("one"), told);
        assert_eq!(cluster.problems().len(), 1);
        assert_eq!(cluster.not_programmed(), 2 + copies);
        cluster.apply(&tls(1));
        assert_eq!(cluster.not_programmed(), 0);
        assert!(!cluster.allows(8080, Some("production/an-account-number-1")));
        assert!(cluster.allows(8080, Some("production/an-account-number-0")));
        assert!(cluster.problems().is_empty());
    }
}
