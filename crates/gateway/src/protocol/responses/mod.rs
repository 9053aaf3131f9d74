//! OpenAI's responses API in front of any backend: text and tools of the
//! client, streamed and whole. Nothing is kept for a later request.

mod reply;
mod request;

pub(crate) use reply::Reply;
pub(crate) use request::to_chat;
