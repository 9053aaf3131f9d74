//! A text under scan.
//!
//! Every look ahead goes through [`Text`], which notes a look past the end: what
//! was decided without one, no continuation can change. Looks back are bounded
//! by [`BACK`].

use std::cell::Cell;

/// How far before a candidate its context reaches, in bytes.
pub(super) const BACK: usize = 96;

pub(super) struct Text<'t> {
    pub(super) str: &'t str,
    pub(super) bytes: &'t [u8],
    past_end: Cell<bool>,
}

impl<'t> Text<'t> {
    pub(super) fn new(str: &'t str) -> Self {
        Self {
            str,
            bytes: str.as_bytes(),
            past_end: Cell::new(false),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Runs `f`; whether it looked past the end.
    pub(super) fn watch<T>(&self, f: impl FnOnce() -> T) -> (T, bool) {
        self.past_end.set(false);
        let value = f();
        (value, self.past_end.get())
    }

    /// The byte at `i`; 0 past the end.
    pub(super) fn byte(&self, i: usize) -> u8 {
        match self.bytes.get(i) {
            Some(b) => *b,
            None => {
                self.past_end.set(true);
                0
            }
        }
    }

    /// The character at `i`, a boundary.
    pub(super) fn char(&self, i: usize) -> Option<char> {
        let byte = self.byte(i);
        if i >= self.len() {
            None
        } else if byte < 128 {
            Some(char::from(byte))
        } else {
            self.str[i..].chars().next()
        }
    }

    /// The character that ends at `i`, a boundary.
    pub(super) fn before(&self, i: usize) -> Option<char> {
        match self.bytes[..i].last() {
            Some(b) if *b < 128 => Some(char::from(*b)),
            _ => self.str[..i].chars().next_back(),
        }
    }

    /// Whether `what` stands at `i`.
    pub(super) fn starts(&self, i: usize, what: &str) -> bool {
        what.bytes().enumerate().all(|(k, b)| self.byte(i + k) == b)
    }

    /// The end of the run of bytes from `i` that `f` holds for, `most` at most.
    pub(super) fn run(&self, i: usize, most: usize, f: impl Fn(u8) -> bool) -> usize {
        let mut end = i;
        while end - i < most && f(self.byte(end)) && end < self.len() {
            end += 1;
        }
        end
    }

    /// The start of the run of bytes before `i` that `f` holds for.
    pub(super) fn run_back(&self, i: usize, most: usize, f: impl Fn(u8) -> bool) -> usize {
        let head = self.bytes[..i].iter().rev().take(most);
        i - head.take_while(|b| f(**b)).count()
    }

    /// Nothing before `at` makes a number part of a longer name (`ORD-41…`).
    pub(super) fn free_before(&self, at: usize) -> bool {
        match self.before(at) {
            None => true,
            Some(c) if c.is_alphanumeric() || c == '_' || c == '#' => false,
            Some(c @ ('-' | '/' | '.' | '–')) => {
                let before = self.before(at - c.len_utf8());
                !before.is_some_and(char::is_alphanumeric)
            }
            Some(_) => true,
        }
    }

    /// Nothing after `at` makes a number part of a longer name.
    pub(super) fn free_after(&self, at: usize) -> bool {
        match self.char(at) {
            None => true,
            Some(c) if c.is_alphanumeric() || c == '_' => false,
            Some('-' | '/') => !self.char(at + 1).is_some_and(char::is_alphanumeric),
            Some('.' | ',') => !self.byte(at + 1).is_ascii_digit(),
            Some(_) => true,
        }
    }

    /// Neither before nor after the bytes is there a letter or digit.
    pub(super) fn alone(&self, start: usize, end: usize) -> bool {
        let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !word(self.before(start)) && !word(self.char(end))
    }

    /// The words before `at` on its line, nearest first, within [`BACK`].
    pub(super) fn words_before(&self, at: usize) -> impl Iterator<Item = &'t str> {
        self.line_before(at)
            .rsplit(|c: char| !c.is_alphanumeric())
            .filter(|w| !w.is_empty())
    }

    /// The line up to `at`, within [`BACK`].
    pub(super) fn line_before(&self, at: usize) -> &'t str {
        let from = self.str.floor_char_boundary(at.saturating_sub(BACK));
        let line = &self.str[from..at];
        line.rsplit('\n').next().unwrap_or("")
    }

    /// Whether one of the `n` words before `at` begins with one of `heads`.
    pub(super) fn named(&self, at: usize, n: usize, heads: &[&str]) -> bool {
        self.words_before(at)
            .take(n)
            .any(|w| heads.iter().any(|h| begins(w, h)))
    }
}

/// Whether `word` begins with `head`, whatever the case of ASCII letters.
pub(super) fn begins(word: &str, head: &str) -> bool {
    let word = word.as_bytes().get(..head.len());
    word.is_some_and(|w| w.eq_ignore_ascii_case(head.as_bytes()))
}
