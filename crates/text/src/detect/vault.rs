//! Pseudonyms: findings replaced by placeholders that are stable within a
//! conversation, and put back on the way to the user.
//!
//! What may not happen here: an original in a `Debug` print, one placeholder
//! for two originals, a placeholder the user wrote taken for one of ours.
//!
//! ```
//! use ashlar_text::detect::{Kinds, Scanner, Vault};
//! let scanner = Scanner::new(Kinds::ALL);
//! let mut vault = Vault::default();
//! let asked = "Write to anna@example.org, not bob@example.org.";
//! let hidden = vault.hide(asked, &scanner.find(asked));
//! assert_eq!(hidden, "Write to <EMAIL_1>, not <EMAIL_2>.");
//! let mut restorer = vault.restorer();
//! let parts = ["Dear <EM", "AIL_1>, I <3 mail"].map(|p| restorer.push(p));
//! assert_eq!(parts.concat() + &restorer.finish(), "Dear anna@example.org, I <3 mail");
//! ```

use super::{Finding, Kind};
use std::{
    collections::{HashMap, HashSet},
    fmt,
};

/// The longest placeholder: `<IT_FISCAL_CODE_4294967295>` and some room.
const MAX_PLACEHOLDER: usize = 32;

/// The originals of one conversation by placeholder.
#[derive(Clone, Default)]
pub struct Vault {
    originals: HashMap<String, String>,
    placeholders: HashMap<(Kind, String), String>,
    /// The last number given out for a kind.
    last: HashMap<Kind, u32>,
    /// What looks like a placeholder in the texts themselves.
    taken: HashSet<String>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vault({} originals)", self.originals.len())
    }
}

impl Vault {
    /// `text` with each of `findings` (sorted, disjoint) replaced by its
    /// placeholder. The same original of a kind gets the same one each time.
    pub fn hide(&mut self, text: &str, findings: &[Finding]) -> String {
        if findings.is_empty() {
            return text.to_owned();
        }
        self.avoid(text);
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        for f in findings {
            out.push_str(&text[at..f.start]);
            out.push_str(self.placeholder(f.kind, &text[f.start..f.end]));
            at = f.end;
        }
        out.push_str(&text[at..]);
        out
    }

    /// Gives out no placeholder that `text` holds as it is. Texts of one conversation
    /// are all avoided before the first of them is hidden: what one says of
    /// `<EMAIL_1>` is not what another's stands for.
    pub fn avoid(&mut self, text: &str) {
        for (open, _) in text.match_indices('<') {
            let name = placeholder_len(&text[open..]);
            if let Some(whole) = text.get(open..open + name + 1).filter(|w| w.ends_with('>')) {
                self.taken.insert(whole.to_owned());
            }
        }
    }

    /// The placeholder of `original`; a new one is none that a text holds.
    fn placeholder(&mut self, kind: Kind, original: &str) -> &str {
        let last = self.last.entry(kind).or_insert(0);
        self.placeholders
            .entry((kind, original.to_owned()))
            .or_insert_with(|| {
                let placeholder = loop {
                    *last += 1;
                    let name = format!("<{}_{last}>", kind.label());
                    if !self.taken.contains(&name) {
                        break name;
                    }
                };
                self.originals
                    .insert(placeholder.clone(), original.to_owned());
                placeholder
            })
    }

    /// How many originals it holds.
    pub fn len(&self) -> usize {
        self.originals.len()
    }

    /// Whether it holds no original.
    pub fn is_empty(&self) -> bool {
        self.originals.is_empty()
    }

    /// `text` with every placeholder of this vault replaced by its original.
    pub fn restore(&self, text: &str) -> String {
        let mut restorer = self.restorer();
        restorer.push(text) + &restorer.finish()
    }

    /// Restores a text that comes in pieces.
    pub fn restorer(&self) -> Restorer<'_> {
        Restorer::new(self)
    }
}

/// [`Vault::restore`] for a stream; holds back at most a cut placeholder. For
/// a vault behind a lock or an `Arc`, keep a [`Held`] instead.
#[derive(Debug)]
pub struct Restorer<'v> {
    vault: &'v Vault,
    held: Held,
}

impl<'v> Restorer<'v> {
    fn new(vault: &'v Vault) -> Self {
        Self {
            vault,
            held: Held::default(),
        }
    }

    /// What can be given out after `piece`.
    pub fn push(&mut self, piece: &str) -> String {
        self.held.push(self.vault, piece, false)
    }

    /// What was held back.
    pub fn finish(self) -> String {
        self.held.finish()
    }
}

/// Bytes of the placeholder that may begin `text`, its `<` among them and a `>` not.
fn placeholder_len(text: &str) -> usize {
    let name = text.bytes().skip(1).take(MAX_PLACEHOLDER);
    1 + name.take_while(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || *b == b'_').count()
}

/// The end of a stream that may be the head of a placeholder.
#[derive(Debug, Default, Clone)]
pub struct Held(String);

impl Held {
    /// What can be given out after `piece`, placeholders of `vault` restored; in
    /// `json` as a part of a JSON string.
    pub fn push(&mut self, vault: &Vault, piece: &str, json: bool) -> String {
        let text = std::mem::take(&mut self.0) + piece;
        let mut out = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(open) = rest.find('<') {
            out.push_str(&rest[..open]);
            rest = &rest[open..];
            let name = placeholder_len(rest);
            if name == rest.len() && name < MAX_PLACEHOLDER {
                self.0 = rest.to_owned();
                return out;
            }
            let whole = rest.get(..name + 1).filter(|w| w.ends_with('>'));
            match whole.and_then(|w| vault.originals.get(w)) {
                Some(original) => {
                    if json {
                        let quoted = serde_json::Value::from(original.as_str()).to_string();
                        out.push_str(&quoted[1..quoted.len() - 1]);
                    } else {
                        out.push_str(original);
                    }
                    rest = &rest[name + 1..];
                }
                None => {
                    out.push_str(&rest[..name]);
                    rest = &rest[name..];
                }
            }
        }
        out + rest
    }

    /// What was held back: no placeholder, for it never closed.
    pub fn finish(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Kinds, Scanner};
    use super::*;
    use proptest::prelude::*;

    fn filled() -> (Vault, String) {
        let mut vault = Vault::default();
        let text = "a@b.org, c@d.org, a@b.org, 4111111111111111";
        let hidden = vault.hide(text, &Scanner::new(Kinds::ALL).find(text));
        (vault, hidden)
    }

    #[test]
    fn the_same_original_has_one_placeholder() {
        let (mut vault, hidden) = filled();
        assert_eq!(hidden, "<EMAIL_1>, <EMAIL_2>, <EMAIL_1>, <CARD_1>");
        let next = "c@d.org and e@f.org";
        let hidden = vault.hide(next, &Scanner::new(Kinds::ALL).find(next));
        assert_eq!(hidden, "<EMAIL_2> and <EMAIL_3>");
        assert_eq!(vault.restore(&hidden), next);
        assert!(!format!("{vault:?}").contains("a@b.org"));
    }

    #[test]
    fn nor_is_one_in_another_text_of_theirs() {
        let mut vault = Vault::default();
        let texts = ["mail a@b.org", "what does <EMAIL_1> mean?"];
        texts.iter().for_each(|t| vault.avoid(t));
        let hidden = texts.map(|t| vault.hide(t, &Scanner::new(Kinds::ALL).find(t)));
        assert_eq!(hidden, ["mail <EMAIL_2>", "what does <EMAIL_1> mean?"]);
        assert_eq!(hidden.map(|t| vault.restore(&t)), texts);
    }

    #[test]
    fn in_json_originals_are_escaped() {
        let mut vault = Vault::default();
        let key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----";
        let hidden = vault.hide(key, &Scanner::new(Kinds::ALL).find(key));
        let (mut held, json) = (Held::default(), format!("{{\"k\":\"{hidden}\"}}"));
        let back: String = json.chars().map(|c| held.push(&vault, &c.to_string(), true)).collect();
        let back = back + &held.finish();
        assert_eq!(serde_json::from_str::<serde_json::Value>(&back).unwrap()["k"], key);
    }

    #[test]
    fn a_placeholder_in_the_users_text_is_no_one_elses() {
        let mut vault = Vault::default();
        let text = "<EMAIL_1> is not a@b.org";
        let hidden = vault.hide(text, &Scanner::new(Kinds::ALL).find(text));
        assert_eq!(hidden, "<EMAIL_1> is not <EMAIL_2>");
        assert_eq!(vault.restore(&hidden), text);
    }

    #[test]
    fn no_placeholder_holds_a_finding() {
        let scanner = Scanner::new(Kinds::ALL);
        for kind in Kind::ALL {
            let text = format!("password = <{0}_12345>, tel <{0}_7>", kind.label());
            assert_eq!(scanner.find(&text), [], "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_stream_restores_as_the_whole(
            pieces in proptest::collection::vec(
                "(<EMAIL_[12]>|<CARD_1>|<EMAIL_9>|[<A-Z_0-9>ä]{0,3}){0,3}", 0..8
            )
        ) {
            let (vault, _) = filled();
            let mut restorer = vault.restorer();
            let mut out = String::new();
            for p in &pieces {
                out += &restorer.push(p);
            }
            out += &restorer.finish();
            let expected = pieces
                .concat()
                .replace("<EMAIL_1>", "a@b.org")
                .replace("<EMAIL_2>", "c@d.org")
                .replace("<CARD_1>", "4111111111111111");
            prop_assert_eq!(out, expected);
        }
    }
}
