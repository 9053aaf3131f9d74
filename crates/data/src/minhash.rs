//! MinHash signatures of word shingles, and the true similarity they estimate.
//!
//! Signatures only propose pairs (Broder 1997; banding after Leskovec,
//! Rajaraman and Ullman, ch. 3); [`jaccard`] decides. Unverified pairs merge
//! what only looks alike.

use ashlar_core::hash::{fnv1a, mix};

/// The 64-bit hashes of the words of `text`: runs of letters and digits, lower
/// case (FNV-1a).
pub fn words(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .map(|w| fnv1a(w.chars().flat_map(char::to_lowercase).flat_map(|c| u32::from(c).to_le_bytes())))
        .collect()
}

/// The set of `n`-word shingles of `text` as sorted 64-bit hashes. A text of
/// fewer words is one shingle; a text without words has none.
pub fn shingles(text: &str, n: usize) -> Vec<u64> {
    let words = words(text);
    if words.is_empty() {
        return Vec::new();
    }
    let mut out: Vec<u64> = words
        .windows(n.clamp(1, words.len()))
        .map(|w| w.iter().fold(0, |h, x| mix(h ^ x).wrapping_add(*x)))
        .collect();
    out.sort_unstable();
    out.dedup();
    out
}

/// The signature: per permutation the least hash over `shingles`. Permutation
/// `i` is multiply-shift with constants drawn from SplitMix64 at `i`.
pub fn signature(shingles: &[u64], permutations: usize) -> Vec<u32> {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let constants: Vec<(u64, u64)> = (0..permutations as u64)
        .map(|i| {
            (
                mix((2 * i + 1).wrapping_mul(STEP)) | 1,
                mix((2 * i + 2).wrapping_mul(STEP)),
            )
        })
        .collect();
    let mut least = vec![u32::MAX; permutations];
    for &x in shingles {
        for (least, &(a, b)) in least.iter_mut().zip(&constants) {
            *least = (*least).min((a.wrapping_mul(x).wrapping_add(b) >> 32) as u32);
        }
    }
    least
}

/// One hash a band of `signature`, with the band's number mixed in; documents
/// that share one are candidates.
pub fn bands(signature: &[u32], bands: usize) -> Vec<u64> {
    signature
        .chunks_exact((signature.len() / bands.max(1)).max(1))
        .enumerate()
        .map(|(band, rows)| {
            rows.iter().fold(mix(band as u64 + 1), |h, &r| {
                mix(h ^ u64::from(r)).wrapping_add(h)
            })
        })
        .collect()
}

/// |a ∩ b| / |a ∪ b| of two sorted sets; 0 when either is empty.
pub fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let (mut i, mut j, mut common) = (0, 0, 0usize);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                common += 1;
                i += 1;
                j += 1;
            }
        }
    }
    if common == 0 {
        return 0.0;
    }
    common as f64 / (a.len() + b.len() - common) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_punctuation_are_folded() {
        assert_eq!(shingles("The Öl, is hot!", 5), shingles("the öl is HOT", 5));
        assert!(shingles("… – !", 5).is_empty());
        assert_eq!(shingles("a b c d e f", 5).len(), 2);
        assert_eq!(shingles("a b", 5).len(), 1);
    }

    #[test]
    fn signatures_estimate_the_jaccard_similarity() {
        for (shared, own) in [(900u64, 50u64), (500, 250), (100, 450)] {
            let set = |from: u64| -> Vec<u64> {
                let mut v: Vec<u64> = (0..shared).chain(from..from + own).map(mix).collect();
                v.sort_unstable();
                v
            };
            let (a, b) = (set(10_000), set(20_000));
            let truth = jaccard(&a, &b);
            assert!((truth - shared as f64 / (shared + 2 * own) as f64).abs() < 1e-12);
            let (sa, sb) = (signature(&a, 1024), signature(&b, 1024));
            let same = sa.iter().zip(&sb).filter(|(x, y)| x == y).count() as f64 / 1024.0;
            // Four standard deviations of a binomial share.
            let bound = 4.0 * (truth * (1.0 - truth) / 1024.0).sqrt();
            assert!((same - truth).abs() < bound, "{same} for {truth}");
        }
    }

    #[test]
    fn equal_rows_in_different_bands_do_not_meet() {
        let b = bands(&[7; 8], 4);
        assert_eq!(b.len(), 4);
        assert!((0..4).all(|i| (0..i).all(|j| b[i] != b[j])));
    }
}
