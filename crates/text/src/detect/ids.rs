//! Numbers that states give to persons, by shape, check digit and the words
//! before them. A check digit alone lets every tenth number through: what has
//! no shape of its own must be named.

use super::checks;
use super::digits::{Context, context, continues, date};
use super::scanner::Scan;
use super::text::Text;
use super::{Finding, Kind};
use std::ops::Range;

/// How many words before a number may name it.
const WORDS: usize = 8;

impl Scan<'_> {
    /// Numbers of digits only: groups with the same single character between.
    pub(super) fn ids(&mut self, groups: &[Range<usize>]) {
        const OF_DIGITS: [Kind; 10] = [
            Kind::Ssn,
            Kind::Itin,
            Kind::Nhs,
            Kind::SteuerId,
            Kind::Pesel,
            Kind::Aadhaar,
            Kind::Tfn,
            Kind::Abn,
            Kind::Nif,
            Kind::Nino,
        ];
        let (text, kinds) = (self.text, self.kinds);
        if !OF_DIGITS.into_iter().any(|k| kinds.has(k)) {
            return;
        }
        for i in 0..groups.len() {
            // A British number has two letters before its digits.
            let start = groups[i].start;
            if let Some(first) = nino_start(text, start).filter(|_| kinds.has(Kind::Nino)) {
                self.judge(first, || nino(text, first, Some(start)));
            }
            self.judge(start, || number(text, groups, i).filter(|f| kinds.has(f.kind)));
        }
    }

    /// Numbers with letters in them: the token `start..end`.
    pub(super) fn letter_id(&mut self, start: usize, end: usize) -> Option<Finding> {
        let (text, kinds) = (self.text, self.kinds);
        let id = &text.bytes[start..end];
        let found = |kind| Some(Finding { kind, start, end });
        let digits = |r: Range<usize>| id[r].iter().all(u8::is_ascii_digit);
        let upper = |i: usize| id[i].is_ascii_uppercase();
        let is = |kind: Kind, check: bool| kinds.has(kind) && check;
        if (6..=9).contains(&id.len())
            && is(Kind::Passport, id.iter().filter(|b| b.is_ascii_digit()).count() >= 4)
            && passport(text, start)
        {
            return found(Kind::Passport);
        }
        match id.len() {
            9 if upper(8) && digits(1..8) => {
                let number = |head: u32| head * 10_000_000 + value(&id[1..8]);
                let letter = id[8];
                match id[0] {
                    d @ b'0'..=b'9' if is(Kind::Nif, checks::nif(number(u32::from(d - b'0')), letter)) => {
                        found(Kind::Nif)
                    }
                    d @ b'X'..=b'Z' if is(Kind::Nif, checks::nif(number(u32::from(d - b'X')), letter)) => {
                        found(Kind::Nif)
                    }
                    _ if is(Kind::Nric, checks::nric(id)) => found(Kind::Nric),
                    _ => None,
                }
            }
            8 | 9 if kinds.has(Kind::Nino) => nino(text, start, None),
            16 if is(Kind::FiscalCode, fiscal_code(id)) => found(Kind::FiscalCode),
            _ => None,
        }
    }
}

fn value(digits: &[u8]) -> u32 {
    digits.iter().fold(0, |v, d| v * 10 + u32::from(d - b'0'))
}

/// Whether one of the four words before `at` names a passport.
fn passport(text: &Text<'_>, at: usize) -> bool {
    text.named(at, 4, &["passport", "reisepass", "passeport", "pasaporte", "passaporto"])
}

/// The number that starts with group `i`.
fn number(text: &Text<'_>, groups: &[Range<usize>], i: usize) -> Option<Finding> {
    let start = groups[i].start;
    if !text.free_before(start) || continues(text, start) {
        return None;
    }
    let separator = |j: usize| match groups.get(j + 1) {
        Some(next) if groups[j].end + 1 == next.start => text.bytes[groups[j].end],
        _ => 0,
    };
    let by = Some(separator(i)).filter(|s| matches!(s, b' ' | b'-'));
    let mut last = i;
    while by.is_some_and(|s| separator(last) == s) && last - i < 4 {
        last += 1;
    }
    let mut lengths = [0; 5];
    let (mut digits, mut n) = ([0; 12], 0);
    for (k, g) in groups[i..=last].iter().enumerate() {
        lengths[k] = g.len();
        let room = digits.get_mut(n..n + g.len())?;
        room.copy_from_slice(&text.bytes[g.clone()]);
        n += g.len();
    }
    let (digits, end) = (&digits[..n], groups[last].end);
    let named = |heads: &[&str]| text.named(start, WORDS, heads);
    let found = |kind, end| Some(Finding { kind, start, end });
    // `12345678-Z`.
    if lengths == [8, 0, 0, 0, 0] && text.byte(end) == b'-' {
        let letter = text.byte(end + 1);
        let control = letter.is_ascii_uppercase() && checks::nif(value(digits), letter);
        return match control && text.alone(start, end + 2) {
            true => found(Kind::Nif, end + 2),
            false => None,
        };
    }
    if !text.free_after(end) {
        return None;
    }
    let other = || context(text, start) == Context::Other;
    let kind = match lengths {
        [8 | 9, 0, ..] if passport(text, start) => Kind::Passport,
        [3, 2, 4, 0, 0] | [9, 0, ..] if ssn(digits) && social(text, start, by) => Kind::Ssn,
        [3, 2, 4, 0, 0] | [9, 0, ..] if itin(digits) && tax(text, start, by) => Kind::Itin,
        [3, 3, 4, 0, 0] | [10, 0, ..] if checks::nhs(digits) && named(&["nhs", "health", "patient"]) => {
            Kind::Nhs
        }
        [3, 3, 3, 0, 0] | [9, 0, ..] if checks::tfn(digits) && named(&["tfn", "tax"]) => Kind::Tfn,
        [4, 4, 4, 0, 0] | [12, 0, ..]
            if digits[0] >= b'2'
                && checks::verhoeff(digits)
                && (named(&["aadhaar", "aadhar", "uidai", "uid"]) || n > lengths[0] && !other()) =>
        {
            Kind::Aadhaar
        }
        [2, 3, 3, 3, 0] | [11, 0, ..] => {
            let spaced = n > lengths[0] && !other();
            if checks::abn(digits) && (spaced || named(&["abn", "business"])) {
                Kind::Abn
            } else if checks::steuer_id(digits)
                && (spaced || named(&["steuer", "idnr", "tin", "tax", "identifikationsnummer"]))
            {
                Kind::SteuerId
            } else if n == lengths[0] && checks::pesel(digits) && named(&["pesel"]) {
                Kind::Pesel
            } else {
                return None;
            }
        }
        _ => return None,
    };
    found(kind, end)
}

/// Whether the Social Security Administration gives out such a number.
fn ssn(digits: &[u8]) -> bool {
    // Printed on cards in wallets of a shop, and by everyone as an example.
    const PRINTED: [&[u8]; 3] = [b"078051120", b"219099999", b"123456789"];
    let (area, group, serial) = (&digits[..3], &digits[3..5], &digits[5..]);
    area != b"000"
        && area != b"666"
        && area[0] != b'9'
        && group != b"00"
        && serial != b"0000"
        && !PRINTED.contains(&digits)
}

/// Whether a number in hyphens, or a word, says it is a social security number.
fn social(text: &Text<'_>, start: usize, by: Option<u8>) -> bool {
    text.named(start, WORDS, &["ssn", "social"])
        || by == Some(b'-') && context(text, start) == Context::Nothing
}

/// Whether the Internal Revenue Service gives out such a taxpayer number.
fn itin(digits: &[u8]) -> bool {
    digits[0] == b'9' && matches!(value(&digits[3..5]), 50..=65 | 70..=88 | 90..=92 | 94..=99)
}

fn tax(text: &Text<'_>, start: usize, by: Option<u8>) -> bool {
    text.named(start, WORDS, &["itin", "tax", "individual"])
        || by == Some(b'-') && context(text, start) == Context::Nothing
}

/// The earliest start of anything that has its first digit at `at`.
pub(super) fn lead(text: &Text<'_>, at: usize) -> usize {
    let signs = text.run_back(at, 2, |b| matches!(b, b'+' | b'('));
    let month = month_before(text, at);
    signs.min(month).min(nino_start(text, at).unwrap_or(at))
}

/// The two letters that a British number in pairs has before the digits at `at`.
fn nino_start(text: &Text<'_>, at: usize) -> Option<usize> {
    let letters = at.checked_sub(1).filter(|i| text.bytes[*i] == b' ')?;
    let start = letters.checked_sub(2)?;
    let both = text.bytes[start..letters].iter().all(u8::is_ascii_uppercase);
    both.then_some(start)
}

/// A National Insurance number: two letters, six digits, in pairs or not, one
/// letter. `digits` is where they start when a space is before them.
fn nino(text: &Text<'_>, start: usize, digits: Option<usize>) -> Option<Finding> {
    const NEVER: [&[u8]; 7] = [b"BG", b"GB", b"KN", b"NK", b"NT", b"TN", b"ZZ"];
    let head = &text.bytes[start..start + 2];
    let issued = head[0].is_ascii_uppercase()
        && head[1].is_ascii_uppercase()
        && !b"DFIQUV".contains(&head[0])
        && !b"DFIOQUV".contains(&head[1])
        && !NEVER.contains(&head);
    if !issued {
        return None;
    }
    let mut at = digits.unwrap_or(start + 2);
    for _ in 0..3 {
        at += usize::from(text.byte(at) == b' ');
        if !text.byte(at).is_ascii_digit() || !text.byte(at + 1).is_ascii_digit() {
            return None;
        }
        at += 2;
    }
    at += usize::from(text.byte(at) == b' ');
    let whole = matches!(text.byte(at), b'A'..=b'D') && text.alone(start, at + 1);
    whole.then_some(Finding {
        kind: Kind::Nino,
        start,
        end: at + 1,
    })
}

/// Surname, name, year, month, day and sex, place, control letter. Letters stand
/// for digits where two persons would have the same code.
fn fiscal_code(id: &[u8]) -> bool {
    let digit = |b: &u8| b.is_ascii_digit() || b"LMNPQRSTUV".contains(b);
    let shape = id.iter().enumerate().all(|(i, b)| match i {
        6 | 7 | 9 | 10 | 12..=14 => digit(b),
        8 => b"ABCDEHLMPRST".contains(b),
        _ => b.is_ascii_uppercase(),
    });
    shape && checks::fiscal_code(id)
}

impl Scan<'_> {
    /// Dates named as a birth.
    pub(super) fn birth_dates(&mut self, groups: &[Range<usize>]) {
        let text = self.text;
        for g in groups {
            if g.len() > 4 || g.len() == 3 {
                continue;
            }
            let (start, _) = text.watch(|| month_before(text, g.start));
            self.judge(start, || {
                let end = match start == g.start {
                    true => date(text, start).or_else(|| written(text, g.end))?,
                    false => year(text, g.end + usize::from(text.byte(g.end) == b','))?,
                };
                let born = text.named(
                    start,
                    6,
                    &[
                        "born", "birth", "dob", "bday", "gebor", "geburts", "geb", "naissance",
                        "née", "nacimiento", "nacid", "nascita",
                    ],
                );
                let whole = text.alone(start, end) && born;
                whole.then_some(Finding {
                    kind: Kind::BirthDate,
                    start,
                    end,
                })
            });
        }
    }
}

/// The first letters of the months, in five languages.
const MONTHS: [&str; 29] = [
    "jan", "feb", "mar", "mär", "apr", "may", "mai", "jun", "jul", "aug", "sep", "oct", "okt",
    "nov", "dec", "dez", "ene", "abr", "ago", "dic", "fév", "avr", "jui", "aoû", "déc", "gen",
    "mag", "giu", "lug",
];

fn is_month(word: &str) -> bool {
    word.len() <= 12 && MONTHS.iter().any(|m| super::text::begins(word, m))
}

/// The start of the month's name before the day at `at`, or `at`.
fn month_before(text: &Text<'_>, at: usize) -> usize {
    let Some(space) = at.checked_sub(1).filter(|i| text.bytes[*i] == b' ') else {
        return at;
    };
    let line = text.line_before(space);
    let word = line.rsplit(|c: char| !c.is_alphabetic()).next().unwrap_or("");
    match is_month(word) {
        true => space - word.len(),
        false => at,
    }
}

/// The end of ` March 1990` or `. März 1990` at `i`.
fn written(text: &Text<'_>, i: usize) -> Option<usize> {
    let mut at = i + usize::from(text.byte(i) == b'.');
    if text.byte(at) != b' ' {
        return None;
    }
    at += 1;
    let mut end = at;
    while let Some(c) = text.char(end).filter(|c| c.is_alphabetic() && end - at < 16) {
        end += c.len_utf8();
    }
    match is_month(&text.str[at..end]) {
        true => year(text, end),
        false => None,
    }
}

/// The end of ` 1990` at `i`.
fn year(text: &Text<'_>, i: usize) -> Option<usize> {
    let century = text.starts(i, " 19") || text.starts(i, " 20");
    let digits = century && text.byte(i + 3).is_ascii_digit() && text.byte(i + 4).is_ascii_digit();
    digits.then_some(i + 5)
}
