//! Where a run stands, on disk: parameters, moments, losses so far.
//!
//! A file is complete or absent (written beside, synced, renamed) and ends in the
//! digest of all before it; one that does not match, or belongs to another run,
//! is passed over for the one before. Data order is not stored: it follows from
//! the settings, and `run` is their digest.

use crate::{TrainError, adam::Adam};
use ashlar_core::Digest;
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

const MAGIC: &[u8; 8] = b"ASHCKPT1";
/// Checkpoints left on disk: the newest and one to fall back on.
const KEEP: usize = 2;

/// The state after `losses.len()` steps.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct State {
    pub params: Vec<f32>,
    pub adam: Adam,
    pub losses: Vec<f32>,
}

impl State {
    fn to_bytes(&self, run: &Digest) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(run.as_bytes());
        for n in [self.params.len(), self.losses.len()] {
            out.extend((n as u64).to_le_bytes());
        }
        for part in [&self.params, &self.adam.m, &self.adam.v, &self.losses] {
            out.extend(part.iter().flat_map(|v| v.to_le_bytes()));
        }
        let digest = Digest::of(&out);
        out.extend(digest.as_bytes());
        out
    }

    /// `None` when the bytes are damaged, of another run, or of another size.
    fn from_bytes(bytes: &[u8], run: &Digest, len: usize) -> Option<Self> {
        let (body, digest) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        let rest = body.strip_prefix(MAGIC)?.strip_prefix(run.as_bytes())?;
        if Digest::of(body).as_bytes() != digest {
            return None;
        }
        let (counts, data) = rest.split_at_checked(16)?;
        let (n, _) = counts.split_first_chunk::<8>()?;
        if u64::from_le_bytes(*n) != len as u64 || !data.len().is_multiple_of(4) {
            return None;
        }
        let mut values = data.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        let mut take = || values.by_ref().take(len).collect::<Vec<_>>();
        let (params, m, v) = (take(), take(), take());
        let losses: Vec<f32> = values.collect();
        let (_, steps) = counts.split_last_chunk::<8>()?;
        (u64::from_le_bytes(*steps) == losses.len() as u64 && v.len() == len)
            .then_some(Self { params, adam: Adam { m, v }, losses })
    }
}

/// Checkpoints in `dir`, newest first.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "ckpt"))
        .collect();
    all.sort();
    all.reverse();
    all
}

/// Writes `state` durably, then drops all but the newest [`KEEP`].
pub(crate) fn save(dir: &Path, run: &Digest, state: &State) -> Result<(), TrainError> {
    let path = dir.join(format!("step-{:08}.ckpt", state.losses.len()));
    let temp = path.with_extension("tmp");
    let write = || {
        let mut file = File::create(&temp)?;
        file.write_all(&state.to_bytes(run))?;
        file.sync_all()?;
        fs::rename(&temp, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(TrainError::io(&path))?;
    for old in files(dir).iter().skip(KEEP) {
        fs::remove_file(old).map_err(TrainError::io(old))?;
    }
    Ok(())
}

/// The newest whole checkpoint of `run` with `len` parameters.
pub(crate) fn load(dir: &Path, run: &Digest, len: usize) -> Option<State> {
    files(dir).iter().find_map(|p| State::from_bytes(&fs::read(p).ok()?, run, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(steps: usize) -> State {
        let params = vec![steps as f32, -0.0, 3.5];
        let adam = Adam { m: vec![1.0; 3], v: vec![2.0; 3] };
        State { params, adam, losses: vec![0.5; steps] }
    }

    #[test]
    fn a_damaged_file_falls_back_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let run = Digest::of(b"run");
        for steps in [3, 12, 101] {
            save(dir.path(), &run, &state(steps)).unwrap();
        }
        assert_eq!(files(dir.path()).len(), KEEP);
        assert_eq!(load(dir.path(), &run, 3), Some(state(101)));
        assert_eq!(load(dir.path(), &Digest::of(b"other"), 3), None);
        assert_eq!(load(dir.path(), &run, 4), None);
        let newest = &files(dir.path())[0];
        let whole = fs::read(newest).unwrap();
        for at in [0, 20, 60, 90, whole.len() - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(newest, bytes).unwrap();
            assert_eq!(load(dir.path(), &run, 3), Some(state(12)), "byte {at}");
        }
        for len in 0..whole.len() {
            assert_eq!(State::from_bytes(&whole[..len], &run, 3), None);
        }
    }
}
