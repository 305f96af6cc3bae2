//! Bytes written as text: `\r`, `\n`, `\t`, `\0`, `\\` and `\x1f`, for arguments and events.

use anyhow::{Context, Result, bail, ensure};

/// The bytes that the text stands for.
pub(crate) fn parse(text: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        if character != '\\' {
            bytes.extend(character.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        match rest.next() {
            Some('r') => bytes.push(b'\r'),
            Some('n') => bytes.push(b'\n'),
            Some('t') => bytes.push(b'\t'),
            Some('0') => bytes.push(0),
            Some('\\') => bytes.push(b'\\'),
            Some('x') => {
                let digits: String = rest.by_ref().take(2).collect();
                ensure!(digits.len() == 2, "two hexadecimal digits follow \\x");
                bytes.push(u8::from_str_radix(&digits, 16).context("two hexadecimal digits")?);
            }
            other => bail!("{other:?} does not follow a backslash"),
        }
    }
    Ok(bytes)
}

/// The text that stands for these bytes.
pub(crate) fn print(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways() {
        let text = "GET / HTTP/1.1\\r\\n\\x00\\\\\\t\\n";
        let bytes = parse(text).expect("valid");
        assert_eq!(bytes, b"GET / HTTP/1.1\r\n\0\\\t\n");
        assert_eq!(print(&bytes), text);
        assert!(parse("\\q").is_err() && parse("\\x1").is_err());
    }
}
