//! Our signatures under PyPI's `model-signing`, and its under ours, on each
//! curve. Wants `$ASHLAR_PEERS_PYTHON`, a Python that has the package.

#![allow(clippy::unwrap_used)]

use ashlar_govern::{GovernError, keygen, sign_dir, verify_dir};
use p256::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _, LineEnding};
use std::{fs, path::Path, process::Command};

fn python() -> Option<String> {
    if let Ok(python) = std::env::var("ASHLAR_PEERS_PYTHON") {
        return Some(python);
    }
    let required = std::env::var("ASHLAR_REQUIRE_PEERS").is_ok_and(|v| v == "1");
    assert!(
        !required,
        "ASHLAR_REQUIRE_PEERS=1, but ASHLAR_PEERS_PYTHON is not set"
    );
    eprintln!("skipped: model-signing");
    None
}

fn both_ways(python: &str, home: &Path, private: &Path, public: &Path) {
    let dir = home.join("model");
    fs::create_dir_all(dir.join("sub/deep")).unwrap();
    fs::write(dir.join("weights.gguf"), vec![42; 300_000]).unwrap();
    fs::write(dir.join("sub/deep/ü 1.json"), "{}").unwrap();
    fs::write(dir.join("sub.x"), "sorts after sub/").unwrap();
    fs::write(dir.join(".gitattributes"), "ignored by both").unwrap();
    let (ours, theirs) = (dir.join("model.sig"), dir.join("peer.sig"));
    sign_dir(&dir, private, &ours).unwrap();

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask/peers/model_signing.py");
    let run = Command::new(python)
        .arg(script)
        .args([&dir, &ours])
        .args([public, private])
        .arg(&theirs)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(
        run.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&run.stderr)
    );
    eprintln!("model-signing: {}", said.trim());

    let verified = verify_dir(&dir, &theirs, public).unwrap();
    // Its signature covers what ours does, in the same order.
    fs::remove_file(&theirs).unwrap();
    assert_eq!(
        verify_dir(&dir, &ours, public).unwrap().files,
        verified.files
    );

    let mut bytes = fs::read(dir.join("weights.gguf")).unwrap();
    bytes[150_000] ^= 1;
    fs::write(dir.join("weights.gguf"), bytes).unwrap();
    assert!(matches!(
        verify_dir(&dir, &ours, public),
        Err(GovernError::Changed { .. })
    ));
}

#[test]
fn p256() {
    let Some(python) = python() else { return };
    let home = tempfile::tempdir().unwrap();
    let keys = keygen(home.path()).unwrap();
    both_ways(&python, home.path(), &keys.private, &keys.public);
}

#[test]
fn p384() {
    let Some(python) = python() else { return };
    let home = tempfile::tempdir().unwrap();
    let (private, public) = (home.path().join("k"), home.path().join("p"));
    let key = p384::SecretKey::from_slice(&[0x5a; 48]).unwrap();
    fs::write(&private, key.to_pkcs8_pem(LineEnding::LF).unwrap()).unwrap();
    fs::write(
        &public,
        key.public_key().to_public_key_pem(LineEnding::LF).unwrap(),
    )
    .unwrap();
    both_ways(&python, home.path(), &private, &public);
}

#[test]
fn keys_in_sec1_are_read_too() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("model");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("weights"), "w").unwrap();
    let (private, public) = (home.path().join("k"), home.path().join("p"));
    let key = p384::SecretKey::from_slice(&[0x5a; 48]).unwrap();
    fs::write(&private, key.to_sec1_pem(LineEnding::LF).unwrap()).unwrap();
    let pem = key.public_key().to_public_key_pem(LineEnding::LF).unwrap();
    fs::write(&public, pem).unwrap();
    let out = dir.join("model.sig");
    sign_dir(&dir, &private, &out).unwrap();
    verify_dir(&dir, &out, &public).unwrap();
}

#[test]
fn p521() {
    let Some(python) = python() else { return };
    let home = tempfile::tempdir().unwrap();
    let (private, public) = (home.path().join("k"), home.path().join("p"));
    let mut scalar = [0x5a; 66];
    scalar[0] = 0;
    let key = p521::SecretKey::from_slice(&scalar).unwrap();
    fs::write(&private, key.to_pkcs8_pem(LineEnding::LF).unwrap()).unwrap();
    fs::write(
        &public,
        key.public_key().to_public_key_pem(LineEnding::LF).unwrap(),
    )
    .unwrap();
    both_ways(&python, home.path(), &private, &public);
}
