//! Matmul, attention, norms, thread pool; a plain reference beside each fast path.
