//! What the scheduler needs of a model, so that it can be tested without one.

use ashlar_model::{Item, KvCache, Model, ModelError, Workspace};
use std::sync::Arc;

/// A model together with its KV cache.
pub(crate) trait Forward: Send {
    /// Logits in a row.
    fn vocab(&self) -> usize;

    /// Runs the items, writing their keys and values into their blocks, and
    /// hands over the wanted rows in item order, numbered from 0.
    fn forward(
        &mut self,
        items: &[Item<'_>],
        row: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ModelError>;
}

/// The real one.
pub(crate) struct Local {
    pub(crate) model: Arc<Model>,
    pub(crate) cache: KvCache,
    pub(crate) workspace: Workspace,
}

impl Forward for Local {
    fn vocab(&self) -> usize {
        self.model.config().vocab
    }

    fn forward(
        &mut self,
        items: &[Item<'_>],
        row: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), ModelError> {
        let logits = self
            .model
            .forward(items, &mut self.cache, &mut self.workspace)?;
        for i in 0..logits.rows() {
            row(i, logits.row(i));
        }
        Ok(())
    }
}
