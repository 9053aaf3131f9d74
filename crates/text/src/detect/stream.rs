//! A scan of a text that comes in pieces, in bounded memory.
//!
//! What it gives out is what [`Scanner::find`] finds in the whole text, however
//! it was cut.

use super::scanner::KEPT;
use super::{Finding, Scanner};

/// A scan of a text that comes in pieces.
///
/// It keeps what is not settled, [`MAX_UNSETTLED`](super::MAX_UNSETTLED) bytes
/// at most, some context before it, and of a secret that is longer than that
/// the whole.
#[derive(Debug, Clone)]
pub struct Stream {
    scanner: Scanner,
    text: String,
    /// Where findings start from, and what was given out; in `text`.
    from: usize,
    given: usize,
}

/// A stretch of text that nothing after it can change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settled {
    /// The text.
    pub text: String,
    /// What is in it, in order, disjoint; bytes of [`Self::text`].
    pub findings: Vec<Finding>,
}

impl Stream {
    /// An empty text.
    pub const fn new(scanner: Scanner) -> Self {
        Self {
            scanner,
            text: String::new(),
            from: 0,
            given: 0,
        }
    }

    /// Adds `piece`; what became settled by it.
    pub fn push(&mut self, piece: &str) -> Settled {
        self.text.push_str(piece);
        let (found, settled) = self.scanner.find_from(&self.text, self.from);
        self.give(&found, settled)
    }

    /// The rest, once nothing follows.
    pub fn finish(mut self) -> Settled {
        let (found, _) = self.scanner.find_from(&self.text, self.from);
        let end = self.text.len();
        self.give(&found, end)
    }

    /// What is held back.
    pub fn held(&self) -> &str {
        &self.text[self.given..]
    }

    fn give(&mut self, found: &[Finding], settled: usize) -> Settled {
        let (given, settled) = (self.given, settled.max(self.given));
        let within = found.iter().filter(|f| f.start >= given && f.end <= settled);
        let findings = within.map(|f| Finding {
            start: f.start - given,
            end: f.end - given,
            ..*f
        });
        let out = Settled {
            findings: findings.collect(),
            text: self.text[given..settled].to_owned(),
        };
        // Pieces of one long finding are counted from its start.
        let mut from = settled;
        for f in found.iter().rev().filter(|f| f.end <= settled) {
            if f.end != from {
                break;
            }
            from = f.start;
        }
        let cut = self.text.floor_char_boundary(from.saturating_sub(KEPT));
        self.text.drain(..cut);
        (self.from, self.given) = (from - cut, settled - cut);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kinds, MAX_UNSETTLED};
    use super::*;

    fn run(pieces: &[&str]) -> (String, Vec<Finding>) {
        let mut stream = Stream::new(Scanner::new(Kinds::ALL));
        let (mut text, mut found) = (String::new(), Vec::new());
        let mut take = |part: Settled| {
            let at = text.len();
            found.extend(part.findings.iter().map(|f| Finding {
                start: f.start + at,
                end: f.end + at,
                ..*f
            }));
            text += &part.text;
        };
        for p in pieces {
            take(stream.push(p));
        }
        take(stream.finish());
        (text, found)
    }

    #[test]
    fn prose_waits_for_its_last_word_only() {
        let mut stream = Stream::new(Scanner::new(Kinds::ALL));
        let mut said = String::new();
        for word in "The train, number 42, leaves at 10:40 from platform 3a.".split_inclusive(' ') {
            said += &stream.push(word).text;
            assert!(stream.held().len() <= 16, "{:?}", stream.held());
        }
        assert!(said.ends_with("platform "), "{said}");
    }

    #[test]
    fn an_open_key_is_given_out_in_pieces() {
        let line = "\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj";
        let key = "-----BEGIN PRIVATE KEY-----".to_owned() + &line.repeat(400);
        let text = format!("key: {key}\n-----END PRIVATE KEY-----\nend");
        let whole = Scanner::new(Kinds::ALL).find(&text);
        assert!(whole.len() > 6 && whole.windows(2).all(|w| w[0].end == w[1].start));
        let mut stream = Stream::new(Scanner::new(Kinds::ALL));
        for piece in text.as_bytes().chunks(700) {
            stream.push(std::str::from_utf8(piece).unwrap());
            assert!(stream.held().len() <= MAX_UNSETTLED);
        }
        let pieces: Vec<&str> = text.as_bytes().chunks(37).map(|p| std::str::from_utf8(p).unwrap()).collect();
        assert!(run(&pieces) == (text.clone(), whole));
    }
}
