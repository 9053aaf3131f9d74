//! The 13 categories of OpenAI's moderation endpoint, and Llama Guard's.
//!
//! Names and meanings after OpenAI's API reference and MLCommons' hazard
//! taxonomy as Llama Guard 3 numbers it, read in November 2026.

use std::{fmt, str::FromStr};

macro_rules! categories {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)+) => {
        /// One of the 13.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) enum Category {
            $($(#[$doc])* $name,)+
        }

        impl Category {
            pub(crate) const ALL: [Self; [$($text),+].len()] = [$(Self::$name),+];

            /// Its name on the wire.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

categories! {
    Harassment = "harassment";
    HarassmentThreatening = "harassment/threatening";
    Hate = "hate";
    HateThreatening = "hate/threatening";
    Illicit = "illicit";
    IllicitViolent = "illicit/violent";
    SelfHarm = "self-harm";
    SelfHarmIntent = "self-harm/intent";
    SelfHarmInstructions = "self-harm/instructions";
    Sexual = "sexual";
    SexualMinors = "sexual/minors";
    Violence = "violence";
    ViolenceGraphic = "violence/graphic";
}

impl Category {
    /// The category that this one is part of: what it scores, that one does.
    pub(crate) const fn parent(self) -> Option<Self> {
        match self {
            Self::HarassmentThreatening => Some(Self::Harassment),
            Self::HateThreatening => Some(Self::Hate),
            Self::IllicitViolent => Some(Self::Illicit),
            Self::SelfHarmIntent | Self::SelfHarmInstructions => Some(Self::SelfHarm),
            Self::SexualMinors => Some(Self::Sexual),
            Self::ViolenceGraphic => Some(Self::Violence),
            _ => None,
        }
    }
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Category {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|c| c.as_str() == name).ok_or(())
    }
}

/// A score for each category.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Scores([f64; Category::ALL.len()]);

impl Scores {
    pub(crate) fn get(&self, c: Category) -> f64 {
        self.0[c as usize]
    }

    /// Raises a category's score to at least `score`, and its parent's.
    pub(crate) fn raise(&mut self, c: Category, score: f64) {
        let mut at = Some(c);
        while let Some(c) = at {
            self.0[c as usize] = self.0[c as usize].max(score);
            at = c.parent();
        }
    }

    pub(crate) fn max(&mut self, other: &Self) {
        for c in Category::ALL {
            self.raise(c, other.get(c));
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Category, f64)> + '_ {
        Category::ALL.into_iter().map(|c| (c, self.get(c)))
    }
}

/// Llama Guard's categories S1 to S14: number, name, and which of the 13 they
/// touch. Some have no counterpart there; an answer can be unsafe by them alone.
pub(crate) const HAZARDS: [(&str, &str, &[Category]); 14] = [
    ("S1", "Violent Crimes", &[Category::IllicitViolent, Category::Violence]),
    ("S2", "Non-Violent Crimes", &[Category::Illicit]),
    ("S3", "Sex-Related Crimes", &[Category::Sexual, Category::IllicitViolent]),
    ("S4", "Child Sexual Exploitation", &[Category::SexualMinors]),
    ("S5", "Defamation", &[Category::Harassment]),
    ("S6", "Specialized Advice", &[]),
    ("S7", "Privacy", &[]),
    ("S8", "Intellectual Property", &[]),
    ("S9", "Indiscriminate Weapons", &[Category::IllicitViolent]),
    ("S10", "Hate", &[Category::Hate]),
    ("S11", "Suicide & Self-Harm", &[Category::SelfHarm]),
    ("S12", "Sexual Content", &[Category::Sexual]),
    ("S13", "Elections", &[]),
    ("S14", "Code Interpreter Abuse", &[Category::Illicit]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_raises_its_whole() {
        let mut s = Scores::default();
        s.raise(Category::SexualMinors, 0.7);
        s.raise(Category::Sexual, 0.2);
        assert_eq!((s.get(Category::Sexual), s.get(Category::SexualMinors)), (0.7, 0.7));
        s.raise(Category::Violence, 0.3);
        assert_eq!(s.get(Category::ViolenceGraphic), 0.0);
        assert_eq!("hate/threatening".parse(), Ok(Category::HateThreatening));
    }
}
