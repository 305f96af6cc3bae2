//! A command's steps: each under a headline, timed, and summed up at the end with whatever a
//! reader must not overlook.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::ui;

/// The steps so far.
pub(crate) struct Steps {
    started: Instant,
    done: Vec<(&'static str, Duration)>,
    warnings: Vec<String>,
}

impl Steps {
    pub(crate) fn start() -> Self {
        Self {
            started: Instant::now(),
            done: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Does one step. Its failure is the command's: `?` it.
    pub(crate) fn step(
        &mut self,
        name: &'static str,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.step_with_warning(name, || work().map(|()| None))
    }

    /// Does one step that can succeed with a warning, which the summary repeats.
    pub(crate) fn step_with_warning(
        &mut self,
        name: &'static str,
        work: impl FnOnce() -> Result<Option<String>>,
    ) -> Result<()> {
        let number = self.done.len() + 1;
        ui::headline(&format!("{number}. {name}"));
        let started = Instant::now();
        let outcome = work();
        let took = started.elapsed();
        let warning = outcome.with_context(|| {
            format!(
                "step {number} ({name}) failed after {}; nothing after it was run",
                seconds(took)
            )
        })?;
        if let Some(warning) = warning {
            ui::warning(&warning);
            self.warnings.push(warning);
        }
        ui::note(&format!("{name}: {}", seconds(took)));
        self.done.push((name, took));
        Ok(())
    }

    /// Prints how long each step took, and the warnings again.
    pub(crate) fn finish(self) {
        ui::headline("all steps succeeded");
        for (name, took) in &self.done {
            ui::note(&format!("{name:<32} {:>8}", seconds(*took)));
        }
        let total = seconds(self.started.elapsed());
        ui::note(&format!("{:<32} {total:>8}", "together"));
        for warning in &self.warnings {
            ui::warning(warning);
        }
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn a_failure_names_the_step() {
        let mut steps = Steps::start();
        steps.step("format", || Ok(())).unwrap();
        let error = steps
            .step("docs", || Err(anyhow!("a broken link")))
            .unwrap_err();
        assert!(error.to_string().starts_with("step 2 (docs) failed after"));
        assert_eq!(error.root_cause().to_string(), "a broken link");
    }

    #[test]
    fn warnings_are_kept_for_the_summary() {
        let mut steps = Steps::start();
        steps
            .step_with_warning("deny", || Ok(Some("no database".to_owned())))
            .unwrap();
        assert_eq!(steps.warnings, ["no database"]);
    }
}
