//! Keys and passwords: by the issuer's prefix, or as the value of a telling
//! name.
//!
//! A value counts only when it does not read like a word: documentation is
//! full of `password: required` and `api_key = "your-api-key"`.

use super::{Finding, Kind, pattern};
use regex::Regex;
use std::sync::LazyLock;

/// Keys with a known head; the body is checked by [`random`].
static PREFIXED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(concat!(
        r"sk-(?:ant-|proj-)?[A-Za-z0-9_-]{16,}",
        r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}",
        r"|(?:AKIA|ASIA)[A-Z0-9]{16}",
        r"|gh[opsur]_[A-Za-z0-9]{20,}",
        r"|github_pat_[A-Za-z0-9_]{20,}",
        r"|xox[abeprs]-[A-Za-z0-9-]{10,}",
        r"|AIza[A-Za-z0-9_-]{30,}",
        r"|glpat-[A-Za-z0-9_-]{16,}",
        r"|(?:npm|hf)_[A-Za-z0-9]{30,}",
        r"|pypi-[A-Za-z0-9_-]{40,}",
        r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)?",
    ))
});

static KEY_BEGIN: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"));
static KEY_END: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"));
/// What follows a header whose end is missing: lines of base64.
static KEY_BODY: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?:\s*[A-Za-z0-9+/=]{16,})*"));

/// `name = value`, `name: value`, `"name": "value"`, `Passwort lautet value`.
static NAMED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(concat!(
        r"(?i)(?P<name>passwor[dt]|passwd|passphrase|pwd|kennwort|secret|token",
        r"|api[_ -]?key|access[_ -]?key|secret[_ -]?key|private[_ -]?key|api[_ -]?schl[uü]ssel)",
        r#"(?:["'`*_]{0,3}\s{0,3}(?::=|=>|=|:)|\s+(?:is|ist|lautet)\s*:?\s)"#,
        r#"[ \t]*["'`*]{0,3}(?P<value>[^\s"'`,;]+)"#,
    ))
});

/// `scheme://user:password@host`.
static IN_URL: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s:/@<>]+:(?P<value>[^\s/@<>]+)@"));

pub(super) fn find(text: &str, out: &mut Vec<Finding>) {
    let mut push = |start: usize, end: usize| {
        out.push(Finding {
            kind: Kind::Secret,
            start,
            end,
        });
    };
    for m in PREFIXED.find_iter(text) {
        let before = text[..m.start()].chars().next_back();
        if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '-')
            && random(m.as_str())
        {
            push(m.start(), m.end());
        }
    }
    for m in KEY_BEGIN.find_iter(text) {
        let rest = &text[m.end()..];
        let end = match KEY_END.find(rest) {
            Some(end) => end.end(),
            None => KEY_BODY.find(rest).map_or(0, |b| b.end()),
        };
        push(m.start(), m.end() + end);
    }
    for c in NAMED.captures_iter(text) {
        let (Some(name), Some(value)) = (c.name("name"), c.name("value")) else {
            continue;
        };
        let word = value
            .as_str()
            .trim_end_matches(['.', ':', '!', '?', ')', ']', '}', '*', '>']);
        // A trailing `!` or `?` is as likely part of a password as of a
        // sentence: it goes with the password.
        let kept = value.as_str()[word.len()..]
            .find(|c| !matches!(c, '!' | '?'))
            .map_or(value.len(), |n| word.len() + n);
        let word = &value.as_str()[..kept];
        if telling(name.as_str(), word) {
            push(value.start(), value.start() + word.len());
        }
    }
    for c in IN_URL.captures_iter(text) {
        if let Some(v) = c.name("value") {
            push(v.start(), v.end());
        }
    }
}

/// Whether a prefixed key's body can be random: it holds a digit or both
/// cases, and many different characters.
fn random(key: &str) -> bool {
    let digit = key.bytes().any(|b| b.is_ascii_digit());
    let both = key.bytes().any(|b| b.is_ascii_lowercase())
        && key.bytes().filter(u8::is_ascii_uppercase).count() > 2;
    (digit || both) && entropy(key) >= 2.5
}

/// Whether `value`, given for `name`, is a secret rather than prose or code.
fn telling(name: &str, value: &str) -> bool {
    const CODE: [&str; 8] = ["$", "{", "<", "%", "os.", "env.", "process.", "http"];
    if CODE.iter().any(|c| value.starts_with(c)) || value.contains(['(', '[', '*', '…']) {
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

/// Shannon entropy of the characters of `s`, in bits a character.
fn entropy(s: &str) -> f64 {
    let mut counts = std::collections::BTreeMap::<char, u32>::new();
    for c in s.chars() {
        *counts.entry(c).or_default() += 1;
    }
    let n = f64::from(counts.values().sum::<u32>());
    counts
        .values()
        .map(|&c| f64::from(c) / n)
        .map(|p| -p * p.log2())
        .sum()
}
