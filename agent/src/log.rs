//! The log: text or JSON lines on standard error, with a level that can be changed while running.

use anyhow::{Context, Result, ensure};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::config::LogFormat;

/// Reads and changes what is logged.
#[derive(Clone)]
pub struct LogControl {
    handle: reload::Handle<EnvFilter, Registry>,
}

/// Starts logging.
///
/// # Errors
/// A filter that cannot be read.
pub fn init(filter: &str, format: LogFormat) -> Result<LogControl> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let lines: Box<dyn Layer<_> + Send + Sync> = match format {
        LogFormat::Text => Box::new(lines),
        LogFormat::Json => Box::new(lines.json().flatten_event(true)),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .context("starting the log")?;
    Ok(LogControl { handle })
}

impl LogControl {
    /// The filter in force.
    pub fn filter(&self) -> String {
        let text = self.handle.with_current(ToString::to_string);
        text.unwrap_or_default()
    }

    /// Puts another filter in force: `info`, `weft_agent=debug,access=off`, ...
    ///
    /// # Errors
    /// A filter that cannot be read; the old one stays.
    pub fn set(&self, filter: &str) -> Result<()> {
        let filter = parse(filter)?;
        self.handle.reload(filter).context("changing the filter")
    }
}

fn parse(filter: &str) -> Result<EnvFilter> {
    // Its parser cuts text by offsets that may be within a letter, and panics.
    ensure!(
        filter.is_ascii(),
        "{filter:?} is no log filter: letters beyond ASCII"
    );
    EnvFilter::builder()
        .parse(filter)
        .with_context(|| format!("{filter:?} is no log filter: try info or weft_agent=debug"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_is_a_filter_or_refused() {
        for good in ["info", "weft_agent=debug,access=off", " warn"] {
            assert!(parse(good).is_ok(), "{good:?}");
        }
        for bad in ["a=b=c", "\u{c}t,\u{45e}=ot: $", " \u{45e}=info"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
