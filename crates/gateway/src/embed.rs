//! The encoder as the gateway knows it: texts in, unit vectors out.
//!
//! The command line opens the model; here it is a function, so that heads,
//! routing, guards and `/v1/embeddings` share one encoder and tests need none.
//!
//! What may not happen here: an encoder that computes on a thread which serves
//! connections.

use crate::{app::GatewayState, ask::Ask};
use ashlar_api::ApiError;
use ashlar_core::Digest;
use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc};

/// One vector of length 1 a text, all of the same dimensions. It computes:
/// call it on a blocking thread. Of a text longer than the encoder's context
/// the beginning counts.
///
/// # Errors
/// What the encoder fails with, e.g. 400 for a text it has no tokens for.
pub type Embed = Arc<dyn Fn(&[&str]) -> Result<Vec<Vec<f32>>, ApiError> + Send + Sync>;

/// Which encoder made a vector. Vectors of two encoders have nothing to do with
/// each other, though they may have the same dimensions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderId {
    /// Its name for people, and for clients of `/v1/embeddings`.
    pub name: String,
    /// Of its weights and its tokenizer.
    pub digest: Digest,
    /// Values of a vector.
    pub dimensions: usize,
}

/// The encoder behind [`Embed`].
#[derive(Clone)]
pub struct EncoderInfo {
    /// Which it is.
    pub id: EncoderId,
    /// Tokens of a text that fit.
    pub context: u32,
    /// Whether its vectors may be cut to fewer dimensions.
    pub truncatable: bool,
    /// The tokens of a text, those around it included.
    ///
    /// # Errors
    /// What the tokenizer refuses.
    pub tokens: Arc<dyn Fn(&str) -> Result<Vec<u32>, ApiError> + Send + Sync>,
}

impl fmt::Debug for EncoderInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EncoderInfo").field("id", &self.id).field("context", &self.context).finish_non_exhaustive()
    }
}

/// The vectors of `texts`, computed on a blocking thread.
///
/// # Errors
/// As [`Embed`], and 500 when it panics or gives another number of vectors.
pub(crate) async fn embed(embed: &Embed, texts: Vec<String>) -> Result<Vec<Vec<f32>>, ApiError> {
    let (embed, wanted) = (embed.clone(), texts.len());
    let work = move || embed(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let rows = tokio::task::spawn_blocking(work).await;
    let rows = rows.map_err(|e| ApiError::internal(format!("the encoder did not finish: {e}")))??;
    if rows.len() != wanted {
        return Err(ApiError::internal(format!("the encoder gave {} vectors for {wanted} texts", rows.len())));
    }
    Ok(rows)
}

/// Gives `ask` the vector of its question, or why it has none.
pub(crate) async fn question(state: &GatewayState, ask: &Ask) {
    let vector = match &state.embed {
        None => Err("there is no encoder".into()),
        Some(by) => match embed(by, vec![ask.question()]).await {
            Ok(rows) => rows.into_iter().next().ok_or_else(|| "the encoder gave nothing".into()),
            Err(e) => Err(e.message),
        },
    };
    // Set once: a request is routed once.
    let _ = ask.vector.set(vector);
}
