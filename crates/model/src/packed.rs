//! The packed form of checkpoints, kept so that the next start need not pack.
//!
//! A file a checkpoint, named by the digest of its bytes and the layout of the
//! kernels: a table of the matrices, then their bytes as they lie in memory. Digests
//! take as long as packing does, so a start does not wait for one: a second, small
//! file says which digest the checkpoint files of this inode, length and times have.
//! New forms are written in the background from the memory they are in.
//! What may not happen here: a load that fails because of this cache (whatever is
//! wrong with it, the checkpoint is packed); weights of another checkpoint (files
//! that changed have other times, and those that may have changed within a tick of
//! the clock are not remembered); a map (see `file`).
//!
//! The folder is the user's alone, like the checkpoints themselves. Whoever can write
//! to it can change what is served, so every piece is checked against accidents, not
//! against its owner.
//!
//! Rejected: forms by path and time alone, which a copy elsewhere would not find;
//! writing while loading, which made first starts wait for the disk.

use crate::file::Opened;
use ashlar_core::{DType, Digest, clock, digest::Hasher};
use ashlar_kernels::{Form, KernelError, LAYOUT, PIECE, PackedMatrix, Pool};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, UNIX_EPOCH},
};

const MAGIC: [u8; 8] = *b"ashlarPK";
/// Magic, bytes of the table, its checksum.
const HEAD: usize = 8 + 8 + 4;
/// How old a file's last change must be: within a tick of the clock it could change
/// again unseen.
const SETTLED_MS: i64 = 1_000;
/// After this, what a writer that was killed left behind is removed.
const ABANDONED_MS: i64 = 24 * 3600 * 1000;

/// A folder of packed forms.
#[derive(Debug)]
pub struct PackedCache {
    place: Place,
    writers: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Clone)]
struct Place {
    folder: PathBuf,
    /// Most bytes of forms kept.
    room: u64,
}

/// A checkpoint's files and what else its packing depends on.
#[derive(Clone)]
struct Checkpoint {
    files: Vec<PathBuf>,
    settings: Vec<u8>,
}

/// One matrix in the table.
#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    n: usize,
    k: usize,
    dtype: DType,
    kind: u8,
    run: usize,
    order: Option<Box<[u32]>>,
    /// Of each piece.
    crc32: Vec<u32>,
}

type Keyed = Vec<(String, PackedMatrix)>;

impl PackedCache {
    /// The cache in `folder`, which is made when something is put there. It keeps at
    /// most `room` bytes: the forms that were used last.
    pub fn new(folder: &Path, room: u64) -> Self {
        Self { place: Place { folder: folder.into(), room }, writers: Mutex::default() }
    }

    /// Waits until what is being written is written.
    pub fn finish(&self) {
        let writers = std::mem::take(&mut *self.writers.lock().unwrap_or_else(PoisonError::into_inner));
        // A form that was not written is packed again: there is nothing to tell.
        writers.into_iter().for_each(|w| drop(w.join()));
    }

    /// What there is of the checkpoint in `files`, which is packed as `settings` say.
    pub(crate) fn open(&self, files: &[&Opened], settings: &[u8], pool: &Pool) -> Shelf<'_> {
        let checkpoint =
            Checkpoint { files: files.iter().map(|f| f.path.clone()).collect(), settings: settings.into() };
        let known = checkpoint.identity(files.iter().map(|f| f.metadata()));
        let settled = known.ok().filter(|(_, changed)| clock::now_ms() - changed >= SETTLED_MS);
        let mut shelf = Shelf { cache: self, form: None, found: HashMap::new(), whose: None, made: Vec::new() };
        if let Some((identity, _)) = settled {
            shelf.whose = Some((checkpoint, identity));
            if let Some((path, found)) = self.place.find(identity, pool) {
                (shelf.form, shelf.found) = (Some(path), found);
            }
        }
        shelf
    }
}

/// What one load takes out of the cache and puts into it.
pub(crate) struct Shelf<'c> {
    cache: &'c PackedCache,
    /// The file that `found` is of.
    form: Option<PathBuf>,
    found: HashMap<String, PackedMatrix>,
    /// `None` where nothing may be kept.
    whose: Option<(Checkpoint, Digest)>,
    made: Keyed,
}

impl Shelf<'_> {
    /// The matrix `key`, if the cache has it. Each is asked for once.
    pub(crate) fn take(&mut self, key: &str) -> Option<PackedMatrix> {
        self.found.remove(key)
    }

    /// Takes note of a matrix that was packed.
    pub(crate) fn put(&mut self, key: String, matrix: &PackedMatrix) {
        if self.whose.is_some() {
            self.made.push((key, matrix.clone()));
        }
    }

    /// Has what was packed written in the background.
    pub(crate) fn close(&mut self) {
        let made = std::mem::take(&mut self.made);
        let Some((checkpoint, identity)) = self.whose.take().filter(|_| !made.is_empty()) else { return };
        if let Some(form) = &self.form {
            // It lacks what this program takes: the next load writes it whole.
            let _ = fs::remove_file(form);
            return;
        }
        let place = self.cache.place.clone();
        let write = move || {
            // What cannot be kept is packed again.
            let _ = place.keep(&checkpoint, identity, &made);
        };
        if let Ok(writer) = std::thread::Builder::new().name("ashlar-packed".into()).spawn(write) {
            self.cache.writers.lock().unwrap_or_else(PoisonError::into_inner).push(writer);
        }
    }
}

impl Checkpoint {
    /// What the system says of files as they are, and when one last changed, in
    /// milliseconds since 1970.
    fn identity(&self, files: impl Iterator<Item = io::Result<Metadata>>) -> io::Result<(Digest, i64)> {
        let (mut hash, mut last) = (Hasher::new(), i64::MIN);
        for about in files {
            let m = about?;
            let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
            for number in [m.dev() as i64, m.ino() as i64, m.len() as i64].into_iter().chain(times) {
                hash.update(&number.to_le_bytes());
            }
            last = last.max(m.ctime() * 1000 + m.ctime_nsec() / 1_000_000);
        }
        hash.update(&self.settings);
        Ok((hash.finish(), last))
    }

    /// The digest of the one file, or of the digests of several and the settings.
    fn digest(&self) -> io::Result<Digest> {
        let of = |path: &PathBuf| {
            let (mut file, mut hash, mut piece) = (File::open(path)?, Hasher::new(), vec![0; PIECE]);
            loop {
                match file.read(&mut piece)? {
                    0 => return Ok(hash.finish()),
                    n => hash.update(&piece[..n]),
                }
            }
        };
        let all = self.files.iter().map(of).collect::<io::Result<Vec<Digest>>>()?;
        if let ([one], true) = (all.as_slice(), self.settings.is_empty()) {
            return Ok(*one);
        }
        let mut hash = Hasher::new();
        all.iter().for_each(|d| hash.update(d.as_bytes()));
        hash.update(&self.settings);
        Ok(hash.finish())
    }
}

impl Place {
    /// Which digest the files of this identity have.
    fn known(&self, identity: Digest) -> PathBuf {
        self.folder.join("known").join(identity.hex())
    }

    fn form(&self, source: Digest) -> PathBuf {
        self.folder.join(format!("{}.{LAYOUT}.packed", source.hex()))
    }

    /// The form of the files of this identity, and its matrices.
    fn find(&self, identity: Digest, pool: &Pool) -> Option<(PathBuf, HashMap<String, PackedMatrix>)> {
        let source = fs::read_to_string(self.known(identity)).ok()?.parse().ok()?;
        let path = self.form(source);
        let file = File::open(&path).ok()?;
        let Ok(found) = read(&file, pool) else {
            // Damaged, or it cannot be read: the next one takes its place.
            let _ = fs::remove_file(&path);
            return None;
        };
        let now = UNIX_EPOCH + Duration::from_millis(clock::now_ms().unsigned_abs());
        // Used now; where that cannot be noted, it only goes sooner.
        let _ = file.set_modified(now);
        Some((path, found))
    }

    /// Writes a form, if there is none of these bytes yet, and notes whose it is.
    fn keep(&self, checkpoint: &Checkpoint, identity: Digest, made: &Keyed) -> io::Result<()> {
        let source = checkpoint.digest()?;
        if checkpoint.identity(checkpoint.files.iter().map(fs::metadata))?.0 != identity {
            // What was packed is not what was hashed.
            return Ok(());
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(self.folder.join("known"))?;
        let path = self.form(source);
        if !path.exists() && !self.write(&path, made)? {
            return Ok(());
        }
        replace(&self.known(identity), |file| file.write_all(source.to_string().as_bytes()))
    }

    /// False where there is no room.
    fn write(&self, path: &Path, made: &Keyed) -> io::Result<bool> {
        let table: Vec<Entry> = made.iter().map(|(key, matrix)| entry(key.clone(), matrix)).collect();
        let table = serde_json::to_vec(&table)?;
        let bytes = made.iter().map(|(_, m)| m.as_bytes().len()).sum::<usize>() + HEAD + table.len();
        if !self.make_room(bytes as u64)? {
            return Ok(false);
        }
        replace(path, |file| {
            file.write_all(&MAGIC)?;
            file.write_all(&(table.len() as u64).to_le_bytes())?;
            file.write_all(&crc32fast::hash(&table).to_le_bytes())?;
            file.write_all(&table)?;
            made.iter().try_for_each(|(_, m)| file.write_all(m.as_bytes()))
        })?;
        Ok(true)
    }

    /// Removes the forms used longest ago until `more` bytes fit in beside the rest,
    /// and what killed writers left. False when they never will.
    fn make_room(&self, more: u64) -> io::Result<bool> {
        if more > self.room {
            return Ok(false);
        }
        let (mut forms, mut total) = (Vec::new(), more);
        for entry in fs::read_dir(&self.folder)? {
            let (path, about) = entry.and_then(|e| Ok((e.path(), e.metadata()?)))?;
            match path.extension().and_then(|e| e.to_str()) {
                Some("packed") => {
                    total += about.len();
                    forms.push((about.mtime(), about.mtime_nsec(), about.len(), path));
                }
                Some("part") if clock::now_ms() - about.mtime() * 1000 > ABANDONED_MS => fs::remove_file(path)?,
                _ => {}
            }
        }
        forms.sort();
        for (_, _, len, path) in forms {
            if total > self.room {
                fs::remove_file(path)?;
                total -= len;
            }
        }
        Ok(true)
    }
}

/// Writes a file beside its place and moves it there whole. Not waited for the disk:
/// what a power cut leaves fails its checksums.
fn replace(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let part = path.with_extension(format!("{}.part", std::process::id()));
    let done = File::create(&part).and_then(|mut file| write(&mut file)).and_then(|()| fs::rename(&part, path));
    done.inspect_err(|_| drop(fs::remove_file(&part)))
}

fn entry(key: String, matrix: &PackedMatrix) -> Entry {
    let Form { n, k, dtype, kind, run, order } = matrix.form();
    let crc32 = matrix.as_bytes().chunks(PIECE).map(crc32fast::hash).collect();
    Entry { key, n, k, dtype, kind, run, order, crc32 }
}

/// Why a form is not taken; whatever it is, the checkpoint is packed.
struct Unusable;

impl From<io::Error> for Unusable {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl From<KernelError> for Unusable {
    fn from(_: KernelError) -> Self {
        Self
    }
}

/// Reads a form, its matrices by their keys.
fn read(file: &File, pool: &Pool) -> Result<HashMap<String, PackedMatrix>, Unusable> {
    let len = file.metadata()?.len();
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, 0)?;
    let (magic, rest) = head.split_first_chunk::<8>().ok_or(Unusable)?;
    let (table, crc) = rest.split_first_chunk::<8>().ok_or(Unusable)?;
    let table = u64::from_le_bytes(*table);
    let body = table.checked_add(HEAD as u64).filter(|&body| *magic == MAGIC && body <= len).ok_or(Unusable)?;
    let mut bytes = vec![0; usize::try_from(table).map_err(|_| Unusable)?];
    file.read_exact_at(&mut bytes, HEAD as u64)?;
    if crc32fast::hash(&bytes).to_le_bytes() != crc {
        return Err(Unusable);
    }
    let table: Vec<Entry> = serde_json::from_slice(&bytes).map_err(|_| Unusable)?;
    let (mut keys, mut forms, mut places, mut at) = (Vec::new(), Vec::new(), Vec::new(), body);
    for Entry { key, n, k, dtype, kind, run, order, crc32 } in table {
        let form = Form { n, k, dtype, kind, run, order };
        let bytes = form.bytes()?;
        if crc32.len() != bytes.div_ceil(PIECE) {
            return Err(Unusable);
        }
        places.push((at, crc32));
        at = at.checked_add(bytes as u64).filter(|&end| end <= len).ok_or(Unusable)?;
        keys.push(key);
        forms.push(form);
    }
    if at != len {
        return Err(Unusable);
    }
    let matrices = PackedMatrix::read_forms(pool, forms, |i, from, to| {
        let (at, crc32) = &places[i];
        file.read_exact_at(to, at + from as u64)?;
        if crc32[from / PIECE] == crc32fast::hash(to) { Ok(()) } else { Err(Unusable) }
    })?;
    Ok(keys.into_iter().zip(matrices).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Model;
    use ashlar_kernels::held_bytes;
    use proptest::prelude::*;

    /// A folder in Hugging Face's layout with a small llama.
    fn checkpoint(folder: &Path, seed: u8) {
        let (hidden, ffn, vocab) = (64, 96, 70);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]), ("model.norm.weight".into(), vec![hidden])];
        for (name, n, k) in [
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", 32, hidden), ("self_attn.v_proj", 32, hidden),
            ("self_attn.o_proj", hidden, hidden), ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ] {
            tensors.push((format!("model.layers.0.{name}.weight"), vec![n, k]));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("model.layers.0.{name}.weight"), vec![hidden]));
        }
        let (mut head, mut body) = (serde_json::Map::new(), Vec::<u8>::new());
        for (i, (name, shape)) in tensors.into_iter().enumerate() {
            let from = body.len();
            let values = (0..shape.iter().product()).map(|v| ((v * 7 + i * 3 + usize::from(seed)) % 31) as f32 / 31.0);
            values.for_each(|v| body.extend(half::bf16::from_f32(v).to_le_bytes()));
            let info = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [from, body.len()]});
            head.insert(name, info);
        }
        let head = serde_json::to_vec(&head).unwrap();
        let mut file = (head.len() as u64).to_le_bytes().to_vec();
        file.extend(head);
        file.extend(body);
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("model.safetensors"), file).unwrap();
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
            "hidden_act": "silu", "torch_dtype": "bfloat16",
        });
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
    }

    struct Home {
        dir: tempfile::TempDir,
        cache: PackedCache,
    }

    impl Home {
        fn new(room: u64) -> Self {
            let dir = tempfile::tempdir().unwrap();
            Self { cache: PackedCache::new(&dir.path().join("packed"), room), dir }
        }

        fn model(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn load(&self, name: &str) -> Model {
            let model = Model::load_cached(&self.model(name), Pool::new(2), Some(&self.cache)).unwrap();
            self.cache.finish();
            model
        }

        fn forms(&self) -> Vec<PathBuf> {
            let Ok(all) = fs::read_dir(&self.cache.place.folder) else { return Vec::new() };
            let mut all: Vec<_> = all.map(|e| e.unwrap().path()).filter(|p| p.is_file()).collect();
            all.sort();
            all
        }
    }

    /// Rows of a model's matrices.
    fn values(model: &Model) -> Vec<f32> {
        let mut all = vec![0.0; 64];
        model.embed.dequantize_row(69, &mut all);
        let layer = &model.layers[0];
        let crate::load::Ffn::Dense(mlp) = &layer.ffn else { panic!() };
        for (w, k) in [(&layer.q.w, 64), (&layer.o.w, 64), (&mlp.up.w, 64), (&mlp.down.w, 96)] {
            let mut row = vec![0.0; k];
            w.dequantize_row(31, &mut row);
            all.extend(row);
        }
        all
    }

    /// Old enough that it cannot change unseen.
    fn settle() {
        std::thread::sleep(Duration::from_millis(SETTLED_MS.unsigned_abs() + 50));
    }

    #[test]
    fn a_form_is_found_by_the_files_and_by_their_bytes() {
        let home = Home::new(1 << 30);
        checkpoint(&home.model("a"), 0);
        let plain = values(&home.load("a"));
        assert!(home.forms().is_empty(), "files that may change within the clock's tick are not kept");
        settle();
        assert_eq!(values(&home.load("a")), plain);
        let forms = home.forms();
        assert_eq!(forms.len(), 1, "{forms:?}");
        // The same bytes elsewhere are the same form.
        checkpoint(&home.model("b"), 0);
        settle();
        assert_eq!(values(&home.load("b")), plain);
        assert_eq!(home.forms(), forms);
        // Other bytes of the same length are another.
        checkpoint(&home.model("a"), 1);
        settle();
        let other = values(&home.load("a"));
        assert_ne!(other, plain);
        assert_eq!(values(&home.load("a")), other);
        assert_eq!(home.forms().len(), 2);
        // Taken, not packed: what lies in the form is what is served.
        let new = home.forms().into_iter().find(|f| !forms.contains(f)).unwrap();
        let good = fs::read(&forms[0]).unwrap();
        fs::copy(&new, &forms[0]).unwrap();
        assert_eq!(values(&home.load("b")), other);
        // One that is damaged, or lacks a matrix, is packed over.
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        fs::write(&forms[0], &bad).unwrap();
        assert_eq!(values(&home.load("b")), plain);
        assert_eq!(fs::read(&forms[0]).unwrap(), good);
        let mut part: Keyed = read(&File::open(&forms[0]).unwrap(), &Pool::new(1)).ok().unwrap().into_iter().collect();
        part.sort_by(|a, b| a.0.cmp(&b.0));
        part.pop();
        assert!(home.cache.place.write(&forms[0], &part).unwrap());
        for _ in 0..2 {
            assert_eq!(values(&home.load("b")), plain);
        }
        assert_eq!(fs::read(&forms[0]).unwrap(), good);
    }

    #[test]
    fn what_was_used_last_stays() {
        let home = Home::new(200 << 10);
        for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
            checkpoint(&home.model(name), i as u8);
        }
        settle();
        let size = |home: &Home| home.forms().iter().map(|f| fs::metadata(f).unwrap().len()).sum::<u64>();
        home.load("a");
        let one = size(&home);
        assert!(one > 60 << 10 && one < 100 << 10, "{one}");
        let first = home.forms();
        settle();
        home.load("b");
        assert_eq!(home.forms().len(), 2);
        settle();
        home.load("a");
        settle();
        home.load("c");
        let left = home.forms();
        assert!(left.len() == 2 && left.contains(&first[0]), "{left:?}");
        assert!(size(&home) <= 200 << 10);
        let small = Home::new(one - 1);
        checkpoint(&small.model("a"), 0);
        settle();
        small.load("a");
        assert!(small.forms().is_empty());
    }

    #[test]
    fn a_folder_that_cannot_be_written_changes_nothing() {
        let home = Home::new(1 << 30);
        checkpoint(&home.model("a"), 0);
        settle();
        let plain = values(&home.load("a"));
        let odd = Home { cache: PackedCache::new(&home.model("a").join("config.json"), 1 << 30), dir: home.dir };
        assert_eq!(values(&odd.load("a")), plain);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever a form is changed to, it is refused or taken as it was.
        #[test]
        fn hostile_forms_are_refused(at in 0usize..4000, to in any::<u8>(), cut in 0usize..4000, table in any::<bool>()) {
            let pool = Pool::new(1);
            let matrix = PackedMatrix::from_rows(DType::Q8_0, 17, 64, &[1; 17 * 2 * 34]).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x.packed");
            let place = Place { folder: dir.path().into(), room: 1 << 20 };
            prop_assert!(place.write(&path, &vec![("x".into(), matrix.clone())]).unwrap());
            let mut bytes = fs::read(&path).unwrap();
            let at = at % bytes.len();
            let same = bytes[at] == to;
            bytes[at] = to;
            if table {
                // A table that somebody wrote, its checksum being right.
                let len = u64::from_le_bytes(*bytes[8..].first_chunk().unwrap()) as usize;
                if let Some(table) = bytes.get(HEAD..HEAD.saturating_add(len)) {
                    let crc = crc32fast::hash(table).to_le_bytes();
                    bytes[16..HEAD].copy_from_slice(&crc);
                }
            }
            if cut % 2 == 1 {
                bytes.truncate(cut % bytes.len());
            }
            fs::write(&path, &bytes).unwrap();
            let held = held_bytes();
            match read(&File::open(&path).unwrap(), &pool) {
                Ok(found) => {
                    let found = found.into_values().next();
                    // Only the name and the type as stored are nobody's to check.
                    prop_assert!(same || table || found.is_none_or(|m| m.as_bytes() == matrix.as_bytes()));
                }
                Err(_) => prop_assert!(held_bytes() <= held + (8 << 20)),
            }
        }
    }
}
