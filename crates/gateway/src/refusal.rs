//! Does an answer open like a refusal?
//!
//! A backend's own verdict goes before this (`refusal`, `content_filter`). Here
//! the answer's opening is held against patterns of words in English and German:
//! someone speaking for itself, at the beginning of a sentence, does not do what
//! was asked. It says nothing about whether refusing was right. Of the cases below,
//! which are ours and were seen while the patterns were written, it finds all and
//! flags none that only looks like one; on other answers it will do worse, most of
//! all on refusals that lecture without declining.
//!
//! Rejected: searching the whole answer for such strings, which flags answers
//! that only quote a refusal or refuse one part.

use crate::guard::Phrases;
use std::sync::LazyLock;

/// Characters of the opening.
const OPENING: usize = 320;

/// Openings that refuse. `can't` is the words `can` and `t`.
const REFUSALS: &[&str] = &[
    // To help.
    "i|we can t|not .. help|assist with|you|in|fulfilling",
    "i|we cannot .. help|assist with|you|in|fulfilling",
    "i|we can t|not help|assist",
    "i|we cannot help|assist",
    "i|we can t|not .. comply|fulfill|fulfil|accommodate|oblige|participate|engage|support|facilitate|entertain",
    "i|we cannot .. comply|fulfill|fulfil|accommodate|oblige|participate|engage|support|facilitate|entertain",
    "i|we won t .. help|assist|comply|provide|write|do|create|generate|engage|participate|share|give",
    "i|we will not .. help|assist|comply|provide|write|do|create|generate|engage|participate|share|give",
    "i|we m|am|re|are not able|going|willing|allowed|permitted|comfortable|programmed to|with|providing|helping|writing|discussing",
    "i|we m|am|re|are unable|unwilling to .. help|assist|comply|provide|fulfill|fulfil|write|create|generate|engage|discuss|give|share|support",
    "i|we must|have|need|ll .. decline|refuse",
    "i|we respectfully|politely decline|refuse",
    "i|we decline|refuse to",
    "i d rather not",
    // To give.
    "i|we can t|not provide|give|share|create|write|generate|produce|offer|discuss|answer|do .. that|this|such|instructions|guidance|content|requests|request|assistance|advice|explicit|harmful|illegal",
    "i|we cannot provide|give|share|create|write|generate|produce|offer|discuss|answer|do .. that|this|such|instructions|guidance|content|requests|request|assistance|advice|explicit|harmful|illegal",
    // Of whom it speaks, and by what.
    "as an ai .. can|m|am|cannot|must|won .. t|not|provide|help|assist|decline",
    "it would be|t .. inappropriate|unethical|irresponsible|illegal .. for me",
    "it s|is not|t .. appropriate|ethical|something .. for me|i to|can",
    "that s|is|goes|would|this|your against|violate|violates .. my|our guidelines|policy|policies|programming|principles",
    "this|your|that request violates|goes|conflicts|is .. guidelines|policy|policies|against",
    // German.
    "ich kann|darf|werde .. nicht .. helfen|beantworten|bereitstellen|unterstützen|weiterhelfen|behilflich|geben|schreiben",
    "ich kann|darf|werde .. keine|keinen|kein .. geben|bereitstellen|anleitung|anleitungen|auskunft|erstellen|schreiben",
    "dabei|damit|hierbei|das kann|darf|werde ich .. nicht .. helfen|beantworten|unterstützen|weiterhelfen|tun|behilflich",
    "dabei|damit|hierbei kann|darf ich .. nicht",
    "leider|daher|deshalb kann|darf|werde ich .. keine|keinen|kein|nicht .. geben|erstellen|helfen|anleitung|anleitungen|schreiben",
    "ich muss .. ablehnen",
    "diese|ihre|deine anfrage .. ablehnen|verstößt|nicht .. beantworten|bearbeiten",
];

/// What begins like a refusal and is none.
const OTHERS: &[&str] = &[
    "can not only",
    "can t|not help but|feeling|thinking|noticing|wondering|smiling|laughing",
    "cannot help but|feeling|thinking|noticing|wondering|smiling|laughing",
    "can t|not do .. without|better|until|enough",
    "won t do .. without|until|it",
    "can t|not give .. enough|up",
    "cannot give .. enough|up",
    "can t|not share .. enough",
    "ich kann .. nicht .. genug",
];

/// Words after which someone may begin to speak for itself.
const LEADS: &[&str] = &["but", "so", "however", "and", "sorry", "afraid", "unfortunately", "regret", "that", "leider", "aber", "apologies", "thus", "therefore", "because", "leid"];

static PATTERNS: LazyLock<(Phrases<()>, Phrases<()>)> = LazyLock::new(|| {
    let read = |list: &[&str]| Phrases::new(list.iter().map(|p| ((*p).to_owned(), ())));
    let both = read(REFUSALS).and_then(|yes| Ok((yes, read(OTHERS)?)));
    both.expect("patterns of this file, read by its tests")
});

/// Whether the opening of `answer` reads as a refusal.
///
/// ```
/// use ashlar_gateway::refusal::opens_with_refusal;
/// assert!(opens_with_refusal("I’m sorry, but I can’t help with that."));
/// assert!(!opens_with_refusal("Sorry for the wait. The office opens at nine."));
/// ```
pub fn opens_with_refusal(answer: &str) -> bool {
    let end = answer.char_indices().nth(OPENING).map_or(answer.len(), |(i, _)| i);
    let opening = answer.get(..end).unwrap_or("");
    let (refusals, others) = &*PATTERNS;
    let found = refusals.find(opening);
    if found.is_empty() {
        return false;
    }
    let others = others.find(opening);
    found.iter().any(|m| {
        let before = opening.get(..m.span.start).unwrap_or("").trim_end();
        let first = before.trim_end_matches(['"', '“', '„', '\'', '*', '_', '(']).trim_end();
        let lead = first.rsplit(|c: char| !c.is_alphanumeric()).next().unwrap_or("").to_lowercase();
        // A colon before it in its sentence makes it someone else's.
        let quoted = first.rsplit(['.', '!', '?', '\n']).next().is_some_and(|sentence| sentence.contains(':'));
        let begins = first.is_empty() || first.ends_with(['.', '!', ',', ';', '—', '–', '-', '…', '\n']) || LEADS.contains(&lead.as_str());
        begins && !quoted && !others.iter().any(|o| o.span.start >= m.span.start && o.span.start < m.span.end)
    })
}

#[cfg(test)]
mod tests {
    use super::opens_with_refusal;

    const REFUSED: &[&str] = &[
        "I can't help with that.",
        "  \"I cannot assist you in this.\"",
        "I'm sorry, but I cannot help with that request.",
        "Unfortunately, I am unable to assist.",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "I must decline",
        "I’m sorry, but I can’t help with that.",
        "Sorry, I can't provide instructions for making explosives.",
        "I apologize, but I cannot fulfill this request as it involves harm to others.",
        "I won't write that letter, because it would threaten someone.",
        "I'm not able to help with hacking into accounts.",
        "As an AI, I can't provide medical prescriptions.",
        "As an AI language model, I cannot help you with this.",
        "I have to decline this one.",
        "I'm not comfortable writing that story.",
        "It would be unethical for me to explain how to stalk someone.",
        "That goes against my guidelines.",
        "This request violates our content policy.",
        "I understand you are upset, but I can't assist you with revenge.",
        "Thank you for asking. However, I cannot engage in this conversation.",
        "I'd rather not.",
        "No. I will not help you hurt anyone.",
        "I'm afraid I can't do that.",
        "I cannot create explicit content.",
        "We are unable to fulfil your request.",
        "I'm not going to write malware for you.",
        "Ich kann Ihnen dabei leider nicht helfen.",
        "Das kann ich nicht beantworten.",
        "Ich muss diese Bitte ablehnen.",
        "Leider darf ich keine Anleitung zum Bau von Waffen geben.",
        "I respectfully decline to answer.",
        "I can't comply with that request.",
    ];

    const ANSWERED: &[&str] = &[
        "",
        "Hello!",
        "Sorry",
        "I'm sorry to hear that you are ill. Call the front desk.",
        "I can't helping",
        "The guard says: I can't help with that.",
        "I cannot recommend the canteen enough.",
        "I can help with that.",
        "I can't help but smile at this question. The answer is 42.",
        "I cannot find the file you mention. Could you check its path?",
        "I can't see the picture, so please describe it.",
        "Sorry for the wait. The office opens at nine.",
        "You can't provide a refund without a receipt.",
        "If the doctor cannot help you, ask for a second opinion.",
        "A refusal usually reads like this: \"I'm sorry, but I can't assist with that.\"",
        "Sure! Here is a poem about a robot who says I cannot comply.",
        "We can not only help you but also train your staff.",
        "I'm not sure, but the meeting is probably at ten.",
        "I am unable to see why the loop ends early; try printing i.",
        "Unfortunately, the train was late.",
        "I decided to write this letter because I am unhappy.",
        "I won the race and will not forget it.",
        "I'm not able-bodied, says the narrator of the novel.",
        "To decline a meeting politely, write: I must decline.",
        "In German, 'to decline' means ablehnen.",
        "Ich kann Ihnen nicht genug danken!",
        "Das kann ich gut verstehen. Hier ist ein Vorschlag.",
        "Leider war der Zug verspätet.",
        "The policy says that employees cannot share passwords.",
        "As an AI pioneer, Turing could not foresee this.",
        "No, the store is closed on Sundays.",
        "I'm sorry, my earlier answer was wrong: it is 17.",
        "I can't wait to share this with you! The recipe is simple.",
        "It is not appropriate to wear jeans there.",
    ];

    #[test]
    fn refusals_and_what_only_looks_like_one() {
        let missed: Vec<_> = REFUSED.iter().filter(|t| !opens_with_refusal(t)).collect();
        let wrong: Vec<_> = ANSWERED.iter().filter(|t| opens_with_refusal(t)).collect();
        assert!(missed.is_empty() && wrong.is_empty(), "missed {missed:#?}, wrong {wrong:#?}");
    }

    #[test]
    fn what_comes_late_is_no_opening() {
        let late = format!("{} I can't help with that.", "Here is a long story. ".repeat(20));
        assert!(!opens_with_refusal(&late));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(s: String) {
            opens_with_refusal(&s);
        }
    }
}
