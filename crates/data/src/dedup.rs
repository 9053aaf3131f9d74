//! Which documents are copies of which: candidate pairs by a group-by on MinHash
//! bands, each verified by its true Jaccard similarity, joined into clusters.
//!
//! Rejected: a self-join on the bands, which a group-by replaces (a group-by can
//! spill, a hash join cannot); unverified clusters, which merge what only looks
//! alike.

use crate::{DataError, MinHashConfig, minhash, table};
use datafusion::{
    arrow::{
        array::{AsArray, RecordBatch, UInt64Array},
        datatypes::UInt64Type,
    },
    prelude::SessionContext,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

/// Verified pairs over classes of equal text.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    /// Row → class; rows with the same text share one.
    pub class: Vec<usize>,
    /// `(a, b, jaccard)` with `a < b` and the similarity at the threshold or
    /// above, sorted.
    pub edges: Vec<(usize, usize, f64)>,
    /// Pairs that shared a band.
    pub candidates: u64,
    shingles: HashMap<usize, Vec<u64>>,
}

impl Pairs {
    /// The true similarity of two classes; 1 of a class with itself.
    pub(crate) fn similarity(&self, a: usize, b: usize) -> f64 {
        if a == b {
            return 1.0;
        }
        match (self.shingles.get(&a), self.shingles.get(&b)) {
            (Some(a), Some(b)) => minhash::jaccard(a, b),
            _ => 0.0,
        }
    }
}

/// Finds the pairs among all rows of the table `documents(row, body)`; `keys`
/// holds the `text_key` of each row.
pub(crate) async fn pairs(
    session: &SessionContext,
    keys: &[String],
    config: &MinHashConfig,
) -> Result<Pairs, DataError> {
    let mut first = HashMap::new();
    let mut out = Pairs {
        class: (0..keys.len())
            .map(|row| *first.entry(keys[row].as_str()).or_insert(row))
            .collect(),
        ..Pairs::default()
    };
    let (n, permutations, bands) = (config.ngram, config.permutations, config.bands);
    let buckets = session
        .sql(&format!(
            "SELECT array_agg(row) AS members FROM \
             (SELECT row, unnest(minhash_bands(body, {n}, {permutations}, {bands})) AS band \
              FROM documents) GROUP BY band HAVING count(*) > 1"
        ))
        .await?
        .collect()
        .await?;
    let mut candidates = BTreeSet::new();
    for batch in &buckets {
        let members = batch.column(0).as_list::<i32>();
        for bucket in members.iter().flatten() {
            let rows = bucket.as_primitive::<UInt64Type>().values();
            let classes: BTreeSet<usize> = rows
                .iter()
                .filter_map(|r| out.class.get(usize::try_from(*r).ok()?).copied())
                .collect();
            for (i, a) in classes.iter().enumerate() {
                candidates.extend(classes.iter().skip(i + 1).map(|b| (*a, *b)));
            }
        }
    }
    out.candidates = candidates.len() as u64;
    let rows: BTreeSet<u64> = candidates
        .iter()
        .flat_map(|(a, b)| [*a as u64, *b as u64])
        .collect();
    session.register_batch("candidates", row_table(rows)?)?;
    let shingles = session
        .sql(&format!(
            "SELECT d.row, shingles(d.body, {n}) AS shingles \
             FROM documents d JOIN candidates c ON d.row = c.row"
        ))
        .await?
        .collect()
        .await?;
    for batch in &shingles {
        let rows = batch.column(0).as_primitive::<UInt64Type>();
        let sets = batch.column(1).as_list::<i32>();
        for (row, set) in rows.values().iter().zip(sets.iter()) {
            let set = set.map(|s| s.as_primitive::<UInt64Type>().values().to_vec());
            out.shingles.insert(*row as usize, set.unwrap_or_default());
        }
    }
    for (a, b) in candidates {
        let similarity = out.similarity(a, b);
        if similarity >= config.threshold {
            out.edges.push((a, b, similarity));
        }
    }
    Ok(out)
}

/// A table of one column, `row`.
pub(crate) fn row_table(rows: impl IntoIterator<Item = u64>) -> Result<RecordBatch, DataError> {
    let rows: UInt64Array = rows.into_iter().collect::<Vec<_>>().into();
    table::table(vec![("row", Arc::new(rows))])
}

/// Joins `members` along `edges` between them; the cluster of each, named by
/// its smallest member.
pub(crate) fn clusters(
    members: impl IntoIterator<Item = usize>,
    edges: &[(usize, usize, f64)],
) -> BTreeMap<usize, usize> {
    let mut parent: BTreeMap<usize, usize> = members.into_iter().map(|m| (m, m)).collect();
    fn root(parent: &mut BTreeMap<usize, usize>, of: usize) -> usize {
        let mut at = of;
        while parent[&at] != at {
            let up = parent[&parent[&at]];
            parent.insert(at, up);
            at = up;
        }
        at
    }
    for (a, b, _) in edges {
        if parent.contains_key(a) && parent.contains_key(b) {
            let (a, b) = (root(&mut parent, *a), root(&mut parent, *b));
            parent.insert(a.max(b), a.min(b));
        }
    }
    let members: Vec<usize> = parent.keys().copied().collect();
    members
        .into_iter()
        .map(|m| (m, root(&mut parent, m)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_take_only_members() {
        let edges = [(0, 1, 1.0), (1, 2, 1.0), (3, 4, 1.0)];
        let all = clusters(0..6, &edges);
        assert_eq!(
            all.values().copied().collect::<Vec<_>>(),
            [0, 0, 0, 3, 3, 5]
        );
        // Without 1, nothing joins 0 and 2.
        let some = clusters([0, 2, 3, 4], &edges);
        assert_eq!(some, BTreeMap::from([(0, 0), (2, 2), (3, 3), (4, 3)]));
    }
}
