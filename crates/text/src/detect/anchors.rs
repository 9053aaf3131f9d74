//! Where findings may be: bytes they are made around, and heads of keys.

use aho_corasick::{AhoCorasick, packed};
use std::sync::LazyLock;

/// What a byte nominates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    None,
    /// A number, or a token that holds a digit.
    Digit,
    /// An e-mail address.
    At,
    /// `[at]`.
    Open,
    /// `name = value`, `name: value`, `scheme://`, an address with colons.
    Assign,
    /// The end of a key's head, or a private key.
    Joint,
}

const CLASSES: [Class; 256] = {
    let mut table = [Class::None; 256];
    let mut b = b'0';
    while b <= b'9' {
        table[b as usize] = Class::Digit;
        b += 1;
    }
    table[b'@' as usize] = Class::At;
    table[b'[' as usize] = Class::Open;
    table[b'(' as usize] = Class::Open;
    table[b'{' as usize] = Class::Open;
    table[b':' as usize] = Class::Assign;
    table[b'=' as usize] = Class::Assign;
    table[b'_' as usize] = Class::Joint;
    table[b'-' as usize] = Class::Joint;
    table
};

/// Bytes that are tested together.
const BLOCK: usize = 32;

/// The same as [`CLASSES`], in arithmetic that compiles to vector instructions.
fn any(block: &[u8; BLOCK]) -> bool {
    let mut any = 0u8;
    for b in block {
        any |= u8::from(b.wrapping_sub(b'0') <= b':' - b'0')
            | u8::from(*b == b'@')
            | u8::from(*b == b'=')
            | u8::from(*b == b'(')
            | u8::from(*b == b'-')
            | u8::from(*b == b'_')
            // `[` and `{` differ in one bit.
            | u8::from(*b | 0x20 == b'{');
    }
    any != 0
}

/// The nominating bytes of a text in order.
pub(super) struct Anchors<'t> {
    bytes: &'t [u8],
    /// The end of the block that holds one.
    block: usize,
}

impl<'t> Anchors<'t> {
    pub(super) fn new(bytes: &'t [u8]) -> Self {
        Self { bytes, block: 0 }
    }

    /// The first one from `at` on, which grows from call to call.
    pub(super) fn next(&mut self, mut at: usize) -> Option<(usize, Class)> {
        loop {
            let rest = self.bytes.get(at..self.block.max(at))?;
            for (i, b) in rest.iter().enumerate() {
                let class = CLASSES[usize::from(*b)];
                if class != Class::None {
                    return Some((at + i, class));
                }
            }
            at = at.max(self.block);
            while let Some(block) = self.bytes[at..].first_chunk() {
                if any(block) {
                    break;
                }
                at += BLOCK;
            }
            if at >= self.bytes.len() {
                return None;
            }
            self.block = (at + BLOCK).min(self.bytes.len());
        }
    }
}

/// A key's issuer by its head: the characters after it, and how many at least.
pub(super) struct Head {
    pub(super) head: &'static str,
    pub(super) body: Body,
    pub(super) least: usize,
}

/// The alphabet of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    /// `[A-Za-z0-9_-]`.
    Url,
    /// `[A-Za-z0-9]`.
    Alnum,
    /// `[A-Z0-9]`.
    Upper,
    /// `[A-Za-z0-9_]`.
    Word,
    /// `[A-Za-z0-9_.-]`, which a sentence's full stop is not part of.
    Dotted,
}

const fn head(head: &'static str, body: Body, least: usize) -> Head {
    Head { head, body, least }
}

/// Keys with a known head, as their issuers document them.
pub(super) const HEADS: [Head; 36] = [
    head("sk-", Body::Url, 16),
    head("sk_live_", Body::Alnum, 16),
    head("sk_test_", Body::Alnum, 16),
    head("rk_live_", Body::Alnum, 16),
    head("rk_test_", Body::Alnum, 16),
    head("whsec_", Body::Alnum, 24),
    head("AKIA", Body::Upper, 16),
    head("ASIA", Body::Upper, 16),
    head("ghp_", Body::Alnum, 20),
    head("gho_", Body::Alnum, 20),
    head("ghu_", Body::Alnum, 20),
    head("ghs_", Body::Alnum, 20),
    head("ghr_", Body::Alnum, 20),
    head("github_pat_", Body::Word, 20),
    head("glpat-", Body::Url, 16),
    head("xoxa-", Body::Url, 10),
    head("xoxb-", Body::Url, 10),
    head("xoxe-", Body::Url, 10),
    head("xoxp-", Body::Url, 10),
    head("xoxr-", Body::Url, 10),
    head("xoxs-", Body::Url, 10),
    head("xapp-", Body::Url, 20),
    head("AIza", Body::Url, 30),
    head("GOCSPX-", Body::Url, 20),
    head("ya29.", Body::Url, 30),
    head("npm_", Body::Alnum, 30),
    head("hf_", Body::Alnum, 30),
    head("pypi-", Body::Url, 40),
    head("SG.", Body::Dotted, 40),
    head("dckr_pat_", Body::Url, 20),
    head("shpat_", Body::Alnum, 32),
    head("dop_v1_", Body::Alnum, 40),
    head("gsk_", Body::Alnum, 40),
    head("nvapi-", Body::Url, 40),
    head("xai-", Body::Alnum, 40),
    head("r8_", Body::Alnum, 30),
];

/// The head that ends in the `-` or `_` at `at`.
pub(super) fn ending(bytes: &[u8], at: usize) -> Option<&'static Head> {
    let text = &bytes[..=at];
    let last = text.len().checked_sub(2).map(|i| text[i])?;
    HEADS.iter().find(|h| {
        let head = h.head.as_bytes();
        head[head.len() - 2] == last && text.ends_with(head)
    })
}

/// Ends of names whose value may follow a verb ("the password is …").
pub(super) const NAMES: [&str; 17] = [
    "ssword", "SSWORD", "sswort", "sswd", "phrase", "pwd", "Pwd", "nnwort", "ecret", "ECRET",
    "oken", "OKEN", "key", "KEY", "Key", "ssel", "earer",
];

/// Heads that end in a letter or a full stop.
pub(super) const LETTERS: [&str; 6] = ["AKIA", "ASIA", "AIza", "ya29.", "SG.", JWT];

/// The head of a JSON Web Token, and of a private key.
pub(super) const JWT: &str = "eyJ";
pub(super) const PEM: &str = "-----BEGIN ";

enum Finder {
    Packed(packed::Searcher),
    /// Where the processor has no vectors.
    Plain(AhoCorasick),
}

static FINDER: LazyLock<Finder> = LazyLock::new(|| {
    let all: Vec<&str> = NAMES.into_iter().chain(LETTERS).collect();
    match packed::Searcher::new(&all) {
        Some(s) => Finder::Packed(s),
        None => Finder::Plain(
            AhoCorasick::new(&all).expect("some twenty short literals of this crate, built by its tests"),
        ),
    }
});

/// Calls `f` with each occurrence of a head or a name's end from `at` on.
pub(super) fn heads(bytes: &[u8], mut at: usize, mut f: impl FnMut(usize, usize)) {
    let finder = &*FINDER;
    while at < bytes.len() {
        let found = match finder {
            Finder::Packed(s) => s
                .find_in(bytes, aho_corasick::Span::from(at..bytes.len()))
                .map(|m| (m.start(), m.end())),
            Finder::Plain(s) => s
                .find(aho_corasick::Input::new(bytes).span(at..bytes.len()))
                .map(|m| (m.start(), m.end())),
        };
        let Some((start, end)) = found else { return };
        f(start, end);
        at = start + 1;
    }
}
