//! The byte-level alphabet of GPT-2: one printable character for each byte, so
//! that a vocabulary of strings can spell any bytes.
//!
//! Printable Latin-1 characters stand for themselves; the other 68 bytes take
//! U+0100 and up, in order.

/// Whether `byte` stands for itself.
fn itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The byte that `c` spells.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    if let Ok(byte) = u8::try_from(code) {
        return itself(byte).then_some(byte);
    }
    let nth = usize::try_from(code.checked_sub(0x100)?).ok()?;
    (0..=255u8).filter(|&b| !itself(b)).nth(nth)
}

/// The bytes `token` spells; its own UTF-8 when a character is outside the
/// alphabet.
pub(crate) fn spell(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(byte_of)
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut seen: Vec<_> = (0..0x200)
            .filter_map(char::from_u32)
            .filter_map(byte_of)
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!(spell("ĠhÃ©"), " hé".as_bytes());
        assert_eq!(spell("日"), "日".as_bytes());
    }
}
