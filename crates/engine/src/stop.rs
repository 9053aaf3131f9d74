//! Stop strings over text that comes in pieces.
//!
//! The stop that is complete first wins, and among those complete at the same
//! character the one that began first: so the cut does not depend on how the
//! text was chunked. Rejected: the stop that begins first, which a later piece
//! could still change after text was sent.

/// Holds back text that may yet turn out to be part of a stop string.
#[derive(Debug, Clone)]
pub(crate) struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes more text; returns what is certain, and whether a stop string
    /// came after it.
    pub(crate) fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|s| self.held.find(s.as_str()).map(|at| (at + s.len(), at)))
            .min();
        if let Some((_, at)) = first {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|&at| self.stops.iter().any(|s| s.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len());
        let tail = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, tail), false)
    }

    /// The text held back, once nothing more can come.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Character by character over the whole text: the definition.
    fn cut(text: &str, stops: &[String]) -> (String, bool) {
        let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
        for end in ends {
            let best = stops
                .iter()
                .filter(|s| text[..end].ends_with(s.as_str()))
                .map(|s| end - s.len())
                .min();
            if let Some(at) = best {
                return (text[..at].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn feed(pieces: &[String], stops: &[String]) -> (String, bool) {
        let mut s = Stops::new(stops.to_vec());
        let mut out = String::new();
        for p in pieces {
            let (text, stopped) = s.push(p);
            out.push_str(&text);
            if stopped {
                return (out, true);
            }
        }
        out.push_str(&s.finish());
        (out, false)
    }

    #[test]
    fn the_stop_complete_first_wins() {
        let stops = ["abc d".to_owned(), "bc".to_owned()];
        let one = feed(&["abc d".to_owned()], &stops);
        let two = feed(&["abc".to_owned(), " d".to_owned()], &stops);
        assert_eq!(one, ("a".to_owned(), true));
        assert_eq!(one, two);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        #[test]
        fn any_chunking_is_the_whole(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{1,5}", 0..4),
        ) {
            let whole = pieces.concat();
            prop_assert_eq!(feed(&pieces, &stops), cut(&whole, &stops));
        }

        /// What was sent stays right whatever comes after it.
        #[test]
        fn nothing_sent_is_part_of_a_stop(
            pieces in prop::collection::vec("[ab]{0,3}", 0..12),
            future in "[ab]{0,6}",
            stops in prop::collection::vec("[ab]{1,4}", 1..3),
        ) {
            let mut s = Stops::new(stops.clone());
            let mut sent = String::new();
            for p in &pieces {
                let (text, stopped) = s.push(p);
                sent.push_str(&text);
                if stopped {
                    break;
                }
            }
            let (right, _) = cut(&(pieces.concat() + &future), &stops);
            prop_assert!(right.starts_with(&sent), "{sent:?} sent, {right:?} right");
        }
    }
}
