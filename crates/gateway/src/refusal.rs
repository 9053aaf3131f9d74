//! Does an answer open like a refusal?
//!
//! A weak, conservative test: a few English and German openings, matched at
//! the start of the answer and ending on a word boundary. It misses every
//! refusal worded otherwise and says nothing about whether refusing was right.
//! A backend's own verdict goes before it.
//!
//! Rejected: searching the whole answer for such strings, which flags answers
//! that only quote a refusal or refuse one part.

/// Apologies that may stand before a refusal; they are no refusal themselves.
const LEADS: &[&str] = &[
    "i'm sorry",
    "i am sorry",
    "sorry",
    "i apologize",
    "i apologise",
    "unfortunately",
    "but",
    "es tut mir leid",
    "tut mir leid",
    "leider",
    "aber",
];

/// Openings that refuse.
const REFUSALS: &[&str] = &[
    "i can't help",
    "i cannot help",
    "i can't assist",
    "i cannot assist",
    "i can't comply",
    "i cannot comply",
    "i can't fulfill",
    "i cannot fulfill",
    "i'm not able to help",
    "i am not able to help",
    "i'm unable to help",
    "i am unable to help",
    "i'm unable to assist",
    "i am unable to assist",
    "i won't help",
    "i will not help",
    "i must decline",
    "i have to decline",
    "ich kann dabei nicht helfen",
    "dabei kann ich nicht helfen",
    "dabei kann ich ihnen nicht helfen",
    "das kann ich nicht beantworten",
];

/// Whether the opening of `answer` reads as a refusal.
///
/// ```
/// use ashlar_gateway::refusal::opens_with_refusal;
/// assert!(opens_with_refusal("I’m sorry, but I can’t help with that."));
/// assert!(!opens_with_refusal("Sorry for the wait. The office opens at nine."));
/// ```
pub fn opens_with_refusal(answer: &str) -> bool {
    let opening: String = answer
        .chars()
        .take(160)
        .map(|c| if c == '’' { '\'' } else { c })
        .collect::<String>()
        .to_lowercase();
    let mut rest = trim(&opening);
    while let Some(after) = LEADS.iter().find_map(|lead| after_words(rest, lead)) {
        rest = trim(after);
    }
    REFUSALS.iter().any(|r| after_words(rest, r).is_some())
}

fn trim(s: &str) -> &str {
    s.trim_start_matches(|c: char| !c.is_alphanumeric())
}

/// What follows `words` at the start of `s`, when they end at a word's end.
fn after_words<'a>(s: &'a str, words: &str) -> Option<&'a str> {
    let rest = s.strip_prefix(words)?;
    (!rest.starts_with(char::is_alphanumeric)).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::opens_with_refusal;

    #[test]
    fn refusals_and_what_only_looks_like_one() {
        for yes in [
            "I can't help with that.",
            "  \"I cannot assist you in this.\"",
            "I'm sorry, but I cannot help with that request.",
            "Unfortunately, I am unable to assist.",
            "Es tut mir leid, aber dabei kann ich nicht helfen.",
            "I must decline",
        ] {
            assert!(opens_with_refusal(yes), "{yes}");
        }
        for no in [
            "",
            "Hello!",
            "Sorry",
            "I'm sorry to hear that you are ill. Call the front desk.",
            "I can't helping", // no boundary after "help"
            "The guard says: I can't help with that.",
            "I cannot recommend the canteen enough.",
            "I can help with that.",
        ] {
            assert!(!opens_with_refusal(no), "{no}");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(s: String) {
            opens_with_refusal(&s);
        }
    }
}
