//! Tensors by name, from a GGUF file or from safetensors shards.
//!
//! It keeps count of what was read: a tensor left over is a part of the model
//! that would have been left out, and an error.

use crate::{
    ModelError,
    file::{GgufFile, Opened},
    formats::{Gguf, TensorInfo, safetensors::{self, SafeTensors}},
    packed::{PackedCache, Shelf},
    quantized::Scheme,
};
use ashlar_core::DType;
use ashlar_kernels::{KernelError, PackedMatrix, Pool, dequantize};
use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A folder's configuration.
pub(crate) const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes compared at once.
const PIECE: usize = 1 << 20;

/// A tensor of a checkpoint: what it is, and where its values are.
pub(crate) struct Tensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [usize],
    pub(crate) dtype: DType,
    bytes: usize,
    place: Place<'a>,
}

#[derive(Clone, Copy)]
enum Place<'a> {
    Memory(&'a [u8]),
    /// From this byte of a file on.
    File(&'a Opened, u64),
}

impl<'a> Tensor<'a> {
    fn new(info: TensorInfo<'a>, place: Place<'a>) -> Result<Self, ModelError> {
        let TensorInfo { name, shape, dtype, range } = info;
        let bytes = usize::try_from(range.end - range.start).map_err(|_| ModelError::Missing(name.into()))?;
        Ok(Self { name, shape, dtype, bytes, place })
    }

    /// Fills `to` with the bytes from `from` on.
    fn read(&self, from: usize, to: &mut [u8]) -> Result<(), ModelError> {
        match self.place {
            Place::File(file, at) => file.read(at + from as u64, to),
            Place::Memory(bytes) => {
                let there = bytes.get(from..from + to.len());
                to.copy_from_slice(there.ok_or_else(|| ModelError::Missing(self.name.into()))?);
                Ok(())
            }
        }
    }

    /// All of its bytes.
    pub(crate) fn bytes(&self) -> Result<Cow<'a, [u8]>, ModelError> {
        if let Place::Memory(bytes) = self.place {
            return Ok(Cow::Borrowed(bytes));
        }
        let mut bytes = vec![0; self.bytes];
        self.read(0, &mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    /// Its values, if its shape is `expected`.
    pub(crate) fn floats(&self, expected: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.shaped(expected)?;
        let mut out = vec![0.0; self.shape.iter().product()];
        dequantize(self.dtype, &self.bytes()?, &mut out).map_err(|cause| self.refused(cause))?;
        Ok(out)
    }

    fn shaped(&self, expected: &[usize]) -> Result<(), ModelError> {
        if self.shape == expected {
            return Ok(());
        }
        let (expected, got) = (expected.to_vec(), self.shape.to_vec());
        Err(ModelError::Shape { name: self.name.into(), expected, got })
    }

    pub(crate) fn refused(&self, cause: KernelError) -> ModelError {
        ModelError::Tensor { name: self.name.into(), cause }
    }

    /// Whether `other` has the same values.
    pub(crate) fn same(&self, other: &Self) -> Result<bool, ModelError> {
        if self.dtype != other.dtype || self.bytes != other.bytes {
            return Ok(false);
        }
        let (mut a, mut b) = (vec![0; PIECE.min(self.bytes)], vec![0; PIECE.min(self.bytes)]);
        for from in (0..self.bytes).step_by(PIECE) {
            let here = PIECE.min(self.bytes - from);
            self.read(from, &mut a[..here])?;
            other.read(from, &mut b[..here])?;
            if a[..here] != b[..here] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Fills `to` with rows of `row` bytes, from number `i` of those in `runs` on.
    pub(crate) fn rows(
        &self,
        runs: &[Range<usize>],
        row: usize,
        mut i: usize,
        mut to: &mut [u8],
    ) -> Result<(), ModelError> {
        for run in runs {
            if to.is_empty() {
                break;
            }
            if i >= run.len() {
                i -= run.len();
                continue;
            }
            let here = ((run.len() - i) * row).min(to.len());
            let (now, later) = to.split_at_mut(here);
            self.read((run.start + i) * row, now)?;
            (to, i) = (later, 0);
        }
        Ok(())
    }
}

/// Why rows were not packed.
pub(crate) enum Unpacked {
    Kernel(KernelError),
    Model(ModelError),
}

impl From<KernelError> for Unpacked {
    fn from(e: KernelError) -> Self {
        Self::Kernel(e)
    }
}

/// Tensors by name.
pub(crate) struct Source<'a> {
    tensors: HashMap<&'a str, Tensor<'a>>,
    read: RefCell<HashSet<&'a str>>,
    /// Put before names: base models are saved without their head's prefix.
    prefix: &'static str,
    /// How its quantized matrices are stored.
    scheme: Option<Scheme>,
    /// Packs matrices.
    pool: Arc<Pool>,
    /// What is packed already.
    shelf: Option<RefCell<Shelf<'a>>>,
}

impl<'a> Source<'a> {
    /// Those of a GGUF file that is in memory whole.
    pub(crate) fn from_gguf(gguf: &'a Gguf<'a>, pool: &Arc<Pool>) -> Result<Self, ModelError> {
        let place = |info: &TensorInfo| {
            let view = gguf.tensor(info.name).ok_or_else(|| ModelError::Missing(info.name.into()))?;
            Ok(Place::Memory(view.data))
        };
        Self::of(gguf.infos().map(|info| (place(&info), info)), "", pool)
    }

    /// Those of a GGUF file, `gguf` being its header.
    pub(crate) fn from_file(gguf: &'a Gguf<'a>, file: &'a GgufFile, pool: &Arc<Pool>) -> Result<Self, ModelError> {
        let place = |info: &TensorInfo| Ok(Place::File(&file.file, info.range.start));
        Self::of(gguf.infos().map(|info| (place(&info), info)), "", pool)
    }

    /// Those of safetensors files. `prefix` is left off where no name has it.
    pub(crate) fn from_shards(
        shards: &'a [(&'a Opened, SafeTensors<'a>)],
        prefix: &'static str,
        scheme: Option<Scheme>,
        pool: &Arc<Pool>,
    ) -> Result<Self, ModelError> {
        let all = shards.iter().flat_map(|(file, shard)| shard.infos().map(move |info| (file, info)));
        let placed = all.map(|(file, info)| (Ok(Place::File(file, info.range.start)), info));
        let mut source = Self { scheme, ..Self::of(placed, prefix, pool)? };
        source.prefix = if source.tensors.keys().any(|k| k.starts_with(prefix)) { prefix } else { "" };
        Ok(source)
    }

    fn of(
        all: impl Iterator<Item = (Result<Place<'a>, ModelError>, TensorInfo<'a>)>,
        prefix: &'static str,
        pool: &Arc<Pool>,
    ) -> Result<Self, ModelError> {
        let mut tensors = HashMap::new();
        for (place, info) in all {
            let name = info.name;
            if tensors.insert(name, Tensor::new(info, place?)?).is_some() {
                return Err(ModelError::Twice(name.into()));
            }
        }
        Ok(Self { tensors, read: RefCell::default(), prefix, scheme: None, pool: Arc::clone(pool), shelf: None })
    }

    /// Takes matrices from `cache` where it has those of `files`, and puts them there
    /// where not.
    pub(crate) fn cached(mut self, cache: Option<&'a PackedCache>, files: &[&Opened], settings: &[u8]) -> Self {
        self.shelf = cache.map(|cache| RefCell::new(cache.open(files, settings, &self.pool)));
        self
    }

    /// Rows out of the tensor `name`, as they were packed before or as `pack` does.
    fn shelved(
        &self,
        name: &str,
        runs: &[Range<usize>],
        pack: impl FnOnce() -> Result<PackedMatrix, ModelError>,
    ) -> Result<PackedMatrix, ModelError> {
        let Some(shelf) = &self.shelf else { return pack() };
        let key = format!("{name} {runs:?}");
        let found = shelf.borrow_mut().take(&key);
        if let Some(found) = found {
            return Ok(found);
        }
        let matrix = pack()?;
        shelf.borrow_mut().put(key, &matrix);
        Ok(matrix)
    }

    /// A tensor's name in the file.
    pub(crate) fn full(&self, name: &str) -> String {
        match name.strip_prefix('/') {
            Some(bare) => bare.to_owned(),
            None => format!("{}{name}", self.prefix),
        }
    }

    /// Whether there is a tensor `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(self.full(name).as_str())
    }

    /// The tensor `name`; a name that begins with `/` is taken without the prefix.
    pub(crate) fn find(&self, name: &str) -> Option<&Tensor<'a>> {
        let (key, tensor) = self.tensors.get_key_value(self.full(name).as_str())?;
        self.read.borrow_mut().insert(key);
        Some(tensor)
    }

    /// The tensor `name`, not counted as read.
    pub(crate) fn peek(&self, name: &str) -> Option<&Tensor<'a>> {
        self.tensors.get(self.full(name).as_str())
    }

    /// The tensor `name`, if its shape is `expected`.
    pub(crate) fn tensor(&self, name: &str, expected: &[usize]) -> Result<&Tensor<'a>, ModelError> {
        let tensor = self.find(name).ok_or_else(|| ModelError::Missing(self.full(name)))?;
        tensor.shaped(expected)?;
        Ok(tensor)
    }

    /// The tensor `name` as `f32`.
    pub(crate) fn floats(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.tensor(name, expected)?.floats(expected)
    }

    /// The tensor `name` of `[n, k]`, packed.
    pub(crate) fn matrix(&self, name: &str, n: usize, k: usize) -> Result<PackedMatrix, ModelError> {
        self.rows(name, n, k, std::slice::from_ref(&(0..n)))
    }

    /// Rows out of the matrix `name` of `[n, k]`, run after run, as one matrix.
    pub(crate) fn rows(
        &self,
        name: &str,
        n: usize,
        k: usize,
        runs: &[Range<usize>],
    ) -> Result<PackedMatrix, ModelError> {
        let quantized = self.scheme.map(|scheme| scheme.find(self, name, n, k)).transpose()?.flatten();
        match quantized {
            None => self.pack(self.tensor(name, &[n, k])?, k, runs),
            Some(quantized) => self.shelved(&self.full(name), runs, || {
                quantized.pack(self, runs).map_err(|e| match e {
                    Unpacked::Kernel(cause) => ModelError::Tensor { name: self.full(name), cause },
                    Unpacked::Model(e) => e,
                })
            }),
        }
    }

    /// Rows of `k` values out of a tensor, run after run, as one matrix. The runs
    /// lie within the tensor.
    pub(crate) fn pack(&self, tensor: &Tensor, k: usize, runs: &[Range<usize>]) -> Result<PackedMatrix, ModelError> {
        let n = runs.iter().map(Range::len).sum();
        let row = tensor.dtype.bytes_for(k).unwrap_or(0);
        let read = |i: usize, to: &mut [u8]| tensor.rows(runs, row, i, to).map_err(Unpacked::Model);
        self.shelved(tensor.name, runs, || {
            PackedMatrix::read_rows(&self.pool, tensor.dtype, n, k, read).map_err(|e| match e {
                Unpacked::Kernel(cause) => tensor.refused(cause),
                Unpacked::Model(e) => e,
            })
        })
    }

    /// The threads that pack.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Refuses tensors that nobody read, but for those `spare` names; then the load
    /// is done.
    pub(crate) fn finish(&self, spare: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        let read = self.read.borrow();
        match self.tensors.keys().filter(|k| !read.contains(*k) && !spare(k)).min() {
            None => {
                self.shelf.iter().for_each(|shelf| shelf.borrow_mut().close());
                Ok(())
            }
            Some(name) => Err(ModelError::Unused((*name).into())),
        }
    }
}

/// A folder in Hugging Face's layout, its weights' headers read.
pub(crate) struct Folder {
    path: PathBuf,
    files: Vec<(Opened, Vec<u8>)>,
    /// Names that the index says are in the shard of the same number.
    promised: Vec<BTreeSet<String>>,
}

impl Folder {
    /// Opens `model.safetensors`, or the shards that the index names.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let index = path.join(INDEX);
        let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        if index.exists() {
            #[derive(serde::Deserialize)]
            struct Index {
                weight_map: BTreeMap<String, String>,
            }
            let index: Index = serde_json::from_slice(&read(&index)?)
                .map_err(|e| ModelError::Json { what: INDEX.into(), cause: e.to_string() })?;
            for (tensor, file) in index.weight_map {
                // A shard lies in the folder itself.
                if Path::new(&file).file_name().is_none_or(|f| f != file.as_str()) {
                    return Err(ModelError::Setting { what: INDEX.into(), value: file, must: "a plain file name" });
                }
                shards.entry(file).or_default().insert(tensor);
            }
        } else {
            shards.insert(SINGLE.into(), BTreeSet::new());
        }
        let open = |name: &String| {
            let file = Opened::open(&path.join(name))?;
            let first = file.begin(8)?;
            // A file too short for a header's length is left to the parser.
            let head = match first.first_chunk() {
                Some(first) => file.begin(safetensors::head_bytes(*first).unwrap_or(16))?,
                None => first,
            };
            Ok((file, head))
        };
        let files = shards.keys().map(open).collect::<Result<_, ModelError>>()?;
        Ok(Self { path: path.into(), files, promised: shards.into_values().collect() })
    }

    /// The bytes of another file in the folder.
    pub(crate) fn file(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        read(&self.path.join(name))
    }

    /// Whether the folder has a file `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.path.join(name).exists()
    }

    /// Parses the weights and holds them against the index.
    pub(crate) fn shards(&self) -> Result<Vec<(&Opened, SafeTensors<'_>)>, ModelError> {
        let mut shards = Vec::with_capacity(self.files.len());
        for ((file, head), names) in self.files.iter().zip(&self.promised) {
            let shard = SafeTensors::head(head, file.len)?;
            let there: HashSet<&str> = shard.infos().map(|t| t.name).collect();
            if let Some(name) = names.iter().find(|n| !there.contains(n.as_str())) {
                return Err(ModelError::Missing(name.clone()));
            }
            shards.push((file, shard));
        }
        Ok(shards)
    }
}

/// Reads a small file whole.
fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    std::fs::read(path).map_err(|e| ModelError::Read { path: path.into(), cause: e.to_string() })
}

/// The size of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorSize {
    /// How its values are stored.
    pub dtype: DType,
    /// How many they are.
    pub values: u64,
    /// Their bytes in the file.
    pub bytes: u64,
}

/// The sizes of all tensors of a GGUF file or of a folder in Hugging Face's layout,
/// from their headers alone.
///
/// # Errors
/// Files that cannot be read or are not well-formed.
pub fn tensor_sizes(path: &Path) -> Result<Vec<TensorSize>, ModelError> {
    let size = |t: TensorInfo| {
        let values = t.shape.iter().map(|&n| n as u64).product();
        TensorSize { dtype: t.dtype, values, bytes: t.range.end - t.range.start }
    };
    if path.is_dir() {
        let folder = Folder::open(path)?;
        return Ok(folder.shards()?.iter().flat_map(|(_, shard)| shard.infos()).map(size).collect());
    }
    GgufFile::read(path, |_, gguf| gguf.infos().map(size).collect())
}
