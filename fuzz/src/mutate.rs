//! Ways to damage a file: flips, cuts, lengths, repeats, splices.

/// SplitMix64, after Steele, Lea and Flood (2014): small and repeatable.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`, which must not be 0; the bias does not matter here.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// Lengths, counts and offsets that parsers get wrong.
const NUMBERS: [u64; 20] = [
    0,
    1,
    2,
    3,
    4,
    5,
    8,
    31,
    32,
    33,
    255,
    65_536,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 61,
    1 << 62,
    1 << 63,
    u64::MAX - 31,
    u64::MAX,
];

const TEXTS: [&str; 16] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "-1",
    "1e99",
    "null",
    "\"F32\"",
    "\"shape\":[]",
    "\"__metadata__\":{}",
    "18446744073709551615",
    "\\ud800",
    "[[[[[[[[",
];

/// One input made from the corpus by one to six changes.
pub fn mutant(corpus: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    const MAX: usize = 1 << 16;
    // Half of the time from the first entries, which are the valid seeds.
    let reach = if rng.one_in(2) {
        corpus.len()
    } else {
        corpus.len().min(3)
    };
    let mut out = corpus[rng.below(reach)].clone();
    let changes = if rng.one_in(2) { 1 } else { 2 + rng.below(5) };
    for _ in 0..changes {
        if out.is_empty() {
            out.push(rng.next() as u8);
        }
        // Headers matter more than data: half of the changes are near the start.
        let reach = if rng.one_in(2) {
            out.len()
        } else {
            out.len().min(256)
        };
        let at = rng.below(reach);
        match rng.below(10) {
            0 => out[at] ^= 1 << rng.below(8),
            1 => out[at] = rng.next() as u8,
            2 => out.truncate(at),
            3 | 4 => {
                let number = NUMBERS[rng.below(NUMBERS.len())].to_le_bytes();
                let width = [2, 4, 8][rng.below(3)].min(out.len() - at);
                out[at..at + width].copy_from_slice(&number[..width]);
            }
            5 => {
                // A small change of a number that is there.
                let width = 8.min(out.len() - at);
                let mut number = [0; 8];
                number[..width].copy_from_slice(&out[at..at + width]);
                let step = [1, 7, 8, 32, u64::MAX][rng.below(5)];
                let number = u64::from_le_bytes(number).wrapping_add(step).to_le_bytes();
                out[at..at + width].copy_from_slice(&number[..width]);
            }
            6 => {
                let end = at + rng.below((out.len() - at).min(64)) + 1;
                out.drain(at..end.min(out.len()));
            }
            7 => {
                let end = (at + rng.below(64) + 1).min(out.len());
                let copy = out[at..end].to_vec();
                let to = rng.below(out.len() + 1);
                out.splice(to..to, copy);
            }
            8 => {
                let other = &corpus[rng.below(corpus.len())];
                if !other.is_empty() {
                    let from = rng.below(other.len());
                    out.truncate(at);
                    out.extend_from_slice(&other[from..]);
                }
            }
            _ => {
                let text = TEXTS[rng.below(TEXTS.len())].bytes();
                out.splice(at..at, text);
            }
        }
        out.truncate(MAX);
    }
    // Most damaged headers would fail at the length before their JSON is read.
    if out.len() > 8 && out[8] == b'{' && rng.one_in(2) {
        let end = out.iter().rposition(|&b| b == b'}').unwrap_or(8);
        let length = (end.saturating_sub(7)) as u64;
        out[..8].copy_from_slice(&length.to_le_bytes());
    }
    out
}
