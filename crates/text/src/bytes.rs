//! The byte-level alphabet of GPT-2: one printable character for each byte, so
//! that a vocabulary of strings can spell any bytes.
//!
//! Printable Latin-1 characters stand for themselves; the other 68 bytes take
//! U+0100 and up, in order.

/// Whether `byte` stands for itself.
const fn itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character of each byte, and the byte of each character where it has one.
const ALPHABET: ([char; 256], [Option<u8>; 256 + 68]) = {
    let (mut chars, mut bytes) = (['\0'; 256], [None; 256 + 68]);
    let (mut byte, mut other) = (0, 0x100);
    while byte < 256 {
        let code = if itself(byte as u8) {
            byte
        } else {
            other += 1;
            other - 1
        };
        if let Some(c) = char::from_u32(code as u32) {
            chars[byte] = c;
        }
        bytes[code] = Some(byte as u8);
        byte += 1;
    }
    (chars, bytes)
};
static CHARS: [char; 256] = ALPHABET.0;
static BYTES: [Option<u8>; 256 + 68] = ALPHABET.1;

/// The character that spells `byte`.
pub(crate) fn char_of(byte: u8) -> char {
    CHARS[byte as usize]
}

/// The byte that `c` spells.
fn byte_of(c: char) -> Option<u8> {
    BYTES.get(c as usize).copied().flatten()
}

/// Appends the bytes `token` spells; its own UTF-8 when a character is outside
/// the alphabet.
pub(crate) fn spell(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        let Some(byte) = byte_of(c) else {
            out.truncate(start);
            out.extend_from_slice(token.as_bytes());
            return;
        };
        out.push(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(token: &str) -> Vec<u8> {
        let mut out = b"before".to_vec();
        spell(token, &mut out);
        out.split_off(6)
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut seen: Vec<_> = (0..0x200)
            .filter_map(char::from_u32)
            .filter_map(byte_of)
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert!((0..=255).all(|b| byte_of(char_of(b)) == Some(b)));
        assert_eq!(spelled("ĠhÃ©"), " hé".as_bytes());
        assert_eq!(spelled("Ġ日"), "Ġ日".as_bytes());
    }
}
