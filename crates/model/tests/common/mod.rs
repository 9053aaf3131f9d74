//! What the tests on the real model share.

use std::path::PathBuf;

/// The model file, or `None` where tests may go without.
pub(crate) fn file() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let path = set("ASHLAR_TEST_MODEL").or_else(|| {
        let cache = set("ASHLAR_CACHE").or_else(|| Some(set("HOME")?.join(".cache/ashlar")))?;
        Some(cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    });
    let found = path.filter(|p| p.exists());
    if found.is_none() {
        assert_ne!(std::env::var("ASHLAR_REQUIRE_PEERS").as_deref(), Ok("1"), "no model file");
        eprintln!("skipped: no model file; set ASHLAR_TEST_MODEL");
    }
    found
}
