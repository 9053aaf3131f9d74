//! How much of a text says the same again: the measures of Gopher (Rae et al.
//! 2021, table A1) with its thresholds.
//!
//! An n-gram that occurs once is not counted as "most common": in a short
//! document it would fill a large share without repeating anything.

use std::collections::{HashMap, HashSet};

/// Each measure, a share between 0 and 1, and the most Gopher allows.
pub const MEASURES: [(&str, f64); 13] = [
    ("duplicate_lines", 0.30),
    ("duplicate_line_characters", 0.20),
    ("duplicate_paragraphs", 0.30),
    ("duplicate_paragraph_characters", 0.20),
    ("top_2_gram", 0.20),
    ("top_3_gram", 0.18),
    ("top_4_gram", 0.16),
    ("duplicate_5_grams", 0.15),
    ("duplicate_6_grams", 0.14),
    ("duplicate_7_grams", 0.13),
    ("duplicate_8_grams", 0.12),
    ("duplicate_9_grams", 0.11),
    ("duplicate_10_grams", 0.10),
];

/// The measures of `text`, in the order of [`MEASURES`].
pub fn measure(text: &str) -> [f64; 13] {
    let lines = duplicates(text.lines());
    let paragraphs = duplicates(text.split("\n\n"));
    let words: Vec<&str> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .collect();
    let lengths: Vec<usize> = words.iter().map(|w| w.chars().count()).collect();
    let total = lengths.iter().sum::<usize>().max(1) as f64;
    let mut out = [0.0; 13];
    (out[0], out[1], out[2], out[3]) = (lines.0, lines.1, paragraphs.0, paragraphs.1);
    for n in 2..=4 {
        out[n + 2] = top(&words, &lengths, n) as f64 / total;
    }
    for n in 5..=10 {
        out[n + 2] = repeated(&words, &lengths, n) as f64 / total;
    }
    out
}

/// Shares of parts, and of their characters, that stood before.
fn duplicates<'a>(parts: impl Iterator<Item = &'a str>) -> (f64, f64) {
    let mut seen = HashSet::new();
    let (mut parts_all, mut parts_twice, mut chars_all, mut chars_twice) = (0, 0, 0, 0);
    for part in parts.map(str::trim).filter(|p| !p.is_empty()) {
        let chars = part.chars().count();
        parts_all += 1;
        chars_all += chars;
        if !seen.insert(part) {
            parts_twice += 1;
            chars_twice += chars;
        }
    }
    let share = |a: usize, b: usize| a as f64 / b.max(1) as f64;
    (share(parts_twice, parts_all), share(chars_twice, chars_all))
}

/// Characters in all occurrences of the n-gram that fills most of them.
fn top(words: &[&str], lengths: &[usize], n: usize) -> usize {
    let mut counts: HashMap<&[&str], (usize, usize)> = HashMap::new();
    for (gram, lengths) in words.windows(n).zip(lengths.windows(n)) {
        let entry = counts.entry(gram).or_insert((0, lengths.iter().sum()));
        entry.0 += 1;
    }
    counts
        .values()
        .filter(|(count, _)| *count > 1)
        .map(|(count, chars)| count * chars)
        .max()
        .unwrap_or(0)
}

/// Characters in n-grams that stood before, none counted twice.
fn repeated(words: &[&str], lengths: &[usize], n: usize) -> usize {
    let mut seen = HashSet::new();
    let (mut at, mut chars) = (0, 0);
    while at + n <= words.len() {
        if seen.insert(&words[at..at + n]) {
            at += 1;
        } else {
            chars += lengths[at..at + n].iter().sum::<usize>();
            at += n;
        }
    }
    chars
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_prose_repeats_nothing() {
        let text = "Each team books its rooms itself.\nThe front desk opens at eight.";
        assert_eq!(measure(text), [0.0; 13]);
        assert_eq!(measure(""), [0.0; 13]);
    }

    #[test]
    fn known_shares() {
        let m = measure("same line\nsame line\nsame line\nother text");
        assert!((m[0] - 0.5).abs() < 1e-12);
        assert!((m[1] - 18.0 / 37.0).abs() < 1e-12);
        // "same line" three times: 24 of 33 letters.
        assert!((m[4] - 24.0 / 33.0).abs() < 1e-12);
        let again = "one two three four five ".repeat(10);
        let m = measure(&again);
        assert!(m[7] > 0.8 && m[12] > 0.7);
    }
}
