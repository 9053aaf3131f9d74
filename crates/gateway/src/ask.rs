//! A request as the client sent it: its body, and where each top-level field
//! lies in it.
//!
//! A body goes to an upstream almost unchanged, so it is scanned, not read into
//! a tree: 1 MB of messages costs one pass and no allocation. What a field holds
//! is checked by whoever answers: the engine reads strictly, an upstream by its
//! own rules.
//!
//! What may not happen here: a field given twice (one would be lost), or a
//! field that no one sees (`upstream::dialect` refuses what is not passed on).

use crate::{protocol, upstream::Call};
use ashlar_api::ApiError;
use axum::http::HeaderMap;
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};
use serde_json::value::RawValue;
use std::{borrow::Cow, fmt, ops::Range, sync::OnceLock, time::Instant};

/// Bytes of JSON a token is taken for where no one counted: the usual rule of
/// thumb for English.
const BYTES_PER_TOKEN: usize = 4;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
    /// Anthropic's, a chat request inside.
    Messages,
    /// OpenAI's later one, a chat request inside.
    Responses,
    Embeddings,
    Rerank,
    Tokenize,
    Detokenize,
}

impl Endpoint {
    /// All that are served.
    pub(crate) const ALL: [Self; 8] = [
        Self::Chat, Self::Completions, Self::Messages, Self::Responses, Self::Embeddings, Self::Rerank, Self::Tokenize,
        Self::Detokenize,
    ];

    /// Our route, as the ledger names it.
    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Messages => "/v1/messages",
            Self::Responses => "/v1/responses",
            Self::Embeddings => "/v1/embeddings",
            Self::Rerank => "/v1/rerank",
            Self::Tokenize => "/v1/tokenize",
            Self::Detokenize => "/v1/detokenize",
        }
    }

    /// Our route in the ledger's name of a copy.
    pub(crate) const fn mirrored(self) -> &'static str {
        match self {
            Self::Chat => "mirror:/v1/chat/completions",
            Self::Completions => "mirror:/v1/completions",
            Self::Messages => "mirror:/v1/messages",
            Self::Responses => "mirror:/v1/responses",
            Self::Embeddings => "mirror:/v1/embeddings",
            Self::Rerank => "mirror:/v1/rerank",
            Self::Tokenize => "mirror:/v1/tokenize",
            Self::Detokenize => "mirror:/v1/detokenize",
        }
    }

    /// The one that a backend is asked at.
    pub(crate) const fn inner(self) -> Self {
        match self {
            Self::Messages | Self::Responses => Self::Chat,
            own => own,
        }
    }

    /// The route at an upstream, in the form of `Dialect::default_probe`.
    pub(crate) const fn tail(self) -> &'static str {
        match self {
            Self::Chat | Self::Messages | Self::Responses => "/chat/completions",
            Self::Completions => "/completions",
            Self::Embeddings => "/embeddings",
            Self::Rerank => "/rerank",
            Self::Tokenize => "//tokenize",
            Self::Detokenize => "//detokenize",
        }
    }

    /// What response ids begin with.
    pub(crate) const fn id_prefix(self) -> &'static str {
        match self {
            Self::Chat => "chatcmpl",
            Self::Completions => "cmpl",
            Self::Messages => "msg",
            Self::Responses => "resp",
            Self::Embeddings => "embd",
            Self::Rerank => "rerank",
            Self::Tokenize | Self::Detokenize => "tok",
        }
    }

    /// The field that holds the prompt, once it is translated.
    pub(crate) const fn prompt(self) -> &'static str {
        match self {
            Self::Chat | Self::Messages | Self::Responses => "messages",
            Self::Completions | Self::Tokenize => "prompt",
            Self::Embeddings => "input",
            Self::Rerank => "documents",
            Self::Detokenize => "tokens",
        }
    }

    /// Whether tokens are generated, and the answer can be streamed.
    pub(crate) const fn streams(self) -> bool {
        matches!(self.inner(), Self::Chat | Self::Completions)
    }
}

/// A request, scanned.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) endpoint: Endpoint,
    pub(crate) headers: HeaderMap,
    pub(crate) arrived: Instant,
    /// The model as the client names it.
    pub(crate) model: String,
    pub(crate) stream: bool,
    /// The client asked for a closing usage chunk.
    pub(crate) include_usage: bool,
    body: Bytes,
    fields: Vec<(String, Range<usize>)>,
    call: OnceLock<Result<Call, ApiError>>,
    /// The vector of [`Ask::question`], where a policy looks at it, or why
    /// there is none.
    pub(crate) vector: OnceLock<Result<Vec<f32>, String>>,
}

/// A JSON object's top-level fields, unread.
pub(crate) struct Fields<'a>(pub(crate) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Fields<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields: Vec<(Cow<'de, str>, &'de RawValue)> = Vec::with_capacity(12);
                while let Some(Key(key)) = map.next_key()? {
                    if fields.iter().any(|(k, _)| *k == key) {
                        let key: String = key.chars().take(80).collect();
                        return Err(A::Error::custom(format!("{key:?} is given twice")));
                    }
                    fields.push((key, map.next_value()?));
                }
                Ok(Fields(fields))
            }
        }
        d.deserialize_map(V)
    }
}

/// A key, borrowed where it holds no escape.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl Ask {
    /// Reads `body`; other protocols' become the chat request they stand for.
    ///
    /// # Errors
    /// 400 for what is no JSON object, a field given twice, a `model`, `stream`
    /// or `stream_options` of the wrong type, and what cannot be translated.
    pub(crate) fn read(
        endpoint: Endpoint,
        headers: HeaderMap,
        body: Bytes,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let body = match endpoint {
            Endpoint::Messages => protocol::messages::to_chat(&body)?.into(),
            Endpoint::Responses => protocol::responses::to_chat(&body)?.into(),
            _ => body,
        };
        Self::scan(endpoint, headers, body, arrived)
    }

    fn scan(endpoint: Endpoint, headers: HeaderMap, body: Bytes, arrived: Instant) -> Result<Self, ApiError> {
        let bad = |e: &dyn fmt::Display| {
            let message = format!("the body is not the JSON object expected: {e}");
            ApiError::bad_request(message, None, Some("invalid_json"))
        };
        let text = std::str::from_utf8(&body).map_err(|e| bad(&e))?;
        let Fields(scanned) = serde_json::from_str(text).map_err(|e| bad(&e))?;
        let start = text.as_ptr() as usize;
        let fields = scanned.iter().map(|(key, raw)| {
            // A raw value borrows from `text`, so the difference is its offset.
            let at = raw.get().as_ptr() as usize - start;
            (key.clone().into_owned(), at..at + raw.get().len())
        });
        let fields: Vec<_> = fields.filter(|(_, at)| &text[at.clone()] != "null").collect();
        let mut ask = Self {
            endpoint,
            headers,
            arrived,
            model: String::new(),
            stream: false,
            include_usage: false,
            body: body.clone(),
            fields,
            call: OnceLock::new(),
            vector: OnceLock::new(),
        };
        ask.model = match ask.typed::<String>("model", "a string")? {
            None => return Err(missing("model")),
            Some(m) if m.is_empty() => {
                return Err(ApiError::bad_request("model is empty", Some("model"), Some("invalid_value")));
            }
            Some(m) => m,
        };
        ask.stream = ask.typed("stream", "true or false")?.unwrap_or(false);
        let options: Option<serde_json::Map<String, serde_json::Value>> =
            ask.typed("stream_options", "an object")?;
        if let Some(options) = options {
            if !ask.stream {
                let message = "stream_options is only allowed when stream is true";
                return Err(ApiError::bad_request(message, Some("stream_options"), Some("invalid_value")));
            }
            ask.include_usage = match options.get("include_usage") {
                None | Some(serde_json::Value::Null) => false,
                Some(serde_json::Value::Bool(wanted)) => *wanted,
                Some(other) => {
                    let got: String = other.to_string().chars().take(80).collect();
                    let message = format!("stream_options.include_usage must be true or false, got {got}");
                    let name = "stream_options.include_usage";
                    return Err(ApiError::bad_request(message, Some(name), Some("invalid_type")));
                }
            };
        }
        if ask.stream && !endpoint.streams() {
            let message = format!("stream is not supported here: {} answers at once", endpoint.path());
            return Err(ApiError::bad_request(message, Some("stream"), Some("unsupported_parameter")));
        }
        let other = (endpoint == Endpoint::Tokenize).then_some("messages").and_then(|f| ask.raw(f));
        if ask.raw(endpoint.prompt()).or(other).is_none() {
            return Err(missing(endpoint.prompt()));
        }
        Ok(ask)
    }

    /// Names and JSON of all fields that are not null, in the client's order.
    pub(crate) fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|(name, at)| (name.as_str(), self.text(at)))
    }

    /// The JSON of a field; null counts as absent.
    pub(crate) fn raw(&self, name: &str) -> Option<&str> {
        let (_, at) = self.fields.iter().find(|(n, _)| n == name)?;
        Some(self.text(at))
    }

    fn text(&self, at: &Range<usize>) -> &str {
        // The range came from a str in `body`.
        self.body.get(at.clone()).and_then(|b| std::str::from_utf8(b).ok()).unwrap_or("")
    }

    /// A field of type `T`.
    pub(crate) fn typed<'a, T: Deserialize<'a>>(&'a self, name: &str, wanted: &str) -> Result<Option<T>, ApiError> {
        let read = self.raw(name).map(serde_json::from_str::<T>).transpose();
        read.map_err(|_| {
            let got: String = self.raw(name).unwrap_or("").chars().take(80).collect();
            let message = format!("{name} must be {wanted}, got {got}");
            ApiError::bad_request(message, Some(name), Some("invalid_type"))
        })
    }

    /// The same request with the field `name` as `json`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(crate) fn with(self, name: &str, json: &str) -> Result<Self, ApiError> {
        let mut body = String::with_capacity(self.body.len() + name.len() + json.len() + 8);
        body.push('{');
        for (n, raw) in self.fields().filter(|(n, _)| *n != name).chain([(name, json)]) {
            if body.len() > 1 {
                body.push(',');
            }
            crate::upstream::json_string(&mut body, n);
            body.push(':');
            body.push_str(raw);
        }
        body.push('}');
        Self::scan(self.endpoint, self.headers, body.into(), self.arrived)
    }

    pub(crate) fn body(&self) -> &Bytes {
        &self.body
    }

    /// The request as the engine reads it, read once.
    pub(crate) fn call(&self) -> Result<&Call, ApiError> {
        let read = self.call.get_or_init(|| Call::parse(self.endpoint, &self.body));
        read.as_ref().map_err(Clone::clone)
    }

    /// The prompt's JSON: what a prefix cache would see first, in essence.
    pub(crate) fn prompt(&self) -> &str {
        self.raw(self.endpoint.prompt()).or_else(|| self.raw("messages")).unwrap_or("")
    }

    /// What is asked, as text: the last turn of the user, or the prompt.
    pub(crate) fn question(&self) -> String {
        match serde_json::from_str::<serde_json::Value>(self.prompt()).ok() {
            Some(serde_json::Value::Array(turns)) => {
                let said = turns.iter().rfind(|t| t["role"] == "user").or(turns.last());
                said.map(|t| text_of(t.get("content").unwrap_or(t))).unwrap_or_default()
            }
            Some(prompt) => text_of(&prompt),
            None => String::new(),
        }
    }

    /// Most tokens the client lets be generated.
    pub(crate) fn max_tokens(&self) -> Option<u32> {
        if !self.endpoint.streams() {
            return Some(0);
        }
        let read = |name| self.raw(name).and_then(|raw| raw.parse().ok());
        read("max_completion_tokens").or_else(|| read("max_tokens"))
    }

    /// Tokens of the prompt, guessed from its size.
    pub(crate) fn prompt_estimate(&self) -> u32 {
        let bytes = self.prompt().len() + self.raw("tools").map_or(0, str::len);
        estimate(bytes)
    }
}

/// The text of a message's content, whole or in parts.
fn text_of(content: &serde_json::Value) -> String {
    match content {
        serde_json::Value::String(s) => s.clone(),
        serde_json::Value::Array(parts) => {
            let texts: Vec<&str> = parts.iter().filter_map(|p| p.as_str().or(p["text"].as_str())).collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}

/// Tokens of `bytes` of text, guessed: at least one for any text.
pub(crate) fn estimate(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(BYTES_PER_TOKEN)).unwrap_or(u32::MAX)
}

fn missing(name: &str) -> ApiError {
    ApiError::bad_request(format!("{name} is required"), Some(name), Some("missing_required_parameter"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Ask, ApiError> {
        Ask::read(Endpoint::Chat, HeaderMap::new(), Bytes::copy_from_slice(body.as_bytes()), Instant::now())
    }

    #[test]
    fn fields_keep_their_bytes() {
        let body = r#" {"model":"m\u0041", "messages" : [ {"a": 1.10} ],"top_k":null,"x\n":"é" ,"stream":true,"stream_options":{"include_usage":true}}"#;
        let ask = read(body).unwrap();
        assert_eq!((ask.model.as_str(), ask.stream, ask.include_usage), ("mA", true, true));
        assert_eq!(ask.raw("messages"), Some(r#"[ {"a": 1.10} ]"#));
        assert_eq!((ask.raw("x\n"), ask.raw("top_k")), (Some("\"é\""), None));
    }

    #[test]
    fn a_field_is_put_in_place_of_another() {
        let ask = read(r#"{"priority":9,"model":"m","messages":["é"]}"#).unwrap().with("priority", "3").unwrap();
        let fields: Vec<_> = ask.fields().collect();
        assert_eq!(fields, [("model", "\"m\""), ("messages", "[\"é\"]"), ("priority", "3")]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param, says) in [
            ("{", None, "JSON object"),
            ("[1]", None, "JSON object"),
            (r#"{"model":"m","model":"n","messages":[]}"#, None, "given twice"),
            (r#"{"model":"m"}"#, Some("messages"), "required"),
            (r#"{"messages":[]}"#, Some("model"), "required"),
            (r#"{"model":7,"messages":[]}"#, Some("model"), "a string, got 7"),
            (r#"{"model":"m","messages":[],"stream":1}"#, Some("stream"), "true or false"),
            (r#"{"model":"m","messages":[],"stream_options":{}}"#, Some("stream_options"), "only allowed"),
            (
                r#"{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":"yes"}}"#,
                Some("stream_options.include_usage"),
                "true or false, got \"yes\"",
            ),
        ] {
            let e = read(body).unwrap_err();
            assert_eq!((e.status, e.param.as_deref()), (400, param), "{body}");
            assert!(e.message.contains(says), "{}", e.message);
        }
        let bytes = Bytes::from_static(b"{\"model\":\"\xff\"}");
        assert_eq!(Ask::read(Endpoint::Chat, HeaderMap::new(), bytes, Instant::now()).unwrap_err().status, 400);
    }

    proptest::proptest! {
        #[test]
        fn any_body_is_read_or_refused(body: Vec<u8>) {
            let _ = Ask::read(Endpoint::Completions, HeaderMap::new(), body.into(), Instant::now());
        }
    }
}
