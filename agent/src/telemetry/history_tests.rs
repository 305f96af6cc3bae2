use super::*;
use crate::telemetry::samples::HistogramSample;

fn counters(values: &[(&str, f64)]) -> Samples {
    let mut samples = Samples::default();
    for (pod, value) in values {
        let labels = vec![("pod", (*pod).to_owned())];
        samples.add(Kind::Counter, "response", "", labels, *value);
    }
    samples
}

fn after(began: Instant, seconds: u64) -> Instant {
    began + Duration::from_secs(seconds)
}

/// What is told of pods, how much time it is of, and how much is not told.
fn told(
    history: &History,
    now: &[(&str, f64)],
    window: u64,
    at: Instant,
) -> (Vec<(String, f64)>, u64, usize) {
    let mut samples = counters(now);
    let recent = history.recent(&mut samples, Duration::from_secs(window), at);
    let mut told = vec![];
    samples.retain(|_, labels, numbers| {
        told.push((labels[0].1.clone(), numbers[0]));
        true
    });
    (told, recent.covered.as_secs(), recent.left_out)
}

fn grew(history: &History, now: f64, window: u64, at: Instant) -> (f64, u64) {
    let (told, covered, _) = told(history, &[("a", now)], window, at);
    (told[0].1, covered)
}

#[test]
fn a_time_is_made_of_whole_samples_and_what_came_since() {
    let began = Instant::now();
    let history = History::new(began);
    // One before any sample: since the agent began.
    assert_eq!(grew(&history, 7.0, 60, after(began, 3)), (7.0, 3));
    for sample in 1..=100_u64 {
        let samples = counters(&[("a", (sample * sample) as f64)]);
        history.sample(samples, after(began, sample * 10));
    }
    let at = after(began, 1004);
    assert_eq!(grew(&history, 10_001.0, 1, at), (1.0, 4));
    assert_eq!(grew(&history, 10_001.0, 10, at), (200.0, 14));
    assert_eq!(grew(&history, 10_001.0, 60, at), (10_001.0 - 8836.0, 64));
    assert_eq!(grew(&history, 10_001.0, 600, at), (10_001.0 - 1600.0, 604));
    assert_eq!(grew(&history, 10_001.0, 6000, at), (10_001.0 - 1600.0, 604));
}

#[test]
fn one_that_begins_anew_or_late_begins_at_nothing() {
    let began = Instant::now();
    let history = History::new(began);
    history.sample(counters(&[("a", 100.0)]), after(began, 10));
    history.sample(counters(&[("a", 3.0)]), after(began, 20));
    assert_eq!(grew(&history, 2.0, 600, after(began, 21)), (105.0, 21));
    let at = after(began, 22);
    let (all, ..) = told(&history, &[("a", 3.0), ("b", 9.0)], 1, at);
    assert_eq!(all, [("a".to_owned(), 0.0), ("b".to_owned(), 9.0)]);
    // Gone, and there again.
    history.sample(counters(&[]), after(began, 30));
    history.sample(counters(&[("a", 4.0)]), after(began, 40));
    assert_eq!(grew(&history, 4.0, 600, after(began, 40)), (4.0, 40));
}

#[test]
fn histograms_grow_by_bucket_and_sum() {
    let histogram = |counts: [u64; 2], sum: f64| {
        let mut samples = Samples::default();
        let buckets = vec![(1.0, counts[0]), (f64::INFINITY, counts[1])];
        let sample = HistogramSample { sum, buckets };
        samples.histogram("response_latency_ms", "", vec![], sample);
        samples
    };
    let began = Instant::now();
    let history = History::new(began);
    history.sample(histogram([3, 1], 9.0), after(began, 10));
    let mut now = histogram([5, 1], 9.5);
    history.recent(&mut now, Duration::from_secs(1), after(began, 15));
    let text = now.encode();
    for line in [
        "response_latency_ms_sum{} 0.5\n",
        "response_latency_ms_bucket{le=\"1.0\"} 2\n",
        "response_latency_ms_bucket{le=\"+Inf\"} 2\n",
    ] {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
}

#[test]
fn what_stands_still_has_no_ring() {
    let began = Instant::now();
    let history = History::new(began);
    for sample in 1..=61 {
        history.sample(counters(&[("a", 5.0)]), after(began, sample * 10));
        let rings = history.locked().room.rings;
        assert_eq!(rings, usize::from(sample <= 60), "{sample}");
    }
    assert_eq!(grew(&history, 6.0, 600, after(began, 611)), (1.0, 601));
}

#[test]
fn what_there_is_no_room_for_is_counted_and_not_guessed() {
    let names: Vec<String> = (0..MAX_SERIES + 2).map(|it| format!("pod-{it}")).collect();
    let all = |value: f64| {
        let values: Vec<(&str, f64)> = names.iter().map(|it| (it.as_str(), value)).collect();
        values
    };
    let began = Instant::now();
    let history = History::new(began);
    history.sample(counters(&all(1.0)), after(began, 10));
    let shown = {
        let mut samples = Samples::default();
        history.collect(&mut samples);
        samples.encode()
    };
    assert!(shown.contains("weft_history_series{} 20000\n"), "{shown}");
    assert!(
        shown.contains("weft_history_left_out_series{} 2\n"),
        "{shown}"
    );
    let (known, _, left_out) = told(&history, &all(3.0), 60, after(began, 15));
    assert_eq!((known.len(), left_out), (MAX_SERIES, 2));
    assert!(known.iter().all(|(_, by)| *by == 3.0));
    // Two go, so that there is room for the others; what those did before is not known.
    let rest = &all(5.0)[2..];
    history.sample(counters(rest), after(began, 20));
    history.sample(counters(rest), after(began, 30));
    history.sample(counters(rest), after(began, 40));
    let later = &all(6.0)[2..];
    let (known, _, left_out) = told(&history, later, 600, after(began, 41));
    assert_eq!((known.len(), left_out), (MAX_SERIES - 2, 2));
    let (known, _, left_out) = told(&history, later, 1, after(began, 41));
    assert_eq!((known.len(), left_out), (MAX_SERIES, 0));
    assert!(known.iter().all(|(_, by)| *by == 1.0));
}

/// Measured in a process of its own: what other tests take at the same time would count.
#[test]
fn a_full_history_is_small_and_taken_fast() {
    const ALONE: &str = "WEFT_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = std::thread::current().name().expect("a test").to_owned();
        let itself = std::env::current_exe().expect("it runs");
        let args = ["--exact", &name, "--nocapture", "--test-threads=1"];
        let output = std::process::Command::new(itself)
            .args(args)
            .env(ALONE, "1")
            .output()
            .expect("it runs again");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        assert!(said.contains(" bytes a series"), "it was measured: {said}");
        return;
    }
    let samples = |value: f64| {
        let mut samples = Samples::default();
        for number in 0..MAX_SERIES {
            let labels = vec![
                ("direction", "outbound".to_owned()),
                ("namespace", format!("team-{}", number % 100)),
                ("deployment", format!("app-{}", number % 500)),
                ("pod", format!("app-{}-5d8f9c7b6-{number:05}", number % 500)),
                (
                    "authority",
                    format!("service-{}.shop.svc.cluster.local:8080", number % 900),
                ),
                ("dst_namespace", "shop".to_owned()),
                ("dst_service", format!("service-{}", number % 900)),
                (
                    "dst_pod",
                    format!("service-{}-6f7d8c9b5-{number:05}", number % 900),
                ),
                ("tls", "true".to_owned()),
                (
                    "server_id",
                    "spiffe://cluster.local/ns/shop/sa/service".to_owned(),
                ),
                ("status_code", "200".to_owned()),
                ("classification", "success".to_owned()),
            ];
            samples.add(Kind::Counter, "response", "", labels, value);
        }
        samples
    };
    let began = Instant::now();
    let history = History::new(began);
    // What a sample takes for as long as it is taken is not the history's.
    drop(samples(1.0));
    let before = resident_bytes();
    history.sample(samples(1.0), after(began, 10));
    history.sample(samples(2.0), after(began, 20));
    let took = resident_bytes().saturating_sub(before);
    let series = took / MAX_SERIES;
    let (all, start) = (samples(3.0), Instant::now());
    history.sample(all, after(began, 30));
    let ms = start.elapsed().as_millis();
    println!(
        "{series} bytes a series, {} KiB, a sample in {ms} ms",
        took / 1024
    );
    assert!(took < 14 << 20, "{} KiB", took / 1024);
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages = statm.split(' ').nth(1).expect("has it");
    pages.parse::<usize>().expect("a number") * 4096
}
