//! As much HTTP as it takes to ask nginx for the same small thing over and over.

use std::io::{self, ErrorKind, Read};

/// How long an answer is, once its head is there completely; an error unless it is a 200.
pub(crate) fn response_length(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(head) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    if !text.starts_with("http/1.1 200 ") {
        return Err(io::Error::new(ErrorKind::InvalidData, text));
    }
    let body = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .and_then(|value| value.trim().parse::<usize>().ok());
    match body {
        Some(body) => Ok(Some(head + 4 + body)),
        None => Err(io::Error::new(ErrorKind::InvalidData, "no length")),
    }
}

/// Reads one answer.
pub(crate) fn read_response(stream: &mut impl Read) -> io::Result<()> {
    let mut buffer = [0; 1024];
    let mut filled = 0;
    loop {
        let count = stream.read(&mut buffer[filled..])?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        filled += count;
        if let Some(length) = response_length(&buffer[..filled])?
            && filled >= length
        {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
        assert_eq!(response_length(answer).expect("a 200"), Some(answer.len()));
        assert_eq!(response_length(&answer[..20]).expect("a start"), None);
        assert!(response_length(b"HTTP/1.1 503 no\r\n\r\n").is_err());
    }
}
