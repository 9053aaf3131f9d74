//! Telephone numbers: international, national by shape, any by a word before.

use super::digits::{Context, context, continues, date};
use super::scanner::Scan;
use super::text::Text;
use super::{Finding, Kind};
use std::ops::Range;

impl Scan<'_> {
    pub(super) fn phones(&mut self, groups: &[Range<usize>]) {
        let text = self.text;
        let mut i = 0;
        while i < groups.len() {
            let mut at = groups[i].start;
            at -= usize::from(text.str[..at].ends_with('+'));
            at -= usize::from(text.str[..at].ends_with('('));
            let mut last = i;
            self.judge(at, || {
                let (start, j) = phone(text, groups, i)?;
                last = j;
                Some(Finding {
                    kind: Kind::Phone,
                    start,
                    end: groups[j].end,
                })
            });
            i = last + 1;
        }
    }
}

/// The telephone number that starts with group `i`: its first byte and its
/// last group.
fn phone(text: &Text<'_>, groups: &[Range<usize>], i: usize) -> Option<(usize, usize)> {
    let mut start = groups[i].start;
    let plus = text.str[..start].ends_with('+');
    start -= usize::from(plus);
    let paren = text.str[..start].ends_with('(');
    let open = start - usize::from(paren);
    if !text.free_before(open) || date(text, start).is_some() {
        return None;
    }
    // Digits up to and with each group that may belong to it.
    let mut chain = [0; 15];
    let mut n = 0;
    for j in i..groups.len() {
        let digits = if j == i { 0 } else { chain[n - 1] } + groups[j].len();
        if j > i && (digits > 15 || date(text, groups[j].start).is_some()) {
            break;
        }
        chain[n] = digits;
        n += 1;
        if n == chain.len() {
            break;
        }
    }
    let chain = &chain[..n];
    let group = |k: usize| if k < n { &text.str[groups[i + k].clone()] } else { "" };
    let gap = |k: usize| match k + 1 < n {
        true => &text.str[groups[i + k].end..groups[i + k + 1].start],
        false => "",
    };
    // The longest run of whole groups with that many digits.
    let longest = |digits: std::ops::RangeInclusive<usize>| {
        let mut ends = (0..n).rev();
        ends.find(|k| digits.contains(&chain[*k]) && text.free_after(groups[i + k].end))
            .map(|k| i + k)
    };
    let first = group(0);
    if plus {
        let most = if first.starts_with('1') { 11 } else { 15 };
        return match first.starts_with('0') {
            true => None,
            false => longest(8..=most).map(|j| (start, j)),
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
        return match split || whole {
            true => longest(11..=15).map(|j| (open, j)),
            false => None,
        };
    }
    if first.starts_with('0') {
        let mobile = first.len() >= 11 && matches!(&first[..3], "015" | "016" | "017");
        let area = (3..=6).contains(&first.len())
            && matches!(
                gap(0),
                " " | "/" | "-" | ")" | ") " | " / " | " - " | "\u{a0}" | ")/"
            );
        return match mobile || area {
            true => longest(9..=13).map(|j| (open, j)),
            false => None,
        };
    }
    // North America: (415) 555-2671, 415-555-2671, 1-415-555-2671.
    let k = usize::from(first == "1");
    let shape = [group(k), group(k + 1), group(k + 2)];
    let joined = matches!(
        (gap(k), gap(k + 1)),
        ("-", "-") | (".", ".") | (")" | ") " | ")-" | ") -", "-" | " " | ".")
    );
    let dialled = shape.iter().map(|g| g.len()).eq([3, 3, 4])
        && shape[..2]
            .iter()
            .all(|g| g.starts_with(|c| ('2'..='9').contains(&c)));
    let whole = joined && dialled && text.free_after(groups[i + k + 2].end);
    whole.then_some((open, i + k + 2))
}
