//! E-mail addresses, also as people write them for people (`anna [at] …`).

use super::scanner::Scan;
use super::text::Text;
use super::{Finding, Kind};

/// Characters of a mailbox's name (RFC 5321), of a label and labels of a domain.
const LOCAL: usize = 64;
const LABEL: usize = 63;
const LABELS: usize = 8;

impl Scan<'_> {
    /// An address around the `@` or the bracket at `at`.
    pub(super) fn email(&mut self, at: usize) {
        let text = self.text;
        let (domain, hit) = text.watch(|| sign(text, at));
        let before = match text.before(at) {
            Some(c) if text.bytes[at] != b'@' && c.is_whitespace() => at - c.len_utf8(),
            _ => at,
        };
        let Some(start) = local(text, before, self.email_end.max(self.from)) else {
            return;
        };
        let Some(domain) = domain else {
            self.pend(hit, start);
            return;
        };
        self.judge(start, || {
            let end = address_end(text, domain)?;
            let known = &text.str[start..end];
            // `git@host.org:path` is a repository, no mailbox; nor is `logo@2x.png`.
            let remote = text.byte(end) == b':'
                && text
                    .char(end + 1)
                    .is_some_and(|c| c.is_alphanumeric() || c == '/');
            let image = [".png", ".jpg", ".svg", ".gif", ".webp"]
                .iter()
                .any(|e| known.ends_with(e));
            let lead = known.len() - known.trim_start_matches(['\'', '.']).len();
            (!remote && !image).then_some(Finding {
                kind: Kind::Email,
                start: start + lead,
                end,
            })
        });
        self.email_end = match self.found.last() {
            Some(f) if f.kind == Kind::Email => f.end.max(self.email_end),
            _ => self.email_end,
        };
    }
}

/// Where the domain starts, after `@` or `[at]` with its spaces.
fn sign(text: &Text<'_>, at: usize) -> Option<usize> {
    if text.byte(at) == b'@' {
        return Some(at + 1);
    }
    let word = ["at", "AT", "ät"].into_iter().find(|w| text.starts(at + 1, w))?;
    bracket_end(text, at + 1 + word.len())
}

/// Past a closing bracket at `i` and one space.
fn bracket_end(text: &Text<'_>, i: usize) -> Option<usize> {
    if !matches!(text.byte(i), b']' | b')' | b'}') {
        return None;
    }
    Some(i + 1 + space(text, i + 1))
}

fn space(text: &Text<'_>, i: usize) -> usize {
    let c = text.char(i);
    c.filter(|c| c.is_whitespace()).map_or(0, char::len_utf8)
}

fn is_local(c: char) -> bool {
    c.is_alphanumeric() || "._%+'-".contains(c)
}

/// The start of the mailbox's name that ends at `end`, not before `least`.
fn local(text: &Text<'_>, end: usize, least: usize) -> Option<usize> {
    let last = text.before(end)?;
    if !is_local(last) || matches!(last, '.' | '\'') || end <= least {
        return None;
    }
    let head = text.str.get(least..end)?.chars().rev().take(LOCAL);
    let bytes: usize = head.take_while(|c| is_local(*c)).map(char::len_utf8).sum();
    Some(end - bytes)
}

/// Past a dot at `i`, in either notation.
fn dot(text: &Text<'_>, i: usize) -> Option<usize> {
    if text.byte(i) == b'.' {
        return Some(i + 1);
    }
    let i = i + space(text, i);
    if !matches!(text.byte(i), b'[' | b'(' | b'{') {
        return None;
    }
    let mut words = ["dot", "DOT", "punkt"].into_iter();
    let word = words.find(|w| text.starts(i + 1, w))?;
    bracket_end(text, i + 1 + word.len())
}

/// The end of the domain that starts at `i`: labels, the last one of letters.
fn address_end(text: &Text<'_>, mut i: usize) -> Option<usize> {
    let mut end = None;
    for label in 0..=LABELS {
        // The last label may end where a letter does, the others at a dot.
        let (mut chars, mut top, mut ends_alnum, mut letters) = (0, None, false, true);
        let mut at = i;
        while chars <= LABEL {
            let Some(c) = text.char(at).filter(|c| c.is_alphanumeric() || *c == '-') else {
                break;
            };
            if chars == 0 && c == '-' {
                break;
            }
            letters &= c.is_alphabetic() || c == '-';
            at += c.len_utf8();
            chars += 1;
            ends_alnum = c != '-';
            if letters && c.is_alphabetic() && chars >= 2 && chars <= LABEL {
                top = Some(at);
            }
        }
        if label > 0 && top.is_some() {
            end = top;
        }
        if chars == 0 || chars > LABEL || !ends_alnum {
            break;
        }
        match dot(text, at) {
            Some(next) => i = next,
            None => break,
        }
    }
    end
}
