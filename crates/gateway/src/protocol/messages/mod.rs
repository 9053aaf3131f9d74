//! Anthropic's messages API in front of any backend; `upstream::anthropic` is
//! its mirror image.

mod reply;
mod request;

pub(crate) use reply::{Reply, error_response};
pub(crate) use request::to_chat;
