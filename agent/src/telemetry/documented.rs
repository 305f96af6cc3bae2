//! Whether docs/operations.md knows every metric that there is code for, and no other.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

#[test]
fn metrics_are_in_the_documentation_and_nothing_else_is() {
    let page = include_str!("../../../docs/operations.md");
    let documented = documented(page);
    let mut emitted = BTreeSet::from(["request".to_owned(), "response".to_owned()]);
    emitted_below(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut emitted,
    );
    let missing: Vec<_> = emitted.difference(&documented).collect();
    assert!(
        missing.is_empty(),
        "not in docs/operations.md, \"Metrics\": {missing:?}"
    );
    let gone: Vec<_> = documented.difference(&emitted).collect();
    assert!(
        gone.is_empty(),
        "in docs/operations.md, and in no code: {gone:?}"
    );
}

/// The names in the first column of the table of metrics, as the code has them: without `_total`.
fn documented(page: &str) -> BTreeSet<String> {
    let (_, rest) = page.split_once("\n## Metrics\n").expect("a section");
    let (section, _) = rest.split_once("\n### Exchanges\n").expect("a section");
    let rows = section.lines().filter_map(|it| it.strip_prefix("| `"));
    let names = rows.flat_map(|row| {
        let cell = row.split(" | ").next().unwrap_or_default();
        cell.split("`, `").map(|it| it.trim_end_matches('`'))
    });
    names
        .map(|it| it.strip_suffix("_total").unwrap_or(it).to_owned())
        .collect()
}

/// The names of metrics that are written in the code of a folder.
fn emitted_below(folder: &Path, names: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("the sources") {
        let path = entry.expect("the sources").path();
        // The kernel programs have names like these.
        if path.is_dir() && !path.ends_with("bpf") {
            emitted_below(&path, names);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(&path).expect("the sources");
            let (code, _) = text
                .split_once("#[cfg(test)]\nmod tests {")
                .unwrap_or((&text, ""));
            let is_test = path.file_stem().is_some_and(|it| {
                let name = it.to_string_lossy();
                name.ends_with("tests") || name == "documented"
            });
            if !is_test {
                names.extend(literals(code).filter(|it| is_metric(it)).map(str::to_owned));
            }
        }
    }
}

/// The texts between two quotation marks that are one word each.
fn literals(code: &str) -> impl Iterator<Item = &str> {
    code.match_indices('"').filter_map(|(at, _)| {
        let rest = &code[at + 1..];
        let word = rest.split(|it: char| it != '_' && !it.is_ascii_alphanumeric());
        let word = word.into_iter().next()?;
        (rest[word.len()..].starts_with('"') && !word.is_empty()).then_some(word)
    })
}

fn is_metric(word: &str) -> bool {
    const PREFIXES: [&str; 7] = [
        "weft_",
        "tcp_",
        "inbound_",
        "outbound_",
        "process_",
        "identity_cert_",
        "response_latency_",
    ];
    PREFIXES.iter().any(|it| word.starts_with(it))
}
