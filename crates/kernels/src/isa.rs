//! Which instructions the kernels use, found at run time.

use std::sync::OnceLock;

/// An instruction-set tier. All tiers give the same bits.
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
                }
            }
        }
        all
    }

    /// The tier in use: the best one, or the one `ASHLAR_ISA` names
    /// (`reference`, `avx2`, `vnni`) if this machine has it.
    pub fn active() -> Self {
        static ACTIVE: OnceLock<Isa> = OnceLock::new();
        *ACTIVE.get_or_init(|| {
            let all = Self::available();
            let forced = std::env::var("ASHLAR_ISA").ok();
            let named = forced.and_then(|name| all.iter().find(|i| i.name() == name));
            *named.or(all.last()).unwrap_or(&Self::Reference)
        })
    }

    /// The name `ASHLAR_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => "vnni",
        }
    }
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
                $crate::Isa::Vnni => unsafe { wide($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::available` found these features.
                _ => unsafe { fast($($arg),*) },
            }
        }
    };
}
pub(crate) use tiered;
