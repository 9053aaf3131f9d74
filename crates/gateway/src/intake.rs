//! Reading a request: who may ask, how large, of what type.
//!
//! What may not happen here: a body is never read past its limit into memory,
//! and no header a client sends is trusted to be true.
//!
//! A loopback server answers only requests whose `Host` is a loopback name:
//! otherwise a page on the web could point its own name at 127.0.0.1 (DNS
//! rebinding) and read answers as if it were same-origin. Requests must carry
//! `application/json`, which a page of another origin can only send after a
//! preflight that is never granted here.

use crate::{app::GatewayConfig, error::refuse};
use ashlar_api::ApiError;
use axum::{
    body::Body,
    http::{HeaderMap, Uri, header},
};
use bytes::Bytes;
use futures::StreamExt as _;
use std::net::{IpAddr, SocketAddr};

/// Refuses a `Host` that is not this server's own.
pub(crate) fn check_host(
    config: &GatewayConfig,
    listen: SocketAddr,
    headers: &HeaderMap,
    uri: &Uri,
) -> Result<(), ApiError> {
    if !listen.ip().is_loopback() {
        return Ok(());
    }
    let sent = headers.get(header::HOST).and_then(|h| h.to_str().ok());
    let Some(sent) = uri.host().or(sent) else {
        return Err(refuse(400, "host_missing", "the Host header is missing".into()));
    };
    let name = host_name(sent);
    let ip = name.trim_matches(['[', ']']).parse::<IpAddr>();
    let own = name.eq_ignore_ascii_case("localhost")
        || ip.is_ok_and(|ip| ip.is_loopback())
        || config.allowed_hosts.iter().any(|h| h.eq_ignore_ascii_case(name));
    if own {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(refuse(
        403,
        "host_not_allowed",
        format!("this server listens on {listen} and does not answer for host {shown:?}; ask localhost"),
    ))
}

/// `host[:port]` without the port.
fn host_name(host: &str) -> &str {
    match host.rfind(':') {
        Some(colon) if !host[colon..].contains(']') => &host[..colon],
        _ => host,
    }
}

/// Reads a JSON body within the limits of `config`.
pub(crate) async fn read_body(
    config: &GatewayConfig,
    headers: &HeaderMap,
    body: Body,
) -> Result<Bytes, ApiError> {
    let sent = headers.get(header::CONTENT_TYPE);
    let kind = sent.and_then(|v| v.to_str().ok()).unwrap_or("");
    let essence = kind.split(';').next().unwrap_or("").trim();
    if !essence.eq_ignore_ascii_case("application/json") {
        let shown: String = kind.chars().take(80).collect();
        let message = format!("content-type must be application/json, got {shown:?}");
        return Err(refuse(415, "unsupported_content_type", message));
    }
    let limit = config.max_body_bytes;
    let declared = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    let read = async {
        let room = declared.map_or(0, |n| usize::try_from(n).unwrap_or(limit).min(limit).min(1 << 20));
        let (mut bytes, mut total) = (Vec::with_capacity(room), 0usize);
        let mut chunks = body.into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|e| {
                refuse(400, "body_unreadable", format!("the body could not be read: {e}"))
            })?;
            total = total.saturating_add(chunk.len());
            if total <= limit {
                bytes.extend_from_slice(&chunk);
            } else {
                // Swallow some of the rest: a client that is still sending
                // when the connection closes would never see the answer.
                bytes = Vec::new();
                if total > limit.saturating_mul(4) {
                    break;
                }
            }
        }
        if total > limit {
            let size = declared.map_or_else(|| format!("more than {limit}"), |n| n.to_string());
            let message = format!("the body has {size} bytes, the limit is {limit}");
            return Err(refuse(413, "body_too_large", message));
        }
        Ok(Bytes::from(bytes))
    };
    tokio::time::timeout(config.body_timeout, read)
        .await
        .unwrap_or_else(|_| {
            let seconds = config.body_timeout.as_secs_f64();
            let message = format!("the body did not arrive within {seconds} s");
            Err(refuse(408, "body_timeout", message))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_reach_a_loopback_server() {
        let config = GatewayConfig {
            allowed_hosts: vec!["ashlar.test".into()],
            ..GatewayConfig::default()
        };
        let ask = |listen: &str, host: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(host) = host {
                headers.insert(header::HOST, host.parse().unwrap());
            }
            check_host(&config, listen.parse().unwrap(), &headers, &Uri::from_static("/"))
                .map_err(|e| e.status)
        };
        for host in [
            "localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.0.0.9", "[::1]", "[::1]:8080",
            "ashlar.test:8080",
        ] {
            assert_eq!(ask("127.0.0.1:8080", Some(host)), Ok(()), "{host}");
        }
        for host in [
            "evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.nip.io",
            "10.0.0.1", "", ":8080", "[::2]", "localhost@evil",
        ] {
            assert_eq!(ask("127.0.0.1:8080", Some(host)), Err(403), "{host}");
        }
        assert_eq!(ask("127.0.0.1:8080", None), Err(400));
        assert_eq!(ask("0.0.0.0:8080", Some("anything.example")), Ok(()));
    }

    proptest::proptest! {
        #[test]
        fn any_host_is_taken_apart_without_panic(host: String) {
            assert!(host.starts_with(host_name(&host)));
        }
    }
}
