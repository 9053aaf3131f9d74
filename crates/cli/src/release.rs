//! The last two stages of `up`: sign the model's folder, pass the gate, move
//! the channel.
//!
//! The statement is a run's output before the channel moves, so a kill between
//! the two leaves a statement that the next `up` finds and uses.

use crate::{
    out,
    sign::SIGNATURE,
    up::{CODE, DataOut, Evals, Merged, PackOut, TrainOut, Up, output},
};
use anyhow::{Result, bail};
use ashlar_core::{ArtifactKind, Digest, clock};
use ashlar_eval::Report;
use ashlar_govern::{
    CardInput, GateInput, GatePolicy, KeyPair, LicencePolicy, Subject, card,
    card::Evaluation,
    gate,
    gate::{Comparison, Expectation, Score},
};
use ashlar_store::{Release, Stage};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A signed model folder.
pub(crate) struct Signed {
    pub folder: Digest,
    pub card: Digest,
    pub data_licences: BTreeMap<String, u64>,
}

fn score(report: &Report) -> Score {
    Score { correct: report.right() as u64, total: report.items.len() as u64 }
}

fn counts(value: &Value) -> BTreeMap<String, u64> {
    let map = value.as_object().into_iter().flatten();
    map.filter_map(|(k, v)| Some((k.clone(), v.as_u64()?))).collect()
}

impl Up {
    /// Lays out model, adapter and card in one folder and signs it.
    pub(crate) async fn sign(
        &mut self,
        base: Digest,
        data: &DataOut,
        pack: &PackOut,
        train: &TrainOut,
        merged: &Merged,
        evals: &Evals,
    ) -> Result<Signed> {
        let keys = KeyPair::open_or_create(&self.store.home().join("keys"))?;
        let public = Digest::of(&std::fs::read(&keys.public)?);
        let data_licences = self.data_licences(&data.snapshot).await?;
        let r = &self.recipe;
        let mut training: BTreeMap<String, String> = serde_json::to_value(&r.train)?
            .as_object()
            .into_iter()
            .flatten()
            .map(|(k, v)| (k.clone(), v.to_string()))
            .collect();
        for key in ["steps", "trained_tokens", "loss_first", "loss_last"] {
            training.insert(key.into(), train.summary[key].to_string());
        }
        training.insert("pack".into(), pack.pack.to_string());
        let drift = &evals.drift;
        let flips = &drift["quantization"];
        let quantization = BTreeMap::from([
            ("held-out questions right before and wrong after".into(), flips["lost"].to_string()),
            ("held-out questions wrong before and right after".into(), flips["gained"].to_string()),
            ("mean KL divergence, nats".into(), drift["drift"]["kl_mean"].to_string()),
            ("99th percentile of KL divergence, nats".into(), drift["drift"]["kl_p99"].to_string()),
            ("share of positions with the same first token".into(), drift["drift"]["same_top"].to_string()),
        ]);
        let text = card(&CardInput {
            name: r.name.clone(),
            licence: r.model.licence.clone(),
            languages: r.data.languages.clone(),
            base: r.model.hub.as_ref().map_or(r.model.name.clone(), |h| h.repository.clone()),
            base_digest: base,
            base_licence: r.model.licence.clone(),
            format: format!("{:?}", r.quantize.r#type),
            adapter: Some(train.adapter),
            snapshot: data.snapshot,
            raw: data.report["raw"].as_u64().unwrap_or(0),
            kept: data.report["kept"].as_u64().unwrap_or(0),
            dropped: counts(&data.report["dropped"]),
            redactions: counts(&data.report["redactions"]),
            data_licences: data_licences.clone(),
            training,
            evaluations: vec![
                Evaluation {
                    task: "held-out questions on the documents".into(),
                    base: score(&evals.base),
                    tuned: score(&evals.quantized),
                    p_value: Some(evals.comparison.p_value),
                },
                Evaluation {
                    task: "general knowledge (multiple choice)".into(),
                    base: score(&evals.general_base),
                    tuned: score(&evals.general_quantized),
                    p_value: ashlar_eval::mcnemar(evals.general_base.paired(&evals.general_quantized)?).p_value.into(),
                },
            ],
            quantization,
            intended_use: format!("Answers questions about the documents of {}.", r.name),
            limits: vec![
                "It can be wrong, and says so to no one: check an answer against the documents its trace shows.".into(),
                "Questions the documents do not answer get an invented answer.".into(),
                "The general set is small and shows only gross forgetting.".into(),
            ],
            gate: None,
        });
        let inputs = [("model", merged.quantized), ("adapter", train.adapter), ("evaluation", evals.evaluation)];
        let settings = json!({"public_key": public, "card": Digest::of(text.as_bytes())});
        let stage = self.store.stage("sign", &settings, &inputs, CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let folder = run.dir().join("release");
                if folder.exists() {
                    std::fs::remove_dir_all(&folder)?;
                }
                std::fs::create_dir_all(&folder)?;
                let name = format!("{}-{:?}.gguf", r.name, r.quantize.r#type);
                std::fs::copy(self.file(&merged.quantized)?, folder.join(name))?;
                self.store.materialize(&train.adapter, &folder.join("adapter")).await?;
                std::fs::write(folder.join("README.md"), &text)?;
                let signature = folder.join(SIGNATURE);
                let signed = ashlar_govern::sign_dir(&folder, &keys.private, &signature)?;
                run.output("card", ArtifactKind::Card, "README.md", &folder.join("README.md")).await?;
                run.output("signature", ArtifactKind::Signature, SIGNATURE, &signature).await?;
                run.output("folder", ArtifactKind::Model, &r.name, &folder).await?;
                run.finish(json!({"files": signed.files.len(), "public_key": public})).await?
            }
        };
        let says = format!("{} files, key {}", outcome.summary["files"], public.short());
        self.told(&outcome, &says);
        Ok(Signed { folder: output(&outcome, "folder")?, card: output(&outcome, "card")?, data_licences })
    }

    /// Kept documents of the snapshot by licence.
    async fn data_licences(&self, snapshot: &Digest) -> Result<BTreeMap<String, u64>> {
        let dir = tempfile::tempdir()?;
        self.store.materialize(snapshot, dir.path()).await?;
        let kept: std::collections::BTreeSet<_> =
            ashlar_data::read_kept(dir.path())?.into_iter().map(|k| (k.doc, k.id)).collect();
        let mut by_licence = BTreeMap::new();
        for o in ashlar_data::read_observations(dir.path())? {
            if kept.contains(&(o.doc, o.id)) {
                *by_licence.entry(o.licence.unwrap_or_default()).or_default() += 1;
            }
        }
        Ok(by_licence)
    }

    /// Passes the gate and points the channel at the model; the release's id.
    ///
    /// The incumbent is the channel's last release of another model that no
    /// takedown reaches: the candidate must not be worse beyond chance.
    pub(crate) async fn promote(
        &mut self,
        data: &DataOut,
        pack: &PackOut,
        train: &TrainOut,
        merged: &Merged,
        evals: &Evals,
        signed: &Signed,
    ) -> Result<String> {
        let r = self.recipe.clone();
        let channel = r.release.channel.as_str();
        let mut comparisons = vec![Comparison {
            with: "base".into(),
            score: score(&evals.base),
            p_value: evals.comparison.p_value,
            expect: Expectation::Better,
        }];
        let releases = self.store.releases().await?;
        let incumbent =
            releases.iter().find(|x| x.channel == channel && x.model != merged.quantized && !x.revoked);
        if let Some(incumbent) = incumbent {
            let theirs = self.measured("eval-incumbent", incumbent.model, pack, evals.general_set).await?.1.0;
            let split = ashlar_eval::mcnemar(theirs.paired(&evals.quantized)?);
            comparisons.push(Comparison {
                with: incumbent.id.clone(),
                score: score(&theirs),
                p_value: split.p_value,
                expect: Expectation::NotWorse,
            });
        }
        let policy = GatePolicy {
            min_accuracy: r.release.min_accuracy,
            max_p_value: r.release.max_p_value,
            max_forgetting: r.release.max_forgetting,
        };
        let open = self.store.open_takedowns(&merged.quantized).await?;
        let licences = LicencePolicy::new(r.data.licences.iter());
        let settings = json!({"channel": channel, "policy": policy, "comparisons": comparisons, "open_takedowns": open, "licences": licences});
        let inputs = [("folder", signed.folder), ("model", merged.quantized), ("evaluation", evals.evaluation)];
        let stage = self.store.stage("promote", &settings, &inputs, CODE).await?;
        let outcome = match stage {
            Stage::Reused(outcome) => outcome,
            Stage::Run(mut run) => {
                let keys = KeyPair::within(&self.store.home().join("keys"));
                let folder = self.folder(&signed.folder, &run).await?;
                let verified = ashlar_govern::verify_dir(&folder, &folder.join(SIGNATURE), &keys.public);
                let report = gate(&GateInput {
                    signature: verified.as_ref(),
                    held_out: score(&evals.quantized),
                    comparisons,
                    general_base: score(&evals.general_base),
                    general: score(&evals.general_quantized),
                    model_licence: Some(&r.model.licence),
                    data_licences: &signed.data_licences,
                    open_takedowns: &open,
                    policy: &policy,
                    licences: &licences,
                });
                for check in &report.checks {
                    let mark = if check.passed { "✓" } else { "✗" };
                    out::note(format!("    {mark} {:<11} {}", check.name, check.detail));
                }
                if !report.passed() {
                    let failed: Vec<_> = report.failed().map(|c| format!("{}: {}", c.name, c.detail)).collect();
                    run.fail(&failed.join("; ")).await?;
                    bail!("the gate refuses {}: {}", merged.quantized, failed.join("; "));
                }
                let roles = BTreeMap::from([
                    ("adapter".into(), train.adapter),
                    ("snapshot".into(), data.snapshot),
                    ("evaluation".into(), evals.evaluation),
                    ("card".into(), signed.card),
                    ("folder".into(), signed.folder),
                ]);
                let subject = Subject { name: r.name.clone(), digest: merged.quantized };
                let statement =
                    ashlar_govern::release_statement(channel, subject, &policy, &report, &roles, clock::now_ms())?;
                let envelope = ashlar_govern::sign_statement(&statement, &keys.private)?;
                run.output_bytes("statement", ArtifactKind::Signature, "release.dsse.json", &envelope).await?;
                run.finish(serde_json::to_value(&report)?).await?
            }
        };
        let statement = output(&outcome, "statement")?;
        let release = match self.store.current(channel).await? {
            Some(current) if current.statement == statement => current.id,
            _ => {
                let release = Release {
                    model: merged.quantized,
                    statement,
                    adapter: Some(train.adapter),
                    snapshot: Some(data.snapshot),
                    evaluation: Some(evals.evaluation),
                };
                self.store.release(channel, &release).await?
            }
        };
        let checks = outcome.summary["checks"].as_array().map_or(0, Vec::len);
        self.told(&outcome, &format!("{checks} checks passed; {channel} → {release}"));
        Ok(release)
    }
}
