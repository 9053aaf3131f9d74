//! Check digits, each by its published rule.

use sha2::{Digest, Sha256};

/// Luhn's check over ASCII digits.
pub(super) fn luhn(digits: &[u8]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(i, b)| {
            let d = u32::from(b - b'0') << (i % 2);
            if d > 9 { d - 9 } else { d }
        })
        .sum();
    sum % 10 == 0
}

/// ISO 7064 mod 97-10 over an IBAN whose first four characters go last.
pub(super) fn mod97(iban: &[u8]) -> bool {
    let mut rest = 0;
    for &c in iban[4..].iter().chain(&iban[..4]) {
        let Some(v) = char::from(c).to_digit(36) else {
            return false;
        };
        rest = if v < 10 { rest * 10 + v } else { rest * 100 + v } % 97;
    }
    rest == 1
}

/// The sum of the digits, each times its weight.
fn weighted(digits: &[u8], weights: &[u32]) -> u32 {
    digits
        .iter()
        .zip(weights)
        .map(|(d, w)| u32::from(d - b'0') * w)
        .sum()
}

/// NHS number: ten digits, mod 11 with weights 10 to 2.
pub(super) fn nhs(digits: &[u8]) -> bool {
    let check = 11 - weighted(digits, &[10, 9, 8, 7, 6, 5, 4, 3, 2]) % 11;
    let all_same = digits.iter().all(|d| *d == digits[0]);
    !all_same && check != 10 && check % 11 == u32::from(digits[9] - b'0')
}

/// Australian tax file number: nine digits, weighted sum divisible by 11.
pub(super) fn tfn(digits: &[u8]) -> bool {
    weighted(digits, &[1, 4, 3, 7, 5, 8, 6, 9, 10]) % 11 == 0
}

/// Australian business number: eleven digits, 1 taken from the first, weighted
/// sum divisible by 89.
pub(super) fn abn(digits: &[u8]) -> bool {
    let sum = weighted(digits, &[10, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19]);
    digits[0] != b'0' && (sum - 10) % 89 == 0
}

/// PESEL: eleven digits, a date whose month also says the century, mod 10.
pub(super) fn pesel(digits: &[u8]) -> bool {
    let two = |i: usize| u32::from(digits[i] - b'0') * 10 + u32::from(digits[i + 1] - b'0');
    let (month, day) = (two(2) % 20, two(4));
    let sum = weighted(digits, &[1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1]);
    (1..=12).contains(&month) && (1..=31).contains(&day) && sum % 10 == 0
}

/// German tax number: eleven digits, ISO 7064 mod 11, 10; one digit of the
/// first ten comes twice or three times, the first is no zero.
pub(super) fn steuer_id(digits: &[u8]) -> bool {
    let mut counts = [0; 10];
    digits[..10].iter().for_each(|d| counts[usize::from(d - b'0')] += 1);
    let repeated = counts.iter().filter(|c| **c > 1).count();
    let most = counts.iter().max().copied().unwrap_or(0);
    let mut product = 10;
    for d in &digits[..10] {
        let sum = (u32::from(d - b'0') + product) % 10;
        product = if sum == 0 { 10 } else { sum } * 2 % 11;
    }
    let check = (11 - product) % 10;
    digits[0] != b'0' && repeated == 1 && most <= 3 && check == u32::from(digits[10] - b'0')
}

/// Verhoeff's check (dihedral group D5), as Aadhaar has it.
pub(super) fn verhoeff(digits: &[u8]) -> bool {
    let times = |a: u8, b: u8| match (a < 5, b < 5) {
        (true, true) => (a + b) % 5,
        (true, false) => (a + b - 5) % 5 + 5,
        (false, true) => (a - 5 + 5 - b) % 5 + 5,
        (false, false) => (a + 5 - b) % 5,
    };
    const TURN: [u8; 10] = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4];
    let mut check = 0;
    for (i, d) in digits.iter().rev().enumerate() {
        let mut d = d - b'0';
        for _ in 0..i % 8 {
            d = TURN[usize::from(d)];
        }
        check = times(check, d);
    }
    check == 0
}

/// The control letter of a Spanish number.
pub(super) fn nif(number: u32, letter: u8) -> bool {
    b"TRWAGMYFPDXBNJZSQVHLCKE"[number as usize % 23] == letter
}

/// NRIC or FIN: `[STFGM]`, seven digits, a control letter.
pub(super) fn nric(id: &[u8]) -> bool {
    let sum = weighted(&id[1..8], &[2, 7, 6, 5, 4, 3, 2]) as usize;
    let (offset, letters) = match id[0] {
        b'S' => (0, b"JZIHGFEDCBA"),
        b'T' => (4, b"JZIHGFEDCBA"),
        b'F' => (0, b"XWUTRQPNMLK"),
        b'G' => (4, b"XWUTRQPNMLK"),
        b'M' => (3, b"KLJNPQRTUWX"),
        _ => return false,
    };
    let at = (sum + offset) % 11;
    // Series M counts its letters from the other end.
    let at = if id[0] == b'M' { 10 - at } else { at };
    letters[at] == id[8]
}

/// Italian fiscal code: sixteen capitals and digits, the last one the control.
pub(super) fn fiscal_code(code: &[u8]) -> bool {
    const ODD: [u32; 26] = [
        1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24,
        23,
    ];
    let value = |c: u8| u32::from(if c.is_ascii_digit() { c - b'0' } else { c - b'A' });
    let sum: u32 = code[..15]
        .iter()
        .enumerate()
        .map(|(i, c)| match i % 2 {
            0 => ODD[value(*c) as usize],
            _ => value(*c),
        })
        .sum();
    sum % 26 + u32::from(b'A') == u32::from(code[15])
}

/// Base58Check: 21 bytes and the head of their double SHA-256.
pub(super) fn base58check(address: &[u8]) -> bool {
    const ALPHABET: &[u8] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
    let mut number = [0u8; 25];
    for c in address {
        let Some(mut carry) = ALPHABET.iter().position(|a| a == c) else {
            return false;
        };
        for byte in number.iter_mut().rev() {
            carry += usize::from(*byte) * 58;
            *byte = (carry % 256) as u8;
            carry /= 256;
        }
        if carry != 0 {
            return false;
        }
    }
    let zeros = number.iter().take_while(|b| **b == 0).count();
    let ones = address.iter().take_while(|b| **b == b'1').count();
    let digest = Sha256::digest(Sha256::digest(&number[..21]));
    zeros == ones && digest[..4] == number[21..]
}

/// Bech32 and Bech32m (BIP 173, 350) of an address in small letters.
pub(super) fn bech32(address: &[u8]) -> bool {
    const ALPHABET: &[u8] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";
    const GENERATOR: [u32; 5] = [0x3b6a_57b2, 0x2650_8e6d, 0x1ea1_19fa, 0x3d42_33dd, 0x2a14_62b3];
    let Some(one) = address.iter().rposition(|c| *c == b'1') else {
        return false;
    };
    let (head, data) = (&address[..one], &address[one + 1..]);
    let mut check = 1u32;
    let mut step = |v: u32| {
        let top = check >> 25;
        check = (check & 0x01ff_ffff) << 5 ^ v;
        for (i, g) in GENERATOR.iter().enumerate() {
            if top >> i & 1 == 1 {
                check ^= g;
            }
        }
    };
    head.iter().for_each(|c| step(u32::from(c >> 5)));
    step(0);
    head.iter().for_each(|c| step(u32::from(c & 31)));
    for c in data {
        match ALPHABET.iter().position(|a| a == c) {
            Some(v) => step(v as u32),
            None => return false,
        }
    }
    data.len() > 6 && matches!(check, 1 | 0x2bc8_30a3)
}

/// EIP-55: a letter of the address is a capital where the digit of its hash is
/// above 7.
pub(super) fn eip55(hex: &[u8]) -> bool {
    let hash = keccak256(&hex.to_ascii_lowercase());
    hex.iter().enumerate().all(|(i, c)| {
        let digit = if i % 2 == 0 { hash[i / 2] >> 4 } else { hash[i / 2] & 15 };
        c.is_ascii_digit() || c.is_ascii_uppercase() == (digit > 7)
    })
}

/// Keccak-256 of at most 135 bytes, padded as before it became SHA-3. By hand:
/// forty lines against a crate for one checksum.
fn keccak256(message: &[u8]) -> [u8; 32] {
    const RATE: usize = 136;
    let mut block = [0u8; 200];
    block[..message.len()].copy_from_slice(message);
    block[message.len()] ^= 1;
    block[RATE - 1] ^= 0x80;
    let mut a = [0u64; 25];
    for (lane, bytes) in a.iter_mut().zip(block.chunks_exact(8)) {
        *lane = bytes.iter().rev().fold(0, |l, b| l << 8 | u64::from(*b));
    }
    // The constants of iota come from a shift register.
    let mut register = 1u8;
    for _ in 0..24 {
        let mut c = [0u64; 5];
        for (i, lane) in a.iter().enumerate() {
            c[i % 5] ^= lane;
        }
        for (i, lane) in a.iter_mut().enumerate() {
            *lane ^= c[(i + 4) % 5] ^ c[(i + 1) % 5].rotate_left(1);
        }
        // rho and pi along their cycle of 24 lanes.
        let (mut at, mut moved) = (1, a[1]);
        for t in 0..24u32 {
            let (x, y) = (at % 5, at / 5);
            at = y + 5 * ((2 * x + 3 * y) % 5);
            moved = std::mem::replace(&mut a[at], moved.rotate_left((t + 1) * (t + 2) / 2 % 64));
        }
        for row in a.chunks_exact_mut(5) {
            let old = [row[0], row[1], row[2], row[3], row[4]];
            for (x, lane) in row.iter_mut().enumerate() {
                *lane ^= !old[(x + 1) % 5] & old[(x + 2) % 5];
            }
        }
        for j in 0..7 {
            if register & 1 == 1 {
                a[0] ^= 1 << ((1u32 << j) - 1);
            }
            register = register << 1 ^ if register >> 7 == 1 { 0x71 } else { 0 };
        }
    }
    let mut hash = [0; 32];
    for (bytes, lane) in hash.chunks_exact_mut(8).zip(a) {
        bytes.copy_from_slice(&lane.to_le_bytes());
    }
    hash
}

/// Shannon entropy of the characters of `s`, in bits a character.
pub(super) fn entropy(s: &str) -> f64 {
    let mut chars: Vec<char> = s.chars().collect();
    chars.sort_unstable();
    let n = chars.len() as f64;
    chars
        .chunk_by(|a, b| a == b)
        .map(|same| same.len() as f64 / n)
        .map(|p| -p * p.log2())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_examples_pass_and_one_digit_off_fails() {
        let checks: [(&str, fn(&[u8]) -> bool); 11] = [
            ("4111111111111111", luhn),
            ("9434765919", nhs),
            ("123456782", tfn),
            ("51824753556", abn),
            ("44051401359", pesel),
            ("86095742719", steuer_id),
            ("234123412346", verhoeff),
            ("S1234567D", nric),
            ("RSSMRA85T10A562S", fiscal_code),
            ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", base58check),
            ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", bech32),
        ];
        for (good, check) in checks {
            assert!(check(good.as_bytes()), "{good}");
            let mut bad = good.as_bytes().to_vec();
            let last = bad.len() - 3;
            bad[last] = match bad[last] {
                b'9' => b'8',
                b'a'..=b'z' | b'A'..=b'Z' => bad[last] ^ 3,
                d => d + 1,
            };
            assert!(!check(&bad), "{}", String::from_utf8_lossy(&bad));
        }
        assert!(eip55(b"5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"));
        assert!(!eip55(b"5aaeb6053F3E94C9b9A09f33669435E7Ef1BeAed"));
        assert!(nif(12_345_678, b'Z') && !nif(12_345_679, b'Z'));
        assert!(mod97(b"DE89370400440532013000") && !mod97(b"DE89370400440532013001"));
        assert!((entropy("aabb") - 1.0).abs() < 1e-12);
    }
}
