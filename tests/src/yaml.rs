//! Writes a JSON value as YAML, so that manifests read as people expect them.

use std::fmt::Write as _;

use serde_json::Value;

/// The value as a block-style YAML document.
pub(crate) fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    write_value(&mut out, value, 0, false);
    out
}

/// `inline` is true right after a `- `: the first line continues there.
fn write_value(out: &mut String, value: &Value, indent: usize, mut inline: bool) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                start_line(out, indent, &mut inline);
                let _ = write!(out, "{}:", scalar(&Value::String(key.clone())));
                write_member(out, value, indent + 2);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                start_line(out, indent, &mut inline);
                out.push_str("- ");
                write_value(out, item, indent + 2, true);
            }
        }
        leaf => {
            start_line(out, indent, &mut inline);
            let _ = writeln!(out, "{}", scalar(leaf));
        }
    }
}

fn write_member(out: &mut String, value: &Value, indent: usize) {
    let nested = value.as_object().is_some_and(|map| !map.is_empty())
        || value.as_array().is_some_and(|items| !items.is_empty());
    if nested {
        out.push('\n');
        write_value(out, value, indent, false);
    } else {
        let _ = writeln!(out, " {}", scalar(value));
    }
}

fn start_line(out: &mut String, indent: usize, inline: &mut bool) {
    if !std::mem::take(inline) {
        out.extend(std::iter::repeat_n(' ', indent));
    }
}

/// Plain where that cannot be read as anything else, else as JSON, which YAML understands.
fn scalar(value: &Value) -> String {
    match value {
        Value::String(text)
            if text.starts_with(|c: char| c.is_ascii_alphabetic())
                && text
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-./_".contains(c))
                && !WORDS.contains(&text.to_ascii_lowercase().as_str()) =>
        {
            text.clone()
        }
        other => other.to_string(),
    }
}

/// Words that YAML 1.1 or 1.2 reads as something else than text.
const WORDS: [&str; 9] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nests() {
        let value = json!({"kind": "Pod", "spec": {"ports": [{"port": 80, "name": "x"}], "none": [],
            "on": "yes", "ip": "10.0.0.1"}});
        let expected = "kind: Pod\nspec:\n  ip: \"10.0.0.1\"\n  none: []\n  \"on\": \"yes\"\n  ports:\n    - name: x\n      port: 80\n";
        assert_eq!(to_yaml(&value), expected);
    }
}
