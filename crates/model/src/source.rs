//! Tensors by name, from a GGUF file or from safetensors shards.
//!
//! It keeps count of what was read: a tensor left over is a part of the model
//! that would have been left out, and an error.

use crate::{
    ModelError,
    formats::{Gguf, TensorView, safetensors::SafeTensors},
};
use ashlar_kernels::{PackedMatrix, Pool, dequantize};
use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};

/// A folder's configuration.
pub(crate) const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Tensors by name.
pub(crate) struct Source<'a> {
    tensors: HashMap<&'a str, TensorView<'a>>,
    read: RefCell<HashSet<&'a str>>,
    /// Put before names: base models are saved without their head's prefix.
    prefix: &'static str,
    /// Packs matrices.
    pool: Arc<Pool>,
}

impl<'a> Source<'a> {
    /// Those of a GGUF file.
    pub(crate) fn from_gguf(gguf: &Gguf<'a>, pool: &Arc<Pool>) -> Self {
        let tensors = gguf.tensors().map(|t| (t.name, t)).collect();
        Self { tensors, read: RefCell::default(), prefix: "", pool: Arc::clone(pool) }
    }

    /// Those of safetensors files. `prefix` is left off where no name has it.
    pub(crate) fn from_shards(
        shards: &'a [SafeTensors<'a>],
        prefix: &'static str,
        pool: &Arc<Pool>,
    ) -> Result<Self, ModelError> {
        let mut tensors = HashMap::new();
        for view in shards.iter().flat_map(SafeTensors::tensors) {
            if tensors.insert(view.name, view.clone()).is_some() {
                return Err(ModelError::Twice(view.name.into()));
            }
        }
        let prefix = if tensors.keys().any(|k| k.starts_with(prefix)) { prefix } else { "" };
        Ok(Self { tensors, read: RefCell::default(), prefix, pool: Arc::clone(pool) })
    }

    /// A tensor's name in the file.
    fn full(&self, name: &str) -> String {
        match name.strip_prefix('/') {
            Some(bare) => bare.to_owned(),
            None => format!("{}{name}", self.prefix),
        }
    }

    /// The tensor `name`; a name that begins with `/` is taken without the prefix.
    pub(crate) fn find(&self, name: &str) -> Option<&TensorView<'a>> {
        let (key, view) = self.tensors.get_key_value(self.full(name).as_str())?;
        self.read.borrow_mut().insert(key);
        Some(view)
    }

    /// The tensor `name`, if its shape is `expected`.
    pub(crate) fn tensor(&self, name: &str, expected: &[usize]) -> Result<&TensorView<'a>, ModelError> {
        let view = self.find(name).ok_or_else(|| ModelError::Missing(self.full(name)))?;
        shaped(view, expected)?;
        Ok(view)
    }

    /// The tensor `name` as `f32`.
    pub(crate) fn floats(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>, ModelError> {
        floats(self.tensor(name, expected)?, expected)
    }

    /// The tensor `name` of `[n, k]`, packed.
    pub(crate) fn matrix(&self, name: &str, n: usize, k: usize) -> Result<PackedMatrix, ModelError> {
        let view = self.tensor(name, &[n, k])?;
        self.pack(view, n, k, view.data)
    }

    /// A matrix of `[n, k]` out of a tensor's bytes.
    pub(crate) fn pack(
        &self,
        view: &TensorView,
        n: usize,
        k: usize,
        bytes: &[u8],
    ) -> Result<PackedMatrix, ModelError> {
        PackedMatrix::from_rows_on(&self.pool, view.dtype, n, k, bytes)
            .map_err(|cause| ModelError::Tensor { name: view.name.into(), cause })
    }

    /// Refuses tensors that nobody read, but for those `spare` names.
    pub(crate) fn finish(&self, spare: impl Fn(&str) -> bool) -> Result<(), ModelError> {
        let read = self.read.borrow();
        match self.tensors.keys().filter(|k| !read.contains(*k) && !spare(k)).min() {
            None => Ok(()),
            Some(name) => Err(ModelError::Unused((*name).into())),
        }
    }
}

/// A tensor's values, if its shape is `expected`.
pub(crate) fn floats(view: &TensorView, expected: &[usize]) -> Result<Vec<f32>, ModelError> {
    shaped(view, expected)?;
    let mut out = vec![0.0; view.elements()];
    dequantize(view.dtype, view.data, &mut out)
        .map_err(|cause| ModelError::Tensor { name: view.name.into(), cause })?;
    Ok(out)
}

fn shaped(view: &TensorView, expected: &[usize]) -> Result<(), ModelError> {
    if view.shape == expected {
        return Ok(());
    }
    let (expected, got) = (expected.to_vec(), view.shape.clone());
    Err(ModelError::Shape { name: view.name.into(), expected, got })
}

/// A folder in Hugging Face's layout, its weights mapped.
pub(crate) struct Folder {
    path: PathBuf,
    files: Vec<Vec<u8>>,
    /// Names that the index says are in the shard of the same number.
    promised: Vec<BTreeSet<String>>,
}

impl Folder {
    /// Maps `model.safetensors`, or the shards that the index names.
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
        let files = shards.keys().map(|file| read(&path.join(file))).collect::<Result<_, _>>()?;
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
    pub(crate) fn shards(&self) -> Result<Vec<SafeTensors<'_>>, ModelError> {
        let mut shards = Vec::with_capacity(self.files.len());
        for (file, names) in self.files.iter().zip(&self.promised) {
            let shard = SafeTensors::parse(file)?;
            if let Some(name) = names.iter().find(|n| shard.tensor(n).is_none()) {
                return Err(ModelError::Missing(name.clone()));
            }
            shards.push(shard);
        }
        Ok(shards)
    }
}

/// Reads a file. Not mapped: touching a page of a map whose file was cut short
/// meanwhile would end the process, while a read just comes out short, which
/// parsing then refuses.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    std::fs::read(path).map_err(|e| ModelError::Read { path: path.into(), cause: e.to_string() })
}
