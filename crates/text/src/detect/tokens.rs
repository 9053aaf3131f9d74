//! Tokens of letters and digits: bank accounts, wallets, numbers with letters.

use super::checks;
use super::scanner::Scan;
use super::text::Text;
use super::{Finding, Kind};
use std::ops::Range;

/// Longer than any address of a wallet.
const LONGEST: usize = 96;

impl Scan<'_> {
    /// The token that the group of digits `g` is part of.
    pub(super) fn token(&mut self, g: &Range<usize>) {
        let text = self.text;
        let word = |b: u8| b.is_ascii_alphanumeric();
        let (next, hit) = text.watch(|| text.byte(g.end));
        self.pend(hit, g.start);
        if self.kinds.has(Kind::Mac)
            && (next == b'-' || next.is_ascii_hexdigit() || g.start > 0 && text.bytes[g.start - 1] == b'-')
        {
            self.dashed_mac(g);
        }
        let letters = g.start > 0 && word(text.bytes[g.start - 1]);
        if !letters && !word(next) {
            return;
        }
        if letters && self.kinds.has(Kind::Iban) && g.len() >= 2 {
            self.iban(g.start);
        }
        if g.start < self.token_end {
            return;
        }
        let start = text.run_back(g.start, LONGEST, word);
        let mut end = g.end;
        self.judge_token(start, &mut end);
        self.token_end = end;
    }

    fn judge_token(&mut self, start: usize, end: &mut usize) {
        let text = self.text;
        let ((), hit) = text.watch(|| *end = text.run(start, LONGEST, |b| b.is_ascii_alphanumeric()));
        self.pend(hit, start);
        let end = *end;
        if start < self.from || end - start == LONGEST {
            return;
        }
        let (finding, hit) = text.watch(|| {
            if !text.alone(start, end) {
                return None;
            }
            let id = &text.bytes[start..end];
            if self.kinds.has(Kind::Crypto) && wallet(text, start, id) {
                return Some(Finding {
                    kind: Kind::Crypto,
                    start,
                    end,
                });
            }
            if self.kinds.has(Kind::Secret) && twilio(id) {
                return Some(Finding {
                    kind: Kind::Secret,
                    start,
                    end,
                });
            }
            self.letter_id(start, end)
        });
        self.pend(hit, start);
        self.found.extend(finding);
    }

    /// The bank account whose check digits are at `at`.
    fn iban(&mut self, at: usize) {
        let text = self.text;
        let Some(start) = at.checked_sub(2) else {
            return;
        };
        if !text.bytes[start..at].iter().all(u8::is_ascii_alphabetic) || !text.free_before(start) {
            return;
        }
        let country = [text.bytes[start], text.bytes[start + 1]].map(|b| b.to_ascii_uppercase());
        let Some(length) = iban_length(country) else {
            return;
        };
        self.judge(start, || {
            let (mut chars, mut n) = ([0; 34], 0);
            let (mut end, mut gap) = (start, false);
            while n < length {
                let at = end + usize::from(gap);
                match text.byte(at) {
                    b if b.is_ascii_alphanumeric() => {
                        chars[n] = b.to_ascii_uppercase();
                        n += 1;
                        end = at + 1;
                        gap = false;
                    }
                    b' ' | b'-' if !gap => gap = true,
                    _ => return None,
                }
            }
            let free = !text.char(end).is_some_and(char::is_alphanumeric);
            (free && checks::mod97(&chars[..n])).then_some(Finding {
                kind: Kind::Iban,
                start,
                end,
            })
        });
    }
}

/// Characters of an IBAN by country (ISO 13616 registry).
fn iban_length(country: [u8; 2]) -> Option<usize> {
    const LENGTHS: [(&[u8], usize); 18] = [
        (b"NO", 15),
        (b"BE", 16),
        (b"DKFOFIGLNLSD", 18),
        (b"MKSI", 19),
        (b"ATBAEEKZLTLUMNXK", 20),
        (b"CHCRHRLILV", 21),
        (b"BGBHDEGBGEIEMERSVA", 22),
        (b"AEGIILIQOMSOTL", 23),
        (b"ADCZESMDPKROSASESKTNVG", 24),
        (b"LYPTST", 25),
        (b"ISTR", 26),
        (b"BIDJFRGRITMCMRSM", 27),
        (b"ALAZBYCYDOGTHULBNISVPL", 28),
        (b"BREGPSQAUA", 29),
        (b"JOKWMU", 30),
        (b"MTSC", 31),
        (b"LC", 32),
        (b"RU", 33),
    ];
    LENGTHS
        .iter()
        .find(|(codes, _)| codes.chunks_exact(2).any(|c| c == country))
        .map(|(_, n)| *n)
}

/// The key of a Twilio account, not its public name (`AC…`).
fn twilio(id: &[u8]) -> bool {
    let hex = |b: &u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    id.len() == 34 && id.starts_with(b"SK") && id[2..].iter().all(hex)
}

/// Whether a token is a wallet's address: Base58Check of Bitcoin, Litecoin,
/// Dogecoin, Tron; Bech32 of Bitcoin and Litecoin; Ethereum's (EIP-55).
fn wallet(text: &Text<'_>, start: usize, id: &[u8]) -> bool {
    match id.len() {
        42 if id.starts_with(b"0x") && id[2..].iter().all(u8::is_ascii_hexdigit) => {
            ethereum(text, start, &id[2..])
        }
        26..=35 if b"13LMDT".contains(&id[0]) => checks::base58check(id),
        14..=90 if [&b"bc1"[..], b"tb1", b"ltc1"].iter().any(|h| id.starts_with(h)) => {
            checks::bech32(id)
        }
        _ => false,
    }
}

/// Mixed case is a checksum; without one a word must name the address.
fn ethereum(text: &Text<'_>, start: usize, hex: &[u8]) -> bool {
    let lower = hex.iter().any(u8::is_ascii_lowercase);
    let upper = hex.iter().any(u8::is_ascii_uppercase);
    if lower && upper {
        return checks::eip55(hex);
    }
    text.named(start, 6, &["wallet", "eth", "address", "crypto", "usdt", "usdc", "token"])
}
