//! What an answer and a document say word for word alike.
//!
//! Shared words show that a document *could* be where an answer stands; they
//! never prove influence.

use std::{collections::HashMap, ops::Range};

/// A run shorter than this is chance.
const MIN_WORDS: usize = 3;

/// The longest run of words that two texts share, case and punctuation aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    /// Characters of the run as it stands in the document.
    pub chars: usize,
    /// Its bytes in the answer.
    pub answer: Range<usize>,
    /// Its bytes in the document.
    pub document: Range<usize>,
}

/// The longest run of at least three words common to `answer` and `document`.
///
/// The longest in words; among equals the first in the answer, then in the
/// document. Dynamic programming, O(words × words) time, O(words) memory.
pub fn overlap(answer: &str, document: &str) -> Option<Overlap> {
    let mut ids = HashMap::new();
    let a = words(answer, &mut ids);
    let d = words(document, &mut ids);
    // run[j]: words of the common run that ends at answer word i, document word j-1.
    let mut run = vec![0usize; d.len() + 1];
    let (mut best, mut at) = (MIN_WORDS - 1, (0, 0));
    for (i, (word, _)) in a.iter().enumerate() {
        for j in (0..d.len()).rev() {
            run[j + 1] = if d[j].0 == *word { run[j] + 1 } else { 0 };
        }
        for (j, &n) in run[1..].iter().enumerate() {
            if n > best {
                (best, at) = (n, (i, j));
            }
        }
    }
    if best < MIN_WORDS {
        return None;
    }
    let span = |w: &[(u32, Range<usize>)], last: usize| w[last + 1 - best].1.start..w[last].1.end;
    let document_span = span(&d, at.1);
    Some(Overlap {
        chars: document[document_span.clone()].chars().count(),
        answer: span(&a, at.0),
        document: document_span,
    })
}

/// The words of `text` as numbers equal for equal folded words, with their
/// byte ranges.
fn words(text: &str, ids: &mut HashMap<String, u32>) -> Vec<(u32, Range<usize>)> {
    let mut out = Vec::new();
    let mut start = None;
    let ends = std::iter::once((text.len(), ' '));
    for (at, c) in text.char_indices().chain(ends) {
        match (c.is_alphanumeric(), start) {
            (true, None) => start = Some(at),
            (false, Some(from)) => {
                let next = u32::try_from(ids.len()).unwrap_or(u32::MAX);
                let id = *ids.entry(text[from..at].to_lowercase()).or_insert(next);
                out.push((id, from..at));
                start = None;
            }
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_the_run_in_both() {
        let answer = "Well: you may carry over FIVE days, until March.";
        let document = "Holiday.\nStaff may carry over five days until the end of June.";
        let o = overlap(answer, document).unwrap();
        assert_eq!(&answer[o.answer], "may carry over FIVE days, until");
        assert_eq!(&document[o.document], "may carry over five days until");
        assert_eq!(o.chars, 30);
    }

    #[test]
    fn two_words_are_chance() {
        assert_eq!(overlap("five days off", "only five days left"), None);
        assert_eq!(overlap("", "x"), None);
        assert_eq!(overlap("ÄÖ", ""), None);
    }

    #[test]
    fn folds_umlauts_on_byte_boundaries() {
        let o = overlap(
            "die GRÖSSE der Öfen",
            "Über die größe: die grösse der öfen.",
        )
        .unwrap();
        assert_eq!(
            &"Über die größe: die grösse der öfen."[o.document],
            "die grösse der öfen"
        );
    }

    fn brute(a: &[&str], d: &[&str]) -> usize {
        let mut best = 0;
        for i in 0..a.len() {
            for j in 0..d.len() {
                let n = a[i..]
                    .iter()
                    .zip(&d[j..])
                    .take_while(|(x, y)| x == y)
                    .count();
                best = best.max(n);
            }
        }
        best
    }

    proptest! {
        #[test]
        fn equals_brute_force(
            a in proptest::collection::vec(0usize..4, 0..24),
            d in proptest::collection::vec(0usize..4, 0..24),
        ) {
            const WORDS: [&str; 4] = ["äu", "bo", "ci", "de"];
            let a: Vec<_> = a.iter().map(|i| WORDS[*i]).collect();
            let d: Vec<_> = d.iter().map(|i| WORDS[*i]).collect();
            let (ta, td) = (a.join(", "), d.join(" "));
            let want = brute(&a, &d);
            match overlap(&ta, &td) {
                Some(o) => {
                    prop_assert_eq!(td[o.document.clone()].split(' ').count(), want);
                    prop_assert_eq!(ta[o.answer].replace(',', ""), &td[o.document]);
                }
                None => prop_assert!(want < MIN_WORDS),
            }
        }

        #[test]
        fn no_text_panics(a: String, d: String) {
            if let Some(o) = overlap(&a, &d) {
                let (a, d) = (&a[o.answer], &d[o.document]);
                prop_assert!(!a.is_empty() && !d.is_empty());
            }
        }
    }
}
