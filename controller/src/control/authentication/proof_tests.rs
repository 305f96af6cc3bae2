use std::collections::BTreeMap;

use k8s_openapi::api::authentication::v1::UserInfo;
use serde_json::json;

use super::*;
use crate::objects::ObjectKey;
use crate::problems::Origin;
use crate::source::Event;

const AGENT: &str = "system:serviceaccount:weft-system:weft-agent";

fn expected() -> Expected {
    Expected {
        audience: "weft-controller".to_owned(),
        account: "weft-system/weft-agent".parse().expect("valid"),
    }
}

fn answer(extra: &[(&str, &[&str])]) -> TokenReviewStatus {
    let value = |(key, values): &(&str, &[&str])| {
        let values = values.iter().map(|&it| it.to_owned()).collect();
        ((*key).to_owned(), values)
    };
    let extra: BTreeMap<String, Vec<String>> = extra.iter().map(value).collect();
    TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(vec!["weft-controller".to_owned()]),
        user: Some(UserInfo {
            username: Some(AGENT.to_owned()),
            extra: Some(extra),
            ..UserInfo::default()
        }),
        ..TokenReviewStatus::default()
    }
}

/// Pods `a` on node one, `b` without a node, `c` that has failed; `d`, uid `old`, was replaced and `e` deleted.
fn pods() -> AgentPods {
    let pods = AgentPods::new("weft-system".parse().expect("valid"));
    let event = |name: &str, pod: serde_json::Value| {
        Event::read(
            key("weft-system", name),
            std::sync::Arc::new(pod),
            Origin {
                place: "test".into(),
                document: None,
            },
        )
    };
    let pod = |name: &str, uid: &str, node: Option<&str>, phase: &str| {
        event(
            name,
            json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": "weft-system", "uid": uid},
                "spec": {"nodeName": node, "containers": []}, "status": {"phase": phase}}),
        )
    };
    let delete = |name: &str| Event::Delete {
        key: key("weft-system", name),
    };
    for event in [
        pod("a", "ua", Some("one"), "Running"),
        pod("b", "ub", None, "Pending"),
        pod("c", "uc", Some("one"), "Failed"),
        pod("d", "old", Some("one"), "Running"),
        pod("d", "new", Some("two"), "Running"),
        pod("e", "ue", Some("one"), "Running"),
        delete("e"),
        // Says nothing any more of what it said.
        event(
            "a",
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": 1}),
        ),
    ] {
        pods.hear(&vec![event].into());
    }
    let elsewhere = Event::Delete {
        key: key("other", "a"),
    };
    pods.hear(&vec![elsewhere].into());
    pods
}

fn key(namespace: &str, name: &str) -> ObjectKey {
    ObjectKey {
        kind: crate::objects::ObjectKind::Pod,
        namespace: Some(namespace.parse().expect("valid")),
        name: name.parse().expect("valid"),
    }
}

#[test]
fn nodes_are_proved_by_claims_and_pods_that_agree() {
    let pods = pods();
    let node = |name: &'static str| (NODE_NAME, vec![name]);
    let pod =
        |name: &'static str, uid: &'static str| vec![(POD_NAME, vec![name]), (POD_UID, vec![uid])];
    let both = |node_name, name, uid| {
        let mut extra = pod(name, uid);
        extra.push(node(node_name));
        extra
    };
    for (extra, proved) in [
        (vec![node("one")], Ok("one")),
        (both("one", "a", "ua"), Ok("one")),
        (pod("a", "ua"), Ok("one")),
        (both("two", "a", "ua"), Err(Refusal::Disagrees)),
        // The source is behind.
        (both("two", "b", "ub"), Ok("two")),
        (both("two", "new", "un"), Ok("two")),
        (pod("b", "ub"), Err(Refusal::UnknownPod)),
        (pod("new", "un"), Err(Refusal::UnknownPod)),
        (both("one", "a", "other"), Err(Refusal::OtherPod)),
        (pod("a", "other"), Err(Refusal::OtherPod)),
        (both("one", "c", "uc"), Err(Refusal::PodEnded)),
        (pod("d", "new"), Ok("two")),
        (both("one", "d", "old"), Err(Refusal::PodGone)),
        (both("one", "e", "ue"), Err(Refusal::PodGone)),
        (vec![], Err(Refusal::Unbound)),
        (vec![(POD_NAME, vec!["a"])], Err(Refusal::Unbound)),
        (vec![(POD_UID, vec!["ua"])], Err(Refusal::Unbound)),
        (vec![(NODE_NAME, vec!["one", "two"])], Err(Refusal::Unbound)),
        (vec![(NODE_NAME, vec![""])], Err(Refusal::Unbound)),
        (vec![(NODE_NAME, vec!["Not a name"])], Err(Refusal::Unbound)),
        (vec![(NODE_NAME, vec![])], Err(Refusal::Unbound)),
    ] {
        let slices: Vec<_> = extra
            .iter()
            .map(|(key, it)| (*key, it.as_slice()))
            .collect();
        let proof = expected().proof(&answer(&slices));
        let found = proof.and_then(|it| it.node(&pods));
        let found = found.as_ref().map(Name::as_str);
        assert_eq!(found, proved.as_ref().map(|it| *it), "{extra:?}");
    }
}

#[test]
fn answers_that_do_not_fit_prove_nothing() {
    type Change = fn(&mut TokenReviewStatus);
    fn user(status: &mut TokenReviewStatus, name: &str) {
        status.user = Some(UserInfo {
            username: Some(name.to_owned()),
            ..status.user.take().unwrap_or_default()
        });
    }
    let cases: [(Change, Refusal); 12] = [
        (
            |it| it.authenticated = Some(false),
            Refusal::NotAuthenticated,
        ),
        (|it| it.authenticated = None, Refusal::NotAuthenticated),
        (
            |it| it.error = Some("expired".to_owned()),
            Refusal::NotAuthenticated,
        ),
        (
            |it| it.audiences = None,
            Refusal::Audience(expected().audience),
        ),
        (
            |it| it.audiences = Some(vec![]),
            Refusal::Audience(expected().audience),
        ),
        (
            |it| it.audiences = Some(vec!["https://kubernetes.default.svc".to_owned()]),
            Refusal::Audience(expected().audience),
        ),
        (|it| it.user = None, Refusal::Account),
        (|it| user(it, "weft-agent"), Refusal::Account),
        (
            |it| user(it, "system:serviceaccount:weft-system:weft-controller"),
            Refusal::Account,
        ),
        (
            |it| user(it, "system:serviceaccount:shop:weft-agent"),
            Refusal::Account,
        ),
        (|it| user(it, &format!("{AGENT}2")), Refusal::Account),
        (|it| user(it, "system:node:one"), Refusal::Account),
    ];
    for (index, (change, refusal)) in cases.into_iter().enumerate() {
        let mut status = answer(&[(NODE_NAME, &["one"])]);
        assert!(expected().proof(&status).is_ok());
        change(&mut status);
        assert_eq!(expected().proof(&status), Err(refusal), "case {index}");
    }
}
