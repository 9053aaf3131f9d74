//! Tasks, scorers and paired statistics over any backend.
