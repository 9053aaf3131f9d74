//! Server-sent events out of bytes that arrive in any pieces.
//!
//! After the WHATWG HTML standard, "9.2.6 Interpreting an event stream": lines
//! end with LF, CR or CRLF, a leading byte order mark is skipped, `data` lines
//! of one event are joined by LF, an event without data is none. An event not
//! closed by an empty line is incomplete and never handed out.
//!
//! What may not happen here: memory beyond the limit, whatever is sent; a
//! different result when the same bytes are cut elsewhere.

/// The bytes so far exceed what one event may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLarge;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Event {
    /// The `event` field; empty when there was none.
    pub(crate) name: Vec<u8>,
    /// The `data` lines.
    pub(crate) data: Vec<u8>,
}

/// Reads events; feed it with [`Parser::push`], ask [`Parser::next`] until it
/// has none.
#[derive(Debug)]
pub(crate) struct Parser {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were handed out.
    done: usize,
    /// Bytes of `buffer` known to hold no line end.
    seen: usize,
    event: Event,
    has_data: bool,
    /// The last line ended with CR: a LF right after it belongs to that end.
    after_cr: bool,
    started: bool,
    limit: usize,
}

impl Parser {
    /// A parser for events of at most `limit` bytes, their names included.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            buffer: Vec::new(),
            done: 0,
            seen: 0,
            event: Event::default(),
            has_data: false,
            after_cr: false,
            started: false,
            limit,
        }
    }

    /// Takes more bytes in.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.done > 0 {
            self.buffer.drain(..self.done);
            self.seen -= self.done;
            self.done = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event.
    pub(crate) fn next(&mut self) -> Result<Option<Event>, TooLarge> {
        loop {
            if self.after_cr && self.buffer.get(self.done) == Some(&b'\n') {
                self.done += 1;
                self.after_cr = false;
            }
            self.seen = self.seen.max(self.done);
            let rest = self.buffer.get(self.seen..).unwrap_or_default();
            let Some(end) = rest.iter().position(|b| matches!(b, b'\n' | b'\r')) else {
                self.seen = self.buffer.len();
                let held = self.buffer.len() - self.done + self.event.data.len() + self.event.name.len();
                return if held > self.limit { Err(TooLarge) } else { Ok(None) };
            };
            let end = self.seen + end;
            let mut line = self.done..end;
            self.after_cr = self.buffer.get(end) == Some(&b'\r');
            self.done = end + 1;
            if !self.started {
                self.started = true;
                if self.buffer.get(line.clone()).is_some_and(|l| l.starts_with(b"\xef\xbb\xbf")) {
                    line.start += 3;
                }
            }
            let line = self.buffer.get(line).unwrap_or_default();
            if line.is_empty() {
                let event = std::mem::take(&mut self.event);
                if std::mem::take(&mut self.has_data) {
                    return Ok(Some(event));
                }
                continue;
            }
            let colon = line.iter().position(|b| *b == b':').unwrap_or(line.len());
            let (field, value) = line.split_at(colon);
            let value = value.strip_prefix(b":").unwrap_or(value);
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match field {
                b"data" => {
                    if self.has_data {
                        self.event.data.push(b'\n');
                    }
                    self.has_data = true;
                    self.event.data.extend_from_slice(value);
                }
                b"event" => self.event.name = value.to_vec(),
                // Comments, `id` and `retry`: nothing here reconnects.
                _ => {}
            }
            if self.event.data.len() + self.event.name.len() > self.limit {
                return Err(TooLarge);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<(String, String)> {
        let mut parser = Parser::new(1 << 20);
        let mut out = Vec::new();
        for piece in pieces {
            parser.push(piece);
            while let Some(e) = parser.next().unwrap() {
                let text = |b| String::from_utf8(b).unwrap();
                out.push((text(e.name), text(e.data)));
            }
        }
        out
    }

    const STREAM: &[u8] = b"\xef\xbb\xbf: hi\ndata: one\n\nevent: x\r\ndata:two\r\ndata:  three\r\n\r\n\rdata\r\r\nid: 4\nretry: 1\n\ndata: {\"\xc3\xa9\"}\n\ndata: cut off";

    #[test]
    fn lines_end_in_every_way() {
        let pairs = [("", "one"), ("x", "two\n three"), ("", ""), ("", "{\"é\"}")];
        let wanted: Vec<_> = pairs.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        assert_eq!(events(&[STREAM]), wanted);
    }

    #[test]
    fn cutting_anywhere_changes_nothing() {
        let whole = events(&[STREAM]);
        for cut in 0..=STREAM.len() {
            for second in cut..=STREAM.len() {
                assert_eq!(events(&[&STREAM[..cut], &STREAM[cut..second], &STREAM[second..]]), whole);
            }
        }
        let bytes: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(events(&bytes), whole);
    }

    #[test]
    fn endless_lines_and_events_are_refused() {
        let mut long_line = Parser::new(100);
        long_line.push(&[b'x'; 101]);
        assert_eq!(long_line.next(), Err(TooLarge));
        let mut many_lines = Parser::new(100);
        for _ in 0..40 {
            many_lines.push(b"data: abc\n");
        }
        assert_eq!(many_lines.next(), Err(TooLarge));
        let mut fits = Parser::new(100);
        fits.push(b"data: abc\n\n");
        assert_eq!(fits.next().unwrap().unwrap().data, b"abc");
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_cut_anywhere(text in "[d\r\n: ateveni\u{feff}é]{0,60}", cuts in proptest::collection::vec(0usize..80, 0..5)) {
            let bytes = text.as_bytes();
            let run = |pieces: Vec<&[u8]>| {
                let mut p = Parser::new(1000);
                let mut out = Vec::new();
                for piece in pieces {
                    p.push(piece);
                    while let Ok(Some(e)) = p.next() {
                        out.push(e);
                    }
                }
                out
            };
            let mut at: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            at.push(0);
            at.push(bytes.len());
            at.sort_unstable();
            let pieces = at.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            proptest::prop_assert_eq!(run(vec![bytes]), run(pieces));
        }
    }
}
