//! The scanner on generated texts: planted values in ordinary sentences, beside
//! what looks like them.

#[path = "../../../benches/detect/planted.rs"]
mod planted;

use ashlar_text::detect::{Kind, Kinds, Scanner};
use std::collections::BTreeMap;

/// Found, planted, and found where planted, by kind.
fn score(seed: u64) -> BTreeMap<Kind, (usize, usize, usize)> {
    let scanner = Scanner::new(Kinds::ALL);
    let mut scores = BTreeMap::<Kind, (usize, usize, usize)>::new();
    for d in planted::documents(seed, 3000, 8, true) {
        let found = scanner.find(&d.text);
        for f in &found {
            scores.entry(f.kind).or_default().0 += 1;
        }
        for (kind, start, end) in &d.plants {
            let score = scores.entry(*kind).or_default();
            score.1 += 1;
            let hit = found.iter().any(|f| (f.kind, f.start, f.end) == (*kind, *start, *end));
            score.2 += usize::from(hit);
            if !hit && std::env::var_os("ASHLAR_SHOW_MISSES").is_some() {
                let near: Vec<_> = found.iter().filter(|f| f.start < *end && f.end > *start).collect();
                eprintln!("{kind}: {:?} {near:?}", &d.text[start.saturating_sub(20)..*end]);
            }
        }
        if std::env::var_os("ASHLAR_SHOW_MISSES").is_some() {
            for f in &found {
                if !d.plants.iter().any(|(k, s, e)| (f.kind, f.start, f.end) == (*k, *s, *e)) {
                    eprintln!("false {}: {:?}", f.kind, &d.text[d.text.floor_char_boundary(f.start.saturating_sub(20))..f.end]);
                }
            }
        }
    }
    scores
}

#[test]
fn f1_of_each_kind_on_the_planted_set() {
    let scores = score(1);
    assert_eq!(scores.len(), Kind::ALL.len(), "{scores:?}");
    for (kind, (found, planted, hit)) in scores {
        let f1 = 2.0 * hit as f64 / (found + planted) as f64;
        let recall = hit as f64 / planted as f64;
        assert!(planted > 150 && f1 >= 0.97, "{kind}: F1 {f1:.3}, {hit} of {planted}, {found} found");
        assert!(kind != Kind::Secret || recall >= 0.99, "{recall} of secrets");
    }
}
