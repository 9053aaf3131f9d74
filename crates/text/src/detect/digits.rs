//! Numbers are read as groups of digits with what stands between them, and by
//! the words before them: an order number has the shape of a telephone number.

use super::scanner::Scan;
use super::text::{Text, begins};
use super::{Finding, Kind, Kinds};
use std::ops::Range;

/// The longest number: a card's.
const LONGEST: usize = 19;

impl Scan<'_> {
    /// Reads the groups that begin at `at`; where to go on.
    pub(super) fn digits(&mut self, at: usize) -> usize {
        const TOKENS: Kinds = Kinds::NONE
            .with(Kind::Secret)
            .with(Kind::Iban)
            .with(Kind::Crypto)
            .with(Kind::Nino)
            .with(Kind::Nif)
            .with(Kind::FiscalCode)
            .with(Kind::Nric)
            .with(Kind::Passport)
            .with(Kind::Mac);
        let text = self.text;
        let mut groups = std::mem::take(&mut self.groups);
        groups.clear();
        let (total, hit) = text.watch(|| cluster(text, at, &mut groups));
        if hit {
            let mut digits = 0;
            let near = groups.iter().rev().take_while(|g| {
                digits += g.len();
                digits <= LONGEST
            });
            let start = near.last().map_or(text.len(), |g| g.start);
            self.pend(true, super::ids::lead(text, start).max(self.from));
        }
        if total >= 13 && self.kinds.has(Kind::Card) {
            self.cards(&groups);
        }
        if total >= 6 && self.kinds.has(Kind::Phone) {
            self.phones(&groups);
        }
        if total >= 6 {
            self.ids(&groups);
        }
        if groups.len() >= 4 && self.kinds.has(Kind::Ip) {
            self.ipv4(&groups);
        }
        if self.kinds.has(Kind::BirthDate) {
            self.birth_dates(&groups);
        }
        if self.kinds.any(TOKENS) {
            for g in &groups {
                self.token(g);
            }
        }
        let end = groups.last().map_or(at + 1, |g| g.end);
        self.groups = groups;
        end
    }

    fn cards(&mut self, groups: &[Range<usize>]) {
        let text = self.text;
        let mut i = 0;
        while i < groups.len() {
            let start = groups[i].start;
            let mut last = None;
            self.judge(start, || {
                last = card(text, groups, i);
                last.map(|j| Finding {
                    kind: Kind::Card,
                    start,
                    end: groups[j].end,
                })
            });
            i = last.unwrap_or(i) + 1;
        }
    }
}

/// Collects groups of digits with at most three characters between two; how
/// many digits there are.
fn cluster(text: &Text<'_>, at: usize, groups: &mut Vec<Range<usize>>) -> usize {
    let (mut at, mut total) = (at, 0);
    loop {
        let mut end = at + 1;
        while text.byte(end).is_ascii_digit() {
            end += 1;
        }
        groups.push(at..end);
        total += end - at;
        let mut next = end;
        for _ in 0..3 {
            match text.byte(next) {
                b' ' | b'-' | b'/' | b'.' | b'(' | b')' => next += 1,
                0xc2 if text.byte(next + 1) == 0xa0 => next += 2,
                0xe2 if text.starts(next, "–") => next += 3,
                _ => break,
            }
        }
        if next == end || !text.byte(next).is_ascii_digit() {
            return total;
        }
        at = next;
    }
}

/// The last group of the longest card number that starts with group `i`.
fn card(text: &Text<'_>, groups: &[Range<usize>], i: usize) -> Option<usize> {
    if !text.free_before(groups[i].start) {
        return None;
    }
    let (mut digits, mut n) = ([0; LONGEST], 0);
    let mut best = None;
    for j in i..groups.len() {
        let joined = j == i
            || matches!(&text.str[groups[j - 1].end..groups[j].start], " " | "-" | "\u{a0}");
        if !joined || n + groups[j].len() > LONGEST {
            break;
        }
        digits[n..n + groups[j].len()].copy_from_slice(&text.bytes[groups[j].clone()]);
        n += groups[j].len();
        let digits = &digits[..n];
        if issued(digits) && super::checks::luhn(digits) && text.free_after(groups[j].end) {
            best = Some(j);
        }
    }
    best
}

/// Whether a card network issues numbers of this head and length.
fn issued(digits: &[u8]) -> bool {
    let n = digits.len();
    if !(13..=LONGEST).contains(&n) {
        return false;
    }
    let head = digits[..4].iter().fold(0, |h, d| h * 10 + u32::from(d - b'0'));
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

/// What the words before a number say it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    Phone,
    Other,
    Nothing,
}

/// Reads the three words before `at` on its line, nearest first.
pub(super) fn context(text: &Text<'_>, at: usize) -> Context {
    const PHONE: [&str; 20] = [
        "tel", "fon", "phone", "mobil", "mobile", "handy", "fax", "call", "ruf", "anruf", "dial",
        "durchwahl", "hotline", "sms", "whatsapp", "erreichbar", "telephone", "cell", "festnetz",
        "phones",
    ];
    const PHONE_HEADS: [&str; 6] = ["telef", "rufn", "mobiln", "handyn", "faxn", "phonen"];
    const OTHER: [&str; 40] = [
        "order", "bestell", "auftrag", "invoice", "rechnung", "artikel", "article", "item",
        "kunde", "customer", "ticket", "case", "vorgang", "akte", "sku", "isbn", "issn", "doi",
        "serial", "serien", "part", "teile", "kosten", "cost", "konto", "account", "inventar",
        "inventory", "asset", "vertrag", "contract", "ref", "tracking", "sendung", "policy",
        "version", "build", "release", "commit", "raum",
    ];
    // A bare "number" or "id" speaks only when no telephone word is near.
    const NUMBER: [&str; 6] = ["nr", "no", "number", "nummer", "id", "ids"];
    let mut weak = Context::Nothing;
    for word in text.words_before(at).take(3) {
        if PHONE.iter().any(|p| word.eq_ignore_ascii_case(p))
            || PHONE_HEADS.iter().any(|p| begins(word, p))
        {
            return Context::Phone;
        }
        if OTHER.iter().any(|o| begins(word, o)) {
            return Context::Other;
        }
        let tail = word.len().checked_sub(6).and_then(|n| word.get(n..));
        if NUMBER.iter().any(|n| word.eq_ignore_ascii_case(n))
            || tail.is_some_and(|t| t.eq_ignore_ascii_case("nummer"))
        {
            weak = Context::Other;
        }
    }
    weak
}

/// Whether a group of digits stands just before `at`: a number in the middle of
/// a longer one stands for nothing.
pub(super) fn continues(text: &Text<'_>, at: usize) -> bool {
    let before = text.line_before(at);
    let trimmed = before.trim_end_matches([' ', '-', '.', '/', '\u{a0}']);
    trimmed.len() < before.len() && trimmed.ends_with(|c: char| c.is_ascii_digit())
}

/// The end of the date in digits at `at`: `2024-05-12`, `12.5.24`, `12/05/2024`.
pub(super) fn date(text: &Text<'_>, at: usize) -> Option<usize> {
    let digits = |i| text.run(i, 5, |b| b.is_ascii_digit());
    let separator = |i| matches!(text.byte(i), b'-' | b'.' | b'/');
    let century = |i| text.starts(i, "19") || text.starts(i, "20");
    let a = digits(at);
    if a == at || !separator(a) {
        return None;
    }
    let b = digits(a + 1);
    if !(1..=2).contains(&(b - a - 1)) || !separator(b) {
        return None;
    }
    let c = digits(b + 1);
    let known = match (a - at, c - b - 1) {
        (4, 1 | 2) => century(at),
        (1 | 2, 2) => true,
        (1 | 2, 4) => century(b + 1),
        _ => false,
    };
    known.then_some(c)
}
