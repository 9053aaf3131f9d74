//! The two task shapes the spine needs: a generated answer that must hold its
//! key strings, and a choice picked by log-likelihood.

use ashlar_api::{ApiError, Backend, ChatMessage, ChatRequest, Event};
use ashlar_core::{Fault, Hint};
use futures::StreamExt;
use serde::{Deserialize, Serialize};

/// A question whose answer is checked by the strings it must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QaItem {
    /// Stable id; results are paired by it.
    pub id: String,
    /// What is asked.
    pub question: String,
    /// Every one of these must appear in the answer (letter case and white
    /// space folded).
    pub accept: Vec<String>,
}

/// A question with fixed choices, scored by `log P(choice | question)` divided
/// by the choice's characters (lm-evaluation-harness's `acc_norm`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChoiceItem {
    /// The question, without its choices.
    pub question: String,
    /// The choices in order.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

/// What one item came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ItemResult {
    /// The item's id.
    pub id: String,
    /// The question asked.
    pub question: String,
    /// The answer given: text, or the choice picked.
    pub answer: String,
    /// Whether it counts as right.
    pub right: bool,
}

/// One model on one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The task's name.
    pub task: String,
    /// The model as the backend names it.
    pub model: String,
    /// One entry an item, in the task's order.
    pub items: Vec<ItemResult>,
}

impl Report {
    /// Number of right items.
    pub fn right(&self) -> usize {
        self.items.iter().filter(|i| i.right).count()
    }

    /// Share of right items in 0…1; 0 for no items.
    pub fn accuracy(&self) -> f64 {
        self.right() as f64 / self.items.len().max(1) as f64
    }

    /// Outcomes of two reports on the same items, in order.
    ///
    /// # Errors
    /// When the two do not hold the same item ids in the same order.
    pub fn paired<'a>(
        &'a self,
        other: &'a Self,
    ) -> Result<impl Iterator<Item = (bool, bool)> + 'a, EvalError> {
        let ids = |r: &'a Self| r.items.iter().map(|i| &i.id);
        if !ids(self).eq(ids(other)) {
            return Err(EvalError::Unpaired {
                first: self.items.len(),
                second: other.items.len(),
                task: self.task.clone(),
            });
        }
        Ok(self
            .items
            .iter()
            .zip(&other.items)
            .map(|(a, b)| (a.right, b.right)))
    }
}

/// Why a task could not be run or compared.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The backend refused or broke.
    #[error("item {item:?} of task {task:?}: {source}")]
    Backend {
        /// The task's name.
        task: String,
        /// The item's id.
        item: String,
        /// What the backend said.
        source: ApiError,
    },
    /// An item that cannot be scored.
    #[error("item {item:?} of task {task:?}: {why}")]
    Item {
        /// The task's name.
        task: String,
        /// The item's id.
        item: String,
        /// What is wrong with it.
        why: String,
    },
    /// Two reports that are not about the same items.
    #[error("reports on {task:?} do not hold the same items ({first} and {second})")]
    Unpaired {
        /// The task's name.
        task: String,
        /// Items of the first.
        first: usize,
        /// Items of the second.
        second: usize,
    },
}

impl Hint for EvalError {
    fn fault(&self) -> Fault {
        match self {
            Self::Backend { source, .. } if source.status >= 500 => Fault::Environment,
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Unpaired { .. } => Some("run both models on the same item file".into()),
            Self::Item { .. } => Some("mend or remove the item in the task file".into()),
            Self::Backend { .. } => None,
        }
    }
}

/// White space runs as one space, letters lower-cased, so that line breaks and
/// capitals do not decide.
fn fold(text: &str) -> String {
    text.to_lowercase()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// Asks each question at temperature 0 with at most `max_tokens` tokens and
/// marks it by its key strings. `progress` is told the items done.
///
/// Items go to the backend eight at a time; the results keep the task's order.
///
/// # Errors
/// An item without key strings, or the backend's first refusal.
pub async fn run_qa(
    backend: &dyn Backend,
    model: &str,
    task: &str,
    items: &[QaItem],
    max_tokens: u32,
    progress: impl Fn(usize) + Sync,
) -> Result<Report, EvalError> {
    let done = std::sync::atomic::AtomicUsize::new(0);
    let results: Vec<_> = futures::stream::iter(items)
        .map(|item| {
            let (progress, done) = (&progress, &done);
            async move {
                let r = ask(backend, model, task, item, max_tokens).await;
                progress(done.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1);
                r
            }
        })
        .buffered(8)
        .collect()
        .await;
    let items = results.into_iter().collect::<Result<_, _>>()?;
    Ok(Report {
        task: task.into(),
        model: model.into(),
        items,
    })
}

async fn ask(
    backend: &dyn Backend,
    model: &str,
    task: &str,
    item: &QaItem,
    max_tokens: u32,
) -> Result<ItemResult, EvalError> {
    if item.accept.iter().all(|a| a.trim().is_empty()) {
        let why = "no string in \"accept\", so any answer would count as right".into();
        return Err(EvalError::Item {
            task: task.into(),
            item: item.id.clone(),
            why,
        });
    }
    let fail = |source| EvalError::Backend {
        task: task.into(),
        item: item.id.clone(),
        source,
    };
    let mut request = ChatRequest::new(model, vec![ChatMessage::user(&item.question)]);
    request.temperature = Some(0.0);
    request.max_tokens = Some(max_tokens);
    let mut stream = backend.chat(request).await.map_err(fail)?;
    let mut answer = String::new();
    while let Some(event) = stream.next().await {
        if let Event::Token { text, .. } = event.map_err(fail)? {
            answer.push_str(&text);
        }
    }
    let folded = fold(&answer);
    let right = item.accept.iter().all(|a| folded.contains(&fold(a)));
    Ok(ItemResult {
        id: item.id.clone(),
        question: item.question.clone(),
        answer,
        right,
    })
}

/// Picks each item's most likely choice after `Question: …\nAnswer:`.
///
/// # Errors
/// An item whose answer index is not a choice, or the backend's first refusal.
pub async fn run_choice(
    backend: &dyn Backend,
    model: &str,
    task: &str,
    items: &[ChoiceItem],
    progress: impl Fn(usize),
) -> Result<Report, EvalError> {
    let mut out = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let id = format!("{task}-{index}");
        if item.answer >= item.choices.len() {
            let why = format!("answer {} of {} choices", item.answer, item.choices.len());
            return Err(EvalError::Item {
                task: task.into(),
                item: id,
                why,
            });
        }
        let prompt = format!("Question: {}\nAnswer:", item.question);
        let mut best = (f64::NEG_INFINITY, 0);
        for (c, choice) in item.choices.iter().enumerate() {
            let score = backend
                .score(&prompt, &format!(" {choice}"))
                .await
                .map_err(|source| EvalError::Backend {
                    task: task.into(),
                    item: id.clone(),
                    source,
                })?;
            let norm = score.logprob / choice.chars().count().max(1) as f64;
            if norm > best.0 {
                best = (norm, c);
            }
        }
        out.push(ItemResult {
            id,
            question: item.question.clone(),
            answer: item.choices[best.1].clone(),
            right: best.1 == item.answer,
        });
        progress(index + 1);
    }
    Ok(Report {
        task: task.into(),
        model: model.into(),
        items: out,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(rights: &[bool]) -> Report {
        let items = rights.iter().enumerate().map(|(i, &right)| ItemResult {
            id: i.to_string(),
            question: String::new(),
            answer: String::new(),
            right,
        });
        Report {
            task: "t".into(),
            model: "m".into(),
            items: items.collect(),
        }
    }

    #[test]
    fn pairing_needs_the_same_items() {
        let (a, b) = (report(&[true, false]), report(&[true, true]));
        assert_eq!(crate::mcnemar(a.paired(&b).unwrap()).gained, 1);
        assert!(a.paired(&report(&[true])).is_err());
        assert_eq!(b.accuracy(), 1.0);
        assert_eq!(report(&[]).accuracy(), 0.0);
    }

    #[test]
    fn folding() {
        assert_eq!(fold("  Pier\n 9 "), "pier 9");
    }
}
