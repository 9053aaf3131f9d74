//! One answer in the making: a request joined with its record.
//!
//! Streamed and whole answers both read a [`Session`], so there is one place
//! where events are recorded, the deadline is kept and the server's stop is
//! obeyed. Dropping it cancels the backend's work and settles the record.

use crate::{
    app::{App, Target},
    error::Failure,
    recorder::{Intake, Recorder},
};
use ashlar_api::{ApiError, ChatRequest, CompletionRequest, Event, EventStream};
use futures::StreamExt as _;
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};

/// A request of either endpoint, read and not yet run.
pub(crate) enum Call {
    Chat(ChatRequest),
    Completion(CompletionRequest),
}

impl Call {
    fn model_mut(&mut self) -> &mut String {
        match self {
            Self::Chat(r) => &mut r.model,
            Self::Completion(r) => &mut r.model,
        }
    }

    pub(crate) fn model(&self) -> &str {
        match self {
            Self::Chat(r) => &r.model,
            Self::Completion(r) => &r.model,
        }
    }

    pub(crate) fn stream(&self) -> bool {
        match self {
            Self::Chat(r) => r.stream,
            Self::Completion(r) => r.stream,
        }
    }

    pub(crate) fn endpoint(&self) -> &'static str {
        match self {
            Self::Chat(_) => "/v1/chat/completions",
            Self::Completion(_) => "/v1/completions",
        }
    }

    pub(crate) fn include_usage(&self) -> bool {
        let options = match self {
            Self::Chat(r) => r.stream_options,
            Self::Completion(r) => r.stream_options,
        };
        options.is_some_and(|o| o.include_usage)
    }

    /// The seed; where the client gave none, one drawn from `id`, so that the
    /// record always says which it was.
    fn fix_seed(&mut self, id: &str) -> i64 {
        let seed = match self {
            Self::Chat(r) => &mut r.seed,
            Self::Completion(r) => &mut r.seed,
        };
        *seed.get_or_insert_with(|| {
            let hash = *ashlar_core::Digest::of(id.as_bytes()).as_bytes();
            let (low, _) = hash.split_at(4);
            low.iter().fold(0, |seed, byte| seed << 8 | i64::from(*byte))
        })
    }

    fn id_prefix(&self) -> &'static str {
        match self {
            Self::Chat(_) => "chatcmpl",
            Self::Completion(_) => "cmpl",
        }
    }
}

/// An admitted request whose events are being read.
pub(crate) struct Session {
    recorder: Recorder,
    events: Option<EventStream>,
    /// Read ahead so that an early failure still has its HTTP status.
    first: Option<Event>,
    deadline: Instant,
    timeout: Duration,
    stop: watch::Receiver<bool>,
}

impl Session {
    /// Admits `call`, hands it to its backend and waits for its first event.
    ///
    /// # Errors
    /// When the store does not admit it, or the backend refuses it or fails
    /// before its first event; the record is settled then.
    pub(crate) async fn open(
        app: &Arc<App>,
        mut call: Call,
        target: Target,
        arrived: std::time::Instant,
    ) -> Result<Self, Failure> {
        let (in_flight, limit) = (app.live.len(), app.state.config.max_in_flight);
        if in_flight >= limit {
            return Err(ApiError::overloaded(
                format!("{in_flight} responses are in flight, the limit is {limit}"),
                1,
            )
            .into());
        }
        target.model.id.clone_into(call.model_mut());
        let id = ashlar_core::id::new(call.id_prefix());
        let seed = call.fix_seed(&id);
        let intake = Intake {
            id: id.clone(),
            release: target.release,
            model: target.model.id,
            backend: target.backend.name().to_owned(),
            endpoint: call.endpoint(),
            // The ledger keeps the 64 bits as they are.
            seed: Some(seed as u64),
            stream: call.stream(),
            arrived,
        };
        let recorder = Recorder::admit(app.clone(), intake).await.map_err(|e| {
            ApiError::unavailable(format!("the ledger did not take the request: {e}"))
        })?;
        let timeout = app.state.config.request_timeout;
        let mut session = Self {
            recorder,
            events: None,
            first: None,
            deadline: Instant::from_std(arrived) + timeout,
            timeout,
            stop: app.stop.clone(),
        };
        let backend = target.backend;
        let asked = async move {
            match call {
                Call::Chat(r) => backend.chat(r).await,
                Call::Completion(r) => backend.complete(r).await,
            }
        };
        match session.begin(asked).await {
            Ok(()) => Ok(session),
            Err(error) => Err(Failure {
                error,
                response_id: Some(id),
            }),
        }
    }

    async fn begin(
        &mut self,
        asked: impl Future<Output = Result<EventStream, ApiError>>,
    ) -> Result<(), ApiError> {
        self.events = Some(self.guarded(asked).await?);
        self.first = Some(self.read().await?);
        Ok(())
    }

    pub(crate) fn id(&self) -> &str {
        self.recorder.id()
    }

    /// The next event. After `Done` or an error there is nothing to read.
    pub(crate) async fn next(&mut self) -> Result<Event, ApiError> {
        match self.first.take() {
            Some(event) => Ok(event),
            None => self.read().await,
        }
    }

    async fn read(&mut self) -> Result<Event, ApiError> {
        let mut events = self.events.take();
        let next = async {
            match &mut events {
                Some(stream) => stream.next().await.unwrap_or_else(|| {
                    Err(ApiError::internal("the backend ended without finishing"))
                }),
                None => Err(ApiError::internal("the answer has ended")),
            }
        };
        let event = self.guarded(next).await?;
        self.recorder.note(&event).await;
        if !matches!(event, Event::Done { .. }) {
            self.events = events;
        }
        Ok(event)
    }

    /// Runs `work` until the deadline or the server's stop; a failure is settled.
    async fn guarded<T>(
        &mut self,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let mut stop = self.stop.clone();
        // The watch's guard may not live across an await.
        let stopped = async move { stop.wait_for(|s| *s).await.map(drop) };
        let error = tokio::select! {
            biased;
            _ = stopped => {
                self.recorder.cancel().await;
                return Err(ApiError::unavailable("the server is stopping"));
            }
            result = tokio::time::timeout_at(self.deadline, work) => match result {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(e)) => e,
                Err(_) => ApiError {
                    status: 504,
                    code: Some("timeout".into()),
                    ..ApiError::internal(format!(
                        "no end after {} s, the limit for one answer",
                        self.timeout.as_secs_f64()
                    ))
                },
            }
        };
        self.recorder.fail(&error.message).await;
        Err(error)
    }
}
