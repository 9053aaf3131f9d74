//! The engine as a [`Backend`]: checks and tokenizes a request on the caller's
//! side, hands it to the scheduler's thread, and streams what comes back.

use crate::{
    EngineError,
    forward::{Forward, Local},
    memory::{self, Available, MemorySource},
    plan::{MemoryPlan, Need, REQUEST_BYTES, TOKEN_BYTES},
    sampler::Sampler,
    scheduler::{Generate, Job, Limits, Room, Scheduler, Scoring, Shared, Work, message},
    stop::Stops,
    vocab::{folder, vocab},
};
use ashlar_api::{
    ApiError, Backend, BackendStats, ChatRequest, CompletionRequest, Event, EventStream, ModelInfo,
    Prompt, Sampling, Score,
};
use ashlar_core::{Digest, Fault, Hint, clock};
use ashlar_model::{GgufFile, KvCache, KvType, Model, PackedCache, Pool, Workspace, tensor_sizes};
use ashlar_text::{ChatTemplate, Message, TextError, Tokenizer};
use futures::Stream;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    pin::Pin,
    sync::{Arc, mpsc},
    task::{Context, Poll},
    thread::JoinHandle,
    time::Instant,
};
use tokio::sync::{mpsc as events, oneshot};

/// Text from this size on is tokenized off the caller's thread.
const LONG_TEXT: usize = 16 << 10;

/// How much an engine holds and does at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// KV blocks of [`ashlar_model::BLOCK`] tokens, shared by all requests. A
    /// request longer than all of them is refused, so this bounds the context
    /// too. `None` takes as many as the memory holds, up to `max_batch` whole
    /// contexts.
    pub kv_blocks: Option<usize>,
    /// How keys and values are kept.
    pub kv_type: KvType,
    /// Requests computed together.
    pub max_batch: usize,
    /// Prompt tokens a step; running requests wait that long for their next
    /// token.
    pub max_prefill: usize,
    /// Requests waiting; one more is refused with 429.
    pub max_queue: usize,
    /// Bytes of requests waiting; what would exceed them is refused with 429.
    pub max_queue_bytes: usize,
    /// Threads that compute; `None` is one for each processor this process may
    /// use.
    pub threads: Option<usize>,
    /// Bytes the engine may take in all, weights included; `None` is what the
    /// system and the control group leave, less a tenth.
    pub memory_bytes: Option<u64>,
}

impl Default for EngineConfig {
    /// A fitted cache, 16 at once, 256 prompt tokens a step, 256 of 32 MiB
    /// waiting, all processors.
    fn default() -> Self {
        Self {
            kv_blocks: None,
            kv_type: KvType::default(),
            max_batch: 16,
            max_prefill: 256,
            max_queue: 256,
            max_queue_bytes: 32 << 20,
            threads: None,
            memory_bytes: None,
        }
    }
}

/// A model served from this process.
pub struct LocalBackend {
    name: String,
    created: i64,
    room: Room,
    plan: MemoryPlan,
    /// Tokens of prompt and answer that fit.
    context: usize,
    vocab: usize,
    /// Bytes of the longest token: text beyond `context` times this cannot fit.
    longest: usize,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    shared: Arc<Shared>,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl LocalBackend {
    /// Serves `model` under `name`, chats only with a template; plans and allocates its cache and starts
    /// its thread. The model brings its own threads: `config.threads` is not
    /// looked at.
    ///
    /// # Errors
    /// [`EngineError::Vocabulary`], [`EngineError::Setting`],
    /// [`EngineError::Memory`], [`EngineError::Thread`].
    pub fn new(
        name: &str,
        model: Arc<Model>,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        config: EngineConfig,
    ) -> Result<Self, EngineError> {
        check(&config)?;
        let mut memory = available(&config);
        if memory.source != MemorySource::Setting {
            // The weights are in memory already.
            memory.bytes = memory.bytes.map(|b| b.saturating_add(model.bytes() as u64));
        }
        let head = model.config().head_dim;
        if config.kv_type == KvType::Int8 && !head.is_multiple_of(4) {
            return Err(EngineError::KvType { head });
        }
        let threads = model.pool().threads();
        let need = Need::of(model.config(), model.bytes(), threads, &config);
        let plan = MemoryPlan::fit(need, &config, memory)?;
        let forward = Local {
            cache: KvCache::of(model.config(), plan.kv_blocks, config.kv_type),
            workspace: Workspace::default(),
            model,
        };
        Self::start(name, forward, plan, tokenizer, template, config)
    }

    /// Serves the GGUF file at `path` with the tokenizer and template inside
    /// it, or the folder in Hugging Face's layout with those beside the weights;
    /// `template` is taken instead of theirs, packed weights from `cache`.
    /// Weights are held against free memory before they are read, and files not
    /// looked at after.
    ///
    /// # Errors
    /// Any [`EngineError`].
    pub fn open(
        name: &str,
        path: &Path,
        template: Option<&str>,
        cache: Option<&PackedCache>,
        config: EngineConfig,
    ) -> Result<Self, EngineError> {
        check(&config)?;
        let pool = Pool::new(config.threads.unwrap_or(0));
        let fits = |file: u64| {
            let memory = available(&config);
            match memory.bytes.filter(|&available| available < file) {
                None => Ok(()),
                Some(available) => Err(EngineError::FileMemory { file, available, source_of: memory.source }),
            }
        };
        if path.is_dir() {
            fits(tensor_sizes(path)?.iter().map(|t| t.bytes).sum())?;
            let (tokenizer, template) = folder(path, template)?;
            let model = Arc::new(Model::load_cached(path, pool, cache)?);
            return Self::new(name, model, tokenizer, template, config);
        }
        let (tokenizer, template, model) = GgufFile::read(path, |file, gguf| {
            fits(file.bytes())?;
            let (tokenizer, template) = vocab(gguf, template)?;
            Ok::<_, EngineError>((tokenizer, template, Model::from_file(file, gguf, pool, cache)?))
        })??;
        Self::new(name, Arc::new(model), tokenizer, template, config)
    }

    pub(crate) fn start(
        name: &str,
        forward: impl Forward + 'static,
        plan: MemoryPlan,
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        config: EngineConfig,
    ) -> Result<Self, EngineError> {
        let least = plan.context.saturating_mul(TOKEN_BYTES) + REQUEST_BYTES;
        if config.max_queue_bytes < least {
            return Err(EngineError::Setting {
                name: "max_queue_bytes",
                value: config.max_queue_bytes,
                least,
            });
        }
        let vocab = forward.vocab();
        if tokenizer.vocab_size() > vocab {
            return Err(EngineError::Vocabulary {
                tokenizer: tokenizer.vocab_size(),
                model: vocab,
            });
        }
        let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let longest = ids.map(|id| tokenizer.piece(id).len()).max().unwrap_or(1);
        let shared = Arc::new(Shared::default());
        let scheduler = Scheduler::new(
            forward,
            plan.kv_blocks,
            Limits {
                batch: config.max_batch,
                prefill: config.max_prefill,
            },
            ends(&tokenizer),
            Arc::clone(&shared),
        );
        let (jobs, inbox) = mpsc::channel();
        let health = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("ashlar-engine".into())
            .spawn(move || {
                // Unwinding drops the scheduler and with it every client's
                // channel, which its stream reports as an error.
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| scheduler.run(&inbox))) {
                    let why = format!("the scheduler stopped: {}", message(&*panic));
                    health.stats().unhealthy = Some(why);
                }
            })
            .map_err(EngineError::Thread)?;
        Ok(Self {
            name: name.to_owned(),
            created: clock::now_ms() / 1000,
            room: Room {
                requests: config.max_queue,
                bytes: config.max_queue_bytes,
                batch: config.max_batch,
            },
            context: plan.context,
            plan,
            vocab,
            longest: longest.max(1),
            tokenizer,
            template,
            shared,
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Where its memory goes.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn check_model(&self, model: &str) -> Result<(), ApiError> {
        if model == self.name {
            return Ok(());
        }
        Err(ApiError::unknown_model(
            model,
            std::slice::from_ref(&self.name),
        ))
    }

    /// 400 for text that cannot fit however it is tokenized, so that it is not.
    fn check_bytes(&self, bytes: usize, param: &str) -> Result<(), ApiError> {
        if bytes <= self.context.saturating_mul(self.longest) {
            return Ok(());
        }
        Err(too_long(
            format!(
                "{bytes} bytes of text are at least {} tokens; this model's context is {} tokens",
                bytes.div_ceil(self.longest),
                self.context
            ),
            param,
        ))
    }

    /// The number of tokens to generate, or 400 with the numbers.
    fn room(&self, prompt: usize, wanted: Option<u32>, param: &str) -> Result<usize, ApiError> {
        let room = self.context.saturating_sub(prompt);
        match wanted.map(|w| w as usize) {
            _ if room == 0 => Err(too_long(
                format!(
                    "the prompt has {prompt} tokens; this model's context of {} tokens leaves no \
                     room for an answer",
                    self.context
                ),
                param,
            )),
            Some(w) if w > room => Err(too_long(
                format!(
                    "the prompt has {prompt} tokens and max_tokens is {w}, together {}; this \
                     model's context is {} tokens",
                    prompt + w,
                    self.context
                ),
                param,
            )),
            wanted => Ok(wanted.unwrap_or(room)),
        }
    }

    fn generate(
        &self,
        tokens: Vec<u32>,
        s: &Sampling,
        turn: Turn,
        param: &str,
    ) -> Result<EventStream, ApiError> {
        let max_tokens = self.room(tokens.len(), s.max_tokens, param)?;
        if let Some((id, _)) = s.logit_bias.iter().find(|b| b.0 as usize >= self.vocab) {
            return Err(ApiError::bad_request(
                format!(
                    "logit_bias names token {id}, the model has {} tokens",
                    self.vocab
                ),
                Some("logit_bias"),
                Some("invalid_value"),
            ));
        }
        let (sender, receiver) = events::unbounded_channel();
        let extra = s.stop.iter().map(String::len).sum::<usize>() + 8 * s.logit_bias.len();
        let work = Work::Generate(Generate {
            events: sender,
            sampler: Sampler::new(s),
            decoder: self.tokenizer.stream(),
            stops: Stops::new(s.stop.clone()),
            max_tokens,
            every_token: s.logprobs,
        });
        self.send(tokens, work, turn, extra)?;
        Ok(Box::pin(Events {
            receiver,
            over: false,
            shared: Arc::clone(&self.shared),
        }))
    }

    /// 503 or 429 for a request that would be refused whatever it holds, so
    /// that no work is put into it.
    fn check_open(&self) -> Result<(), ApiError> {
        if let Some(why) = self.shared.stats().unhealthy.clone() {
            return Err(ApiError::unavailable(why));
        }
        self.shared.peek(self.room)
    }

    fn send(&self, tokens: Vec<u32>, work: Work, turn: Turn, extra: usize) -> Result<(), ApiError> {
        if let Some(why) = self.shared.stats().unhealthy.clone() {
            return Err(ApiError::unavailable(why));
        }
        let bytes = tokens
            .len()
            .saturating_mul(TOKEN_BYTES)
            .saturating_add(extra);
        let job = Job {
            tokens,
            work,
            priority: turn.priority,
            user: turn.user,
            ticket: self.shared.enter(bytes, self.room)?,
            sent: Instant::now(),
        };
        self.jobs
            .as_ref()
            .and_then(|jobs| jobs.send(job).ok())
            .ok_or_else(|| gone(&self.shared))
    }

    /// Runs `work` on the tokenizer, off an async worker when it may take long.
    async fn tokenize<T: Send + 'static>(
        bytes: usize,
        work: impl FnOnce() -> Result<T, TextError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let done = match tokio::runtime::Handle::try_current() {
            Ok(runtime) if bytes >= LONG_TEXT => runtime
                .spawn_blocking(work)
                .await
                .map_err(|e| ApiError::internal(format!("tokenizing failed: {e}")))?,
            _ => work(),
        };
        done.map_err(|e| text_error(&e))
    }

    /// Tokens of raw text, with the token every text of this model begins with.
    fn raw(&self, text: &str) -> impl FnOnce() -> Result<Vec<u32>, TextError> + Send + 'static {
        let (tokenizer, text) = (self.tokenizer.clone(), text.to_owned());
        move || {
            let mut ids: Vec<u32> = Vec::new();
            if tokenizer.add_bos() {
                ids.extend(tokenizer.bos());
            }
            ids.extend(tokenizer.encode(&text, true)?);
            Ok(ids)
        }
    }
}

#[async_trait::async_trait]
impl Backend for LocalBackend {
    fn name(&self) -> &str {
        &self.name
    }

    fn models(&self) -> Vec<ModelInfo> {
        vec![ModelInfo {
            id: self.name.clone(),
            created: self.created,
            owned_by: "ashlar".into(),
            context: u32::try_from(self.context).unwrap_or(u32::MAX),
        }]
    }

    async fn chat(&self, request: ChatRequest) -> Result<EventStream, ApiError> {
        self.check_model(&request.model)?;
        self.check_open()?;
        let user = request
            .user
            .as_deref()
            .or(request.safety_identifier.as_deref());
        let turn = Turn::new(user, request.priority);
        let bytes = request.messages.iter().map(|m| m.content.len()).sum();
        self.check_bytes(bytes, "messages")?;
        let sampling = request.sampling();
        let messages: Vec<Message> = request
            .messages
            .into_iter()
            .map(|m| Message {
                role: m.role,
                content: m.content,
            })
            .collect();
        let template = self.template.clone().ok_or_else(|| {
            ApiError::bad_request(
                format!(
                    "{} has no chat template: send text to /v1/completions, or serve it with --chat-template FILE",
                    self.name
                ),
                Some("messages"),
                Some("no_chat_template"),
            )
        })?;
        let tokenizer = self.tokenizer.clone();
        let tokens = Self::tokenize(bytes, move || template.encode(&tokenizer, &messages, true));
        let tokens = tokens.await.map_err(|e| at(e, "messages"))?;
        self.generate(tokens, &sampling, turn, "messages")
    }

    /// Control tokens written out in a text prompt are control tokens, as in
    /// other servers: a caller of this endpoint writes the whole prompt.
    async fn complete(&self, request: CompletionRequest) -> Result<EventStream, ApiError> {
        self.check_model(&request.model)?;
        self.check_open()?;
        let turn = Turn::new(request.user.as_deref(), request.priority);
        let sampling = request.sampling();
        let tokens = match request.prompt {
            Prompt::Tokens(ids) => {
                if let Some(i) = ids.iter().position(|&id| id as usize >= self.vocab) {
                    return Err(ApiError::bad_request(
                        format!(
                            "prompt[{i}] is token {}, the model has {} tokens",
                            ids[i], self.vocab
                        ),
                        Some("prompt"),
                        Some("invalid_value"),
                    ));
                }
                ids
            }
            Prompt::Text(text) => {
                self.check_bytes(text.len(), "prompt")?;
                let work = self.raw(&text);
                let ids = Self::tokenize(text.len(), work).await;
                ids.map_err(|e| at(e, "prompt"))?
            }
        };
        if tokens.is_empty() {
            return Err(ApiError::bad_request(
                "prompt is empty and this model has no beginning token",
                Some("prompt"),
                Some("invalid_value"),
            ));
        }
        self.generate(tokens, &sampling, turn, "prompt")
    }

    /// As lm-evaluation-harness does it: white space at the end of the context
    /// belongs to the continuation, both are tokenized as one text, the cut is
    /// at the number of tokens of the context alone, and an empty context is
    /// the beginning (else the end) token. Control tokens written out are
    /// control tokens.
    async fn score(&self, context: &str, continuation: &str) -> Result<Score, ApiError> {
        self.check_open()?;
        let whole = format!("{context}{continuation}");
        let context = context.trim_end();
        self.check_bytes(whole.len(), "context")?;
        let (head, all) = (self.raw(context), self.raw(&whole));
        let work = move || Ok((head()?, all()?));
        let (head, mut tokens) = Self::tokenize(whole.len(), work).await?;
        let mut context = head.len();
        if context == 0 {
            let start = self.tokenizer.bos().or(self.tokenizer.eos());
            let start = start.ok_or_else(|| {
                ApiError::bad_request(
                    "the context is empty and this model has no beginning token",
                    Some("context"),
                    Some("invalid_value"),
                )
            })?;
            tokens.insert(0, start);
            context = 1;
        }
        if tokens.len() <= context {
            return Err(ApiError::bad_request(
                format!(
                    "the continuation adds no token to the {context} of the context: \
                     {continuation:?}"
                ),
                Some("continuation"),
                Some("invalid_value"),
            ));
        }
        if tokens.len() > self.context {
            return Err(too_long(
                format!(
                    "context and continuation have {} tokens; this model's context is {} tokens",
                    tokens.len(),
                    self.context
                ),
                "context",
            ));
        }
        let (reply, answer) = oneshot::channel();
        let work = Work::Score(Scoring {
            context,
            reply: Some(reply),
            logprob: 0.0,
            greedy: true,
        });
        self.send(tokens, work, Turn::new(None, None), 0)?;
        answer.await.unwrap_or_else(|_| Err(gone(&self.shared)))
    }

    fn stats(&self) -> BackendStats {
        let mut stats = self.shared.stats().clone();
        // Jobs the scheduler has not seen yet wait too.
        let queued = u32::try_from(self.shared.queued()).unwrap_or(u32::MAX);
        stats.waiting = stats.waiting.max(queued);
        stats.queued_bytes = self.shared.queued_bytes() as u64;
        stats
    }
}

impl Drop for LocalBackend {
    fn drop(&mut self) {
        // Closing the channel is the signal to stop; a panic inside was
        // reported where it happened.
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// When a request's turn comes.
#[derive(Clone, Copy)]
struct Turn {
    priority: i32,
    user: Option<Digest>,
}

impl Turn {
    fn new(user: Option<&str>, priority: Option<i32>) -> Self {
        Self {
            priority: priority.unwrap_or(0),
            user: user.map(|u| Digest::of(u.as_bytes())),
        }
    }
}

/// The client's end of a request.
struct Events {
    receiver: events::UnboundedReceiver<Result<Event, ApiError>>,
    over: bool,
    shared: Arc<Shared>,
}

impl Stream for Events {
    type Item = Result<Event, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        let next = match self.receiver.poll_recv(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(event)) => event,
            Poll::Ready(None) => Err(gone(&self.shared)),
        };
        self.over = matches!(next, Err(_) | Ok(Event::Done { .. }));
        Poll::Ready(Some(next))
    }
}

/// What the engine may take, the weights not yet loaded.
fn available(config: &EngineConfig) -> Available {
    match config.memory_bytes {
        Some(bytes) => Available {
            bytes: Some(bytes),
            source: MemorySource::Setting,
        },
        None => memory::available(),
    }
}

fn check(config: &EngineConfig) -> Result<(), EngineError> {
    for (name, value) in [
        ("kv_blocks", config.kv_blocks.unwrap_or(1)),
        ("threads", config.threads.unwrap_or(1)),
        ("max_batch", config.max_batch),
        ("max_prefill", config.max_prefill),
        ("max_queue", config.max_queue),
    ] {
        if value == 0 {
            return Err(EngineError::Setting {
                name,
                value,
                least: 1,
            });
        }
    }
    Ok(())
}

/// Tokens that end an answer: the file's end token, and the ends of turn and
/// text that chat models use, where they are control tokens of this one.
pub(crate) fn ends(tokenizer: &Tokenizer) -> Vec<u32> {
    const NAMES: [&str; 6] = [
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "</s>",
    ];
    let named = NAMES.iter().filter_map(|n| tokenizer.token_id(n));
    let mut ids: Vec<u32> = named.filter(|&id| tokenizer.is_control(id)).collect();
    ids.extend(tokenizer.eos());
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn too_long(message: String, param: &str) -> ApiError {
    ApiError::bad_request(message, Some(param), Some("context_length_exceeded"))
}

fn text_error(e: &TextError) -> ApiError {
    match e.fault() {
        Fault::Input => ApiError::bad_request(e.to_string(), None, Some("invalid_text")),
        _ => ApiError::internal(e.to_string()),
    }
}

fn at(mut e: ApiError, param: &str) -> ApiError {
    if e.status == 400 {
        e.param = Some(param.to_owned());
    }
    e
}

/// 500 for a request whose scheduler went away under it.
fn gone(shared: &Shared) -> ApiError {
    let why = shared.stats().unhealthy.clone();
    ApiError::internal(why.unwrap_or_else(|| "the scheduler stopped".into()))
}

#[cfg(test)]
mod tests;
