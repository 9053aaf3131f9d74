//! Bytes in, views out: GGUF, safetensors, adapter layouts. Hostile input never panics.
