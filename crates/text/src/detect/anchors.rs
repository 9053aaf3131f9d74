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
    table
};

/// The same as [`CLASSES`], in arithmetic that compiles to vector instructions.
fn any(block: &[u8; 64]) -> bool {
    let mut any = 0u8;
    for b in block {
        any |= u8::from(b.wrapping_sub(b'0') <= b':' - b'0')
            | u8::from(*b == b'@')
            | u8::from(*b == b'=')
            | u8::from(*b == b'(')
            // `[` and `{` differ in one bit.
            | u8::from(*b | 0x20 == b'{');
    }
    any != 0
}

/// The first nominating byte from `at` on.
pub(super) fn next(bytes: &[u8], mut at: usize) -> Option<(usize, Class)> {
    loop {
        let rest = bytes.get(at..)?;
        let block = match rest.first_chunk::<64>() {
            Some(block) if !any(block) => {
                at += 64;
                continue;
            }
            Some(block) => &block[..],
            None => rest,
        };
        match block.iter().position(|b| CLASSES[usize::from(*b)] != Class::None) {
            Some(i) => return Some((at + i, CLASSES[usize::from(block[i])])),
            None if block.len() < 64 => return None,
            None => at += 64,
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

/// Ends of names whose value may follow a verb ("the password is …").
pub(super) const NAMES: [&str; 24] = [
    "ssword", "SSWORD", "sswort", "SSWORT", "sswd", "SSWD", "phrase", "PHRASE", "pwd", "PWD",
    "Pwd", "nnwort", "NNWORT", "ecret", "ECRET", "oken", "OKEN", "key", "KEY", "Key", "ssel",
    "SSEL", "earer", "EARER",
];

/// The head of a JSON Web Token, and of a private key.
pub(super) const JWT: &str = "eyJ";
pub(super) const PEM: &str = "-----BEGIN ";

enum Finder {
    Packed(packed::Searcher),
    /// Where the processor has no vectors.
    Plain(AhoCorasick),
}

static FINDER: LazyLock<Finder> = LazyLock::new(|| {
    let heads = HEADS.iter().map(|h| h.head);
    let all: Vec<&str> = heads.chain(NAMES).chain([JWT, PEM]).collect();
    match packed::Searcher::new(&all) {
        Some(s) => Finder::Packed(s),
        None => Finder::Plain(
            AhoCorasick::new(&all).expect("some sixty short literals of this crate, built by its tests"),
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
