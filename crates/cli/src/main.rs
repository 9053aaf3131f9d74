//! The `ashlar` command: arguments → settings → plan, and the terminal's face.
//!
//! Stages never import each other; this crate strings them together. It is the
//! only one with `anyhow`: below it, errors are typed.

mod abuse;
mod bench;
mod chat;
mod doctor;
mod encoder;
mod guard;
mod jsonl;
mod keys;
mod out;
mod recipe;
mod release;
mod router;
mod serve;
mod sign;
mod takedown;
mod trace;
mod up;
mod usage;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::{path::PathBuf, process::ExitCode};

/// From raw documents to a governed endpoint, with the trail kept.
#[derive(Parser)]
#[command(name = "ashlar", version, max_term_width = 100)]
struct Args {
    /// Where objects, the ledger and keys are kept.
    #[arg(long, global = true, env = "ASHLAR_HOME", default_value = ".ashlar", value_name = "DIR")]
    home: PathBuf,
    /// Print one JSON object on stdout; everything else goes to stderr.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run a recipe from documents to a signed release, serve it and ask it.
    Up {
        /// The recipe's TOML file.
        #[arg(default_value = "recipes/quickstart.toml")]
        recipe: PathBuf,
        /// Stop after the sample question instead of serving.
        #[arg(long)]
        no_serve: bool,
        /// Where to serve.
        #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR")]
        listen: String,
    },
    /// Show what something stands on and what stands on it.
    Trace {
        /// A response, document, artifact, run or release: its id, or at least six digits of its digest.
        id: String,
        /// Print Graphviz.
        #[arg(long, conflicts_with = "json")]
        dot: bool,
    },
    /// Withdraw a document and its near-duplicates, and close the gate for what was exposed to them.
    Takedown {
        /// The document: its digest, at least six digits of it, or its corpus id.
        id: String,
        /// Kept with the takedown.
        #[arg(long, default_value = "unspecified", value_name = "TEXT")]
        reason: String,
        /// Only list what would be affected.
        #[arg(long)]
        dry_run: bool,
    },
    /// Serve the current release, a GGUF file, or other servers' models over the OpenAI-compatible API.
    Serve {
        /// A channel's name, a GGUF file, or a folder in Hugging Face's layout [default: prod, when no --config is given].
        #[arg(long, value_name = "NAME|PATH")]
        model: Option<String>,
        /// Backends, models and rules; read again when it changes or on SIGHUP.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Where to listen.
        #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR")]
        listen: String,
        #[command(flatten)]
        door: serve::DoorArgs,
        #[command(flatten)]
        engine: serve::EngineArgs,
    },
    /// Look at what the gateway would do, and train what it routes by.
    Gateway {
        #[command(subcommand)]
        what: GatewayVerb,
    },
    /// Make, list and revoke the gateway's keys.
    Keys {
        #[command(flatten)]
        at: keys::AccountsArg,
        #[command(subcommand)]
        what: keys::KeysVerb,
    },
    /// Make and list teams, whose limits their keys share.
    Teams {
        #[command(flatten)]
        at: keys::AccountsArg,
        #[command(subcommand)]
        what: keys::TeamsVerb,
    },
    /// Show what was used and what it cost, or export it.
    Usage(usage::UsageArgs),
    /// Train what the gateway's guard looks for.
    Guard {
        #[command(subcommand)]
        what: GuardVerb,
    },
    /// End users who violate the guard's policies: look, decide, let in again.
    Abuse {
        #[command(subcommand)]
        what: abuse::What,
    },
    /// Talk to the current release in the terminal.
    Chat {
        /// A channel's name or a GGUF file.
        #[arg(long, default_value = "prod", value_name = "NAME|PATH")]
        model: String,
        #[command(flatten)]
        template: serve::TemplateArg,
    },
    /// Measure the engine on a model file, or a server under load.
    Bench {
        #[command(subcommand)]
        what: bench::What,
    },
    /// Sign every file in a folder (OpenSSF Model Signing, key method).
    Sign {
        /// The folder.
        dir: PathBuf,
        /// An EC private key in PEM.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
    },
    /// Check a signed folder, or the whole ledger.
    Verify {
        /// The folder.
        #[arg(required_unless_present = "ledger")]
        dir: Option<PathBuf>,
        /// The signer's public key in PEM.
        #[arg(long, value_name = "FILE", required_unless_present = "ledger")]
        public_key: Option<PathBuf>,
        /// The signature, when it is not `model.sig` in the folder.
        #[arg(long, value_name = "FILE")]
        signature: Option<PathBuf>,
        /// Check every object and the transparency log of the home instead.
        #[arg(long, conflicts_with = "dir")]
        ledger: bool,
    },
    /// Say what this machine has and what can run here.
    Doctor,
}

#[derive(Subcommand)]
enum GuardVerb {
    /// Train the classifier of a policy with `check = "head"` on labelled texts.
    Train {
        /// JSON lines: {text, labels: [...]}; an empty list says that all is well.
        #[arg(long, value_name = "FILE")]
        data: PathBuf,
        #[command(flatten)]
        files: router::Files,
    },
}

#[derive(Subcommand)]
enum GatewayVerb {
    /// Check a configuration file and print it with every default filled in.
    Check {
        /// The file, as for `serve --config`.
        file: PathBuf,
    },
    /// Train the classifier of `policy = "task"` on labelled prompts.
    TrainRouter {
        /// JSON lines: {prompt, label}, or {prompt, model, score}.
        #[arg(long, value_name = "FILE")]
        data: PathBuf,
        #[command(flatten)]
        files: router::Files,
    },
    /// Choose the threshold of `policy = "quality"` from evaluation results.
    Calibrate {
        /// JSON lines: {prompt, scores: {model: score}}.
        #[arg(long, value_name = "FILE")]
        data: PathBuf,
        /// The model that is better and dearer.
        #[arg(long, value_name = "MODEL")]
        strong: String,
        /// The model that is cheaper.
        #[arg(long, value_name = "MODEL")]
        weak: String,
        #[command(flatten)]
        wanted: router::Wanted,
        #[command(flatten)]
        files: router::Files,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = tokio::runtime::Runtime::new()
        .map_err(anyhow::Error::from)
        .and_then(|rt| rt.block_on(run(args)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            out::error(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<()> {
    let Args { home, json, verb } = args;
    ashlar_kernels::Isa::chosen()?;
    match verb {
        Verb::Up { recipe, no_serve, listen } => {
            up::run(&up::Options { recipe, home, json, no_serve, listen }).await
        }
        Verb::Trace { id, dot } => trace::run(&home, &id, dot, json).await,
        Verb::Takedown { id, reason, dry_run } => {
            takedown::run(&home, &id, &reason, dry_run, json).await
        }
        Verb::Serve { model, config, listen, door, engine } => {
            serve::run(&home, model.as_deref(), config.as_deref(), &listen, door, &engine, json).await
        }
        Verb::Gateway { what } => match what {
            GatewayVerb::Check { file } => serve::check_config(&file, json),
            GatewayVerb::TrainRouter { data, files } => router::train(&data, &files, json),
            GatewayVerb::Calibrate { data, strong, weak, wanted, files } => {
                router::calibrate(&data, (&strong, &weak), &wanted, &files, json)
            }
        },
        Verb::Keys { at, what } => keys::keys(&home, &at, what, json).await,
        Verb::Teams { at, what } => keys::teams(&home, &at, what, json).await,
        Verb::Usage(args) => usage::run(&home, &args, json).await,
        Verb::Guard { what: GuardVerb::Train { data, files } } => guard::train(&data, &files, json),
        Verb::Abuse { what } => abuse::run(&home, what, json).await,
        Verb::Chat { model, template } => chat::run(&home, &model, template).await,
        Verb::Bench { what } => bench::run(what, json).await,
        Verb::Sign { dir, key } => sign::sign(&dir, &key, json),
        Verb::Verify { ledger: true, .. } => sign::verify_ledger(&home, json).await,
        Verb::Verify { dir: Some(dir), public_key: Some(key), signature, .. } => {
            sign::verify(&dir, &key, signature.as_deref(), json)
        }
        // clap lets nothing else through (`required_unless_present`).
        Verb::Verify { .. } => anyhow::bail!("verify needs DIR and --public-key, or --ledger"),
        Verb::Doctor => doctor::run(&home, json),
    }
}
