//! What an agent says of its metrics, as the command-line tool reads it: any text is read or counted, and quantiles of
//! whatever it counts are numbers within its buckets.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft::metrics::{Scrape, quantile};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let scrape = Scrape::read(&text, |_| true);
    assert!(scrape.values.len() + scrape.unread <= text.lines().count());
    let mut all = 0;
    for series in scrape.values.keys() {
        all += usize::from(scrape.of(&series.name).any(|(it, _)| it == series));
    }
    assert_eq!(all, scrape.values.len(), "every series is found by its name");
    let ends = scrape.values.iter();
    let buckets: Vec<(f64, f64)> = ends
        .filter_map(|(series, count)| Some((series.label("le")?.parse().ok()?, *count)))
        .collect();
    for part in [0.0, 0.5, 0.99, 1.0] {
        let _ = quantile(part, &buckets);
    }
});
