//! How much memory this process may still take.
//!
//! The least of what the system calls available and of what each memory control
//! group above the process leaves. Pages of files that can be dropped count as
//! free. Where the system tells nothing (outside Linux), nothing is assumed.

use serde::Serialize;
use std::{fs, path::Path};

/// Where a figure of available memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemorySource {
    /// The setting `memory_bytes`.
    Setting,
    /// A control group's limit.
    Cgroup,
    /// The system's available memory.
    System,
    /// Nothing tells.
    Unknown,
}

impl std::fmt::Display for MemorySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Setting => "set by memory_bytes",
            Self::Cgroup => "left by the control group",
            Self::System => "available on this system",
            Self::Unknown => "unknown",
        })
    }
}

/// Bytes that may still be taken, and who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Available {
    pub(crate) bytes: Option<u64>,
    pub(crate) source: MemorySource,
}

/// What is available now.
pub(crate) fn available() -> Available {
    measure(Path::new("/"))
}

/// [`available`] of a file system rooted at `root`.
fn measure(root: &Path) -> Available {
    let system = read(&root.join("proc/meminfo"))
        .and_then(|text| field(&text, "MemAvailable:"))
        .map(|kib| kib.saturating_mul(1024));
    let groups = read(&root.join("proc/self/cgroup")).unwrap_or_default();
    let left = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let path = path.trim_start_matches('/');
        if controllers.is_empty() {
            let names = ("memory.max", "memory.current", "inactive_file");
            return group(&root.join("sys/fs/cgroup"), path, names);
        }
        if !controllers.split(',').any(|c| c == "memory") {
            return None;
        }
        let names = (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        );
        group(&root.join("sys/fs/cgroup/memory"), path, names)
    });
    match (system, left.min()) {
        (system, Some(left)) if system.is_none_or(|s| left < s) => Available {
            bytes: Some(left),
            source: MemorySource::Cgroup,
        },
        (Some(bytes), _) => Available {
            bytes: Some(bytes),
            source: MemorySource::System,
        },
        _ => Available {
            bytes: None,
            source: MemorySource::Unknown,
        },
    }
}

/// What the group at `path` and those above it leave, if any has a limit.
/// Inside a container the path may not exist; its root then holds the limit.
fn group(mount: &Path, path: &str, names: (&str, &str, &str)) -> Option<u64> {
    let (limit, usage, droppable) = names;
    let whole = mount.join(path);
    let dirs = whole.ancestors().take_while(|dir| dir.starts_with(mount));
    dirs.filter_map(|dir| {
        let number = |name: &str| read(&dir.join(name))?.trim().parse::<u64>().ok();
        let limit = number(limit)?;
        let stat = read(&dir.join("memory.stat")).unwrap_or_default();
        let used = number(usage)?.saturating_sub(field(&stat, droppable).unwrap_or(0));
        Some(limit.saturating_sub(used))
    })
    .min()
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The number after `name` at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == name).then_some(words.next()?.parse().ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn of(files: &[(&str, &str)]) -> (Option<u64>, MemorySource) {
        let a = measure(root(files).path());
        (a.bytes, a.source)
    }

    const INFO: (&str, &str) = ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    4 kB\n");

    #[test]
    fn the_least_of_system_and_groups() {
        assert_eq!(of(&[]), (None, MemorySource::Unknown));
        assert_eq!(of(&[INFO]), (Some(4096), MemorySource::System));
        let v2 = [
            INFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "5\n"),
            ("sys/fs/cgroup/a/memory.max", "3000\n"),
            ("sys/fs/cgroup/a/memory.current", "2500\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 500\n"),
        ];
        assert_eq!(of(&v2), (Some(1000), MemorySource::Cgroup));
        let v1 = [
            INFO,
            ("proc/self/cgroup", "5:cpu:/x\n4:memory:/gone\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4000"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "5000"),
        ];
        assert_eq!(of(&v1), (Some(0), MemorySource::Cgroup));
        let unlimited = [
            INFO,
            ("proc/self/cgroup", "4:memory:/\n"),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712",
            ),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "5000"),
        ];
        assert_eq!(of(&unlimited), (Some(4096), MemorySource::System));
    }

    #[test]
    fn this_system_says_something() {
        if cfg!(target_os = "linux") {
            assert!(available().bytes.is_some());
        }
    }
}
