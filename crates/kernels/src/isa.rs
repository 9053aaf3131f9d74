//! Which instructions the kernels use, found at run time.

use crate::KernelError;
use std::sync::OnceLock;

/// An instruction-set tier. All tiers give the same bits, but for 16-bit floats
/// on the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, on any machine.
    Reference,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// That, AVX-512 BF16 and AMX's tiles of int8 and bf16.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Isa {
    /// Every tier this machine has, slowest first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut all = vec![Self::Reference];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                all.push(Self::Avx2);
                if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") && has!("avx512vnni") {
                    all.push(Self::Vnni);
                    if has!("avx512bf16") && tiles() {
                        all.push(Self::Amx);
                    }
                }
            }
        }
        all
    }

    /// The tier in use: the one `ASHLAR_ISA` names (`reference`, `avx2`, `vnni`,
    /// `amx`), else the best one. A name that [`Isa::chosen`] refuses is passed
    /// over here: programs ask that first.
    pub fn active() -> Self {
        static ACTIVE: OnceLock<Isa> = OnceLock::new();
        let best = || *Self::available().last().unwrap_or(&Self::Reference);
        *ACTIVE.get_or_init(|| Self::chosen().ok().flatten().unwrap_or_else(best))
    }

    /// The tier that `ASHLAR_ISA` names, if it is set.
    ///
    /// # Errors
    /// A tier this machine does not have.
    pub fn chosen() -> Result<Option<Self>, KernelError> {
        match std::env::var("ASHLAR_ISA") {
            Ok(name) if !name.is_empty() => Self::named(name).map(Some),
            _ => Ok(None),
        }
    }

    fn named(name: String) -> Result<Self, KernelError> {
        let all = Self::available();
        match all.iter().find(|i| i.name() == name) {
            Some(tier) => Ok(*tier),
            None => Err(KernelError::Tier { name, available: all.iter().map(|i| i.name()).collect() }),
        }
    }

    /// The name `ASHLAR_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => "vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
        }
    }
}

/// Whether the processor has AMX and the system lets this process use it, which
/// Linux wants to be asked for.
#[cfg(target_arch = "x86_64")]
fn tiles() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
        const TILE_DATA: libc::c_ulong = 18;
        // Leaf 7: tiles of bf16, tiles, tiles of int8.
        const BITS: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        // A leaf beyond the last would repeat the last one's bits.
        let leaves = std::arch::x86_64::__cpuid(0).eax;
        if leaves < 7 || std::arch::x86_64::__cpuid_count(7, 0).edx & BITS != BITS {
            return false;
        }
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        // SAFETY: asks for a permission; refused, nothing has changed.
        return *ALLOWED.get_or_init(|| unsafe {
            libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0
        });
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Compiles one body for each tier. Rust neither reorders nor contracts float
/// arithmetic, so the compilations differ in speed only. The body must be
/// `#[inline(always)]`, or it would keep the plain instructions.
macro_rules! tiered {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:path;) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn fast($($arg: $ty),*) {
                $body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
            #[allow(clippy::too_many_arguments)]
            fn wide($($arg: $ty),*) {
                $body($($arg),*)
            }
            match isa {
                $crate::Isa::Reference => $body($($arg),*),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::available` found these features.
                $crate::Isa::Vnni | $crate::Isa::Amx => unsafe { wide($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::available` found these features.
                _ => unsafe { fast($($arg),*) },
            }
        }
    };
}
pub(crate) use tiered;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_that_is_not_there_is_refused_by_name() {
        assert_eq!(Isa::named("reference".into()), Ok(Isa::Reference));
        let refused = Isa::named("avx1024".into()).unwrap_err().to_string();
        assert!(refused.starts_with("ASHLAR_ISA is avx1024; this machine has reference"), "{refused}");
    }
}
