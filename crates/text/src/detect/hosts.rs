//! Addresses of hosts and of network interfaces.

use super::scanner::Scan;
use super::text::{Text, begins};
use super::{Finding, Kind};
use std::{net::Ipv6Addr, ops::Range};

/// More than any address in hexadecimal digits and colons.
const LONGEST: usize = 64;

impl Scan<'_> {
    pub(super) fn ipv4(&mut self, groups: &[Range<usize>]) {
        let text = self.text;
        for quad in groups.windows(4) {
            let dotted = quad.windows(2).all(|g| {
                g[0].end + 1 == g[1].start && text.bytes[g[0].end] == b'.'
            });
            if !dotted || quad.iter().any(|g| g.len() > 3) {
                continue;
            }
            let (start, end) = (quad[0].start, quad[3].end);
            self.judge(start, || {
                host(text, quad, start..end).then_some(Finding {
                    kind: Kind::Ip,
                    start,
                    end,
                })
            });
        }
    }

    /// An address of hexadecimal digits around the colon at `at`.
    pub(super) fn colons(&mut self, at: usize) {
        let text = self.text;
        let part = |b: u8| b.is_ascii_hexdigit() || b == b':';
        let start = text.run_back(at, LONGEST, part);
        if at - start == LONGEST || text.bytes[start..at].contains(&b':') {
            return;
        }
        let (ip, mac) = (self.kinds.has(Kind::Ip), self.kinds.has(Kind::Mac));
        self.judge(start, || {
            let end = text.run(at, LONGEST, part);
            if end - start > LONGEST - 1 {
                return None;
            }
            let run = &text.str[start..end];
            let colons = run.bytes().filter(|b| *b == b':').count();
            if colons < 3 || !text.alone(start, end) {
                return None;
            }
            if mac && is_mac(run.as_bytes()) {
                let kind = Kind::Mac;
                return Some(Finding { kind, start, end });
            }
            let run = run.trim_end_matches(':');
            let parts = run.split(':').filter(|p| !p.is_empty()).count();
            let address = run.parse::<Ipv6Addr>();
            let host = address.is_ok_and(|a| !a.is_loopback() && !a.is_unspecified());
            (ip && parts >= 4 && host).then_some(Finding {
                kind: Kind::Ip,
                start,
                end: start + run.len(),
            })
        });
    }

    /// An interface's address with hyphens, that the group `g` is part of.
    pub(super) fn dashed_mac(&mut self, g: &Range<usize>) {
        let text = self.text;
        let part = |b: u8| b.is_ascii_hexdigit() || b == b'-';
        let start = text.run_back(g.start, 18, part);
        // Only from its first digit, and not from each.
        if text.bytes[start..g.start].iter().any(u8::is_ascii_digit) {
            return;
        }
        self.judge(start, || {
            let end = text.run(start, 18, part);
            let mac = is_mac(&text.bytes[start..end]) && text.alone(start, end);
            mac.then_some(Finding {
                kind: Kind::Mac,
                start,
                end,
            })
        });
    }
}

/// Six pairs of hexadecimal digits, neither all the same nor a placeholder.
fn is_mac(run: &[u8]) -> bool {
    run.len() == 17
        && matches!(run[2], b':' | b'-')
        && run.iter().enumerate().all(|(i, b)| match i % 3 {
            2 => *b == run[2],
            _ => b.is_ascii_hexdigit(),
        })
        && run.chunks(3).any(|pair| pair[..2] != run[..2])
}

/// Whether a dotted quad is a host's address.
fn host(text: &Text<'_>, quad: &[Range<usize>], at: Range<usize>) -> bool {
    let octets: Vec<u16> = quad
        .iter()
        .filter_map(|g| text.str[g.clone()].parse().ok())
        .collect();
    let valid = quad.iter().all(|g| g.len() == 1 || text.bytes[g.start] != b'0')
        && octets.iter().all(|o| *o <= 255);
    let host = !matches!(octets[..], [0 | 127, ..] | [255, 255, ..]) && octets[3] != 0;
    valid && host && outside(text, &at) && !numbering(text, at.start, &octets)
}

/// Whether a dotted quad stands alone, not inside a longer name or number.
fn outside(text: &Text<'_>, at: &Range<usize>) -> bool {
    let before = match text.before(at.start) {
        Some(c) if c.is_alphanumeric() || c == '.' || c == '_' => false,
        Some('-') => !text.before(at.start - 1).is_some_and(char::is_alphabetic),
        _ => true,
    };
    before
        && match text.char(at.end) {
            Some(c) if c.is_alphanumeric() || c == '_' => false,
            Some('.') => !text.char(at.end + 1).is_some_and(char::is_alphanumeric),
            Some('-' | '+') => !text.char(at.end + 1).is_some_and(char::is_alphabetic),
            _ => true,
        }
}

/// Whether a dotted quad numbers a version or a section.
fn numbering(text: &Text<'_>, at: usize, octets: &[u16]) -> bool {
    const NUMBERED: [&str; 22] = [
        "version", "versions", "release", "build", "firmware", "kernel", "v", "ver", "section",
        "abschnitt", "kapitel", "chapter", "clause", "ziffer", "punkt", "paragraph", "upgrade",
        "update", "patch", "revision", "rev", "driver",
    ];
    const HOSTED: [&str; 16] = [
        "ip", "ipv4", "host", "server", "address", "adresse", "ping", "dns", "gateway", "ssh",
        "http", "https", "client", "router", "peer", "from",
    ];
    if text.line_before(at).trim_end().ends_with('§') {
        return true;
    }
    let is = |word: &str, list: &[&str]| list.iter().any(|w| begins(word, w) && w.len() == word.len());
    for word in text.words_before(at).take(3) {
        if is(word, &HOSTED) {
            return false;
        }
        if is(word, &NUMBERED) {
            return true;
        }
    }
    octets.iter().all(|o| *o < 20)
}
