//! Packed matrices put away and taken back as they lie.
//!
//! A matrix is its [`Form`] and its bytes. The bytes are this crate's own layout:
//! whoever keeps them keeps [`LAYOUT`] beside them, and packs anew where it differs.
//! What may not happen here: a form whose kernel would read beyond its bytes,
//! whatever somebody wrote into a file.

use crate::{
    KernelError, PackedMatrix, Pool,
    memory::Bytes,
    packed::{BLOCK, FORMATS, GROUP, Kind, Per, SUPER},
};
use ashlar_core::DType;
use std::sync::{Arc, Mutex, PoisonError};

/// The layout's version. A test holds it to the bytes of every kind.
pub const LAYOUT: u32 = 1;
/// Bytes that are read at once.
pub const PIECE: usize = 1 << 20;

/// What a packed matrix is, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Form {
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// The type its rows were stored as.
    pub dtype: DType,
    /// Which of the layout's kinds it has become.
    pub kind: u8,
    /// Values along k that share a scale, where the kind leaves that to the matrix.
    pub run: usize,
    /// The k that each place along a row is for, where they do not ascend.
    pub order: Option<Box<[u32]>>,
}

/// Of [`Form::kind`], what is no index of [`FORMATS`].
const PLAIN: [(u8, Kind); 5] =
    [(32, Kind::F32), (33, Kind::F16), (34, Kind::BF16), (35, Kind::E4M3), (36, Kind::E5M2)];

impl Form {
    fn kind(&self) -> Option<Kind> {
        let index = usize::from(self.kind);
        let plain = || PLAIN.iter().find(|p| p.0 == self.kind).map(|p| p.1);
        if index < FORMATS.len() { Some(Kind::Quantized(index)) } else { plain() }
    }

    /// Bytes of a matrix of this form.
    ///
    /// # Errors
    /// A form that no matrix has.
    pub fn bytes(&self) -> Result<usize, KernelError> {
        let wrong = || KernelError::Form { n: self.n, k: self.k, kind: self.kind, run: self.run };
        let kind = self.kind().ok_or_else(wrong)?;
        // Within these, no product below overflows.
        let small = self.n <= u32::MAX as usize && self.k <= 1 << 28 && self.run <= 1 << 29;
        let order = self.order.as_ref().is_none_or(|order| {
            let mut seen = vec![false; self.k.min(order.len())];
            let mut new = |&i: &u32| seen.get_mut(i as usize).is_some_and(|seen| !std::mem::replace(seen, true));
            order.len() == self.k && order.iter().all(|i| new(i))
        });
        let (own, block) = match kind {
            Kind::Quantized(f) => {
                let own = matches!(FORMATS[f].scale, Per::Run16 | Per::Run32);
                (own, if FORMATS[f].is_super() { BLOCK * SUPER } else { BLOCK })
            }
            _ => (matches!(kind, Kind::E4M3 | Kind::E5M2), 1),
        };
        let run = match (kind, own) {
            (Kind::Quantized(_), true) => self.run.is_multiple_of(BLOCK) && (self.run / BLOCK).is_power_of_two(),
            (_, true) => self.run > 0 && self.run <= self.k.max(1),
            (_, false) => self.run == self.k && self.order.is_none(),
        };
        let quantized = matches!(kind, Kind::Quantized(_));
        if !(small && order && run && self.k.is_multiple_of(block) && (quantized || self.order.is_none())) {
            return Err(wrong());
        }
        self.n.div_ceil(GROUP).checked_mul(kind.group_bytes(self.k, self.run)).ok_or_else(wrong)
    }
}

impl PackedMatrix {
    /// What it is.
    pub fn form(&self) -> Form {
        let kind = match self.kind {
            Kind::Quantized(f) => f as u8,
            plain => PLAIN.iter().find(|p| p.1 == plain).map_or(u8::MAX, |p| p.0),
        };
        Form { n: self.n, k: self.k, dtype: self.dtype, kind, run: self.run, order: self.order.clone() }
    }

    /// Its bytes, in this crate's layout.
    pub fn as_bytes(&self) -> &[u8] {
        &self.data
    }

    /// Matrices of these forms, with bytes from somewhere else: `read(i, from, to)`
    /// fills `to` with bytes of matrix `i` from byte `from` on, at most [`PIECE`] of
    /// them and `from` a multiple of that, and is called on the pool's threads.
    ///
    /// # Errors
    /// A form that no matrix has, and what `read` refuses.
    pub fn read_forms<E: From<KernelError> + Send>(
        pool: &Pool,
        forms: Vec<Form>,
        read: impl Fn(usize, usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Vec<Self>, E> {
        let sizes = forms.iter().map(Form::bytes).collect::<Result<Vec<_>, _>>()?;
        let mut all: Vec<Bytes> = sizes.into_iter().map(Bytes::weights).collect();
        let cut = all.iter_mut().enumerate().flat_map(|(i, bytes)| {
            bytes.chunks_mut(PIECE).enumerate().map(move |(p, piece)| (i, p * PIECE, piece))
        });
        let mut pieces: Vec<_> = cut.collect();
        let failed = Mutex::new(None);
        pool.chunks_mut(&mut pieces, 1, |_, one| {
            for (i, from, to) in one {
                if let Err(e) = read(*i, *from, to) {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                }
            }
        });
        drop(pieces);
        if let Some(e) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(e);
        }
        let made = forms.into_iter().zip(all).filter_map(|(form, data)| {
            // There is one: its bytes were counted.
            let kind = form.kind()?;
            let Form { n, k, dtype, run, order, .. } = form;
            Some(Self { n, k, dtype, kind, run, order, data: Arc::new(data) })
        });
        Ok(made.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Runs;
    use ashlar_core::Digest;

    /// A matrix of every kind there is, of numbers that are the same everywhere.
    fn all() -> Vec<PackedMatrix> {
        let (n, k) = (21, 512);
        let mut state = 1u64;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u8
        };
        let mut found = Vec::new();
        for dtype in crate::packed::TYPES.into_iter().chain([DType::F16, DType::BF16, DType::F32]) {
            // Any bytes, but none that makes a scale infinite.
            let bytes: Vec<u8> = (0..dtype.bytes_for(n * k).unwrap()).map(|_| next() & 0x3f).collect();
            found.push(PackedMatrix::from_rows(dtype, n, k, &bytes).unwrap());
        }
        let codes: Vec<u8> = (0..n * k).map(|_| next() & 15).collect();
        let read = |i: usize, to: &mut [u8]| {
            to.copy_from_slice(&codes[i * k..][..to.len()]);
            Ok::<(), KernelError>(())
        };
        for (dtype, scale) in [(DType::U4, 0.5), (DType::U4, 0.1), (DType::U8, 0.1), (DType::F8_E4M3, 0.3), (DType::F8_E5M2, 0.3)] {
            let integers = matches!(dtype, DType::U4 | DType::U8);
            let heads = n * (k / 128);
            let order = (dtype == DType::U8).then(|| (0..k as u32).rev().collect());
            let zeros = if integers { vec![7; heads] } else { vec![] };
            let runs = Runs { len: 128, scales: vec![scale; heads], zeros, order };
            found.push(PackedMatrix::read_runs(&Pool::new(1), dtype, n, k, runs, read).unwrap());
        }
        found
    }

    #[test]
    fn every_kind_comes_back_as_it_was() {
        let all = all();
        let kinds: std::collections::BTreeSet<u8> = all.iter().map(|m| m.form().kind).collect();
        assert_eq!(kinds.len(), FORMATS.len() + PLAIN.len(), "{kinds:?}");
        let forms: Vec<Form> = all.iter().map(PackedMatrix::form).collect();
        let read = |i: usize, from: usize, to: &mut [u8]| {
            to.copy_from_slice(&all[i].as_bytes()[from..][..to.len()]);
            Ok::<(), KernelError>(())
        };
        let back = PackedMatrix::read_forms(&Pool::new(2), forms.clone(), read).unwrap();
        let (mut a, mut b) = (vec![0.0; 512], vec![0.0; 512]);
        for ((was, is), form) in all.iter().zip(&back).zip(&forms) {
            assert_eq!((is.form(), is.as_bytes()), (form.clone(), was.as_bytes()), "{was:?}");
            for row in [0, 15, 20] {
                was.dequantize_row(row, &mut a);
                is.dequantize_row(row, &mut b);
                assert_eq!(a, b, "{was:?}");
            }
        }
        let failed = PackedMatrix::read_forms(&Pool::new(2), forms, |i, from, to| {
            if i == 3 { Err(KernelError::NotANumber { row: 3 }) } else { read(i, from, to) }
        });
        assert!(matches!(failed, Err(KernelError::NotANumber { row: 3 })));
    }

    /// Another layout under the same number would be read as garbage.
    #[test]
    fn the_layout_is_what_its_number_says() {
        let bytes: Vec<u8> = all().iter().flat_map(|m| m.as_bytes().to_vec()).collect();
        assert_eq!((LAYOUT, Digest::of(&bytes).short()), (1, "cb7f3e1e0f9c".into()));
    }

    #[test]
    fn a_form_that_no_matrix_has_is_refused() {
        let good = all()[0].form();
        let (gptq, f8) = (all()[16].form(), all()[17].form());
        let bad = [
            Form { kind: 31, ..good.clone() },
            Form { kind: 255, ..good.clone() },
            Form { n: usize::MAX, ..good.clone() },
            Form { k: 513, run: 513, ..good.clone() },
            Form { k: usize::MAX, run: usize::MAX, ..good.clone() },
            Form { run: 32, ..good.clone() },
            Form { order: Some((0..512).collect()), ..good.clone() },
            Form { run: 0, ..gptq.clone() },
            Form { run: 96, ..gptq.clone() },
            Form { order: Some((0..511).collect()), ..gptq.clone() },
            Form { order: Some((0..512).map(|i| i / 2).collect()), ..gptq.clone() },
            Form { order: Some((1..513).collect()), ..gptq.clone() },
            Form { run: 0, ..f8.clone() },
            Form { run: 1024, ..f8.clone() },
        ];
        for form in [good, gptq, f8] {
            assert!(form.bytes().is_ok(), "{form:?}");
        }
        for form in bad {
            assert!(matches!(form.bytes(), Err(KernelError::Form { .. })), "{form:?}");
        }
    }
}
