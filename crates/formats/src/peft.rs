//! The adapter layout of Hugging Face PEFT: `adapter_config.json` and the names
//! of the tensors in `adapter_model.safetensors`.
//!
//! A setting that would change the result and is not implemented is an error:
//! an adapter is applied as it was trained or not at all.

use crate::FormatError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// File name of the configuration in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File name of the weights in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// A LoRA adapter's configuration, with PEFT's field names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank of the two factors.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Names of the linear layers that carry an update, e.g. `q_proj`.
    pub target_modules: Vec<String>,
    /// The model it was trained on.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
    /// Dropout on the update's input while training; nothing at inference.
    #[serde(default)]
    pub lora_dropout: f64,
    /// PEFT's task, `CAUSAL_LM` for language models.
    #[serde(default)]
    pub task_type: Option<String>,
    /// Revision of the base model.
    #[serde(default)]
    pub revision: Option<String>,
}

impl LoraConfig {
    /// A causal language model's adapter without dropout.
    pub fn new(r: usize, lora_alpha: f64, target_modules: Vec<String>, base: &str) -> Self {
        Self {
            r,
            lora_alpha,
            target_modules,
            base_model_name_or_path: Some(base.to_owned()),
            lora_dropout: 0.0,
            task_type: Some("CAUSAL_LM".to_owned()),
            revision: None,
        }
    }

    /// What `B·A·x` is multiplied with: `lora_alpha / r`.
    pub fn scaling(&self) -> f32 {
        (self.lora_alpha / self.r as f64) as f32
    }

    /// `adapter_config.json`, with the fields PEFT's loader reads spelled out.
    pub fn to_json(&self) -> String {
        let json = serde_json::json!({
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": self.revision,
            "inference_mode": true,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "modules_to_save": null,
            "layers_to_transform": null,
            "layers_pattern": null,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": false,
            "use_dora": false,
        });
        format!("{json:#}\n")
    }

    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// JSON that does not parse or lacks a field; a rank of zero; a setting
    /// that changes the result and is not implemented, by its name.
    pub fn from_json(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "adapter_config.json";
        let json: Value = serde_json::from_slice(bytes).map_err(|e| FormatError::json(WHAT, &e))?;
        for (field, need, fine) in SETTINGS {
            if let Some(found) = json.get(field)
                && !fine(found)
            {
                return Err(FormatError::Adapter {
                    field,
                    found: crate::error::clip(&found.to_string()),
                    need,
                });
            }
        }
        let config: Self = serde_json::from_value(json).map_err(|e| FormatError::json(WHAT, &e))?;
        if config.r == 0 || !config.scaling().is_finite() {
            return Err(FormatError::Value {
                what: "adapter rank and alpha".to_owned(),
                found: format!("r={}, lora_alpha={}", config.r, config.lora_alpha),
                need: "positive and finite",
            });
        }
        Ok(config)
    }
}

type Setting = (&'static str, &'static str, fn(&Value) -> bool);

/// Settings that change the result: name, what is supported, test.
const SETTINGS: [Setting; 11] = [
    ("peft_type", "\"LORA\"", |v| v == "LORA"),
    ("bias", "\"none\"", |v| v == "none"),
    ("target_modules", "a list of names", Value::is_array),
    ("use_dora", "false", off),
    ("use_rslora", "false", off),
    ("fan_in_fan_out", "false", off),
    ("modules_to_save", "null", off),
    ("layers_to_transform", "null", off),
    ("rank_pattern", "{}", off),
    ("alpha_pattern", "{}", off),
    ("lora_bias", "false", off),
];

/// `null`, `false`, or nothing in it.
fn off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
    }
}

const PREFIX: &str = "base_model.model.model.layers.";

/// The name of one factor: `half` is `A` (`[r, in]`) or `B` (`[out, r]`),
/// `module` is e.g. `self_attn.q_proj`.
pub fn tensor_name(layer: usize, module: &str, half: &str) -> String {
    format!("{PREFIX}{layer}.{module}.lora_{half}.weight")
}

/// The parts of a name made by [`tensor_name`]: layer, module, half.
pub fn parse_tensor_name(name: &str) -> Option<(usize, &str, &str)> {
    let (layer, rest) = name.strip_prefix(PREFIX)?.split_once('.')?;
    let (module, half) = rest.strip_suffix(".weight")?.rsplit_once(".lora_")?;
    (matches!(half, "A" | "B") && !module.is_empty()).then_some((layer.parse().ok()?, module, half))
}
