//! The guard of an answer: every piece goes in, and what may leave comes out.
//!
//! A whole answer is judged whole: nothing of it leaves before. In a stream each
//! text has a channel of its own; when another text of the same choice goes on
//! for the first time, or the choice ends, what a channel still holds leaves
//! first. A block ends the
//! stream with `finish_reason: "content_filter"`, and the upstream is told to
//! stop by being dropped.
//!
//! What may not happen here: a piece whose form is not known passes, or a text
//! leaves by a way that is no channel (`shape`).

use super::{
    Action, Stage,
    active::Active,
    channel::{Channel, Outcome},
    judge::Judgement,
    policy::Check,
    shape::{self, Shape},
};
use crate::upstream::{Chunk, End, Piece, Tokens, json_string};
use ashlar_api::{ApiError, Finish};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, sync::Arc};
use tokio::task::JoinSet;

/// Most choices and texts of an answer.
const CHANNELS: usize = 4096;
/// Most bytes of the names of one kind in an answer.
const NAMES: usize = 4096;
/// What names the verdict on an answer's form.
const SHAPE: &str = "(shape)";

type Key = (u64, String);

/// One answer's guard.
pub(crate) struct Answer {
    active: Arc<Active>,
    stream: bool,
    channels: BTreeMap<Key, Channel>,
    /// Choices that have been seen, and whether they ended.
    choices: BTreeMap<u64, bool>,
    /// Names, joined as a client joins them.
    names: BTreeMap<String, String>,
    /// `object` and `created` of a stream's chunks.
    head: Map<String, Value>,
    /// Judges that are asked while text leaves.
    asked: JoinSet<(usize, Result<Judgement, String>)>,
    prompt: Tokens,
    gains: u32,
    blocked: bool,
    chat: bool,
}

/// The answer ends here.
struct Blocked;

impl Answer {
    /// A guard by `active`. `prompt` is what the prompt is taken for where no one
    /// counts it.
    pub(crate) fn new(active: Arc<Active>, stream: bool, chat: bool, prompt: u32) -> Self {
        Self {
            active,
            stream,
            channels: BTreeMap::new(),
            choices: BTreeMap::new(),
            names: BTreeMap::new(),
            head: Map::new(),
            asked: JoinSet::new(),
            prompt: Tokens::estimate(prompt, 0),
            gains: 0,
            blocked: false,
            chat,
        }
    }

    /// Whether the upstream need not go on.
    pub(crate) fn over(&self) -> bool {
        self.blocked && self.stream
    }

    /// What `piece` lets leave, in order.
    pub(crate) async fn push(&mut self, piece: Piece) -> Vec<Piece> {
        match piece {
            Piece::Started { prompt_tokens, cached_tokens } => {
                let cached = cached_tokens.min(prompt_tokens);
                self.prompt = Tokens { input: prompt_tokens - cached, cache_read: cached, ..Tokens::default() };
                vec![piece]
            }
            Piece::Text(text) => {
                self.gains = self.gains.saturating_add(1);
                if !self.stream && self.blocked {
                    return vec![Piece::Text(String::new())];
                }
                match self.text(&(0, "content".into()), &text, false).await {
                    Ok(free) => vec![Piece::Text(free)],
                    Err(Blocked) => self.block(),
                }
            }
            // Only this guard makes it.
            Piece::Rest(_) => Vec::new(),
            Piece::Chunk(chunk) if !self.active.enforces() => {
                self.watch(&chunk).await;
                vec![Piece::Chunk(chunk)]
            }
            Piece::Chunk(chunk) => {
                self.gains = self.gains.saturating_add(chunk.gains);
                // The whole answer was paid for, whoever sees it.
                let (gains, usage) = (chunk.gains, chunk.usage.clone().filter(|_| !self.stream));
                match self.chunk(chunk).await {
                    Ok(pieces) => pieces,
                    Err(Blocked) => {
                        let mut out = self.block();
                        if let Some(Piece::Chunk(c)) = out.first_mut() {
                            (c.gains, c.usage) = (gains, usage);
                        }
                        out
                    }
                }
            }
            Piece::Done(end) => self.done(end).await,
        }
    }

    /// Adds to a channel; what may leave of it.
    async fn text(&mut self, key: &Key, text: &str, end: bool) -> Result<String, Blocked> {
        if !self.channels.contains_key(key) && self.channels.len() >= CHANNELS {
            self.shape("too_many_texts");
            return Err(Blocked);
        }
        let channel = self.channels.entry(key.clone()).or_insert_with(|| Channel::named(&key.1));
        channel.push(text);
        // Judged whole, or not at all until its end.
        if !end && (!self.stream || self.active.whole()) {
            return Ok(String::new());
        }
        let active = self.active.clone();
        for due in channel.due(&active, end) {
            let policy = &active.policies[due.policy];
            if policy.holds() {
                if active.judged(policy, Stage::Answer, &due.window).await && policy.action == Action::Block {
                    return Err(Blocked);
                }
            } else {
                let active = active.clone();
                self.asked.spawn(async move {
                    let policy = &active.policies[due.policy];
                    (due.policy, active.ask(policy, Stage::Answer, &due.window).await)
                });
            }
        }
        while let Some(answer) = self.asked.try_join_next() {
            self.late(answer)?;
        }
        if end && self.schema(key) {
            return Err(Blocked);
        }
        let channel = self.channels.entry(key.clone()).or_insert_with(|| Channel::named(&key.1));
        match channel.advance(&active, end) {
            Outcome::Free(free) => {
                self.active.log.release(&free);
                Ok(free)
            }
            Outcome::Blocked => Err(Blocked),
        }
    }

    /// A judge's word that text did not wait for.
    fn late(&mut self, answer: Result<(usize, Result<Judgement, String>), tokio::task::JoinError>) -> Result<(), Blocked> {
        let Ok((policy, judgement)) = answer else { return Ok(()) };
        let policy = &self.active.policies[policy];
        let violates = self.active.weigh(policy, Stage::Answer, judgement);
        if violates && policy.action == Action::Block { Err(Blocked) } else { Ok(()) }
    }

    /// Whether a whole text is not of the schema, and that ends the answer.
    fn schema(&self, key: &Key) -> bool {
        let text = match (key.1.as_str(), self.channels.get(key)) {
            ("content" | "text", Some(channel)) if !channel.text().is_empty() => channel.text(),
            // A choice that only calls has no text to be JSON.
            _ => return false,
        };
        let mut block = false;
        for policy in &self.active.policies {
            let Check::Schema(own) = &policy.check else { continue };
            let Some(schema) = own.as_ref().or(self.active.schema.as_ref()) else { continue };
            if schema.check(text).is_err() {
                self.active.found(policy, Stage::Answer, "schema", 1.0);
                block |= policy.action == Action::Block;
            }
        }
        block
    }

    fn shape(&self, word: &str) {
        if self.active.log.note(SHAPE, Stage::Answer, Action::Block, word, 1.0) {
            self.active.counters.verdict(SHAPE, Stage::Answer, Action::Block, word);
        }
    }

    /// Looks at a chunk that passes as it is.
    async fn watch(&mut self, chunk: &Chunk) {
        let object = serde_json::from_str::<Map<String, Value>>(&format!("{{{}}}", chunk.fields));
        let read = object.map_err(|_| "no_object").and_then(|mut object| Ok((shape::read(&mut object)?, object)));
        let (shape, object) = match read {
            Ok(read) => read,
            Err(word) => {
                // An enforcing policy would end the answer here.
                self.active.log.note(SHAPE, Stage::Answer, Action::Shadow, word, 1.0);
                return;
            }
        };
        let object = Value::Object(object);
        for leaf in &shape.leaves {
            let text = object.pointer(&leaf.at).and_then(Value::as_str).unwrap_or("").to_owned();
            let ends = !self.stream || shape.choices.iter().any(|(c, _, ends)| *c == leaf.choice && *ends);
            // Nothing enforces, so nothing is blocked.
            let _ = self.text(&(leaf.choice, leaf.channel.clone()), &text, ends).await;
        }
    }

    async fn chunk(&mut self, mut chunk: Chunk) -> Result<Vec<Piece>, Blocked> {
        if self.blocked {
            return Ok(Vec::new());
        }
        let Ok(mut object) = serde_json::from_str::<Map<String, Value>>(&format!("{{{}}}", chunk.fields)) else {
            self.shape("no_object");
            return Err(Blocked);
        };
        let shape = shape::read(&mut object).map_err(|word| {
            self.shape(word);
            Blocked
        })?;
        for name in &shape.removed {
            self.active.log.note(SHAPE, Stage::Answer, Action::Redact, name, 1.0);
        }
        self.named(&shape)?;
        for key in ["object", "created"] {
            if let Some(value) = object.get(key) {
                self.head.insert(key.into(), value.clone());
            }
        }
        let (mut before, mut says, mut own) = (Vec::new(), shape.speaks, String::new());
        let mut object = Value::Object(object);
        for (choice, ..) in &shape.choices {
            self.choices.entry(*choice).or_insert(false);
        }
        for leaf in &shape.leaves {
            let text = object.pointer(&leaf.at).and_then(Value::as_str).unwrap_or("").to_owned();
            if self.stream && !text.is_empty() {
                before.extend(self.others(leaf.choice, Some(&leaf.channel)).await?);
            }
            let ends = !self.stream || shape.choices.iter().any(|(c, _, ends)| *c == leaf.choice && *ends);
            let free = self.text(&(leaf.choice, leaf.channel.clone()), &text, ends).await?;
            says |= !free.is_empty();
            if leaf.choice == 0 && matches!(leaf.channel.as_str(), "content" | "text") {
                own.push_str(&free);
            }
            if let Some(place) = object.pointer_mut(&leaf.at) {
                *place = free.into();
            }
        }
        for (choice, _, ends) in shape.choices.iter().filter(|(_, _, ends)| *ends) {
            // The finish may not overtake the text.
            before.extend(self.others(*choice, None).await?);
            self.choices.insert(*choice, *ends);
        }
        if !self.stream {
            // No verdict comes after the answer.
            self.verdicts().await?;
        }
        (chunk.fields, chunk.text) = (fields(&object), own);
        if !says && !chunk.bare && chunk.usage.is_none() && self.stream {
            // Tokens came, and what they say waits.
            chunk = Chunk { gains: chunk.gains, bare: true, ..Chunk::default() };
        }
        before.push(Piece::Chunk(chunk));
        Ok(before)
    }

    /// Names are short and leave as they are: one that violates ends the answer.
    fn named(&mut self, shape: &Shape) -> Result<(), Blocked> {
        for (what, name) in &shape.names {
            let joined = self.names.entry(what.clone()).or_default();
            if joined == name {
                continue;
            }
            joined.push_str(name);
            if joined.len() > NAMES {
                self.shape("name_too_long");
                return Err(Blocked);
            }
            for policy in self.active.policies.iter().filter(|p| p.action.enforces()) {
                if let Some(hit) = policy.hits(joined).into_iter().next() {
                    self.active.found(policy, Stage::Answer, &hit.kind, 1.0);
                    return Err(Blocked);
                }
            }
        }
        Ok(())
    }

    /// What a choice's channels hold, as chunks of their own: at its end, or
    /// because the channel `next` goes on. For that a channel is let go once only:
    /// texts that take turns would put a secret together piece by piece.
    async fn others(&mut self, choice: u64, next: Option<&str>) -> Result<Vec<Piece>, Blocked> {
        let due = |name: &str, ch: &Channel| ch.waits() && next.is_none_or(|next| name != next && !ch.passed);
        let waiting = self.channels.iter_mut().filter(|((c, name), ch)| *c == choice && due(name, ch));
        let waiting: Vec<Key> = waiting
            .map(|(key, ch)| {
                ch.passed |= next.is_some();
                key.clone()
            })
            .collect();
        let mut out = Vec::new();
        for key in waiting {
            let free = self.text(&key, "", true).await?;
            if free.is_empty() {
                continue;
            }
            let mut object = self.head.clone();
            object.insert("choices".into(), json!([shape::addition(key.0, &key.1, &free)]));
            let own = key.0 == 0 && matches!(key.1.as_str(), "content" | "text");
            out.push(Piece::Chunk(Chunk {
                fields: fields(&Value::Object(object)),
                text: if own { free } else { String::new() },
                ..Chunk::default()
            }));
        }
        Ok(out)
    }

    /// Waits for all judges that are still asked.
    async fn verdicts(&mut self) -> Result<(), Blocked> {
        while let Some(answer) = self.asked.join_next().await {
            self.late(answer)?;
        }
        Ok(())
    }

    async fn done(&mut self, mut end: End) -> Vec<Piece> {
        if !self.blocked {
            match self.rest().await {
                Ok(mut pieces) => {
                    pieces.push(Piece::Done(end));
                    return pieces;
                }
                Err(Blocked) => {
                    let mut pieces = self.block();
                    if self.stream {
                        // All tokens are counted: the answer is there, and stays.
                        if let Some(Piece::Done(ours)) = pieces.last_mut() {
                            ours.tokens = end.tokens;
                        }
                        return pieces;
                    }
                }
            }
        }
        (end.finish, end.refused) = (Finish::ContentFilter, true);
        vec![Piece::Done(end)]
    }

    async fn rest(&mut self) -> Result<Vec<Piece>, Blocked> {
        let mut out = Vec::new();
        // An engine's text has no chunks.
        let engine = self.head.is_empty() && self.choices.is_empty();
        if engine {
            let key = (0, "content".to_owned());
            if self.channels.contains_key(&key) {
                out.push(Piece::Rest(self.text(&key, "", true).await?));
            }
        } else {
            let choices: Vec<u64> = self.choices.keys().copied().collect();
            for choice in choices {
                out.extend(self.others(choice, None).await?);
            }
        }
        self.verdicts().await?;
        Ok(out)
    }

    /// The end of a blocked answer.
    fn block(&mut self) -> Vec<Piece> {
        self.blocked = true;
        self.asked.abort_all();
        let engine = self.head.is_empty() && self.choices.is_empty();
        let mut out = Vec::new();
        if !engine {
            let open: Vec<u64> = self.choices.iter().filter(|(_, ended)| !**ended).map(|(c, _)| *c).collect();
            let open = if self.choices.is_empty() { vec![0] } else { open };
            let all: Vec<u64> = if self.stream { open } else { self.choices.keys().copied().collect() };
            let choice = |index: u64| match (self.chat, self.stream) {
                (true, true) => json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": "content_filter"}),
                (true, false) => json!({"index": index, "message": {"role": "assistant", "content": "", "refusal": null},
                    "logprobs": null, "finish_reason": "content_filter"}),
                (false, _) => json!({"index": index, "text": "", "logprobs": null, "finish_reason": "content_filter"}),
            };
            let mut object = self.head.clone();
            let form = match (self.chat, self.stream) {
                (true, true) => "chat.completion.chunk",
                (true, false) => "chat.completion",
                (false, _) => "text_completion",
            };
            object.entry("object").or_insert_with(|| form.into());
            object.insert("choices".into(), all.into_iter().map(choice).collect());
            out.push(Piece::Chunk(Chunk { fields: fields(&Value::Object(object)), ..Chunk::default() }));
        } else if !self.stream {
            out.push(Piece::Text(String::new()));
        }
        if self.stream {
            out.push(Piece::Done(End {
                finish: Finish::ContentFilter,
                refused: true,
                tokens: Tokens { output: self.gains, ..self.prompt },
                timings: None,
            }));
        }
        out
    }

    /// Writes down what counts against the end user.
    pub(crate) async fn strike(&self, response: &str) {
        self.active.strike(response).await;
    }

    /// An error on its way out: an upstream's words may hold the answer's.
    pub(crate) fn error(&self, mut error: ApiError) -> ApiError {
        for policy in self.active.policies.iter().filter(|p| p.action.enforces()) {
            let hits = policy.hits(&error.message);
            if let Some(hit) = hits.first() {
                self.active.found(policy, Stage::Answer, &hit.kind, 1.0);
            }
            if policy.action == Action::Block && !hits.is_empty() {
                error.message = "the backend failed; its words are withheld by the guard".into();
                continue;
            }
            error.message = super::redacted(&error.message, hits);
        }
        error
    }
}

/// An object without its braces, on one line.
fn fields(object: &Value) -> String {
    let mut out = String::new();
    for (key, value) in object.as_object().into_iter().flatten() {
        if !out.is_empty() {
            out.push(',');
        }
        json_string(&mut out, key);
        out.push(':');
        out.push_str(&value.to_string());
    }
    out
}

#[cfg(test)]
mod tests;
