//! Passwords and tokens by the name before them, and in addresses.
//!
//! A value counts only when it does not read like a word: documentation is
//! full of `password: required` and `api_key = "your-api-key"`.

use super::checks::entropy;
use super::scanner::Scan;
use super::secrets::JUDGED;
use super::text::Text;
use super::{Finding, Kind};
use std::ops::Range;

/// The most characters of a user or a password in an address.
pub(super) const IN_URL: usize = 256;

/// Trailing characters that are a sentence's, not the value's.
const TRIMMED: usize = 16;

impl Scan<'_> {
    /// A value after the `=` or `:` at `at`: of a telling name, or in an address.
    pub(super) fn assigned(&mut self, at: usize) {
        let text = self.text;
        let Some(before) = at.checked_sub(1).map(|i| text.bytes[i]) else {
            return;
        };
        if text.bytes[at] == b':' && text.bytes[at + 1..].starts_with(b"//") && before.is_ascii_alphanumeric() {
            return self.in_url(at);
        }
        let blank = |b: u8| matches!(b, b' ' | b'\t'..=b'\r');
        let quote = |b: u8| matches!(b, b'"' | b'\'' | b'`' | b'*' | b'_');
        let spaces = text.run_back(at, 3, blank);
        let end = text.run_back(spaces, 3, quote);
        let Some(name) = name_before(text, end) else {
            return;
        };
        let after = match (text.bytes[at], text.bytes.get(at + 1)) {
            (b':', Some(b'=')) | (b'=', Some(b'>')) => at + 2,
            _ => at + 1,
        };
        self.value(name, after);
    }

    /// A value after a verb that follows the name which ends at `end`.
    pub(super) fn told(&mut self, end: usize) {
        let text = self.text;
        let blank = |b: u8| matches!(b, b' ' | b'\t'..=b'\r');
        // The value starts where text ends, if it ends in what is between.
        let (after, _) = text.watch(|| {
            let verb = text.run(end, 3, blank);
            if verb == end {
                return None;
            }
            if text.bytes[..end].ends_with(b"earer") {
                return Some(verb);
            }
            let verb = ["is", "ist", "lautet", "IS", "Is"]
                .into_iter()
                .find(|v| text.starts(verb, v) && blank(text.byte(verb + v.len())))
                .map(|v| verb + v.len())?;
            let colon = text.run(verb, 3, blank);
            if text.byte(colon) == b':' && blank(text.byte(colon + 1)) {
                return Some(colon + 2);
            }
            Some(colon)
        });
        let (Some(after), Some(name)) = (after, name_before(text, end)) else {
            return;
        };
        self.value(name, after);
    }

    fn value(&mut self, name: Range<usize>, after: usize) {
        let text = self.text;
        let (start, hit) = text.watch(|| {
            let spaces = text.run(after, 8, |b| matches!(b, b' ' | b'\t'));
            text.run(spaces, 3, |b| matches!(b, b'"' | b'\'' | b'`' | b'*'))
        });
        self.pend(hit, after.min(text.len()));
        let mut run = std::mem::take(&mut self.value);
        self.judge(start, || {
            if !(run.start <= start && start < run.end) {
                run = start..value_end(text, start);
            } else if run.end == text.len() {
                text.byte(run.end);
            }
            let kept = accept(&text.str[name], &text.str[start..run.end])?;
            Some(Finding {
                kind: Kind::Secret,
                start,
                end: start + kept,
            })
        });
        self.value = run;
    }

    /// `scheme://user:password@host`, the colon of the scheme at `at`.
    fn in_url(&mut self, at: usize) {
        let text = self.text;
        let part = |b: u8| b > b' ' && !matches!(b, b'/' | b'@' | b'<' | b'>');
        let (colon, hit) = text.watch(|| {
            let colon = text.run(at + 3, IN_URL, |b| part(b) && b != b':');
            (text.byte(colon) == b':').then_some(colon)
        });
        self.pend(hit, at + 3);
        let Some(start) = colon.map(|c| c + 1) else {
            return;
        };
        self.judge(start, || {
            let end = text.run(start, IN_URL, part);
            let password = end > start && text.byte(end) == b'@';
            let value = &text.str[start..end];
            (password && !placeholder(value)).then_some(Finding {
                kind: Kind::Secret,
                start,
                end,
            })
        });
    }
}

/// Names of secrets as they may be written before `=` or `:`; `_` stands for a
/// space, a hyphen, an underscore or nothing.
pub(super) const SECRETS: [&str; 17] = [
    "password",
    "passwort",
    "passwd",
    "passphrase",
    "pwd",
    "kennwort",
    "secret",
    "token",
    "bearer",
    "api_key",
    "access_key",
    "secret_key",
    "private_key",
    "account_key",
    "auth_key",
    "api_schlussel",
    "api_schlüssel",
];

/// The telling name that ends at `end`.
fn name_before(text: &Text<'_>, end: usize) -> Option<Range<usize>> {
    let last = text.bytes.get(end.checked_sub(1)?)? | 0x20;
    if !matches!(last, b'd' | b't' | b'e' | b'n' | b'y' | b'l' | b'r') {
        return None;
    }
    SECRETS.iter().find_map(|name| {
        let mut at = end;
        for b in name.bytes().rev() {
            if b == b'_' {
                let joint = at > 0 && matches!(text.bytes[at - 1], b'_' | b' ' | b'-');
                at -= usize::from(joint);
            } else {
                at = at.checked_sub(1)?;
                let c = text.bytes[at];
                // `ü` and `Ü` differ in one bit of their second byte.
                let same = c.eq_ignore_ascii_case(&b) || b == 0xbc && c == 0x9c;
                if !same {
                    return None;
                }
            }
        }
        Some(at..end)
    })
}

/// The end of the value at `i`.
fn value_end(text: &Text<'_>, i: usize) -> usize {
    let mut end = i;
    loop {
        let c = match text.byte(end) {
            0 if end >= text.len() => return end,
            b if b < 128 => char::from(b),
            _ => text.char(end).unwrap_or(' '),
        };
        if c.is_whitespace() || matches!(c, '"' | '\'' | '`' | ',' | ';') {
            return end;
        }
        end += c.len_utf8();
    }
}

/// How much of `value` is a secret that `name` names.
pub(super) fn accept(name: &str, value: &str) -> Option<usize> {
    let word = trimmed(value).len();
    // A trailing `!` or `?` is as likely part of a password as of a sentence: it
    // goes with the password.
    let tail = value[word..].find(|c| !matches!(c, '!' | '?'));
    let kept = tail.map_or(value.len(), |n| word + n);
    let judged = &value[..value.floor_char_boundary(kept.min(JUDGED))];
    telling(name, judged).then_some(kept)
}

/// `value` without what may be the end of a sentence.
fn trimmed(value: &str) -> &str {
    let tail = value
        .bytes()
        .rev()
        .take(TRIMMED)
        .take_while(|b| b".:!?)]}*>".contains(b))
        .count();
    &value[..value.len() - tail]
}

/// What documentation and templates have in place of a secret.
pub(super) fn placeholder(value: &str) -> bool {
    const CODE: [&str; 8] = ["$", "{", "<", "%", "os.", "env.", "process.", "http"];
    const WORDS: [&str; 9] = [
        "your", "example", "placeholder", "changeme", "change-me", "change_me", "xxxx", "dummy",
        "redacted",
    ];
    const WHOLE: [&str; 7] = ["password", "passwd", "pass", "pwd", "pw", "secret", "token"];
    CODE.iter().any(|c| value.starts_with(c))
        || value.contains(['(', '[', '*', '…'])
        || WHOLE.iter().any(|w| value.eq_ignore_ascii_case(w))
        || WORDS.iter().any(|w| {
            let mut windows = value.as_bytes().windows(w.len());
            let at = windows.position(|v| v.eq_ignore_ascii_case(w.as_bytes()));
            at.is_some_and(|at| !random_rest(value.as_bytes(), at..at + w.len()))
        })
}

/// Whether what a placeholder's word leaves of a value is a secret all the same:
/// `EXAMPLE-q7Zt2Lm9Xc4V` is no template's.
fn random_rest(value: &[u8], word: Range<usize>) -> bool {
    let rest = || value[..word.start].iter().chain(&value[word.end..]);
    let digits = rest().filter(|b| b.is_ascii_digit()).count();
    rest().count() >= 12 && digits >= 2 && rest().any(u8::is_ascii_lowercase) && rest().any(u8::is_ascii_uppercase)
}

/// Whether `value`, given for `name`, is a secret rather than prose or code.
pub(super) fn telling(name: &str, value: &str) -> bool {
    if placeholder(value) {
        return false;
    }
    let classes = [
        value.chars().any(char::is_lowercase),
        value.chars().any(char::is_uppercase),
        value.chars().any(|c| c.is_ascii_digit()),
        value
            .chars()
            .any(|c| c.is_ascii_punctuation() && !"-_./:|=".contains(c)),
    ];
    let kinds = classes.iter().filter(|c| **c).count();
    let password = name.to_ascii_lowercase().starts_with(['p', 'k']) && !name.contains(['_', ' ']);
    let (length, bits) = if password { (6, 2.0) } else { (10, 2.8) };
    kinds >= 2
        && (classes[2] || password && classes[3])
        && value.chars().count() >= length
        && entropy(value) >= bits
}
