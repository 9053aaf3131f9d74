//! Anthropic's messages API behind OpenAI's chat endpoint: the connection. The
//! translation itself is in `request` and `reply`.

mod reply;
mod request;

use super::{Dialect, Link, Piece, Pieces, Upstream, UpstreamError, sse::Parser};
use crate::ask::Ask;
use ashlar_api::ApiError;
use reply::Reply;
use std::{collections::VecDeque, sync::Arc};

/// The version of the protocol spoken here.
pub(crate) const VERSION: &str = "2023-06-01";

/// The API.
pub(crate) struct Anthropic {
    pub(crate) link: Arc<Link>,
    pub(crate) probe: String,
    /// Sent where the client set no limit: the API demands one.
    pub(crate) max_tokens: u32,
}

#[async_trait::async_trait]
impl Upstream for Anthropic {
    fn check(&self, ask: &Ask, model: &str) -> Result<(), ApiError> {
        Dialect::Anthropic.check(ask, &self.link.settings.backend)?;
        request::translate(ask, model, self.max_tokens).map(drop)
    }

    async fn send(&self, ask: &Ask, model: &str, _seed: i64) -> Result<Pieces, UpstreamError> {
        let body = request::translate(ask, model, self.max_tokens).map_err(UpstreamError::Local)?;
        let mut reader = self.link.post("/messages", body.to_string().into()).await?;
        let prompt = ask.prompt_estimate();
        if ask.stream {
            if !reader.event_stream {
                return Err(reader.malformed("JSON", "an event stream was asked for"));
            }
            let state = (
                Parser::new(reader.max_event_bytes),
                Some(reader),
                Reply::new(prompt),
                VecDeque::<Piece>::new(),
                self.link.clone(),
            );
            return Ok(Box::pin(futures::stream::try_unfold(
                state,
                |(mut parser, mut reader, mut reply, mut ready, link)| async move {
                    loop {
                        if let Some(piece) = ready.pop_front() {
                            if matches!(piece, Piece::Done(_))
                                && let Some(reader) = reader.take()
                            {
                                reader.finish();
                            }
                            return Ok(Some((piece, (parser, reader, reply, ready, link))));
                        }
                        let Some(open) = &mut reader else { return Ok(None) };
                        let limit = open.max_event_bytes as u64;
                        match parser.next().map_err(|_| open.too_large("an event", limit))? {
                            Some(event) => ready.extend(reply.event(&event.data, &link, open)?),
                            None => match open.next().await? {
                                Some(bytes) => parser.push(&bytes),
                                None => return Err(open.closed("the stream ended without message_stop".into())),
                            },
                        }
                    }
                },
            )));
        }
        let body = reader.whole().await?;
        let pieces = reply::whole(&body, prompt).map_err(|why| reader.malformed("an answer that is not of the protocol", why))?;
        Ok(Box::pin(futures::stream::iter(pieces.map(Ok))))
    }

    async fn probe(&self) -> Result<(), UpstreamError> {
        self.link.get(&self.probe).await
    }
}
