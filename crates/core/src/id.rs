//! Ids of things that happen rather than are: runs, responses, requests.
//!
//! A thing that *is* (a file, a document) is named by its [`crate::Digest`].

use std::sync::atomic::{AtomicU64, Ordering};

/// `prefix` + `-` + 24 hex digits: 6 bytes of milliseconds, so that ids sort by
/// time, then 6 random bytes.
///
/// Where the system's random source fails, a process-wide counter takes its
/// place: ids stay unique within the process, which the ledger's key checks.
pub fn new(prefix: &str) -> String {
    static FALLBACK: AtomicU64 = AtomicU64::new(1);
    let ms = u64::try_from(crate::clock::now_ms()).unwrap_or(0);
    let mut tail = [0u8; 8];
    if getrandom::fill(&mut tail[2..]).is_err() {
        tail = FALLBACK.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    }
    let hex = |b: &[u8]| crate::digest::to_hex(b);
    format!(
        "{prefix}-{}{}",
        hex(&ms.to_be_bytes()[2..]),
        hex(&tail[2..])
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn unique_and_sorted_by_time() {
        let ids: Vec<_> = (0..1000).map(|_| super::new("run")).collect();
        let unique: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(unique.len(), 1000);
        assert!(ids[0][..16] <= ids[999][..16]);
        assert_eq!(ids[0].len(), "run-".len() + 24);
    }
}
