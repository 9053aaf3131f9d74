//! Phrases found in a text word by word, whatever case, spacing or punctuation.
//!
//! A pattern is a row of words: `a|b` is either, `kill*` is every word that
//! begins so, `..` lets up to four words stand between its neighbours. Words of
//! a text are runs of letters and digits, folded: lower case, full-width forms
//! as plain ones, characters of no width left out; a Han, kana or Hangul
//! character is a word of its own, since no spaces part them.
//!
//! What may not happen here: a match that depends on where a growing text was
//! cut ([`Phrases::settled`]; a property test cuts everywhere).
//!
//! Rejected: Aho-Corasick over bytes, which `foo-bar`, `FOO  bar` and a
//! zero-width joiner get past.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

/// Most words that `..` stands for.
const GAP: usize = 4;
/// Most characters that a stem's word is waited for.
const LONGEST: usize = 64;

/// Patterns, each with what it stands for.
#[derive(Debug, Clone)]
pub(crate) struct Phrases<T> {
    patterns: Vec<(Vec<Slot>, T)>,
    /// Patterns by a first word that is given in full.
    exact: HashMap<String, Vec<usize>>,
    /// Patterns by a first word's stem.
    stems: BTreeMap<String, Vec<usize>>,
    /// Characters of the longest word in a pattern.
    longest: usize,
}

#[derive(Debug, Clone)]
struct Slot {
    words: Vec<(String, bool)>,
    /// Words that may stand before it.
    gap: usize,
}

impl Slot {
    fn takes(&self, word: &str) -> bool {
        self.words.iter().any(|(w, stem)| if *stem { word.starts_with(w.as_str()) } else { word == w })
    }

    /// Whether a word that begins with `start` could be taken.
    fn may_take(&self, start: &str) -> bool {
        self.words.iter().any(|(w, stem)| w.starts_with(start) || (*stem && start.starts_with(w.as_str())))
    }
}

/// A match: bytes of the text, and the pattern's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Match {
    pub(crate) span: Range<usize>,
    pub(crate) pattern: usize,
}

enum Try {
    /// Up to this word, itself included.
    Yes(usize),
    No,
    /// The text ended first.
    Open,
}

impl<T> Phrases<T> {
    /// Reads patterns.
    ///
    /// # Errors
    /// The pattern that holds no word, and why.
    pub(crate) fn new(patterns: impl IntoIterator<Item = (String, T)>) -> Result<Self, String> {
        let mut out = Self { patterns: Vec::new(), exact: HashMap::new(), stems: BTreeMap::new(), longest: 0 };
        for (text, value) in patterns {
            let slots = slots(&text)?;
            let place = out.patterns.len();
            for (word, stem) in slots.first().into_iter().flat_map(|s| &s.words) {
                if *stem {
                    out.stems.entry(word.clone()).or_default().push(place);
                } else {
                    out.exact.entry(word.clone()).or_default().push(place);
                }
            }
            let lengths = slots.iter().flat_map(|s| &s.words).map(|(w, _)| w.chars().count());
            out.longest = lengths.max().unwrap_or(0).max(out.longest);
            out.patterns.push((slots, value));
        }
        Ok(out)
    }

    /// What the pattern at `place` stands for.
    pub(crate) fn value(&self, place: usize) -> Option<&T> {
        self.patterns.get(place).map(|(_, v)| v)
    }

    /// All matches in order of their starts; they may overlap.
    pub(crate) fn find(&self, text: &str) -> Vec<Match> {
        if self.patterns.is_empty() {
            return Vec::new();
        }
        let words = words(text);
        let mut out = Vec::new();
        for at in 0..words.len() {
            self.starts(&words[at].0, |place| {
                if let Some(Try::Yes(last)) = self.attempt(&words, at, place) {
                    out.push(Match { span: words[at].1.start..words[last].1.end, pattern: place });
                }
            });
        }
        out
    }

    /// The length of the prefix of `text` that no match, whatever is appended,
    /// starts in and ends after; all matches that end by it are found already.
    pub(crate) fn settled(&self, text: &str) -> usize {
        if self.patterns.is_empty() {
            return text.len();
        }
        let words = words(text);
        let growing = words.last().filter(|(_, at)| at.end == text.len());
        // A word longer than any in a pattern is what it is, however it goes on;
        // one of a stem's has its end to find, within reason.
        let growing = growing.filter(|(w, _)| {
            let length = w.chars().count();
            let stem = || self.slots().any(|s| s.words.iter().any(|(p, stem)| *stem && w.starts_with(p.as_str())));
            length <= self.longest || (length <= LONGEST && stem())
        });
        let growing = growing.is_some();
        let mut settled = text.len();
        for (at, (word, span)) in words.iter().enumerate() {
            let last = at + 1 == words.len();
            let open = if last && growing {
                self.patterns.iter().any(|(slots, _)| slots.first().is_some_and(|s| s.may_take(word)))
            } else {
                let mut open = false;
                self.starts(word, |place| {
                    open |= match self.attempt(&words, at, place) {
                        Some(Try::Open) => true,
                        Some(Try::Yes(end)) => growing && end + 1 == words.len(),
                        // With its last word grown it may match.
                        _ => growing && self.could(&words, at, place),
                    };
                });
                open
            };
            if open {
                settled = span.start;
                break;
            }
        }
        if settled == text.len() {
            return settled;
        }
        // No match may lie across the end.
        let found = self.find(text);
        while let Some(m) = found.iter().find(|m| m.span.start < settled && m.span.end > settled) {
            settled = m.span.start;
        }
        settled
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.patterns.iter().flat_map(|(slots, _)| slots)
    }

    fn starts(&self, word: &str, mut each: impl FnMut(usize)) {
        for place in self.exact.get(word).into_iter().flatten() {
            each(*place);
        }
        // Every stem of the word is one of its prefixes.
        for (end, _) in word.char_indices().skip(1).chain([(word.len(), ' ')]) {
            if let Some(places) = word.get(..end).and_then(|stem| self.stems.get(stem)) {
                places.iter().for_each(|p| each(*p));
            }
        }
    }

    fn attempt(&self, words: &[(String, Range<usize>)], at: usize, place: usize) -> Option<Try> {
        let (slots, _) = self.patterns.get(place)?;
        Some(walk(&slots[1..], words, at, false))
    }

    /// Whether the pattern would match, or go on, with the last word grown.
    fn could(&self, words: &[(String, Range<usize>)], at: usize, place: usize) -> bool {
        self.patterns.get(place).is_some_and(|(slots, _)| !matches!(walk(&slots[1..], words, at, true), Try::No))
    }
}

/// Matches the slots after word `at`; `grow` takes the last word for a part of
/// one.
fn walk(slots: &[Slot], words: &[(String, Range<usize>)], at: usize, grow: bool) -> Try {
    let Some((slot, rest)) = slots.split_first() else { return Try::Yes(at) };
    let mut open = false;
    for next in at + 1..=at + 1 + slot.gap {
        let Some((word, _)) = words.get(next) else { return Try::Open };
        let taken = slot.takes(word) || (grow && next + 1 == words.len() && slot.may_take(word));
        if taken {
            match walk(rest, words, next, grow) {
                Try::Yes(end) => return Try::Yes(end),
                Try::Open => open = true,
                Try::No => {}
            }
        }
    }
    if open { Try::Open } else { Try::No }
}

fn slots(text: &str) -> Result<Vec<Slot>, String> {
    let (mut out, mut gap) = (Vec::<Slot>::new(), 0);
    for part in text.split_whitespace() {
        if part == ".." {
            gap = GAP;
            continue;
        }
        let mut alternatives = Vec::new();
        for word in part.split('|') {
            let (word, stem) = word.strip_suffix('*').map_or((word, false), |w| (w, true));
            let found = words(word);
            match found.as_slice() {
                [(folded, _)] => alternatives.push((folded.clone(), stem)),
                // `don't` is two words and no alternative to anything.
                [_, ..] if !part.contains('|') => {
                    let last = found.len() - 1;
                    for (i, (folded, _)) in found.iter().enumerate() {
                        out.push(Slot { words: vec![(folded.clone(), stem && i == last)], gap: std::mem::take(&mut gap) });
                    }
                }
                [] if !part.contains('|') => {}
                _ => return Err(format!("{word:?} in {text:?} is not one word")),
            }
        }
        if !alternatives.is_empty() {
            out.push(Slot { words: alternatives, gap: std::mem::take(&mut gap) });
        }
    }
    if out.is_empty() {
        return Err(format!("{text:?} holds no word"));
    }
    if gap > 0 || out[0].gap > 0 {
        return Err(format!("{text:?}: .. stands between words"));
    }
    Ok(out)
}

/// The folded words of `text` with their bytes.
pub(crate) fn words(text: &str) -> Vec<(String, Range<usize>)> {
    let mut out: Vec<(String, Range<usize>)> = Vec::new();
    let mut open = false;
    for (at, c) in text.char_indices() {
        let end = at + c.len_utf8();
        if invisible(c) {
            // Inside a word it is part of its bytes, and of nothing else.
            if let Some((_, span)) = out.last_mut().filter(|_| open) {
                span.end = end;
            }
        } else if alone(c) {
            out.push((c.to_string(), at..end));
            open = false;
        } else if c.is_alphanumeric() {
            if !open {
                out.push((String::new(), at..at));
            }
            open = true;
            if let Some((word, span)) = out.last_mut() {
                match c.is_ascii() {
                    true => word.push(c.to_ascii_lowercase()),
                    false => word.extend(plain(c).to_lowercase()),
                }
                span.end = end;
            }
        } else {
            open = false;
        }
    }
    out
}

/// Characters that show nothing.
fn invisible(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2060}'..='\u{2064}' | '\u{feff}' | '\u{fe00}'..='\u{fe0f}' | '\u{300}'..='\u{36f}')
}

/// Characters of scripts without spaces.
fn alone(c: char) -> bool {
    matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7af}')
}

/// Full-width forms as what they show.
fn plain(c: char) -> char {
    match c {
        '\u{ff10}'..='\u{ff19}' | '\u{ff21}'..='\u{ff3a}' | '\u{ff41}'..='\u{ff5a}' => {
            char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c)
        }
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn phrases(list: &[&str]) -> Phrases<()> {
        Phrases::new(list.iter().map(|p| ((*p).to_owned(), ()))).unwrap()
    }

    fn found(list: &[&str], text: &str) -> Vec<String> {
        phrases(list).find(text).into_iter().map(|m| text[m.span].to_owned()).collect()
    }

    #[test]
    fn words_match_whatever_their_dress() {
        let list = ["project falcon", "kill*", "make|build .. bomb", "don't tell", "秘密"];
        for (text, want) in [
            ("about Project\n FALCON, yes", vec!["Project\n FALCON"]),
            ("pro\u{200b}ject-falcon", vec!["pro\u{200b}ject-falcon"]),
            ("ＰＲＯＪＥＣＴ　ｆａｌｃｏｎ", vec!["ＰＲＯＪＥＣＴ　ｆａｌｃｏｎ"]),
            ("falcon project, projects falcon", vec![]),
            ("skill killing", vec!["killing"]),
            ("Build me a small pipe bomb", vec!["Build me a small pipe bomb"]),
            ("make one two three four five bomb", vec![]),
            ("I DON’T tell", vec!["DON’T tell"]),
            ("这是秘密。", vec!["秘密"]),
        ] {
            assert_eq!(found(&list, text), want, "{text}");
        }
        assert!(Phrases::new([("...".to_owned(), ())]).is_err());
        assert!(Phrases::new([(".. a".to_owned(), ())]).is_err());
    }

    #[test]
    fn only_what_may_begin_a_phrase_is_held() {
        let p = phrases(&["project falcon", "kill*"]);
        for (text, settled) in [
            ("hello wor", 9), ("a pro", 2), ("a project", 2), ("a project ", 2), ("a project fal", 2),
            ("a project falcon", 2), ("a project falcon ", 17), ("a project x", 11), ("a ki", 2), ("a killer", 2), ("a killer ", 9),
            ("a kill", 2),
        ] {
            assert_eq!(p.settled(text), settled, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_appended_changes_what_is_settled(
            text in "(ab|a|b|c|x|ab c|[ -]|\u{200b}|秘|密){0,12}",
            more in "(ab|a|b|c|x|[ -]|秘|密){0,8}",
        ) {
            let p = phrases(&["ab c", "a* b", "c .. x", "秘密", "x|b a"]);
            let settled = p.settled(&text);
            prop_assert!(text.is_char_boundary(settled));
            let grown = format!("{text}{more}");
            let by = |t: &str| -> Vec<Match> { p.find(t).into_iter().filter(|m| m.span.end <= settled).collect() };
            prop_assert_eq!(by(&text), by(&grown), "{:?} + {:?} at {}", text, more, settled);
            for m in p.find(&grown) {
                prop_assert!(m.span.start >= settled || m.span.end <= settled, "{:?} cuts {:?}", settled, m);
            }
        }

        #[test]
        fn any_text_is_read(text: String) {
            let p = phrases(&["a b", "é*"]);
            prop_assert!(p.settled(&text) <= text.len());
            for m in p.find(&text) {
                prop_assert!(text.get(m.span).is_some());
            }
        }
    }
}
