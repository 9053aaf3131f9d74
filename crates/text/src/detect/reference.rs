//! What the scanner finds, by plain patterns over the whole text: no anchors,
//! no shortcuts, no parsers by hand. Judges (checksums, context, what reads like
//! a secret) are the same.

use super::anchors::{Body, HEADS, Head, NAMES};
use super::scanner::{Scan, pieces};
use super::text::Text;
use super::{Finding, Kind, Kinds, email, hosts, named, secrets};
use regex::Regex;
use std::{ops::Range, sync::LazyLock};

fn pattern(source: &str) -> Regex {
    Regex::new(source).unwrap()
}

static EMAIL: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&concat!(
        r"[A._%+'-]*[A_%+-](?:@|\s?[\[({](?:at|AT|ät)[\])}]\s?)(?P<domain>",
        r"(?:[A](?:[A-]*[A])?(?:\.|\s?[\[({](?:dot|DOT|punkt)[\])}]\s?))+L[L-]*L)"
    )
    .replace("[A", r"[\p{Alphabetic}\p{N}")
    .replace("L[L-]*L", r"\p{Alphabetic}[\p{Alphabetic}-]*\p{Alphabetic}"))
});
/// Of each of [`HEADS`].
static KEYS: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    let key = |h: &Head| {
        let class = match h.body {
            Body::Url => "[A-Za-z0-9_-]",
            Body::Alnum => "[A-Za-z0-9]",
            Body::Upper => "[A-Z0-9]",
            Body::Word => "[A-Za-z0-9_]",
            Body::Dotted => "[A-Za-z0-9_.-]",
        };
        let head = regex::escape(h.head);
        pattern(&format!("{head}{class}{{{},}}", h.least))
    };
    HEADS.iter().map(key).collect()
});
static GROUP: LazyLock<Regex> = LazyLock::new(|| pattern(r"[0-9]+"));
static CLUSTER: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"[0-9]+(?:[ \-–/.()\x{a0}]{1,3}[0-9]+)*"));
static IPV4: LazyLock<Regex> = LazyLock::new(|| pattern(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"));
static COLONS: LazyLock<Regex> = LazyLock::new(|| pattern(r"[0-9A-Fa-f]*(?::[0-9A-Fa-f]*){3,}"));
static DASHES: LazyLock<Regex> = LazyLock::new(|| pattern(r"[0-9A-Fa-f-]+"));
static URL: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"[A-Za-z0-9]://[^\x00-\x20:/@<>]{0,256}:(?P<value>[^\x00-\x20/@<>]{1,256})@")
});
static JWT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"eyJ(?P<header>[A-Za-z0-9_-]{8,})\.eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)?")
});
static PEM: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&concat!(
        r"-----BEGIN (?:[A-Z0-9 ]* )?PRIVATE KEY(?: BLOCK)?-----",
        r"(?:GAP(?:[A-Za-z0-9+/=]{16,}|(?:Proc-Type|DEK-Info|Version|Comment|Charset|Hash): [ -\[\]-~]{0,120}))*",
        r"(?:GAP(?:[A-Za-z0-9+/=]{1,15}GAP)?-----END [A-Z0-9 ]{0,64}-----)?",
    )
    .replace("GAP", r#"(?:[ \t\r\n"',|>#*]|\\[nrt]){0,32}"#))
});
static NAMED: LazyLock<[Regex; 2]> = LazyLock::new(|| {
    let names = named::SECRETS.map(|n| {
        let name = n.replace('_', "[_ -]?").replace('ü', ")(?:ü|Ü)(?i-u:");
        format!("(?i-u:{name})")
    });
    let name = format!("(?P<name>{})", names.join("|"));
    let value = r#"[ \t]{0,8}["'`*]{0,3}(?P<value>[^\s"'`,;]+)"#;
    [
        pattern(&format!(r#"{name}["'`*_]{{0,3}}[ \t-\r]{{0,3}}(?P<op>:=|=>|=|:){value}"#)),
        pattern(&format!(
            r"{name}(?P<op>[ \t-\r]{{1,3}}(?:is|ist|lautet|IS|Is)[ \t-\r]{{1,3}}(?::[ \t-\r])?|[ \t-\r]{{1,3}}){value}"
        )),
    ]
});

/// Everything of `kinds` in `text`.
pub(super) fn find(text: &str, kinds: Kinds) -> Vec<Finding> {
    let text = Text::new(text);
    let mut found = Vec::new();
    if kinds.has(Kind::Email) {
        emails(&text, &mut found);
    }
    if kinds.has(Kind::Secret) {
        keys(&text, &mut found);
        values(&text, &mut found);
    }
    if kinds.has(Kind::Ip) || kinds.has(Kind::Mac) {
        addresses(&text, kinds, &mut found);
    }
    let mut scan = Scan::new(&text, kinds, 0);
    for m in CLUSTER.find_iter(text.str) {
        let groups = GROUP.find_iter(m.as_str());
        let groups: Vec<Range<usize>> = groups
            .map(|g| m.start() + g.start()..m.start() + g.end())
            .collect();
        if kinds.has(Kind::Card) {
            scan.cards(&groups);
        }
        if kinds.has(Kind::Phone) {
            scan.phones(&groups);
        }
        scan.ids(&groups);
        if kinds.has(Kind::BirthDate) {
            scan.birth_dates(&groups);
        }
        groups.iter().for_each(|g| scan.token(g));
    }
    found.extend(scan.found.iter().filter(|f| kinds.has(f.kind)));
    pieces(text.str, found)
}

fn emails(text: &Text<'_>, out: &mut Vec<Finding>) {
    let mut at = 0;
    while let Some(c) = EMAIL.captures_at(text.str, at) {
        let (all, domain) = (c.get(0).unwrap(), c.name("domain").unwrap());
        // The pattern has no bound of its own.
        let local_end = local_end(text.str, all.start(), domain.start());
        let start = text.str[all.start()..local_end].char_indices().rev().nth(email::LOCAL - 1);
        let start = all.start() + start.map_or(0, |(i, _)| i);
        at = match email::mailbox(text, start, all.end()) {
            Some(f) => {
                out.push(f);
                all.end()
            }
            None => domain.start(),
        };
    }
}

/// Where the mailbox's name ends, between the start of an address and its domain.
fn local_end(text: &str, start: usize, domain: usize) -> usize {
    let local = |c: char| c.is_alphanumeric() || "._%+'-".contains(c);
    let end = text[start..domain].find(|c| !local(c));
    start + end.unwrap_or(domain - start)
}

/// Matches of `pattern` at each place it can start, overlapping ones too.
fn each(pattern: &Regex, text: &str, mut f: impl FnMut(&regex::Captures<'_>)) {
    let mut at = 0;
    while let Some(c) = pattern.captures_at(text, at) {
        let start = c.get(0).unwrap().start();
        f(&c);
        at = text.ceil_char_boundary(start + 1);
        if start + 1 > text.len() {
            return;
        }
    }
}

fn keys(text: &Text<'_>, out: &mut Vec<Finding>) {
    let kind = Kind::Secret;
    let mut push = |start: usize, end: usize| {
        let before = text.before(start);
        let free = !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '-');
        if free && secrets::random(&text.str[start..end.min(start + secrets::JUDGED)]) {
            out.push(Finding { kind, start, end });
        }
    };
    for (h, head) in HEADS.iter().zip(KEYS.iter()) {
        each(head, text.str, |c| {
            let m = c.get(0).unwrap();
            let dots = m.as_str().len() - m.as_str().trim_end_matches('.').len();
            let end = m.end() - if h.body == Body::Dotted { dots.min(16) } else { 0 };
            if end - m.start() >= h.head.len() + h.least {
                push(m.start(), end);
            }
        });
    }
    each(&JWT, text.str, |c| {
        let m = c.get(0).unwrap();
        if c["header"].len() <= secrets::JWT_HEAD {
            push(m.start(), m.end());
        }
    });
    each(&PEM, text.str, |c| {
        let m = c.get(0).unwrap();
        if text.before(m.start()) != Some('-') {
            out.push(Finding { kind, start: m.start(), end: m.end() });
        }
    });
}

fn values(text: &Text<'_>, out: &mut Vec<Finding>) {
    let kind = Kind::Secret;
    for (i, p) in NAMED.iter().enumerate() {
        each(p, text.str, |c| {
            let (op, value) = (c.name("op").unwrap(), c.name("value").unwrap());
            let scheme = op.as_str() == ":"
                && text.str[op.end()..].starts_with("//")
                && text.before(op.start()).is_some_and(|c| c.is_ascii_alphanumeric());
            let bearer = c["name"].ends_with("earer") == op.as_str().trim().is_empty();
            let told = i == 0 || bearer && NAMES.iter().any(|n| c["name"].ends_with(n));
            if scheme || !told {
                return;
            }
            if let Some(kept) = named::accept(&c["name"], value.as_str()) {
                let (start, end) = (value.start(), value.start() + kept);
                out.push(Finding { kind, start, end });
            }
        });
    }
    each(&URL, text.str, |c| {
        let value = c.name("value").unwrap();
        if !named::placeholder(value.as_str()) {
            let (start, end) = (value.start(), value.end());
            out.push(Finding { kind, start, end });
        }
    });
}

fn addresses(text: &Text<'_>, kinds: Kinds, out: &mut Vec<Finding>) {
    for m in IPV4.find_iter(text.str) {
        let groups = GROUP.find_iter(m.as_str());
        let quad: Vec<Range<usize>> = groups
            .map(|g| m.start() + g.start()..m.start() + g.end())
            .collect();
        if kinds.has(Kind::Ip) && hosts::host(text, &quad, m.range()) {
            let (kind, start, end) = (Kind::Ip, m.start(), m.end());
            out.push(Finding { kind, start, end });
        }
    }
    for m in COLONS.find_iter(text.str) {
        let found = hosts::with_colons(text, m.start(), m.end());
        out.extend(found.filter(|f| m.len() < hosts::LONGEST && kinds.has(f.kind)));
    }
    for m in DASHES.find_iter(text.str) {
        let digit = m.as_str().bytes().any(|b| b.is_ascii_digit());
        let mac = digit && hosts::is_mac(m.as_str().as_bytes());
        if kinds.has(Kind::Mac) && mac && text.alone(m.start(), m.end()) {
            let (kind, start, end) = (Kind::Mac, m.start(), m.end());
            out.push(Finding { kind, start, end });
        }
    }
}
