//! Names of OpenTelemetry's semantic conventions, in this one place because
//! those of GenAI are all still "development" (version 1.41) and change.

pub(crate) const OPERATION: &str = "gen_ai.operation.name";
pub(crate) const PROVIDER: &str = "gen_ai.provider.name";
pub(crate) const REQUEST_MODEL: &str = "gen_ai.request.model";
pub(crate) const RESPONSE_ID: &str = "gen_ai.response.id";
pub(crate) const RESPONSE_MODEL: &str = "gen_ai.response.model";
pub(crate) const FINISH_REASONS: &str = "gen_ai.response.finish_reasons";
pub(crate) const INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
pub(crate) const OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
pub(crate) const CACHE_READ_TOKENS: &str = "gen_ai.usage.cache_read.input_tokens";
pub(crate) const INPUT_MESSAGES: &str = "gen_ai.input.messages";
pub(crate) const OUTPUT_MESSAGES: &str = "gen_ai.output.messages";
pub(crate) const CHOICES: &str = "gen_ai.request.choice.count";
pub(crate) const EVALUATION: &str = "gen_ai.evaluation.result";
pub(crate) const EVALUATION_NAME: &str = "gen_ai.evaluation.name";
pub(crate) const EVALUATION_LABEL: &str = "gen_ai.evaluation.score.label";
pub(crate) const EVALUATION_SCORE: &str = "gen_ai.evaluation.score.value";
pub(crate) const SERVER_ADDRESS: &str = "server.address";
pub(crate) const SERVER_PORT: &str = "server.port";
pub(crate) const ERROR_TYPE: &str = "error.type";
pub(crate) const HTTP_METHOD: &str = "http.request.method";
pub(crate) const HTTP_STATUS: &str = "http.response.status_code";
pub(crate) const HTTP_ROUTE: &str = "http.route";
pub(crate) const URL_PATH: &str = "url.path";
pub(crate) const SERVICE_NAME: &str = "service.name";
pub(crate) const SERVICE_VERSION: &str = "service.version";
pub(crate) const SERVICE_INSTANCE: &str = "service.instance.id";

// No convention has these.
pub(crate) const BACKEND: &str = "ashlar.backend";
pub(crate) const HEDGE: &str = "ashlar.hedge";
pub(crate) const OUTCOME: &str = "ashlar.outcome";
pub(crate) const FIRST_TOKEN: &str = "ashlar.first_token";

/// Numbers of a request: its field and the attribute.
pub(crate) const NUMBERS: [(&str, &str); 8] = [
    ("max_completion_tokens", "gen_ai.request.max_tokens"),
    ("max_tokens", "gen_ai.request.max_tokens"),
    ("temperature", "gen_ai.request.temperature"),
    ("top_p", "gen_ai.request.top_p"),
    ("top_k", "gen_ai.request.top_k"),
    ("seed", "gen_ai.request.seed"),
    ("frequency_penalty", "gen_ai.request.frequency_penalty"),
    ("presence_penalty", "gen_ai.request.presence_penalty"),
];
pub(crate) const STOP: (&str, &str) = ("stop", "gen_ai.request.stop_sequences");

/// `gen_ai.operation.name` of an endpoint.
pub(crate) fn operation(endpoint: &str) -> &'static str {
    match endpoint {
        "/v1/chat/completions" | "/v1/responses" | "/v1/messages" => "chat",
        "/v1/embeddings" => "embeddings",
        _ => "text_completion",
    }
}

/// The provider of the gateway's own metrics.
pub(crate) const OURS: &str = "ashlar";

/// A metric's name and unit for OTLP, and an attribute that tells it from
/// another of the same name.
pub(crate) fn metric(family: &str) -> (String, &'static str, Option<(&'static str, &'static str)>) {
    let kind = |kind| Some(("gen_ai.token.type", kind));
    match family {
        "request_duration_seconds" => ("gen_ai.server.request.duration".into(), "s", None),
        "time_to_first_token_seconds" => ("gen_ai.server.time_to_first_token".into(), "s", None),
        "request_time_per_output_token_seconds" => ("gen_ai.server.time_per_output_token".into(), "s", None),
        "request_prompt_tokens" => ("gen_ai.client.token.usage".into(), "{token}", kind("input")),
        "request_generation_tokens" => ("gen_ai.client.token.usage".into(), "{token}", kind("output")),
        other => {
            let unit = if other.ends_with("_seconds") {
                "s"
            } else if other.ends_with("_bytes") {
                "By"
            } else {
                "1"
            };
            let name = other.strip_suffix("_total").unwrap_or(other);
            (format!("ashlar.{name}"), unit, None)
        }
    }
}

/// A label of ours as an attribute.
pub(crate) fn attribute(label: &str, value: &str) -> (&'static str, String) {
    match label {
        "model_name" => (REQUEST_MODEL, value.to_owned()),
        "endpoint" => (HTTP_ROUTE, value.to_owned()),
        "policy" => ("ashlar.policy", value.to_owned()),
        "stage" => ("ashlar.stage", value.to_owned()),
        "action" => ("ashlar.action", value.to_owned()),
        "backend" => (BACKEND, value.to_owned()),
        "outcome" => (OUTCOME, value.to_owned()),
        "finished_reason" => ("ashlar.finished_reason", value.to_owned()),
        "status" => (HTTP_STATUS, value.to_owned()),
        "error" => (ERROR_TYPE, value.to_owned()),
        "currency" => ("ashlar.currency", value.to_owned()),
        "version" => (SERVICE_VERSION, value.to_owned()),
        _ => ("ashlar.kind", value.to_owned()),
    }
}
