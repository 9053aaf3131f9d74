//! LoRA fine-tuning: forward, hand-written backward, optimizer, checkpoints.
