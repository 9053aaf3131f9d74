//! Scheduler, paged KV cache and sampler: many requests, one model.
