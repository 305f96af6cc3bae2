//! Several named checks on one cluster: each says how it went, all run, and the test fails at the
//! end if one did.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Result, anyhow};

/// The checks of one test. `WEFT_ONLY=<text>` runs just those with the text in their name.
#[derive(Debug)]
pub struct Checks {
    test: String,
    only: Option<String>,
    failed: Vec<String>,
}

impl Checks {
    /// The checks of a test with this name.
    pub fn new(test: &str) -> Checks {
        // Straight to the process's standard error: a test harness would hold it back until the
        // end, and who watches wants to see progress.
        Checks {
            test: test.into(),
            only: std::env::var("WEFT_ONLY").ok(),
            failed: Vec::new(),
        }
    }

    /// Runs a check.
    pub fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        if self
            .only
            .as_ref()
            .is_some_and(|only| !name.contains(only.as_str()))
        {
            return;
        }
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(check))
            .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(&*panic))));
        let took = start.elapsed().as_millis();
        match result {
            Ok(()) => report(&format!("{}: ok      {name} ({took} ms)", self.test)),
            Err(error) => {
                report(&format!(
                    "{}: FAILED  {name} ({took} ms): {error:#}",
                    self.test
                ));
                self.failed.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// Fails with all that failed.
    ///
    /// # Panics
    ///
    /// If a check failed.
    pub fn finish(self) {
        assert!(
            self.failed.is_empty(),
            "{} checks of {} failed:\n{}",
            self.failed.len(),
            self.test,
            self.failed.join("\n")
        );
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default()
}

/// Says something that is worth seeing also when the test succeeds.
pub fn report(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// A figure that belongs into the summary of a long run: said like [`report`], and added to the file
/// that `WEFT_FIGURES` names, for `cargo xtask soak`.
pub fn figure(what: &str, value: impl std::fmt::Display) {
    use std::io::Write;
    report(&format!("{what}: {value}"));
    let Some(path) = std::env::var_os("WEFT_FIGURES") else {
        return;
    };
    let file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(path);
    let written = file.and_then(|mut file| writeln!(file, "{what}\t{value}"));
    if let Err(error) = written {
        report(&format!("WEFT_FIGURES: {error}"));
    }
}
