//! Tokenizers, chat templates and detectors of language, personal data and secrets.
