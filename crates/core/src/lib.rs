//! The vocabulary every other crate speaks: digests, ids, artifact kinds,
//! canonical JSON, error hints, block types, exact decimals and the clock.
//!
//! What may not happen here: no I/O, no threads, no dependency on another
//! Ashlar crate. The wall clock is read in [`clock`] alone, so that everything
//! else can be replayed.
//!
//! ```
//! use ashlar_core::Digest;
//! let d = Digest::of(b"ashlar");
//! assert_eq!(d.to_string().parse::<Digest>().unwrap(), d);
//! ```

pub mod clock;
pub mod decimal;
pub mod digest;
pub mod dtype;
pub mod hash;
pub mod hint;
pub mod id;
pub mod json;
pub mod kind;
pub mod window;

pub use decimal::{Decimal, DecimalError, Rate};
pub use digest::{Digest, DigestError, Hasher};
pub use dtype::DType;
pub use hint::{Fault, Hint};
pub use kind::ArtifactKind;
pub use window::Window;
