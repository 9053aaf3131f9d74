//! The API described for machines: OpenAPI 3.1 at `/openapi.json`.
//!
//! It is made of the same list as the router, so that no route of the API is
//! without a description.

use crate::ask::Endpoint;
use serde_json::{Map, Value, json};

/// Routes of the API beside the endpoints: path, summary, type of the answer.
pub(crate) const OTHERS: &[(&str, &str, &str)] = &[
    ("/v1/models", "The models this key may ask for", "application/json"),
    ("/v1/models/{id}", "One model", "application/json"),
    ("/health", "Whether requests can be served", "application/json"),
    ("/livez", "Whether the process lives", "text/plain"),
    ("/metrics", "Prometheus metrics", "text/plain"),
    ("/openapi.json", "This document", "application/json"),
];

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    for endpoint in Endpoint::ALL {
        let (required, optional) = fields(endpoint);
        let properties: Map<String, Value> =
            required.iter().chain(optional).map(|(name, kind)| ((*name).to_owned(), kind_of(kind))).collect();
        let names: Vec<&str> = required.iter().map(|(n, _)| *n).collect();
        let mut content = json!({"application/json": {"schema": {"type": "object"}}});
        if endpoint.streams() {
            content["text/event-stream"] = json!({"schema": {"type": "string"}});
        }
        let error = json!({"description": "What is wrong, with the field at fault",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}});
        paths.insert(endpoint.path().into(), json!({"post": {
            "summary": summary(endpoint), "operationId": operation(endpoint.path()),
            "requestBody": {"required": true, "content": {"application/json": {
                "schema": {"type": "object", "required": names, "properties": properties},
            }}},
            "responses": {
                "200": {"description": "The answer", "content": content,
                    "headers": {"x-ashlar-response-id": {"description": "The response's id in the ledger", "schema": {"type": "string"}}}},
                "400": error, "401": error, "403": error, "404": error, "429": error, "503": error,
            },
        }}));
    }
    paths.insert("/v1/moderations".into(), moderations());
    for (path, summary, kind) in OTHERS {
        let mut get = json!({"summary": summary, "operationId": operation(path),
            "responses": {"200": {"description": "The answer", "content": {*kind: {"schema": {}}}}}});
        if path.contains("{id}") {
            get["parameters"] = json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}]);
        }
        paths.insert((*path).into(), json!({"get": get}));
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Ashlar", "version": env!("CARGO_PKG_VERSION"),
            "description": "One front door for every model. Fields that a backend does not take are refused by name."},
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": {
                "type": "object", "required": ["message", "type"],
                "properties": {"message": {"type": "string"}, "type": {"type": "string"},
                    "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}},
            }}}},
        },
        "security": [{}, {"key": []}],
    })
}

/// The guard's own endpoint, which no model answers.
fn moderations() -> Value {
    json!({"post": {
        "summary": "What a text is about, in thirteen categories (OpenAI)", "operationId": operation("/v1/moderations"),
        "requestBody": {"required": true, "content": {"application/json": {"schema": {
            "type": "object", "required": ["input"], "properties": {"input": {}, "model": {"type": "string"}},
        }}}},
        "responses": {"200": {"description": "The verdicts", "content": {"application/json": {"schema": {"type": "object"}}}}},
    }})
}

/// `post_v1_chat_completions` of a path.
fn operation(path: &str) -> String {
    path.trim_matches('/').replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}

fn kind_of(kind: &str) -> Value {
    match kind {
        "any" => json!({}),
        kind => json!({"type": kind}),
    }
}

const fn summary(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::Chat => "Answer a conversation (OpenAI)",
        Endpoint::Completions => "Continue a text (OpenAI)",
        Endpoint::Messages => "Answer a conversation (Anthropic)",
        Endpoint::Responses => "Answer a conversation (OpenAI's responses)",
        Endpoint::Embeddings => "Vectors of texts (OpenAI)",
        Endpoint::Rerank => "Documents by relevance to a query",
        Endpoint::Tokenize => "Tokens of a text or a conversation (vLLM)",
        Endpoint::Detokenize => "The text of tokens (vLLM)",
    }
}

type Named = &'static [(&'static str, &'static str)];

/// Fields every request of an endpoint has, and the usual ones.
const fn fields(endpoint: Endpoint) -> (Named, Named) {
    match endpoint {
        Endpoint::Chat => (
            &[("model", "string"), ("messages", "array")],
            &[
                ("stream", "boolean"), ("max_completion_tokens", "integer"), ("temperature", "number"), ("top_p", "number"),
                ("stop", "any"), ("seed", "integer"), ("tools", "array"), ("tool_choice", "any"), ("response_format", "object"),
            ],
        ),
        Endpoint::Completions => (
            &[("model", "string"), ("prompt", "any")],
            &[
                ("stream", "boolean"), ("max_tokens", "integer"), ("temperature", "number"), ("top_p", "number"), ("stop", "any"),
                ("seed", "integer"), ("echo", "boolean"), ("logprobs", "integer"),
            ],
        ),
        Endpoint::Messages => (
            &[("model", "string"), ("messages", "array"), ("max_tokens", "integer")],
            &[
                ("system", "any"), ("stream", "boolean"), ("temperature", "number"), ("top_p", "number"), ("top_k", "integer"),
                ("stop_sequences", "array"), ("tools", "array"), ("tool_choice", "object"), ("metadata", "object"),
            ],
        ),
        Endpoint::Responses => (
            &[("model", "string"), ("input", "any")],
            &[
                ("instructions", "string"), ("stream", "boolean"), ("max_output_tokens", "integer"), ("temperature", "number"),
                ("top_p", "number"), ("tools", "array"), ("tool_choice", "any"), ("text", "object"), ("reasoning", "object"),
            ],
        ),
        Endpoint::Embeddings => (
            &[("model", "string"), ("input", "any")],
            &[("encoding_format", "string"), ("dimensions", "integer"), ("user", "string")],
        ),
        Endpoint::Rerank => (&[("model", "string"), ("query", "string"), ("documents", "array")], &[("top_n", "integer")]),
        Endpoint::Tokenize => (
            &[("model", "string")],
            &[("prompt", "string"), ("messages", "array"), ("add_special_tokens", "boolean"), ("return_token_strs", "boolean")],
        ),
        Endpoint::Detokenize => (&[("model", "string"), ("tokens", "array")], &[]),
    }
}
