//! `ashlar chat`: a conversation in the terminal, recorded like any other.

use crate::{
    out,
    serve::{self, TemplateArg},
};
use anyhow::Result;
use ashlar_store::Store;
use serde_json::json;
use std::{io::BufRead, path::Path};

/// Reads lines until the end of input; each is answered with the whole
/// conversation in view.
pub(crate) async fn run(home: &Path, model: &str, template: TemplateArg) -> Result<()> {
    let store = Store::open(home).await?;
    let server = serve::start(&store, model, serve::bind("127.0.0.1:0", false).await?, &template.engine()).await?;
    out::note("type a message; an empty line or Ctrl-D ends");
    let mut messages = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.trim().is_empty() {
            break;
        }
        messages.push(json!({"role": "user", "content": line}));
        let reply = server.chat(&messages, None).await?;
        out::line(reply.answer.clone());
        out::note(format!("  ({})", reply.response_id));
        messages.push(json!({"role": "assistant", "content": reply.answer}));
    }
    server.stop().await
}
