//! Keys by the issuer's head, private keys, tokens.

use super::anchors::{Body, HEADS, Head, JWT, PEM, ending};
use super::checks::entropy;
use super::scanner::Scan;
use super::text::Text;
use super::{Finding, Kind};

/// A key is judged by this many bytes of it, however long it is.
pub(super) const JUDGED: usize = 512;

/// The most a token's first part may have.
pub(super) const JWT_HEAD: usize = 2048;

impl Body {
    pub(super) fn has(self, b: u8) -> bool {
        match self {
            Self::Alnum => b.is_ascii_alphanumeric(),
            Self::Upper => b.is_ascii_uppercase() || b.is_ascii_digit(),
            Self::Word => b.is_ascii_alphanumeric() || b == b'_',
            Self::Url => b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'),
            Self::Dotted => b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'),
        }
    }
}

impl Scan<'_> {
    /// The key whose head ends at `at`, or the private key that starts there.
    pub(super) fn joint(&mut self, at: usize) {
        let text = self.text;
        if let Some(head) = ending(text.bytes, at) {
            self.key(at + 1 - head.head.len(), at + 1, Some(head));
        }
        if text.bytes[at] == b'-' && text.bytes[..at].last() != Some(&b'-') {
            self.judge(at, || {
                let end = text.starts(at, PEM).then(|| private_key(text, at + PEM.len()))??;
                Some(Finding {
                    kind: Kind::Secret,
                    start: at,
                    end,
                })
            });
        }
    }

    /// What starts with the head, or follows the name, at `start..end`.
    pub(super) fn head(&mut self, start: usize, end: usize) {
        let head = &self.text.str[start..end];
        let issuer = HEADS.iter().find(|h| h.head == head);
        match issuer.is_some() || head == JWT {
            true => self.key(start, end, issuer),
            false => self.told(end),
        }
    }

    fn key(&mut self, start: usize, end: usize, issuer: Option<&Head>) {
        let text = self.text;
        let before = text.before(start);
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '-') {
            return;
        }
        // A body may hold heads of its own: the run they share is walked once.
        let mut run = std::mem::take(&mut self.dotted);
        self.judge(start, || {
            let end = match issuer {
                Some(h) if h.body == Body::Dotted => {
                    if !(run.start <= end && end < run.end) {
                        run = end..text.run(end, usize::MAX, |b| h.body.has(b));
                    } else if run.end == text.len() {
                        text.byte(run.end);
                    }
                    sentence(text, end, run.end, h.least)?
                }
                Some(h) => body(text, end, h.body, h.least)?,
                None => jwt(text, end)?,
            };
            random(&text.str[start..end.min(start + JUDGED)]).then_some(Finding {
                kind: Kind::Secret,
                start,
                end,
            })
        });
        self.dotted = run;
    }
}

/// The end of the body at `i`, if it has `least` characters.
fn body(text: &Text<'_>, i: usize, body: Body, least: usize) -> Option<usize> {
    let end = text.run(i, usize::MAX, |b| body.has(b));
    (end - i >= least).then_some(end)
}

/// The end of the dotted body `i..end` without a sentence's full stops.
fn sentence(text: &Text<'_>, i: usize, end: usize, least: usize) -> Option<usize> {
    let end = end - text.bytes[i..end].iter().rev().take_while(|b| **b == b'.').count().min(16);
    (end - i >= least).then_some(end)
}

/// The end of the token whose head ends at `i`: two parts of an object each, and
/// a signature.
fn jwt(text: &Text<'_>, i: usize) -> Option<usize> {
    let url = |b| Body::Url.has(b);
    let header = text.run(i, JWT_HEAD, url);
    if header - i < 8 || !text.starts(header, ".eyJ") {
        return None;
    }
    let payload = text.run(header + 4, usize::MAX, url);
    if payload - header - 4 < 8 {
        return None;
    }
    if text.byte(payload) != b'.' {
        return Some(payload);
    }
    let signature = text.run(payload + 1, usize::MAX, url);
    Some(if signature > payload + 1 { signature } else { payload })
}

/// The end of the private key whose `-----BEGIN ` ends at `i`: its label, then
/// lines of base64 and of headers, until its end or anything else. So a key
/// that is cut off, or still coming, is found as far as it goes.
fn private_key(text: &Text<'_>, i: usize) -> Option<usize> {
    let label = text.run(i, 64, |b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b' ');
    let name = &text.str[i..label];
    let private = ["PRIVATE KEY", "PRIVATE KEY BLOCK"]
        .iter()
        .any(|n| name.strip_suffix(n).is_some_and(|h| h.is_empty() || h.ends_with(' ')));
    if !private || !text.starts(label, "-----") {
        return None;
    }
    let base64 = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=');
    let mut end = label + 5;
    loop {
        let line = gap(text, end);
        if let Some(last) = key_end(text, line) {
            return Some(last);
        }
        let run = text.run(line, usize::MAX, base64);
        if run - line >= 16 {
            end = run;
        } else if let Some(last) = (run > line).then(|| key_end(text, gap(text, run))).flatten() {
            return Some(last);
        } else if let Some(header) = header(text, line) {
            end = header;
        } else {
            return Some(end);
        }
    }
}

/// Past what stands between two lines of a key, quoted or not.
fn gap(text: &Text<'_>, i: usize) -> usize {
    let mut at = i;
    while at - i < 32 {
        match text.byte(at) {
            b' ' | b'\t' | b'\r' | b'\n' | b'"' | b'\'' | b',' | b'|' | b'>' | b'#' | b'*' => at += 1,
            b'\\' if matches!(text.byte(at + 1), b'n' | b'r' | b't') => at += 2,
            _ => break,
        }
    }
    at
}

/// The end of a key's last line at `i`.
fn key_end(text: &Text<'_>, i: usize) -> Option<usize> {
    if !text.starts(i, "-----END ") {
        return None;
    }
    let label = text.run(i + 9, 64, |b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b' ');
    text.starts(label, "-----").then_some(label + 5)
}

/// The end of a header's line at `i`.
fn header(text: &Text<'_>, i: usize) -> Option<usize> {
    const HEADERS: [&str; 6] = ["Proc-Type: ", "DEK-Info: ", "Version: ", "Comment: ", "Charset: ", "Hash: "];
    let known = HEADERS.iter().find(|h| text.starts(i, h))?;
    let at = i + known.len();
    Some(text.run(at, 120, |b| (b' '..127).contains(&b) && b != b'\\'))
}

/// Whether a key's body can be random: it holds a digit or both cases, and many
/// different characters.
pub(super) fn random(key: &str) -> bool {
    let digit = key.bytes().any(|b| b.is_ascii_digit());
    let capitals = key.bytes().filter(u8::is_ascii_uppercase).count();
    let both = capitals > 2 && key.bytes().any(|b| b.is_ascii_lowercase());
    // The keys of one issuer are all capitals, one in thirty without a digit.
    let aws = key.len() == 20 && capitals == 20;
    (digit || both || aws) && entropy(key) >= 2.5
}
