//! Signatures, cards, licences and release gates.
//!
//! | file | subject |
//! |---|---|
//! | `keys` | ECDSA keys on P-256, P-384 and P-521, in PEM |
//! | `dsse` | the signed envelope around any payload |
//! | `tree` | which files of a folder count, and their digests |
//! | `signing` | OpenSSF Model Signing v1, key method |
//! | `statement` | in-toto statements: what a release says about a model |
//! | `licence` | which licences may go into a model |
//! | `gate` | the checks between a model and a channel |
//! | `card` | the model card |
//!
//! What may not happen here: nothing is believed before its signature has been
//! checked over the exact bytes that were signed; a check that cannot be made
//! is a check that fails; no private key is printed, logged or overwritten.
//!
//! ```
//! let home = tempfile::tempdir().unwrap();
//! let model = home.path().join("model");
//! std::fs::create_dir(&model).unwrap();
//! std::fs::write(model.join("weights"), b"0 1 1 2 3 5").unwrap();
//! let keys = ashlar_govern::keygen(home.path()).unwrap();
//! let signature = model.join("model.sig");
//! ashlar_govern::sign_dir(&model, &keys.private, &signature).unwrap();
//! ashlar_govern::verify_dir(&model, &signature, &keys.public).unwrap();
//! std::fs::write(model.join("weights"), b"0 1 1 2 3 6").unwrap();
//! assert!(ashlar_govern::verify_dir(&model, &signature, &keys.public).is_err());
//! ```

#![forbid(unsafe_code)]

pub mod card;
mod dsse;
mod error;
pub mod gate;
mod keys;
mod licence;
mod signing;
mod statement;
mod tree;

pub use card::{CardInput, card};
pub use error::GovernError;
pub use gate::{Check, GateInput, GatePolicy, GateReport, gate};
pub use keys::{KeyPair, keygen};
pub use licence::LicencePolicy;
pub use signing::{Verified, sign_dir, verify_dir};
pub use statement::{Statement, Subject, release_statement, sign_statement, verify_statement};
