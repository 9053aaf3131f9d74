//! Ingest, score, decide, deduplicate, scrub and pack, as Arrow functions on DataFusion.
