//! A configuration's keys, each of which must be understood.
//!
//! A key that nobody read is an error unless it is on the short list of those
//! that do not touch the arithmetic: a setting we do not know may not be
//! ignored. `config.json` and the `<architecture>.` part of GGUF metadata are
//! read through the same type. Rejected: a serde struct an architecture, which
//! cannot tell a key that is wrong from one that is new.

use crate::{
    ModelError,
    formats::{Gguf, Value},
};
use serde_json::{Map, Value as Json};
use std::{cell::RefCell, collections::HashSet};

/// Keys of Hugging Face's `config.json` that leave inference as it is: names,
/// training, special tokens, storage.
const HARMLESS: [&str; 44] = [
    "_attn_implementation_autoset", "_model_name_or_path", "_name_or_path", "architectures", "bias_dropout_fusion",
    "attention_dropout", "attention_probs_dropout_prob", "auto_map", "bos_token_id", "cache_implementation",
    "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id", "gradient_checkpointing",
    "hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_range", "is_llama_config",
    "label2id", "masked_softmax_fusion", "model_type", "n_inner",
    "offset_alibi", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "resid_pdrop", "rope_interleaved", "router_aux_loss_coef", "router_jitter_noise",
    "seq_length", "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "torch_dtype",
    "transformers.js_config", "transformers_version", "unk_token_id", "use_cache", "attention_softmax_in_fp32",
];

/// The same of GGUF, after the architecture's name.
const HARMLESS_GGUF: [&str; 3] = ["rope.scaling.finetuned", "tensor_data_layout", "vocab_size"];

/// The largest width or count taken: products of dimensions stay far from overflow.
const CAP: u64 = 1 << 20;

/// An object of settings; remembers which were read.
pub(crate) struct Keys {
    map: Map<String, Json>,
    /// Put before a key in errors.
    prefix: String,
    read: RefCell<HashSet<String>>,
}

impl Keys {
    /// The keys of a `config.json`.
    pub(crate) fn from_json(bytes: &[u8]) -> Result<Self, ModelError> {
        let map = serde_json::from_slice(bytes).map_err(|e| ModelError::Json {
            what: "config.json".into(),
            cause: e.to_string(),
        })?;
        Ok(Self::new(map, String::new()))
    }

    /// The keys of GGUF metadata that begin with the architecture's name.
    pub(crate) fn from_gguf(gguf: &Gguf, architecture: &str) -> Self {
        let prefix = format!("{architecture}.");
        let own = gguf.metadata().filter_map(|(k, v)| Some((k.strip_prefix(&prefix)?, v)));
        Self::new(own.map(|(k, v)| (k.to_owned(), json(v))).collect(), prefix)
    }

    fn new(map: Map<String, Json>, prefix: String) -> Self {
        Self { map, prefix, read: RefCell::default() }
    }

    /// The value of `key`; `null` counts as none.
    pub(crate) fn get(&self, key: &str) -> Option<&Json> {
        let (key, value) = self.map.get_key_value(key)?;
        self.read.borrow_mut().insert(key.clone());
        (!value.is_null()).then_some(value)
    }

    /// Whether there is such a key.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|v| !v.is_null())
    }

    fn typed<'s, T>(&'s self, key: &str, to: impl Fn(&'s Json) -> Option<T>) -> Result<Option<T>, ModelError> {
        self.get(key).map(|v| to(v).ok_or_else(|| self.lacks(key))).transpose()
    }

    pub(crate) fn lacks(&self, key: &str) -> ModelError {
        ModelError::Metadata { key: format!("{}{key}", self.prefix) }
    }

    /// The error that `key` must be something else.
    pub(crate) fn must(&self, key: &str, value: impl ToString, must: &'static str) -> ModelError {
        ModelError::Setting { what: format!("{}{key}", self.prefix), value: value.to_string(), must }
    }

    /// A count from 1 to 2²⁰, where given.
    pub(crate) fn maybe_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(n) = self.typed(key, Json::as_u64)? else { return Ok(None) };
        if !(1..=CAP).contains(&n) {
            return Err(self.must(key, n, "within 1..=1048576"));
        }
        Ok(Some(n as usize))
    }

    /// A count from 1 to 2²⁰.
    pub(crate) fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.maybe_size(key)?.ok_or_else(|| self.lacks(key))
    }

    /// The number of layers, at most 4096: each is allocated for.
    pub(crate) fn layers(&self, key: &str) -> Result<usize, ModelError> {
        let n = self.size(key)?;
        if n > 4096 { Err(self.must(key, n, "within 1..=4096")) } else { Ok(n) }
    }

    /// A finite number, where given.
    pub(crate) fn maybe_float(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let Some(v) = self.typed(key, Json::as_f64)? else { return Ok(None) };
        let v = v as f32;
        if v.is_finite() { Ok(Some(v)) } else { Err(self.must(key, v, "finite")) }
    }

    /// A finite number.
    pub(crate) fn float(&self, key: &str) -> Result<f32, ModelError> {
        self.maybe_float(key)?.ok_or_else(|| self.lacks(key))
    }

    /// A truth value.
    pub(crate) fn flag(&self, key: &str, otherwise: bool) -> Result<bool, ModelError> {
        Ok(self.typed(key, Json::as_bool)?.unwrap_or(otherwise))
    }

    /// A string, where given.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.typed(key, Json::as_str)
    }

    /// A list, where given.
    pub(crate) fn list(&self, key: &str) -> Result<Option<&[Json]>, ModelError> {
        self.typed(key, |v| v.as_array().map(Vec::as_slice))
    }

    /// A list of finite numbers.
    pub(crate) fn floats(&self, key: &str) -> Result<Vec<f32>, ModelError> {
        let list = self.list(key)?.ok_or_else(|| self.lacks(key))?;
        let to = |v: &Json| v.as_f64().map(|v| v as f32).filter(|v| v.is_finite());
        list.iter().map(|v| to(v).ok_or_else(|| self.lacks(key))).collect()
    }

    /// The object under `key`, whose own keys are checked by its own `finish`.
    pub(crate) fn nested(&self, key: &str) -> Result<Option<Self>, ModelError> {
        let map = self.typed(key, Json::as_object)?;
        Ok(map.map(|map| Self::new(map.clone(), format!("{}{key}.", self.prefix))))
    }

    /// All keys.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// `key` may only have the value `only`, which is all this program does.
    pub(crate) fn only(&self, key: &str, only: &Json, must: &'static str) -> Result<(), ModelError> {
        match self.get(key) {
            Some(v) if v != only => Err(self.must(key, v, must)),
            _ => Ok(()),
        }
    }

    /// Refuses keys that were neither read nor are harmless, by name.
    pub(crate) fn finish(&self) -> Result<(), ModelError> {
        self.finish_but(&[&HARMLESS[..], &HARMLESS_GGUF].concat())
    }

    /// [`Keys::finish`] with another list of harmless ones.
    pub(crate) fn finish_but(&self, harmless: &[&str]) -> Result<(), ModelError> {
        let read = self.read.borrow();
        let known = |k: &str| read.contains(k) || harmless.contains(&k);
        match self.map.iter().find(|(k, v)| !v.is_null() && !known(k)) {
            None => Ok(()),
            Some((key, value)) => {
                let value = value.to_string().chars().take(60).collect();
                Err(ModelError::Unknown { key: format!("{}{key}", self.prefix), value })
            }
        }
    }
}

/// A GGUF value as JSON. A number JSON cannot hold becomes text, which no
/// reader of numbers takes.
fn json(value: &Value) -> Json {
    match value {
        Value::String(s) => s.as_str().into(),
        Value::Bool(b) => (*b).into(),
        Value::F32(v) if v.is_finite() => f64::from(*v).into(),
        Value::F64(v) if v.is_finite() => (*v).into(),
        Value::F32(_) | Value::F64(_) => "not finite".into(),
        Value::Array(values) => values.iter().map(json).collect(),
        _ => match (value.as_u64(), value.as_i64()) {
            (Some(v), _) => v.into(),
            (_, v) => v.into(),
        },
    }
}
