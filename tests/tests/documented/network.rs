//! What docs/policy.md says of NetworkPolicies.

use anyhow::{Result, ensure};
use weft_tests::scenario::eventually;

use super::{HTTP, METRICS, Scene, expect};

pub(crate) fn network_policy(scene: &Scene) -> Result<()> {
    scene.with(&["NetworkPolicy"], || {
        let (http, metrics) = (scene.at_payment(HTTP), scene.at_payment(METRICS));
        eventually("the policy to be in effect", || {
            // That of the check before may be in effect still.
            let shown = expect(&scene.other, http, "/", 403)?;
            ensure!(
                shown.header("weft-error") == Some("network_policy"),
                "{shown:?}"
            );
            Ok(())
        })?;
        for (pod, target, code) in [
            (&scene.order, http, 200),
            (&scene.order, metrics, 403),
            (&scene.monitor, http, 403),
            (&scene.monitor, metrics, 200),
            (&scene.other, metrics, 403),
        ] {
            expect(pod, target, "/", code)?;
        }
        Ok(())
    })
}

pub(crate) fn what_leaves_a_pod(scene: &Scene) -> Result<()> {
    scene.with(&["What leaves a pod"], || {
        let metrics = scene.at_payment(METRICS);
        eventually(
            "the policy to be in effect, and the one before no more",
            || {
                // They are told to two agents, by two ways.
                expect(&scene.other, metrics, "/", 200)?;
                let shown = expect(&scene.order, metrics, "/", 403)?;
                ensure!(
                    shown.header("weft-error") == Some("network_policy_egress"),
                    "{shown:?}"
                );
                Ok(())
            },
        )?;
        expect(&scene.order, scene.at_payment(HTTP), "/", 200)?;
        expect(&scene.order, scene.service, "/", 200)?;
        let other = scene.ledgers[0].sockets(HTTP)[0];
        expect(&scene.order, other, "/", 403)?;
        expect(&scene.other, other, "/", 200)?;
        expect(&scene.other, metrics, "/", 200).map(drop)
    })
}
