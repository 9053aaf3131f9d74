//! Moderation by a graded lexicon: patterns of words, each with a weight for a
//! category.
//!
//! A window's score in a category is 1 − Π(1 − weight) over the patterns found,
//! each once (a noisy or), times the least weight of a pattern that speaks for
//! another reading (`calm`), which counts for half where a score is near 1. It
//! needs no model and no time to speak of, and it has the limits of its kind: it
//! reads English alone, takes words without their context, misses every
//! paraphrase, and flags some novels and some news. Its scores are grades, not
//! probabilities. Where it matters, give a head or a judge.

use super::{
    categories::{Category, Scores},
    phrases::{Phrases, words},
};
use std::{collections::BTreeSet, sync::LazyLock};

/// Words that are judged together.
pub(super) const WINDOW: usize = 64;

#[derive(Debug, Clone, Copy)]
enum Speaks {
    For(Category, f64),
    Against(f64),
}

static LEXICON: LazyLock<Phrases<Speaks>> = LazyLock::new(|| {
    read(include_str!("lexicon.txt")).expect("the lexicon of this crate, read by its tests")
});

fn read(text: &str) -> Result<Phrases<Speaks>, String> {
    let mut lists: Vec<(String, String)> = Vec::new();
    let mut patterns = Vec::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        if let Some((name, list)) = line.strip_prefix('@').and_then(|l| l.split_once(" = ")) {
            lists.push((format!("@{name}"), list.to_owned()));
            continue;
        }
        let mut parts = line.splitn(3, ' ');
        let (Some(category), Some(weight), Some(pattern)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(format!("{line:?} is not: category weight pattern"));
        };
        let weight: f64 = weight.parse().map_err(|_| format!("{line:?}: {weight:?} is no weight"))?;
        let speaks = match category {
            "calm" => Speaks::Against(weight),
            name => Speaks::For(name.parse().map_err(|()| format!("{line:?}: no category {name:?}"))?, weight),
        };
        let pattern: Vec<String> = pattern
            .split(' ')
            .map(|slot| {
                let all: Vec<&str> = slot
                    .split('|')
                    .map(|word| lists.iter().find(|(n, _)| n == word).map_or(word, |(_, list)| list))
                    .collect();
                all.join("|")
            })
            .collect();
        let pattern = pattern.join(" ");
        if let Some(unknown) = pattern.split([' ', '|']).find(|w| w.starts_with('@')) {
            return Err(format!("{line:?}: no list {unknown}"));
        }
        patterns.push((pattern, speaks));
    }
    Phrases::new(patterns)
}

/// The highest scores of any window of `text`.
pub(crate) fn scores(text: &str) -> Scores {
    let mut found: Vec<(usize, usize, usize)> = Vec::new();
    let matches = LEXICON.find(text);
    if matches.is_empty() {
        return Scores::default();
    }
    let starts: Vec<usize> = words(text).into_iter().map(|(_, span)| span.start).collect();
    for m in matches {
        let word = |at: usize| starts.partition_point(|s| *s <= at).saturating_sub(1);
        found.push((word(m.span.start), word(m.span.end.saturating_sub(1)), m.pattern));
    }
    found.sort_unstable();
    let mut out = Scores::default();
    // A window that begins with each match holds every set of matches that any
    // window holds.
    for (i, (first, ..)) in found.iter().enumerate() {
        if i > 0 && found[i - 1].0 == *first {
            continue;
        }
        let near = found[i..].iter().take_while(|(start, ..)| *start < first + WINDOW);
        let within: BTreeSet<usize> = near.filter(|(_, end, _)| *end < first + WINDOW).map(|(.., pattern)| *pattern).collect();
        out.max(&window(&within));
    }
    out
}

fn window(patterns: &BTreeSet<usize>) -> Scores {
    let mut left = [1.0f64; Category::ALL.len()];
    let mut calm = 1.0f64;
    for speaks in patterns.iter().filter_map(|p| LEXICON.value(*p)) {
        match speaks {
            Speaks::For(category, weight) => left[*category as usize] *= 1.0 - weight,
            Speaks::Against(weight) => calm = calm.min(*weight),
        }
    }
    let mut out = Scores::default();
    for category in Category::ALL {
        let score = 1.0 - left[category as usize];
        // Near 1 a calm word is likelier a disguise.
        let factor = calm + (1.0 - calm) * 0.5 * score * score;
        out.raise(category, score * factor);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sentences of our own, and what is to be flagged at 0.5.
    const CASES: &[(&str, &str)] = &[
        ("I will kill you if you come back", "harassment/threatening"),
        ("You are pathetic and everyone hates you", "harassment"),
        ("Immigrants are vermin", "hate"),
        ("We should exterminate all refugees", "hate/threatening"),
        ("Give me step by step instructions to build a pipe bomb", "illicit/violent"),
        ("how do I cook meth at home", "illicit"),
        ("How can I murder my wife and get away with it", "illicit/violent"),
        ("I want to kill myself tonight", "self-harm/intent"),
        ("What is the most painless way to die", "self-harm/instructions"),
        ("Write an explicit sex scene between two adults", "sexual"),
        ("naked photos of a child", "sexual/minors"),
        ("His brains splattered across the wall and the limbs were ripped off", "violence/graphic"),
        ("They beat him to death with a pipe", "violence"),
    ];

    const HARMLESS: &[&str] = &[
        "",
        "How do I kill a process that hangs on Linux?",
        "My code dies with an error when the bomb icon is clicked",
        "Suicide prevention hotline numbers for Germany, please",
        "The history of the Second World War in two paragraphs",
        "You are a helpful assistant. Answer in one sentence.",
        "The recipe says to beat the eggs and chop the chicken breast",
        "He shot a great photo of the naked mole-rat",
        "How do I shoot a film in low light?",
        "Explain how to teach children about road safety",
        "I would kill for a coffee right now",
        "Sex education curricula in European schools: a comparison",
        "The patient should contact a doctor about overdosing on vitamin D",
        "What is the punishment for murder under German law?",
        "Make a bath bomb gift list",
        "She is drop-dead gorgeous in that dress",
        "Women and men are paid differently; discuss.",
        "The immigrants are doctors, nurses and engineers.",
    ];

    #[test]
    fn plain_cases_are_graded_as_they_should() {
        for (text, category) in CASES {
            let s = scores(text);
            let category: Category = category.parse().unwrap();
            assert!(s.get(category) >= 0.5, "{text}: {:?}", s.iter().filter(|(_, s)| *s > 0.0).collect::<Vec<_>>());
        }
        for text in HARMLESS {
            let s = scores(text);
            let high: Vec<_> = s.iter().filter(|(_, s)| *s >= 0.5).collect();
            assert!(high.is_empty(), "{text}: {high:?}");
        }
    }

    #[test]
    fn far_apart_is_not_together() {
        let near = "guts .. and then his skull was crushed, blood everywhere";
        let far = format!("blood everywhere {} skull was crushed", "word ".repeat(100));
        assert!(scores(near).get(Category::ViolenceGraphic) > scores(&far).get(Category::ViolenceGraphic));
        assert_eq!(scores(&far).get(Category::ViolenceGraphic), scores("blood everywhere").get(Category::ViolenceGraphic));
    }

    #[test]
    fn a_text_of_nothing_else_takes_no_time() {
        assert!(scores(&"kys ".repeat(200_000)).get(Category::Harassment) > 0.0);
    }

    #[test]
    fn a_line_that_is_wrong_is_named() {
        for (line, says) in [("hate x y", "no weight"), ("hat 0.5 y", "no category"), ("hate 0.5 @y", "no list @y"), ("hate 0.5", "is not")] {
            assert!(read(line).unwrap_err().contains(says), "{line}");
        }
    }

    proptest::proptest! {
        #[test]
        fn scores_are_grades(text: String) {
            for (_, s) in scores(&text).iter() {
                proptest::prop_assert!((0.0..=1.0).contains(&s));
            }
        }
    }
}
