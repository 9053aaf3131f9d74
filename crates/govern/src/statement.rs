//! in-toto statements, signed as DSSE: who vouches for what about which digest.
//!
//! A release is stated as an SLSA verification summary: this verifier held that
//! artifact against that policy, and it passed. A predicate of our own was
//! rejected, since other tools read this one; the gate's checks ride along in a
//! field that they skip.

use crate::{
    GatePolicy, GateReport, GovernError,
    dsse::Envelope,
    keys::{Private, Public},
    signing::LARGEST_BUNDLE,
};
use ashlar_core::{Digest, clock};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};

const KIND: &str = "https://in-toto.io/Statement/v1";
const SUMMARY: &str = "https://slsa.dev/verification_summary/v1";

/// What a statement is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Its name, for people.
    pub name: String,
    /// Its identity.
    pub digest: Digest,
}

/// A statement about one subject.
#[derive(Debug, Clone, PartialEq)]
pub struct Statement {
    /// The model.
    pub subject: Subject,
    /// URI naming the predicate's schema.
    pub predicate_type: String,
    /// What is said.
    pub predicate: Value,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<WireSubject>,
    predicate_type: String,
    predicate: Value,
}

#[derive(Serialize, Deserialize)]
struct WireSubject {
    name: String,
    digest: BTreeMap<String, String>,
}

/// That `model` passed `report`'s checks under `policy` and is released to
/// `channel` at `at_ms` (milliseconds since 1970, UTC). `inputs` are further
/// digests the release stands on, by role: adapter, snapshot, evaluation, card.
///
/// # Errors
/// None today; a policy is always JSON.
pub fn release_statement(
    channel: &str,
    model: Subject,
    policy: &GatePolicy,
    report: &GateReport,
    inputs: &BTreeMap<String, Digest>,
    at_ms: i64,
) -> Result<Statement, GovernError> {
    let policy = ashlar_core::json::digest(policy).map_err(malformed)?;
    let inputs: Vec<_> = inputs
        .iter()
        .map(|(role, d)| json!({"uri": format!("ashlar:{role}"), "digest": {"sha256": d.hex()}}))
        .collect();
    let passed = report.passed();
    Ok(Statement {
        subject: model,
        predicate_type: SUMMARY.into(),
        predicate: json!({
            "verifier": {"id": "ashlar:gate", "version": {"ashlar": env!("CARGO_PKG_VERSION")}},
            "timeVerified": clock::rfc3339(at_ms),
            "resourceUri": format!("ashlar:release/{channel}"),
            "policy": {"uri": "ashlar:gate-policy", "digest": {"sha256": policy.hex()}},
            "inputAttestations": inputs,
            "verificationResult": if passed { "PASSED" } else { "FAILED" },
            "verifiedLevels": if passed { vec!["ASHLAR_GATE"] } else { vec![] },
            "checks": report.checks,
        }),
    })
}

/// Signs `statement` with the PEM key at `key`: a DSSE envelope as JSON.
///
/// # Errors
/// A key we cannot use.
pub fn sign_statement(statement: &Statement, key: &Path) -> Result<Vec<u8>, GovernError> {
    let key = Private::read(key)?;
    let wire = Wire {
        kind: KIND.into(),
        subject: vec![WireSubject {
            name: statement.subject.name.clone(),
            digest: [("sha256".to_owned(), statement.subject.digest.hex())].into(),
        }],
        predicate_type: statement.predicate_type.clone(),
        predicate: statement.predicate.clone(),
    };
    let payload = ashlar_core::json::canonical(&wire).map_err(malformed)?;
    let envelope = Envelope::seal(payload.as_bytes(), &key, key.public().id()?)?;
    serde_json::to_vec(&envelope).map_err(malformed)
}

/// The statement in `envelope`, once the key at `public` is known to have
/// signed it and it is about `subject`.
///
/// # Errors
/// A malformed envelope, another key, a changed payload, another subject.
pub fn verify_statement(
    envelope: &[u8],
    public: &Path,
    subject: &Digest,
) -> Result<Statement, GovernError> {
    let found = envelope.len() as u64;
    if found > LARGEST_BUNDLE {
        return Err(GovernError::TooLarge {
            what: "bytes of a statement",
            found,
            limit: LARGEST_BUNDLE,
        });
    }
    let envelope: Envelope = serde_json::from_slice(envelope).map_err(malformed)?;
    let wire: Wire =
        serde_json::from_slice(&envelope.open(&Public::read(public)?)?).map_err(malformed)?;
    if wire.kind != KIND {
        return Err(GovernError::unsupported("_type", &wire.kind, KIND));
    }
    let [WireSubject { name, digest }] = wire.subject.as_slice() else {
        return Err(GovernError::Malformed(format!(
            "{} subjects, one is wanted",
            wire.subject.len()
        )));
    };
    let hex = digest
        .get("sha256")
        .ok_or_else(|| GovernError::Malformed("the subject has no sha256 digest".into()))?;
    let digest = crate::signing::parse_digest(hex)?;
    if digest != *subject {
        return Err(GovernError::Subject {
            found: digest,
            wanted: *subject,
        });
    }
    Ok(Statement {
        subject: Subject {
            name: name.clone(),
            digest,
        },
        predicate_type: wire.predicate_type,
        predicate: wire.predicate,
    })
}

fn malformed(e: serde_json::Error) -> GovernError {
    GovernError::Malformed(crate::error::cut(&e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Check, keygen};

    fn statement(passed: bool) -> Statement {
        let report = GateReport {
            checks: vec![Check {
                name: "signature".into(),
                passed,
                detail: "3 files".into(),
            }],
        };
        let model = Subject {
            name: "tuned".into(),
            digest: Digest::of(b"model"),
        };
        let inputs = [("snapshot".to_owned(), Digest::of(b"snapshot"))].into();
        release_statement("prod", model, &GatePolicy::default(), &report, &inputs, 0).unwrap()
    }

    #[test]
    fn round_trip_and_tampering() {
        let dir = tempfile::tempdir().unwrap();
        let (keys, others) = (
            keygen(dir.path()).unwrap(),
            keygen(&dir.path().join("other")).unwrap(),
        );
        let said = statement(true);
        let sealed = sign_statement(&said, &keys.private).unwrap();
        let subject = Digest::of(b"model");
        assert_eq!(
            verify_statement(&sealed, &keys.public, &subject).unwrap(),
            said
        );
        assert_eq!(said.predicate["verificationResult"], "PASSED");
        assert_eq!(statement(false).predicate["verificationResult"], "FAILED");
        assert!(matches!(
            verify_statement(&sealed, &others.public, &subject),
            Err(GovernError::WrongKey { .. })
        ));
        assert!(matches!(
            verify_statement(&sealed, &keys.public, &Digest::of(b"another")),
            Err(GovernError::Subject { .. })
        ));
        // The key id is advice: without it, only the signature decides.
        let mut anonymous: Value = serde_json::from_slice(&sealed).unwrap();
        anonymous["signatures"][0]["keyid"] = Value::Null;
        let anonymous = serde_json::to_vec(&anonymous).unwrap();
        assert!(verify_statement(&anonymous, &keys.public, &subject).is_ok());
        assert!(matches!(
            verify_statement(&anonymous, &others.public, &subject),
            Err(GovernError::BadSignature)
        ));
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
        #[test]
        fn no_changed_byte_yields_another_statement(at: proptest::sample::Index, bit in 0u8..8) {
            let dir = tempfile::tempdir().unwrap();
            let keys = keygen(dir.path()).unwrap();
            let said = statement(true);
            let mut sealed = sign_statement(&said, &keys.private).unwrap();
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            if let Ok(read) = verify_statement(&sealed, &keys.public, &Digest::of(b"model")) {
                proptest::prop_assert_eq!(read, said);
            }
        }
    }
}
