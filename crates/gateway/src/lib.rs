//! The HTTP front door: one path for every endpoint, with metering, lineage and console.
