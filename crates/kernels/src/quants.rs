//! Blocks to `f32` and back.
//!
//! Block layouts are ggml's; quantizing follows the rounding of ggml's
//! reference functions, so that the bytes agree with other tools. What may not
//! happen here: reading past the bytes given, whatever they hold.

use crate::KernelError;
use ashlar_core::DType;
use half::{bf16, f16};

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Writes the values of `src` to `dst`, whose length says how many.
///
/// Takes F32, F16, BF16, F8_E4M3, F8_E5M2, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL and Q2_K to Q6_K.
///
/// # Errors
/// Another type, or bytes that are not exactly those of `dst.len()` values.
pub fn dequantize(dtype: DType, src: &[u8], dst: &mut [f32]) -> Result<(), KernelError> {
    let expected = dtype.bytes_for(dst.len()).unwrap_or(0);
    if expected != src.len() {
        return Err(KernelError::Length { dtype, values: dst.len(), expected, got: src.len() });
    }
    let decode: fn(&[u8], &mut [f32]) = match dtype {
        DType::F32 => |s, d| d[0] = f32::from_le_bytes([s[0], s[1], s[2], s[3]]),
        DType::F16 => |s, d| d[0] = f16_at(s, 0),
        DType::BF16 => |s, d| d[0] = bf16::from_le_bytes([s[0], s[1]]).to_f32(),
        DType::F8_E4M3 => |s, d| d[0] = e4m3(s[0]),
        DType::F8_E5M2 => |s, d| d[0] = e5m2(s[0]),
        DType::Q4_0 => |s, d| {
            let scale = f16_at(s, 0);
            for i in 0..16 {
                d[i] = (i32::from(s[2 + i] & 15) - 8) as f32 * scale;
                d[i + 16] = (i32::from(s[2 + i] >> 4) - 8) as f32 * scale;
            }
        },
        DType::Q4_1 => |s, d| {
            let (scale, min) = (f16_at(s, 0), f16_at(s, 2));
            for i in 0..16 {
                d[i] = f32::from(s[4 + i] & 15) * scale + min;
                d[i + 16] = f32::from(s[4 + i] >> 4) * scale + min;
            }
        },
        DType::Q5_0 => |s, d| {
            let scale = f16_at(s, 0);
            for (i, q) in fives(&s[2..]).into_iter().enumerate() {
                d[i] = (i32::from(q) - 16) as f32 * scale;
            }
        },
        DType::Q5_1 => |s, d| {
            let (scale, min) = (f16_at(s, 0), f16_at(s, 2));
            for (i, q) in fives(&s[4..]).into_iter().enumerate() {
                d[i] = f32::from(q) * scale + min;
            }
        },
        DType::Q8_0 => |s, d| {
            let scale = f16_at(s, 0);
            for (d, &q) in d.iter_mut().zip(&s[2..]) {
                *d = f32::from(q as i8) * scale;
            }
        },
        DType::Q4_K => |s, d| {
            let (scale, min) = (f16_at(s, 0), f16_at(s, 2));
            for j in 0..8 {
                let (sc, m) = k_scale(&s[4..16], j);
                let (sc, m) = (scale * f32::from(sc), min * f32::from(m));
                let codes = &s[16 + j / 2 * 32..][..32];
                for (d, &q) in d[j * 32..].iter_mut().zip(codes) {
                    *d = sc * f32::from(if j % 2 == 0 { q & 15 } else { q >> 4 }) - m;
                }
            }
        },
        DType::Q5_K => |s, d| {
            let (scale, min) = (f16_at(s, 0), f16_at(s, 2));
            let high = &s[16..48];
            for j in 0..8 {
                let (sc, m) = k_scale(&s[4..16], j);
                let (sc, m) = (scale * f32::from(sc), min * f32::from(m));
                let codes = &s[48 + j / 2 * 32..][..32];
                for (i, d) in d[j * 32..][..32].iter_mut().enumerate() {
                    let low = if j % 2 == 0 { codes[i] & 15 } else { codes[i] >> 4 };
                    *d = sc * f32::from(low | (high[i] >> j & 1) << 4) - m;
                }
            }
        },
        DType::Q6_K => |s, d| {
            let scale = f16_at(s, 208);
            for (e, d) in d.iter_mut().enumerate() {
                // Halves of 128 values: four runs of 32, two to a low byte.
                let (half, run, i) = (e / 128, e / 32 % 4, e % 32);
                let low = s[half * 64 + run % 2 * 32 + i] >> (run / 2 * 4) & 15;
                let high = s[128 + half * 32 + i] >> (run * 2) & 3;
                let sub = f32::from(s[192 + e / 16] as i8);
                *d = scale * sub * (i32::from(low | high << 4) - 32) as f32;
            }
        },
        DType::IQ4_NL => |s, d| {
            let scale = f16_at(s, 0);
            for i in 0..16 {
                d[i] = f32::from(IQ4_NL[usize::from(s[2 + i] & 15)]) * scale;
                d[i + 16] = f32::from(IQ4_NL[usize::from(s[2 + i] >> 4)]) * scale;
            }
        },
        DType::Q2_K => |s, d| {
            let (scale, min) = (f16_at(s, 80), f16_at(s, 82));
            for (e, d) in d.iter_mut().enumerate() {
                // Halves of 128 values: four runs of 32, two bits each.
                let code = s[16 + e / 128 * 32 + e % 32] >> (e / 32 % 4 * 2) & 3;
                let sub = s[e / 16];
                *d = scale * f32::from(sub & 15) * f32::from(code) - min * f32::from(sub >> 4);
            }
        },
        DType::Q3_K => |s, d| {
            let scale = f16_at(s, 108);
            for (e, d) in d.iter_mut().enumerate() {
                let low = s[32 + e / 128 * 32 + e % 32] >> (e / 32 % 4 * 2) & 3;
                let high = s[e % 32] >> (e / 32) & 1;
                *d = scale * f32::from(q3_scale(&s[96..108], e / 16)) * (i32::from(low | high << 2) - 4) as f32;
            }
        },
        _ => return Err(KernelError::Unsupported { action: "dequantizing", dtype }),
    };
    let blocks = src.chunks_exact(dtype.block_bytes());
    for (s, d) in blocks.zip(dst.chunks_exact_mut(dtype.block_len())) {
        decode(s, d);
    }
    Ok(())
}

/// The exponent of E4M3 as half precision reads it is 8 too small.
pub(crate) const E4M3_UNIT: f32 = 256.0;
/// What is not a number in E4M3, but for its sign. There is no infinity.
pub(crate) const E4M3_NAN: u8 = 0x7f;

/// The value of an E4M3 byte: half precision with its mantissa cut to three bits,
/// less the exponent.
pub(crate) fn e4m3(byte: u8) -> f32 {
    if byte & 0x7f == E4M3_NAN {
        return f32::NAN;
    }
    e4m3_small(byte) * E4M3_UNIT
}

/// That, divided by [`E4M3_UNIT`], and as if there were no exceptions.
pub(crate) fn e4m3_small(byte: u8) -> f32 {
    let byte = u16::from(byte);
    f16::from_bits((byte & 0x80) << 8 | (byte & 0x7f) << 7).to_f32()
}

/// The value of an E5M2 byte.
pub(crate) fn e5m2(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
}

/// The sixteen values of IQ4_NL.
pub(crate) const IQ4_NL: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Scale `j` of a Q3_K block's 12 packed bytes: four low bits in the first
/// eight bytes, two high bits in the last four.
fn q3_scale(s: &[u8], j: usize) -> i8 {
    let low = s[j % 8] >> (j / 8 * 4) & 15;
    let high = s[8 + j % 4] >> (j / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

/// The scales of one block, as a packed matrix keeps them.
#[derive(Default)]
pub(crate) struct Scales {
    /// `f16` bytes of the scale (or of a K block's factor).
    pub(crate) scale: [u8; 2],
    /// `f16` bytes of the minimum (or of a K block's factor).
    pub(crate) min: [u8; 2],
    /// A K block's sub-scales: 8 of 32 values, or 16 of 16.
    pub(crate) subs: [u8; 16],
    /// Its minimums, likewise.
    pub(crate) mins: [u8; 16],
}

/// Takes a quantized block's scales apart. The block is of the type's length.
pub(crate) fn scales(dtype: DType, s: &[u8]) -> Scales {
    let at = |i: usize| [s[i], s[i + 1]];
    let mut out = Scales { scale: at(0), ..Scales::default() };
    match dtype {
        DType::Q4_1 | DType::Q5_1 => out.min = at(2),
        DType::Q4_K | DType::Q5_K => {
            out.min = at(2);
            for j in 0..8 {
                (out.subs[j], out.mins[j]) = k_scale(&s[4..16], j);
            }
        }
        DType::Q6_K => {
            out.scale = at(208);
            out.subs.copy_from_slice(&s[192..208]);
        }
        DType::Q3_K => {
            out.scale = at(108);
            out.subs = std::array::from_fn(|j| q3_scale(&s[96..108], j) as u8);
        }
        DType::Q2_K => {
            (out.scale, out.min) = (at(80), at(82));
            out.subs = std::array::from_fn(|j| s[j] & 15);
            out.mins = std::array::from_fn(|j| s[j] >> 4);
        }
        _ => {}
    }
    out
}

/// The bytes of a block of 32 that hold its low four bits, code i beside code
/// i + 16, and its fifth bits, for types that have such.
pub(crate) fn nibbles(dtype: DType, s: &[u8]) -> Option<(&[u8], u32)> {
    let fifths = |at: usize| u32::from_le_bytes([s[at], s[at + 1], s[at + 2], s[at + 3]]);
    match dtype {
        DType::Q4_0 | DType::IQ4_NL => Some((&s[2..18], 0)),
        DType::Q4_1 => Some((&s[4..20], 0)),
        DType::Q5_0 => Some((&s[6..22], fifths(2))),
        DType::Q5_1 => Some((&s[8..24], fifths(4))),
        _ => None,
    }
}

/// Writes the codes of a block of another type as unsigned numbers, in order: of
/// Q8_0 the first 32, of K types 256.
pub(crate) fn codes(dtype: DType, s: &[u8], out: &mut [u8; 256]) {
    match dtype {
        DType::Q8_0 => {
            for (o, s) in out.iter_mut().zip(&s[2..34]) {
                *o = s ^ 0x80;
            }
        }
        _ => {
            out.fill(0);
            for (run, out) in out.chunks_exact_mut(32).enumerate() {
                let (half, pair) = (run / 4 * 32, run / 2 * 32);
                match dtype {
                    DType::Q2_K => bits(out, &s[16 + half..], run % 4 * 2, 3, 0),
                    DType::Q3_K => {
                        bits(out, &s[32 + half..], run % 4 * 2, 3, 0);
                        bits(out, s, run, 1, 2);
                    }
                    DType::Q4_K => bits(out, &s[16 + pair..], run % 2 * 4, 15, 0),
                    DType::Q5_K => {
                        bits(out, &s[48 + pair..], run % 2 * 4, 15, 0);
                        bits(out, &s[16..], run, 1, 4);
                    }
                    _ => {
                        bits(out, &s[half * 2 + run % 2 * 32..], run % 4 / 2 * 4, 15, 0);
                        bits(out, &s[128 + half..], run % 4 * 2, 3, 4);
                    }
                }
            }
        }
    }
}

/// Adds some bits of each byte of `s`, from bit `from` on, at bit `to`.
fn bits(out: &mut [u8], s: &[u8], from: usize, mask: u8, to: usize) {
    for (o, s) in out.iter_mut().zip(s) {
        *o |= (s >> from & mask) << to;
    }
}

/// The 5-bit codes of a Q5 block: 4 bytes of high bits, 16 bytes of low ones.
pub(crate) fn fives(s: &[u8]) -> [u8; 32] {
    let high = u32::from_le_bytes([s[0], s[1], s[2], s[3]]);
    std::array::from_fn(|i| {
        let low = if i < 16 { s[4 + i] & 15 } else { s[4 + i - 16] >> 4 };
        low | ((high >> i & 1) as u8) << 4
    })
}

/// Scale and minimum `j` of a K block's 12 packed bytes (6 bits each).
fn k_scale(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4)
    }
}

/// Appends the blocks of `src` to `dst`.
///
/// Takes F32, F16, BF16, Q8_0, Q4_0 and Q4_1.
///
/// # Errors
/// Another type, or values that do not fill whole blocks.
pub fn quantize(dtype: DType, src: &[f32], dst: &mut Vec<u8>) -> Result<(), KernelError> {
    let block = dtype.block_len();
    let encode: fn(&[f32], &mut Vec<u8>) = match dtype {
        DType::F32 => |s, d| d.extend(s[0].to_le_bytes()),
        DType::F16 => |s, d| d.extend(f16::from_f32(s[0]).to_le_bytes()),
        DType::BF16 => |s, d| d.extend(bf16::from_f32(s[0]).to_le_bytes()),
        DType::Q8_0 => |s, d| {
            let scale = s.iter().fold(0f32, |a, v| a.max(v.abs())) / 127.0;
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            d.extend(f16::from_f32(scale).to_le_bytes());
            d.extend(s.iter().map(|v| (v * inverse).round() as i8 as u8));
        },
        DType::Q4_0 => |s, d| {
            // The value of largest magnitude, with its sign, becomes code 0.
            let top = s.iter().fold(0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
            let scale = top / -8.0;
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            d.extend(f16::from_f32(scale).to_le_bytes());
            let code = |v: f32| ((v * inverse + 8.5) as u8).min(15);
            d.extend((0..16).map(|i| code(s[i]) | code(s[i + 16]) << 4));
        },
        DType::Q4_1 => |s, d| {
            let low = s.iter().copied().fold(f32::INFINITY, f32::min);
            let high = s.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let scale = (high - low) / 15.0;
            let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
            d.extend(f16::from_f32(scale).to_le_bytes());
            d.extend(f16::from_f32(low).to_le_bytes());
            let code = |v: f32| (((v - low) * inverse + 0.5) as u8).min(15);
            d.extend((0..16).map(|i| code(s[i]) | code(s[i + 16]) << 4));
        },
        _ => return Err(KernelError::Unsupported { action: "quantizing", dtype }),
    };
    let Some(bytes) = dtype.bytes_for(src.len()) else {
        return Err(KernelError::Ragged { dtype, values: src.len(), block });
    };
    dst.reserve(bytes);
    src.chunks_exact(block).for_each(|s| encode(s, dst));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trips_stay_within_a_step(values in prop::collection::vec(-8f32..8.0, 64)) {
            for (dtype, step) in [
                (DType::F32, 0.0), (DType::F16, 0.004), (DType::BF16, 0.04),
                (DType::Q8_0, 0.07), (DType::Q4_0, 1.01), (DType::Q4_1, 0.6),
            ] {
                let mut bytes = Vec::new();
                quantize(dtype, &values, &mut bytes).unwrap();
                let mut back = vec![0.0; 64];
                dequantize(dtype, &bytes, &mut back).unwrap();
                for (a, b) in values.iter().zip(&back) {
                    prop_assert!((a - b).abs() <= step, "{dtype:?}: {a} became {b}");
                }
            }
        }
    }

    #[test]
    fn known_blocks() {
        // Q6_K: all bits of value 0 set, scale 2, sub-scale 3 for its run.
        let mut s = vec![0u8; 210];
        (s[0], s[128], s[192]) = (15, 3, 3);
        s[208..].copy_from_slice(&f16::from_f32(2.0).to_le_bytes());
        let mut d = vec![0.0; 256];
        dequantize(DType::Q6_K, &s, &mut d).unwrap();
        assert_eq!((d[0], d[1], d[16]), (2.0 * 3.0 * 31.0, 2.0 * 3.0 * -32.0, 0.0));
        // Q5_K: scale 1, min 0.5; sub-block 5 has scale 33 (4 low and 2 high bits).
        let mut s = vec![0u8; 176];
        s[..2].copy_from_slice(&f16::ONE.to_le_bytes());
        s[2..4].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        (s[4 + 9], s[4 + 1]) = (0x41, 0x80);
        (s[16 + 7], s[48 + 64 + 7]) = (1 << 5, 0x90);
        dequantize(DType::Q5_K, &s, &mut d).unwrap();
        assert_eq!(d[5 * 32 + 7], 33.0 * 25.0 - 0.5 * 4.0);
        let mut q4k = s[..16].to_vec();
        q4k.extend([0u8; 128]);
        q4k[16 + 64 + 7] = 0x90;
        dequantize(DType::Q4_K, &q4k, &mut d).unwrap();
        assert_eq!(d[5 * 32 + 7], 33.0 * 9.0 - 0.5 * 4.0);
        let mut five = vec![0u8; 22];
        five[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        (five[4], five[6 + 1]) = (2, 0x70);
        let mut d = vec![0.0; 32];
        dequantize(DType::Q5_0, &five, &mut d).unwrap();
        assert_eq!((d[17], d[1], d[0]), ((16.0 + 7.0 - 16.0) * 0.5, -8.0, -8.0));
    }

    #[test]
    fn eight_bit_floats_are_what_their_fields_say() {
        for byte in 0..=255u8 {
            let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
            let value = |exponent: u8, mantissa: u8, bits: i32, bias: i32| match exponent {
                0 => sign * f32::from(mantissa) * 2f32.powi(1 - bias - bits),
                e => sign * (1.0 + f32::from(mantissa) * 2f32.powi(-bits)) * 2f32.powi(i32::from(e) - bias),
            };
            let mut d = [0.0];
            dequantize(DType::F8_E4M3, &[byte], &mut d).unwrap();
            match byte & 0x7f {
                0x7f => assert!(d[0].is_nan()),
                b => assert_eq!(d[0], value(b >> 3, b & 7, 3, 7)),
            }
            dequantize(DType::F8_E5M2, &[byte], &mut d).unwrap();
            match byte & 0x7f {
                0x7c => assert_eq!(d[0], sign * f32::INFINITY),
                0x7d.. => assert!(d[0].is_nan()),
                b => assert_eq!(d[0], value(b >> 2, b & 3, 2, 15)),
            }
        }
    }

    #[test]
    fn refuses_lengths_and_types() {
        assert!(matches!(
            dequantize(DType::Q8_0, &[0; 33], &mut [0.0; 32]),
            Err(KernelError::Length { expected: 34, got: 33, .. })
        ));
        assert!(matches!(
            dequantize(DType::I64, &[0; 8], &mut [0.0; 1]),
            Err(KernelError::Unsupported { .. })
        ));
        assert!(matches!(
            quantize(DType::Q4_1, &[0.0; 31], &mut Vec::new()),
            Err(KernelError::Ragged { block: 32, .. })
        ));
    }
}
