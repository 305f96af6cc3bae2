//! How far back is looked, and who remembers.

use std::time::Duration;

use clap::Args;

use super::prometheus::PrometheusUrl;

/// A time up to now.
#[derive(Args, Clone, Debug)]
pub struct Window {
    /// How far back is looked. Agents remember ten minutes; what is longer, a Prometheus has to know.
    #[arg(
        short = 't',
        long,
        visible_alias = "time-window",
        value_name = "TIME",
        default_value = "1m",
        value_parser = crate::command::duration
    )]
    pub window: Duration,
    /// A Prometheus that scrapes the agents, as http://127.0.0.1:9090, to be asked in their place.
    #[arg(long, value_name = "URL", env = "WEFT_PROMETHEUS_URL")]
    pub prometheus_url: Option<PrometheusUrl>,
}

/// Who remembers a window.
#[derive(Debug)]
pub(super) enum Source<'a> {
    /// Agents, so many seconds.
    Agents(u64),
    Prometheus(&'a PrometheusUrl),
}

/// Nobody remembers that much.
#[derive(Debug, thiserror::Error)]
#[error(
    "agents remember {} minutes: of longer ones a Prometheus may know that scrapes them, which --prometheus-url names",
    LONGEST.as_secs() / 60
)]
pub struct TooLong;

/// What agents remember.
const LONGEST: Duration = Duration::from_secs(600);

impl Window {
    pub(super) fn source(&self) -> Result<Source<'_>, TooLong> {
        if let Some(url) = &self.prometheus_url {
            return Ok(Source::Prometheus(url));
        }
        // Agents know whole seconds.
        let seconds = self.window.as_secs_f64().ceil() as u64;
        match seconds <= LONGEST.as_secs() {
            true => Ok(Source::Agents(seconds)),
            false => Err(TooLong),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(window: Duration) -> Result<u64, String> {
        let window = Window {
            window,
            prometheus_url: None,
        };
        match window.source() {
            Ok(Source::Agents(seconds)) => Ok(seconds),
            Ok(Source::Prometheus(_)) => panic!("there is none"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn agents_are_asked_for_as_much_as_they_remember() {
        assert_eq!(source(Duration::from_millis(10)), Ok(1));
        assert_eq!(source(Duration::from_secs(60)), Ok(60));
        assert_eq!(source(LONGEST), Ok(600));
        let told = source(LONGEST + Duration::from_secs(1)).expect_err("too long");
        assert!(
            told.contains("10 minutes") && told.contains("--prometheus-url"),
            "{told}"
        );
    }
}
