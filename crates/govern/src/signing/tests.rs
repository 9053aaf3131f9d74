//! Round trips, tampering and kept attacks.

use super::*;
use crate::{KeyPair, keygen};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::PathBuf;

struct Model {
    _home: tempfile::TempDir,
    dir: PathBuf,
    sig: PathBuf,
    keys: KeyPair,
}

impl Model {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("model");
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("weights.gguf"), vec![7; 5000]).unwrap();
        fs::write(dir.join("sub/config.json"), "{}").unwrap();
        fs::write(dir.join("sub.x"), "x").unwrap();
        fs::write(dir.join(".hidden"), "").unwrap();
        let keys = keygen(home.path()).unwrap();
        let sig = dir.join("model.sig");
        let model = Self {
            _home: home,
            dir,
            sig,
            keys,
        };
        sign_dir(&model.dir, &model.keys.private, &model.sig).unwrap();
        model
    }

    fn verify(&self) -> Result<Verified, GovernError> {
        verify_dir(&self.dir, &self.sig, &self.keys.public)
    }

    /// Signs `statement` as it is, the way a holder of the key could.
    fn forge(&self, statement: &Value) {
        let key = Private::read(&self.keys.private).unwrap();
        let payload = serde_json::to_vec(statement).unwrap();
        let bundle = json!({
            "mediaType": BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": key.public().id().unwrap()}},
            "dsseEnvelope": Envelope::seal(&payload, &key, String::new()).unwrap(),
        });
        fs::write(&self.sig, bundle.to_string()).unwrap();
    }

    fn bundle(&self) -> Value {
        serde_json::from_slice(&fs::read(&self.sig).unwrap()).unwrap()
    }

    fn statement(&self) -> Value {
        let bundle = self.bundle();
        let payload = bundle["dsseEnvelope"]["payload"].as_str().unwrap();
        serde_json::from_slice(&STANDARD.decode(payload).unwrap()).unwrap()
    }
}

#[test]
fn round_trip_in_and_beside_the_folder() {
    let model = Model::new();
    let verified = model.verify().unwrap();
    let names: Vec<_> = verified.files.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(
        names,
        [".hidden", "sub/config.json", "sub.x", "weights.gguf"]
    );
    assert_eq!(verified.name, "model");
    let moved = model.dir.with_file_name("elsewhere.sig");
    fs::rename(&model.sig, &moved).unwrap();
    assert_eq!(
        verify_dir(&model.dir, &moved, &model.keys.public).unwrap(),
        verified
    );
    let beside = model.dir.with_file_name("beside.sig");
    let signed = sign_dir(&model.dir, &model.keys.private, &beside).unwrap();
    assert_eq!(
        verify_dir(&model.dir, &beside, &model.keys.public).unwrap(),
        signed
    );
    assert_eq!(signed.root, verified.root);
    // Signing again over an old signature covers the same files.
    assert_eq!(
        sign_dir(&model.dir, &model.keys.private, &model.sig)
            .unwrap()
            .root,
        verified.root
    );
    let leftovers = fs::read_dir(&model.dir).unwrap().count();
    assert_eq!(leftovers, 5);
}

#[test]
fn every_tampering_has_its_own_error() {
    type Tamper = fn(&Model);
    type Expected = fn(&GovernError) -> bool;
    let table: &[(Tamper, Expected)] = &[
        (
            |m| fs::write(m.dir.join("sub.x"), "y").unwrap(),
            |e| matches!(e, GovernError::Changed { path, .. } if path == "sub.x"),
        ),
        (
            |m| fs::write(m.dir.join("sub/new"), "").unwrap(),
            |e| {
                // The empty file has the digest of `.hidden`, which is still there.
                matches!(e, GovernError::Extra { path, count: 1 } if path == "sub/new")
            },
        ),
        (
            |m| fs::remove_file(m.dir.join(".hidden")).unwrap(),
            |e| matches!(e, GovernError::Missing { path, count: 1 } if path == ".hidden"),
        ),
        (
            |m| fs::rename(m.dir.join("sub.x"), m.dir.join("sub/x")).unwrap(),
            |e| matches!(e, GovernError::Renamed { from, to } if from == "sub.x" && to == "sub/x"),
        ),
        (
            |m| fs::remove_file(&m.sig).unwrap(),
            |e| matches!(e, GovernError::Io { .. }),
        ),
        (
            |m| fs::write(&m.sig, "{").unwrap(),
            |e| matches!(e, GovernError::Malformed(_)),
        ),
        (
            |m| {
                let mut s = m.statement();
                s["subject"][0]["name"] = json!("another");
                let mut b = m.bundle();
                b["dsseEnvelope"]["payload"] = json!(STANDARD.encode(s.to_string()));
                fs::write(&m.sig, b.to_string()).unwrap();
            },
            |e| matches!(e, GovernError::BadSignature),
        ),
        #[cfg(unix)]
        (
            |m| std::os::unix::fs::symlink("/etc/hostname", m.dir.join("link")).unwrap(),
            |e| matches!(e, GovernError::NotPlain(_)),
        ),
    ];
    for (i, (tamper, expected)) in table.iter().enumerate() {
        let model = Model::new();
        tamper(&model);
        let error = model.verify().unwrap_err();
        assert!(expected(&error), "case {i}: {error}");
    }
}

#[test]
fn another_key_is_named() {
    let model = Model::new();
    let other = keygen(&model.dir.with_file_name("other")).unwrap();
    assert!(matches!(
        verify_dir(&model.dir, &model.sig, &other.public),
        Err(GovernError::WrongKey { signed, given }) if signed != given
    ));
    // A hint that was bent to the given key does not help.
    let mut bundle = model.bundle();
    for hint in [
        json!(Public::read(&other.public).unwrap().id().unwrap()),
        Value::Null,
        json!(""),
    ] {
        bundle["verificationMaterial"]["publicKey"]["hint"] = hint;
        fs::write(&model.sig, bundle.to_string()).unwrap();
        assert!(matches!(
            verify_dir(&model.dir, &model.sig, &other.public),
            Err(GovernError::BadSignature)
        ));
    }
}

#[test]
fn attacks_by_bundle() {
    type Spoil = fn(&mut Value);
    let table: &[(&str, Spoil)] = &[
        ("payloadType", |b| {
            b["dsseEnvelope"]["payloadType"] = json!("application/json")
        }),
        ("mediaType", |b| {
            b["mediaType"] = json!("application/vnd.dev.sigstore.bundle+json;version=0.1")
        }),
        ("verificationMaterial", |b| {
            b["verificationMaterial"] = json!({"certificate": {"rawBytes": ""}})
        }),
        ("0 signatures", |b| {
            b["dsseEnvelope"]["signatures"] = json!([])
        }),
        ("2 signatures", |b| {
            let one = b["dsseEnvelope"]["signatures"][0].clone();
            b["dsseEnvelope"]["signatures"] = json!([one, one]);
        }),
        ("signature does not match", |b| {
            b["dsseEnvelope"]["signatures"][0]["sig"] = json!("")
        }),
        ("canonical base64", |b| {
            let spaced = format!("{}\n", b["dsseEnvelope"]["payload"].as_str().unwrap());
            b["dsseEnvelope"]["payload"] = json!(spaced);
        }),
        ("canonical base64", |b| {
            b["dsseEnvelope"]["signatures"][0]["sig"] = json!("AB==")
        }),
        ("canonical base64", |b| {
            b["dsseEnvelope"]["payload"] = json!("-_-_")
        }),
    ];
    for (part, spoil) in table {
        let model = Model::new();
        let mut bundle = model.bundle();
        spoil(&mut bundle);
        fs::write(&model.sig, bundle.to_string()).unwrap();
        let error = model.verify().unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

#[test]
fn attacks_by_a_holder_of_the_key() {
    type Spoil = fn(&mut Value);
    let table: &[(&str, Spoil)] = &[
        ("\"../../etc/passwd\" is refused", |s| {
            s["predicate"]["resources"][0]["name"] = json!("../../etc/passwd");
        }),
        ("it is absolute", |s| {
            s["predicate"]["resources"][0]["name"] = json!("/etc/passwd")
        }),
        ("listed twice", |s| {
            let one = s["predicate"]["resources"][0].clone();
            s["predicate"]["resources"]
                .as_array_mut()
                .unwrap()
                .push(one);
        }),
        ("\"..\"", |s| {
            s["predicate"]["serialization"]["ignore_paths"] = json!(["."])
        }),
        ("it is empty", |s| {
            s["predicate"]["serialization"]["ignore_paths"] = json!([""])
        }),
        ("signed root", |s| {
            s["subject"][0]["digest"]["sha256"] = json!("00".repeat(32))
        }),
        ("signed root", |s| {
            s["predicate"]["resources"]
                .as_array_mut()
                .unwrap()
                .reverse()
        }),
        ("signed root", |s| s["predicate"]["resources"] = json!([])),
        ("no sha256", |s| {
            s["subject"][0]["digest"] = json!({"md5": "00"})
        }),
        ("0 subjects", |s| s["subject"] = json!([])),
        ("needs 64", |s| {
            s["predicate"]["resources"][0]["digest"] = json!("00")
        }),
        ("algorithm", |s| {
            s["predicate"]["resources"][0]["algorithm"] = json!("blake3")
        }),
        ("method", |s| {
            s["predicate"]["serialization"]["method"] = json!("shards")
        }),
        ("hash_type", |s| {
            s["predicate"]["serialization"]["hash_type"] = json!("blake2")
        }),
        ("allow_symlinks", |s| {
            s["predicate"]["serialization"]["allow_symlinks"] = json!(true)
        }),
        ("predicateType", |s| {
            s["predicateType"] = json!("https://model_signing/Digests/v0.1")
        }),
        ("_type", |s| {
            s["_type"] = json!("https://in-toto.io/Statement/v0.1")
        }),
        ("malformed", |s| *s = json!([1])),
    ];
    for (part, spoil) in table {
        let model = Model::new();
        let mut statement = model.statement();
        spoil(&mut statement);
        model.forge(&statement);
        let error = model.verify().unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

#[test]
fn huge_lists_are_refused_by_their_size() {
    let model = Model::new();
    let mut statement = model.statement();
    let one = json!({"name": "a", "digest": "", "algorithm": "sha256"});
    statement["predicate"]["resources"] = json!(vec![one; 100_001]);
    model.forge(&statement);
    assert!(matches!(
        model.verify(),
        Err(GovernError::TooLarge {
            found: 100_001,
            limit: MOST_FILES,
            ..
        })
    ));
    let file = fs::File::create(&model.sig).unwrap();
    file.set_len(LARGEST_BUNDLE * 4).unwrap();
    assert!(matches!(model.verify(), Err(GovernError::TooLarge { .. })));
    fs::write(&model.sig, "[".repeat(1 << 20)).unwrap();
    assert!(matches!(model.verify(), Err(GovernError::Malformed(_))));
}

#[test]
fn a_repeated_key_in_the_json_is_refused() {
    let model = Model::new();
    let text = fs::read_to_string(&model.sig).unwrap();
    let twice = text.replacen('{', &format!("{{\"mediaType\":\"{BUNDLE}\","), 1);
    fs::write(&model.sig, twice).unwrap();
    assert!(
        model
            .verify()
            .unwrap_err()
            .to_string()
            .contains("duplicate field")
    );
}

#[test]
fn nothing_is_signed_of_an_empty_or_linked_folder() {
    let model = Model::new();
    let empty = model.dir.with_file_name("empty");
    fs::create_dir(&empty).unwrap();
    let sign = |dir: &Path| sign_dir(dir, &model.keys.private, &dir.join("model.sig"));
    assert!(matches!(sign(&empty), Err(GovernError::Empty(_))));
    fs::write(empty.join(".gitattributes"), "x").unwrap();
    assert!(matches!(sign(&empty), Err(GovernError::Empty(_))));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("weights.gguf", model.dir.join("latest")).unwrap();
        assert!(matches!(sign(&model.dir), Err(GovernError::NotPlain(_))));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_flipped_bit_of_any_file_is_found(at: prop::sample::Index, bit in 0u8..8, which in 0usize..3) {
        let model = Model::new();
        let path = model.dir.join(["weights.gguf", "sub/config.json", "sub.x"][which]);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        fs::write(&path, bytes).unwrap();
        let changed = matches!(model.verify(), Err(GovernError::Changed { .. }));
        prop_assert!(changed);
    }

    #[test]
    fn no_flipped_bit_of_the_signature_changes_what_is_believed(at: prop::sample::Index, bit in 0u8..8) {
        let model = Model::new();
        let before = model.verify().unwrap();
        let mut bytes = fs::read(&model.sig).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        fs::write(&model.sig, bytes).unwrap();
        if let Ok(after) = model.verify() {
            prop_assert_eq!(after, before);
        }
    }

    #[test]
    fn junk_never_panics(bytes: Vec<u8>) {
        let model = Model::new();
        fs::write(&model.sig, bytes).unwrap();
        prop_assert!(model.verify().is_err());
    }
}
