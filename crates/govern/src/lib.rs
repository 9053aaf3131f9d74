//! Signatures, cards, licences and release gates.
