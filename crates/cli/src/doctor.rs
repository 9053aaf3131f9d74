//! `ashlar doctor`: what this machine has and what can run here.

use anyhow::Result;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The folder for pulled models and tools: `$ASHLAR_CACHE`, else
/// `~/.cache/ashlar`, else `.ashlar-cache` here.
pub(crate) fn cache_dir() -> PathBuf {
    let var = |k: &str| std::env::var_os(k).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("ASHLAR_CACHE")
        .or_else(|| var("HOME").map(|h| h.join(".cache").join("ashlar")))
        .unwrap_or_else(|| PathBuf::from(".ashlar-cache"))
}

/// Cores this process may use (affinity and cgroup quota included).
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Free bytes on the file system that holds `path` or its nearest parent.
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|p| p.exists())?;
    let c = std::ffi::CString::new(existing.as_os_str().as_encoded_bytes()).ok()?;
    // SAFETY: statvfs is plain data, for which all-zero is a valid value.
    let mut s: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `c` is a NUL-terminated path and `s` outlives the call.
    (unsafe { libc::statvfs(c.as_ptr(), &mut s) } == 0).then(|| s.f_bavail as u64 * s.f_frsize as u64)
}

/// `MemAvailable` in bytes, where the system tells.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

fn cpu_features() -> Vec<&'static str> {
    #[allow(unused_mut)]
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! probe {
            ($($name:tt),*) => { $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })* };
        }
        probe!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vnni", "avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    found.push("neon");
    found
}

fn tool(name: &str, args: &[&str]) -> Option<String> {
    let out = std::process::Command::new(name).args(args).output().ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).trim().to_string())
}

/// Prints the findings; as one JSON object with `--json`.
pub(crate) fn run(home: &Path, as_json: bool) -> Result<()> {
    let features = cpu_features();
    let cache = cache_dir();
    let pip = tool("python3", &["-m", "pip", "--version"]).or_else(|| tool("pip", &["--version"]));
    let memory = available_memory();
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cores": cores(),
        "cpu_features": features,
        "isa_tier": ashlar_kernels::Isa::active().name(),
        "memory_available_bytes": memory,
        "home": home,
        "home_free_bytes": free_bytes(home),
        "cache": cache,
        "cache_free_bytes": free_bytes(&cache),
        "pip": pip,
        "gpu": Value::Null,
        "can_run": {
            "serve": true,
            "train_lora_135m": memory.is_none_or(|m| m > 3 << 30),
            "pull_from_pypi": pip.is_some(),
        },
    });
    if as_json {
        crate::out::json(&report)?;
        return Ok(());
    }
    let size = |v: &Value| v.as_u64().map_or("unknown".into(), crate::out::bytes);
    crate::out::line(format!("ashlar {} on {} {}", report["version"].as_str().unwrap_or(""), std::env::consts::OS, std::env::consts::ARCH));
    crate::out::line(format!("  cores      {}", cores()));
    crate::out::line(format!("  cpu        {} → kernels: {}", features.join(" "), report["isa_tier"].as_str().unwrap_or("")));
    crate::out::line(format!("  memory     {} available", size(&report["memory_available_bytes"])));
    crate::out::line(format!("  home       {} ({} free)", home.display(), size(&report["home_free_bytes"])));
    crate::out::line(format!("  cache      {} ({} free)", cache.display(), size(&report["cache_free_bytes"])));
    crate::out::line(format!("  pip        {}", report["pip"].as_str().unwrap_or("not found: models can come only from the hub or the cache")));
    crate::out::line("  gpu        none is used: every kernel here is for the CPU".into());
    let can = |k: &str| if report["can_run"][k] == true { "yes" } else { "no" };
    crate::out::line(format!("  can serve {}, train a 135M LoRA {}, pull from PyPI {}", can("serve"), can("train_lora_135m"), can("pull_from_pypi")));
    Ok(())
}
