//! Cards, bank accounts, telephone numbers and host addresses.
//!
//! Numbers are read as groups of digits with what stands between them, and by
//! the words before them: an order number has the shape of a telephone number.

use super::{Finding, Kind, pattern};
use regex::Regex;
use std::{net::Ipv6Addr, ops::Range, sync::LazyLock};

static DATE: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^(?:(?:19|20)\d\d[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[./-]\d{1,2}[./-](?:19|20)?\d\d)(?:\D|$)",
    )
});
static IPV4: LazyLock<Regex> = LazyLock::new(|| pattern(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"));
static IPV6: LazyLock<Regex> = LazyLock::new(|| pattern(r"[0-9A-Fa-f]*(?::[0-9A-Fa-f]*){3,}"));

pub(super) fn find(text: &str, out: &mut Vec<Finding>) {
    let groups = groups(text);
    cards(text, &groups, out);
    ibans(text, &groups, out);
    phones(text, &groups, out);
    addresses(text, out);
}

/// Runs of ASCII digits, as byte ranges.
fn groups(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let mut out = Vec::new();
    let mut i = 0;
    while i < bytes.len() {
        if bytes[i].is_ascii_digit() {
            let start = i;
            while i < bytes.len() && bytes[i].is_ascii_digit() {
                i += 1;
            }
            out.push(start..i);
        } else {
            i += 1;
        }
    }
    out
}

/// Nothing before `at` makes the number part of a longer name (`ORD-41…`).
fn free_before(text: &str, at: usize) -> bool {
    let mut back = text[..at].chars().rev();
    match back.next() {
        None => true,
        Some(c) if c.is_alphanumeric() || c == '_' || c == '#' => false,
        Some('-' | '/' | '.' | '–') => !back.next().is_some_and(char::is_alphanumeric),
        Some(_) => true,
    }
}

/// Nothing after `at` makes the number part of a longer name.
fn free_after(text: &str, at: usize) -> bool {
    let mut ahead = text[at..].chars();
    match ahead.next() {
        None => true,
        Some(c) if c.is_alphanumeric() || c == '_' => false,
        Some('-' | '/') => !ahead.next().is_some_and(char::is_alphanumeric),
        Some('.' | ',') => !ahead.next().is_some_and(|c| c.is_ascii_digit()),
        Some(_) => true,
    }
}

fn cards(text: &str, groups: &[Range<usize>], out: &mut Vec<Finding>) {
    let mut i = 0;
    while i < groups.len() {
        let mut best = None;
        if free_before(text, groups[i].start) {
            let mut digits = String::new();
            for j in i..groups.len() {
                if j > i
                    && !matches!(
                        &text[groups[j - 1].end..groups[j].start],
                        " " | "-" | "\u{a0}"
                    )
                {
                    break;
                }
                digits.push_str(&text[groups[j].clone()]);
                if digits.len() > 19 {
                    break;
                }
                if issued(&digits) && luhn(&digits) && free_after(text, groups[j].end) {
                    best = Some(j);
                }
            }
        }
        match best {
            Some(j) => {
                out.push(Finding {
                    kind: Kind::Card,
                    start: groups[i].start,
                    end: groups[j].end,
                });
                i = j + 1;
            }
            None => i += 1,
        }
    }
}

/// Whether a card network issues numbers of this head and length.
fn issued(digits: &str) -> bool {
    let n = digits.len();
    if !(13..=19).contains(&n) {
        return false;
    }
    let head: u32 = digits[..4].parse().unwrap_or(0);
    match head {
        4000..=4999 => matches!(n, 13 | 16 | 19),
        5100..=5599 | 2221..=2720 => n == 16,
        3400..=3499 | 3700..=3799 => n == 15,
        3000..=3059 | 3600..=3699 | 3800..=3999 => (14..=19).contains(&n),
        3528..=3589 => (16..=19).contains(&n),
        6011 | 6440..=6599 | 6200..=6299 => (16..=19).contains(&n),
        5000..=5099 | 5600..=5999 | 6000..=6999 => true,
        _ => false,
    }
}

/// Luhn's check over ASCII digits.
fn luhn(digits: &str) -> bool {
    let sum: u32 = digits
        .bytes()
        .rev()
        .enumerate()
        .map(|(i, b)| {
            let d = u32::from(b - b'0') << (i % 2);
            if d > 9 { d - 9 } else { d }
        })
        .sum();
    sum % 10 == 0
}

/// Characters of an IBAN by country (ISO 13616 registry).
fn iban_length(country: &[u8]) -> Option<usize> {
    const LENGTHS: [(&[u8], usize); 18] = [
        (b"NO", 15),
        (b"BE", 16),
        (b"DKFOFIGLNLSD", 18),
        (b"MKSI", 19),
        (b"ATBAEEKZLTLUMNXK", 20),
        (b"CHCRHRLILV", 21),
        (b"BGBHDEGBGEIEMERSVA", 22),
        (b"AEGIILIQOMSOTL", 23),
        (b"ADCZESMDPKROSASESKTNVG", 24),
        (b"LYPTST", 25),
        (b"ISTR", 26),
        (b"BIDJFRGRITMCMRSM", 27),
        (b"ALAZBYCYDOGTHULBNISVPL", 28),
        (b"BREGPSQAUA", 29),
        (b"JOKWMU", 30),
        (b"MTSC", 31),
        (b"LC", 32),
        (b"RU", 33),
    ];
    LENGTHS
        .iter()
        .find(|(codes, _)| codes.chunks_exact(2).any(|c| c == country))
        .map(|(_, n)| *n)
}

fn ibans(text: &str, groups: &[Range<usize>], out: &mut Vec<Finding>) {
    let bytes = text.as_bytes();
    for g in groups {
        let Some(start) = g.start.checked_sub(2) else {
            continue;
        };
        if g.len() < 2 || !bytes[start..g.start].iter().all(u8::is_ascii_alphabetic) {
            continue;
        }
        if !free_before(text, start) {
            continue;
        }
        let country = bytes[start..g.start].to_ascii_uppercase();
        let Some(length) = iban_length(&country) else {
            continue;
        };
        let mut chars = Vec::with_capacity(length);
        let (mut end, mut gap) = (start, false);
        for (at, c) in text[start..].char_indices() {
            if c.is_ascii_alphanumeric() && chars.len() < length {
                chars.push(c.to_ascii_uppercase());
                end = start + at + 1;
                gap = false;
            } else if matches!(c, ' ' | '\u{a0}' | '-') && !gap && chars.len() < length {
                gap = true;
            } else {
                break;
            }
        }
        let free = !text[end..].starts_with(|c: char| c.is_alphanumeric());
        if chars.len() == length && free && mod97(&chars) {
            out.push(Finding {
                kind: Kind::Iban,
                start,
                end,
            });
        }
    }
}

/// ISO 7064 mod 97-10 over an IBAN whose first four characters go last.
fn mod97(chars: &[char]) -> bool {
    let value = |c: char| c.to_digit(36);
    let mut rest = 0;
    for &c in chars[4..].iter().chain(&chars[..4]) {
        let Some(v) = value(c) else { return false };
        rest = if v < 10 {
            rest * 10 + v
        } else {
            rest * 100 + v
        } % 97;
    }
    rest == 1
}

/// What the words before a number say it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Context {
    Phone,
    Other,
    Nothing,
}

/// Reads the three words before `at` on its line, nearest first.
fn context(text: &str, at: usize) -> Context {
    const PHONE: [&str; 20] = [
        "tel",
        "fon",
        "phone",
        "mobil",
        "mobile",
        "handy",
        "fax",
        "call",
        "ruf",
        "anruf",
        "dial",
        "durchwahl",
        "hotline",
        "sms",
        "whatsapp",
        "erreichbar",
        "telephone",
        "cell",
        "festnetz",
        "phones",
    ];
    const OTHER: [&str; 40] = [
        "order",
        "bestell",
        "auftrag",
        "invoice",
        "rechnung",
        "artikel",
        "article",
        "item",
        "kunde",
        "customer",
        "ticket",
        "case",
        "vorgang",
        "akte",
        "sku",
        "isbn",
        "issn",
        "doi",
        "serial",
        "serien",
        "part",
        "teile",
        "kosten",
        "cost",
        "konto",
        "account",
        "inventar",
        "inventory",
        "asset",
        "vertrag",
        "contract",
        "ref",
        "tracking",
        "sendung",
        "policy",
        "version",
        "build",
        "release",
        "commit",
        "raum",
    ];
    // A bare "number" or "id" speaks only when no telephone word is near.
    const NUMBER: [&str; 6] = ["nr", "no", "number", "nummer", "id", "ids"];
    let line = text[..at].rsplit('\n').next().unwrap_or("");
    let mut weak = Context::Nothing;
    let words = line
        .rsplit(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty());
    for word in words.take(3) {
        let word = word.to_lowercase();
        if PHONE.contains(&word.as_str())
            || ["telef", "rufn", "mobiln", "handyn", "faxn", "phonen"]
                .iter()
                .any(|p| word.starts_with(p))
        {
            return Context::Phone;
        }
        if OTHER.iter().any(|o| word.starts_with(o)) {
            return Context::Other;
        }
        if NUMBER.contains(&word.as_str()) || word.ends_with("nummer") {
            weak = Context::Other;
        }
    }
    weak
}

/// Whether a group of digits stands just before `at`: a number in the middle of
/// a longer one is not a telephone number.
fn continues(text: &str, at: usize) -> bool {
    let before = text[..at].trim_end_matches([' ', '-', '.', '/', '\u{a0}']);
    before.len() < at && before.ends_with(|c: char| c.is_ascii_digit())
}

fn phones(text: &str, groups: &[Range<usize>], out: &mut Vec<Finding>) {
    let mut i = 0;
    while i < groups.len() {
        match phone(text, groups, i) {
            Some((start, last)) => {
                let end = groups[last].end;
                out.push(Finding {
                    kind: Kind::Phone,
                    start,
                    end,
                });
                i = last + 1;
            }
            None => i += 1,
        }
    }
}

/// The telephone number that starts with group `i`: its first byte and its
/// last group.
fn phone(text: &str, groups: &[Range<usize>], i: usize) -> Option<(usize, usize)> {
    let mut start = groups[i].start;
    let plus = text[..start].ends_with('+');
    start -= usize::from(plus);
    let paren = text[..start].ends_with('(');
    if !free_before(text, start - usize::from(paren)) || DATE.is_match(&text[start..]) {
        return None;
    }
    // Groups that may belong together, with the digits so far.
    let mut chain = vec![(i, groups[i].len())];
    for j in i + 1..groups.len() {
        let gap = &text[groups[j - 1].end..groups[j].start];
        let joins = gap.chars().count() <= 3
            && gap.chars().all(|c| " -–/.()\u{a0}".contains(c))
            && !DATE.is_match(&text[groups[j].start..]);
        let digits = chain[j - i - 1].1 + groups[j].len();
        if !joins || digits > 15 {
            break;
        }
        chain.push((j, digits));
    }
    let group = |n: usize| chain.get(n).map_or("", |&(j, _)| &text[groups[j].clone()]);
    let gap = |n: usize| match chain.get(n + 1) {
        Some(&(j, _)) => &text[groups[j - 1].end..groups[j].start],
        None => "",
    };
    let ends = |j: usize| free_after(text, groups[j].end);
    // The longest run of whole groups with that many digits.
    let longest = |digits: std::ops::RangeInclusive<usize>| {
        chain
            .iter()
            .rev()
            .find(|&&(j, n)| digits.contains(&n) && ends(j))
            .map(|&(j, _)| j)
    };
    let open = start - usize::from(paren);
    let first = group(0);
    if plus {
        let most = if first.starts_with('1') { 11 } else { 15 };
        return if first.starts_with('0') {
            None
        } else {
            longest(8..=most).map(|j| (start, j))
        };
    }
    let context = context(text, open);
    if context == Context::Phone {
        return longest(6..=15).map(|j| (open, j));
    }
    if context == Context::Other || continues(text, open) {
        return None;
    }
    if let Some(country) = first.strip_prefix("00") {
        let split = !country.starts_with('0') && (1..=3).contains(&country.len());
        let whole = ["49", "43", "41"].iter().any(|c| country.starts_with(c));
        return if split || whole {
            longest(11..=15).map(|j| (open, j))
        } else {
            None
        };
    }
    if first.starts_with('0') {
        let mobile = first.len() >= 11 && matches!(&first[..3], "015" | "016" | "017");
        let area = (3..=6).contains(&first.len())
            && matches!(
                gap(0),
                " " | "/" | "-" | ")" | ") " | " / " | " - " | "\u{a0}" | ")/"
            );
        return if mobile || area {
            longest(9..=13).map(|j| (open, j))
        } else {
            None
        };
    }
    // North America: (415) 555-2671, 415-555-2671, 1-415-555-2671.
    let n = usize::from(first == "1");
    let shape = [group(n), group(n + 1), group(n + 2)];
    let (a, b) = (gap(n), gap(n + 1));
    let joined = matches!(
        (a, b),
        ("-", "-") | (".", ".") | (")" | ") " | ")-" | ") -", "-" | " " | ".")
    );
    let dialled = shape.iter().map(|g| g.len()).eq([3, 3, 4])
        && shape[..2]
            .iter()
            .all(|g| g.starts_with(|c| ('2'..='9').contains(&c)));
    let last = chain.get(n + 2)?.0;
    (joined && dialled && ends(last)).then_some((open, last))
}

fn addresses(text: &str, out: &mut Vec<Finding>) {
    for m in IPV4.find_iter(text) {
        let octets: Vec<u16> = m
            .as_str()
            .split('.')
            .filter_map(|o| o.parse().ok())
            .collect();
        let valid = m
            .as_str()
            .split('.')
            .all(|o| o == "0" || !o.starts_with('0'))
            && octets.iter().all(|o| *o <= 255);
        let host = !matches!(octets[..], [0 | 127, ..] | [255, 255, ..]) && octets[3] != 0;
        if valid && host && outside(text, m.range()) && !numbering(text, &m.range(), &octets) {
            out.push(Finding {
                kind: Kind::Ip,
                start: m.start(),
                end: m.end(),
            });
        }
    }
    for m in IPV6.find_iter(text) {
        let parts = m.as_str().split(':').filter(|p| !p.is_empty()).count();
        let free = !text[..m.start()].ends_with(char::is_alphanumeric)
            && !text[m.end()..].starts_with(char::is_alphanumeric);
        let address = m.as_str().trim_end_matches(':').parse::<Ipv6Addr>();
        if parts >= 4 && free && address.is_ok_and(|a| !a.is_loopback() && !a.is_unspecified()) {
            out.push(Finding {
                kind: Kind::Ip,
                start: m.start(),
                end: m.start() + m.as_str().trim_end_matches(':').len(),
            });
        }
    }
}

/// Whether a dotted quad stands alone, not inside a longer name or number.
fn outside(text: &str, at: Range<usize>) -> bool {
    let mut back = text[..at.start].chars().rev();
    let mut ahead = text[at.end..].chars();
    let before = match back.next() {
        Some(c) if c.is_alphanumeric() || c == '.' || c == '_' => false,
        Some('-') => !back.next().is_some_and(char::is_alphabetic),
        _ => true,
    };
    before
        && match ahead.next() {
            Some(c) if c.is_alphanumeric() || c == '_' => false,
            Some('.') => !ahead.next().is_some_and(char::is_alphanumeric),
            Some('-' | '+') => !ahead.next().is_some_and(char::is_alphabetic),
            _ => true,
        }
}

/// Whether a dotted quad numbers a version or a section.
fn numbering(text: &str, at: &Range<usize>, octets: &[u16]) -> bool {
    const NUMBERED: [&str; 22] = [
        "version",
        "versions",
        "release",
        "build",
        "firmware",
        "kernel",
        "v",
        "ver",
        "section",
        "abschnitt",
        "kapitel",
        "chapter",
        "clause",
        "ziffer",
        "punkt",
        "paragraph",
        "upgrade",
        "update",
        "patch",
        "revision",
        "rev",
        "driver",
    ];
    const HOSTED: [&str; 16] = [
        "ip", "ipv4", "host", "server", "address", "adresse", "ping", "dns", "gateway", "ssh",
        "http", "https", "client", "router", "peer", "from",
    ];
    let line = text[..at.start].rsplit('\n').next().unwrap_or("");
    let near: Vec<String> = line
        .rsplit(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .take(3)
        .map(str::to_lowercase)
        .collect();
    if line.trim_end().ends_with('§') {
        return true;
    }
    for word in &near {
        if HOSTED.contains(&word.as_str()) {
            return false;
        }
        if NUMBERED.contains(&word.as_str()) {
            return true;
        }
    }
    octets.iter().all(|o| *o < 20)
}
