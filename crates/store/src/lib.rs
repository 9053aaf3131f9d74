//! Content-addressed objects, the ledger, runs and the transparency log.
