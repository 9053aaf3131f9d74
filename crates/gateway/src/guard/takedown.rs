//! Text of documents that were taken down, found in answers by hashes of words
//! in a row.
//!
//! Kept is not the text but a 64-bit hash of every run of [`SHINGLE`] words. A
//! run of `words` words in an answer, all of whose shingles are known, is taken
//! for a copy. With 64 bits and a million shingles a chance hit on one shingle
//! has a probability below 10⁻¹²; several in a row are needed.
//!
//! What may not happen here: the withheld text itself is held in memory or on
//! disk to look for it.

use super::phrases::words;
use ashlar_core::hash::{fnv1a, mix};
use std::{
    collections::HashSet,
    ops::Range,
    sync::{PoisonError, RwLock},
};

/// Words of one hash.
const SHINGLE: usize = 3;

/// Hashes of what may not be said.
#[derive(Debug, Default)]
pub struct Takedowns(RwLock<HashSet<u64>>);

fn hash(words: &[(String, Range<usize>)]) -> u64 {
    mix(fnv1a(words.iter().flat_map(|(word, _)| word.bytes().chain([0]))))
}

/// The hashes of a document's shingles.
pub fn shingles(text: &str) -> Vec<u64> {
    words(text).windows(SHINGLE).map(hash).collect()
}

impl Takedowns {
    /// Puts `hashes` in place of what was there.
    pub fn set(&self, hashes: HashSet<u64>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = hashes;
    }

    /// Runs of at least `least` words that were taken down.
    pub(super) fn find(&self, text: &str, least: usize) -> Vec<Range<usize>> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if known.is_empty() {
            return Vec::new();
        }
        let words = words(text);
        let (mut out, mut from) = (Vec::new(), None);
        let shingles = words.len().saturating_sub(SHINGLE - 1);
        for at in 0..=shingles {
            let hit = at < shingles && known.contains(&hash(&words[at..at + SHINGLE]));
            match (hit, from) {
                (true, None) => from = Some(at),
                (false, Some(first)) => {
                    // The last shingle began one before.
                    let last = at + SHINGLE - 2;
                    if last + 1 - first >= least {
                        out.push(words[first].1.start..words[last].1.end);
                    }
                    from = None;
                }
                _ => {}
            }
        }
        out
    }

    /// The prefix that no run, whatever follows, reaches into.
    pub(super) fn settled(&self, text: &str, least: usize) -> usize {
        if self.0.read().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return text.len();
        }
        let words = words(text);
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        // The last word may grow, and a run may have begun with any word that no
        // unknown shingle has closed off.
        let whole = words.len().saturating_sub(usize::from(words.last().is_some_and(|(_, at)| at.end == text.len())));
        let mut at = whole.saturating_sub(SHINGLE - 1);
        while at > 0 && known.contains(&hash(&words[at - 1..at - 1 + SHINGLE])) {
            at -= 1;
        }
        let mut settled = words.get(at).map_or(text.len(), |(_, span)| span.start);
        drop(known);
        // Nor into one that is over, and whose last words may begin another.
        if let Some(run) = self.find(text, least).into_iter().find(|r| r.start < settled && settled < r.end) {
            settled = run.start;
        }
        settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "The kiln of the old pottery must be warmed slowly, for the tiles crack when the winter air meets them.";

    fn down() -> Takedowns {
        let t = Takedowns::default();
        t.set(shingles(DOCUMENT).into_iter().collect());
        t
    }

    #[test]
    fn a_copied_run_is_found_whatever_its_dress() {
        let t = down();
        let answer = "As they say: THE TILES crack when the   winter air meets them! Indeed.";
        let found = t.find(answer, 6);
        assert_eq!(found.iter().map(|r| &answer[r.clone()]).collect::<Vec<_>>(), ["THE TILES crack when the   winter air meets them"]);
        assert!(t.find(answer, 12).is_empty());
        assert!(t.find("the tiles of the kiln are in the winter air", 3).len() <= 1);
    }

    #[test]
    fn the_prefix_is_free_of_runs_to_come() {
        let t = down();
        let answer = format!("Well, {DOCUMENT} So much for that.");
        let found = t.find(&answer, 8);
        assert_eq!(found.len(), 1);
        for (cut, _) in answer.char_indices() {
            let settled = t.settled(&answer[..cut], 8);
            assert!(settled <= found[0].start || settled >= found[0].end, "{cut}: {settled}");
        }
        assert_eq!(t.settled(&answer, 8), answer.len() - "for that.".len(), "two words and the next make a shingle");
    }
}
