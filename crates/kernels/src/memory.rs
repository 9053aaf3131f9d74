//! Memory that kernels read: from a cache line on, weights in large pages.
//!
//! Decoding reads every weight once a step, and with pages of 4 KiB a good part of
//! that time goes to finding them. So weights lie side by side in regions that the
//! system is asked to back with pages of 2 MiB; where it has none to give, nothing
//! but time is lost. What is not read end to end (a cache that grows as contexts
//! do) stays in small pages, so that only what is touched takes memory.
//! What may not happen here: a region that is unmapped while something in it lives.
//!
//! Rejected: a region a matrix. Most of a small model's matrices are shorter than a
//! large page, and would be in small ones.

use std::{
    ptr::NonNull,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// What addresses begin at.
const LINE: usize = 64;
/// A large page.
const LARGE: usize = 2 << 20;
/// A region that weights share. What is left of one is not touched, but for the end
/// of its last large page: a thirtieth at most.
const SHARED: usize = if cfg!(test) { 4 << 20 } else { 64 << 20 };

/// Bytes in use of all regions.
static HELD: AtomicUsize = AtomicUsize::new(0);
/// The region that the next weights go into, and its bytes in use.
static OPEN: Mutex<(Weak<Region>, usize)> = Mutex::new((Weak::new(), 0));

/// Bytes of weights and caches that this process holds. The allocator does not see
/// them.
pub fn held_bytes() -> usize {
    HELD.load(Relaxed)
}

/// A map of zeros that comes page by page as it is first touched.
struct Region {
    /// Mapped from here, for `mapped` bytes.
    base: NonNull<libc::c_void>,
    mapped: usize,
    /// The first byte in use.
    at: NonNull<u8>,
}

// SAFETY: it owns its map, as a boxed slice does its memory.
unsafe impl Send for Region {}
// SAFETY: it hands out nothing by itself; see `Bytes`.
unsafe impl Sync for Region {}

impl Region {
    /// `len` bytes that begin at a multiple of `align`, a power of two.
    fn new(len: usize, align: usize) -> Arc<Self> {
        // Maps begin at a page; more than that is cut out of a longer one.
        let mapped = len.saturating_add(if align > LINE { align } else { 0 }).max(1);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
        // SAFETY: a new map, of no file and at no address in use.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), mapped, prot, flags, -1, 0) };
        // As for a vector that memory has no room for, there is no going on.
        assert!(base != libc::MAP_FAILED, "{mapped} bytes: {}", std::io::Error::last_os_error());
        let skip = base.addr().next_multiple_of(align) - base.addr();
        let at = base.wrapping_byte_add(skip);
        #[cfg(target_os = "linux")]
        if align == LARGE {
            // SAFETY: a part of the map. A refusal changes nothing but speed.
            unsafe { libc::madvise(at, mapped - skip, libc::MADV_HUGEPAGE) };
        }
        let (Some(base), Some(at)) = (NonNull::new(base), NonNull::new(at.cast())) else {
            unreachable!("a map at address 0, which was not asked for");
        };
        Arc::new(Self { base, mapped, at })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody is left who could read it.
        unsafe { libc::munmap(self.base.as_ptr(), self.mapped) };
    }
}

/// Bytes that begin at a cache line and are in no other `Bytes`.
pub(crate) struct Bytes {
    at: NonNull<u8>,
    len: usize,
    _region: Arc<Region>,
}

// SAFETY: the region outlives it, and no other `Bytes` overlaps it.
unsafe impl Send for Bytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for Bytes {}

impl Bytes {
    /// `from + len` lies within the region, and is in use by nobody.
    fn of(region: Arc<Region>, from: usize, len: usize) -> Self {
        HELD.fetch_add(len, Relaxed);
        // SAFETY: as said.
        let at = unsafe { region.at.add(from) };
        Self { at, len, _region: region }
    }

    /// Zeros in small pages, each there once it is touched.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self::of(Region::new(len, LINE), 0, len)
    }

    /// Zeros for weights.
    pub(crate) fn weights(len: usize) -> Self {
        if len > SHARED / 2 {
            return Self::of(Region::new(len, LARGE), 0, len);
        }
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let (region, from) = match open.0.upgrade() {
            Some(region) if open.1 + len <= SHARED => (region, open.1),
            _ => {
                let region = Region::new(SHARED, LARGE);
                open.0 = Arc::downgrade(&region);
                (region, 0)
            }
        };
        open.1 = (from + len).next_multiple_of(LINE);
        Self::of(region, from, len)
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        HELD.fetch_sub(self.len, Relaxed);
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes of the region, initialized as every map is.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed mutably, and in no other `Bytes`.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache fitted to all free memory once took seconds to write its zeros.
    #[test]
    #[cfg(target_os = "linux")]
    fn zeroed_memory_is_not_touched() {
        let resident = || {
            let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
            pages.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        let mut bytes = Bytes::zeroed(1 << 30);
        bytes[1 << 29] = 1;
        assert!(resident() < before + (256 << 20), "{} bytes", resident() - before);
        assert_eq!((bytes.as_ptr().addr() % LINE, bytes[0], bytes[(1 << 30) - 1]), (0, 0, 0));
    }

    #[test]
    fn weights_lie_side_by_side_and_never_over_each_other() {
        // Some that end within a line, some that no longer fit, some on their own.
        let lens = [0, 1, 63, 64, 65, 4097, SHARED / 2, SHARED / 2 - 64, SHARED / 2 + 1, 3 * LARGE + 5, SHARED, 100];
        let mut all: Vec<Bytes> = lens.iter().map(|&len| Bytes::weights(len)).collect();
        for (i, bytes) in all.iter_mut().enumerate() {
            assert!(bytes.iter().all(|&b| b == 0), "{} bytes", bytes.len());
            assert!(bytes.as_ptr().addr().is_multiple_of(LINE));
            bytes.fill(i as u8 + 1);
        }
        for (i, bytes) in all.iter().enumerate() {
            assert!(bytes.len() == lens[i] && bytes.iter().all(|&b| b == i as u8 + 1), "{} bytes", lens[i]);
        }
        // What is left open is used on, as long as somebody is in it.
        let last = all.pop().unwrap();
        all.clear();
        assert!(last.iter().all(|&b| b == lens.len() as u8));
    }
}
