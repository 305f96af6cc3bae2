//! The control stream's and the store's numbers.

use std::fmt;

use super::asks::Discovery;
use crate::telemetry::{Kind, Samples, Source};

impl Source for Discovery {
    fn collect(&self, samples: &mut Samples) {
        let state = self.state();
        let mut gauge = |name, help, value| samples.add(Kind::Gauge, name, help, vec![], value);
        gauge(
            "weft_control_connected",
            "Whether a control stream is open",
            f64::from(u8::from(state.connected)),
        );
        if let Some(age) = state.knowledge_age() {
            gauge(
                "weft_control_knowledge_age_seconds",
                "How long ago the agent's knowledge was last known to be current",
                age.as_secs_f64(),
            );
        }
        gauge(
            "weft_control_rejected",
            "Resources whose newest version is rejected now",
            state.rejected.len() as f64,
        );
        let mut count = |name, help, value: u64| {
            samples.add(Kind::Counter, name, help, vec![], value as f64);
        };
        count(
            "weft_control_pushes",
            "Pushes received from the controller",
            state.pushes,
        );
        count(
            "weft_control_rejected_resources",
            "Resources of pushes that could not be used",
            state.rejections,
        );
        count(
            "weft_control_connects",
            "Control streams that were opened",
            state.connects,
        );
        count(
            "weft_control_failures",
            "Control streams, and tries to open one, that failed",
            state.failures,
        );
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        let mut shown = formatter.debug_struct("Discovery");
        shown.field("state", &state).finish_non_exhaustive()
    }
}
