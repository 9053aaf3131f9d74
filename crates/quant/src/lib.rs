//! Merging adapters and writing quantized checkpoints; how far they drift from the original.
