//! Architectures, weights and the inference forward pass.
