//! How far a quantized model's next-token distributions are from the exact
//! model's: Kullback–Leibler divergence and same-top share.
//!
//! Accuracy hides flips that cancel, so the gate looks at both (per-item flips
//! come from `eval`).

use ashlar_model::{BLOCK, Item, KvCache, Model, ModelError, Want, Workspace};
use serde::{Deserialize, Serialize};

/// Divergence over all positions compared.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    /// Positions compared.
    pub positions: usize,
    /// Mean KL(exact ‖ quantized) in nats.
    pub kl_mean: f64,
    /// Median KL in nats.
    pub kl_p50: f64,
    /// 99th percentile of KL in nats.
    pub kl_p99: f64,
    /// Largest KL in nats.
    pub kl_max: f64,
    /// Share of positions where both rank the same token first, 0…1.
    pub same_top: f64,
}

/// Runs both models over `texts` (token ids, each at least one) and compares
/// every position.
///
/// # Errors
/// As [`Model::forward`]. No texts gives zero positions and zero drift.
pub fn compare(
    exact: &Model,
    quantized: &Model,
    texts: &[Vec<u32>],
    ws: &mut Workspace,
) -> Result<Drift, ModelError> {
    let (mut kls, mut same) = (Vec::new(), 0usize);
    for tokens in texts {
        let p = all_logits(exact, tokens, ws)?;
        let q = all_logits(quantized, tokens, ws)?;
        for (p, q) in p.iter().zip(&q) {
            kls.push(kl(p, q));
            same += usize::from(argmax(p) == argmax(q));
        }
    }
    kls.sort_by(f64::total_cmp);
    let n = kls.len();
    let at = |share: f64| {
        kls.get(((n as f64 * share) as usize).min(n.saturating_sub(1)))
            .copied()
    };
    Ok(Drift {
        positions: n,
        kl_mean: kls.iter().sum::<f64>() / n.max(1) as f64,
        kl_p50: at(0.5).unwrap_or(0.0),
        kl_p99: at(0.99).unwrap_or(0.0),
        kl_max: kls.last().copied().unwrap_or(0.0),
        same_top: same as f64 / n.max(1) as f64,
    })
}

fn all_logits(
    model: &Model,
    tokens: &[u32],
    ws: &mut Workspace,
) -> Result<Vec<Vec<f32>>, ModelError> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(BLOCK) as u32).collect();
    let mut kv = KvCache::new(model.config(), blocks.len());
    let item = Item {
        tokens,
        start: 0,
        blocks: &blocks,
        want: Want::All,
    };
    let logits = model.forward(&[item], &mut kv, ws)?;
    let rows = (0..tokens.len()).map(|r| logits.row(r).to_vec()).collect();
    Ok(rows)
}

fn argmax(row: &[f32]) -> usize {
    row.iter()
        .enumerate()
        .fold(
            (0, f32::NEG_INFINITY),
            |b, (i, &v)| if v > b.1 { (i, v) } else { b },
        )
        .0
}

/// KL(softmax(p) ‖ softmax(q)) in nats, from logits, in f64.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let norm = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = x.iter().map(|v| f64::from(v - max).exp()).sum();
        f64::from(max) + sum.ln()
    };
    let (np, nq) = (norm(p), norm(q));
    p.iter()
        .zip(q)
        .map(|(&a, &b)| {
            let lp = f64::from(a) - np;
            lp.exp() * (lp - (f64::from(b) - nq))
        })
        .sum::<f64>()
        .max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_by_hand() {
        let (p, q) = ([0.5f32.ln(), 0.5f32.ln()], [0.25f32.ln(), 0.75f32.ln()]);
        let want = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((kl(&p, &q) - want).abs() < 1e-6);
        assert_eq!(kl(&p, &p), 0.0);
        // Logits are defined up to a constant.
        assert!(kl(&[1000.0, 1001.0], &[0.0, 1.0]) < 1e-6);
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
    }
}
