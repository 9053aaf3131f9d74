//! W3C Trace Context: who is part of which trace.
//!
//! `traceparent` is read by the letter of the recommendation (level 1, section
//! 3.2); one that is malformed is as none, and takes `tracestate` with it.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
pub(crate) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// Most bytes of `tracestate` passed on: what the recommendation asks for.
const STATE: usize = 512;

/// A span's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Context {
    pub(crate) trace: [u8; 16],
    pub(crate) span: [u8; 8],
    pub(crate) sampled: bool,
}

/// What a client sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parent {
    pub(crate) context: Context,
    pub(crate) state: Option<HeaderValue>,
}

/// 64 bits no one can guess: a keyed hash (SipHash, its key from the system) of a
/// counter.
fn draw() -> u64 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static COUNT: AtomicU64 = AtomicU64::new(0);
    // Zero is no id.
    KEY.hash_one(COUNT.fetch_add(1, Relaxed)).max(1)
}

fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut out = [0; N];
    if text.len() != 2 * N || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(out)
}

impl Context {
    /// The first span of a trace.
    pub(crate) fn root(sampled: bool) -> Self {
        let (a, b) = (draw().to_be_bytes(), draw().to_be_bytes());
        let mut trace = [0; 16];
        trace[..8].copy_from_slice(&a);
        trace[8..].copy_from_slice(&b);
        Self { trace, span: draw().to_be_bytes(), sampled }
    }

    /// A span below this one.
    pub(crate) fn child(&self) -> Self {
        Self { span: draw().to_be_bytes(), ..*self }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(4, '-');
        let (version, trace, span, rest) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let [version] = hex::<1>(version)?;
        // Later versions may have more behind the flags.
        let (flags, more) = rest.split_at_checked(2)?;
        if version == 0xff || (version == 0 && !more.is_empty()) || !(more.is_empty() || more.starts_with('-')) {
            return None;
        }
        let ([flags], trace, span) = (hex::<1>(flags)?, hex(trace)?, hex(span)?);
        if trace == [0; 16] || span == [0; 8] {
            return None;
        }
        Some(Self { trace, span, sampled: flags & 1 == 1 })
    }

    /// As a `traceparent`.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        let (trace, span) = (u128::from_be_bytes(self.trace), u64::from_be_bytes(self.span));
        let text = format!("00-{trace:032x}-{span:016x}-{:02x}", u8::from(self.sampled));
        HeaderValue::try_from(text).ok()
    }
}

impl Parent {
    /// What `headers` say.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut sent = headers.get_all(TRACEPARENT).iter();
        let (Some(one), None) = (sent.next(), sent.next()) else { return None };
        let context = Context::parse(one.to_str().ok()?.trim())?;
        let states: Vec<&str> = headers.get_all(TRACESTATE).iter().filter_map(|v| v.to_str().ok()).collect();
        let state = states.join(",");
        let state = (!state.is_empty() && state.len() <= STATE).then(|| HeaderValue::try_from(state).ok()).flatten();
        Some(Self { context, state })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_recommendations_example_is_read_and_written() {
        let context = Context::parse(GOOD).unwrap();
        assert!(context.sampled);
        assert_eq!(context.header().unwrap(), GOOD);
        let child = context.child();
        assert_eq!(child.trace, context.trace);
        assert_ne!(child.span, context.span);
    }

    #[test]
    fn malformed_ones_are_as_none() {
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        for bad in [
            String::new(),
            GOOD.to_uppercase(),
            format!("{GOOD}-"),
            format!("{GOOD}0"),
            GOOD.replacen("00", "ff", 1),
            GOOD.replace(trace, &"0".repeat(32)),
            GOOD.replace("00f067aa0ba902b7", "0000000000000000"),
            GOOD.replace(trace, &trace[1..]),
            GOOD.replace("-01", "-0"),
            GOOD.replace("-01", "-é"),
        ] {
            assert_eq!(Context::parse(&bad), None, "{bad}");
        }
        for good in [format!("cc{}-later", &GOOD[2..]), GOOD.replace("-01", "-03")] {
            assert!(Context::parse(&good).unwrap().sampled, "{good}");
        }
        assert!(!Context::parse(&GOOD.replace("-01", "-02")).unwrap().sampled);
    }

    #[test]
    fn two_parents_are_none_and_states_are_joined() {
        let mut headers = HeaderMap::new();
        headers.append(TRACEPARENT, GOOD.parse().unwrap());
        headers.append(TRACESTATE, "a=1".parse().unwrap());
        headers.append(TRACESTATE, "b=2".parse().unwrap());
        assert_eq!(Parent::of(&headers).unwrap().state.unwrap(), "a=1,b=2");
        headers.append(TRACESTATE, "c".repeat(600).parse().unwrap());
        assert_eq!(Parent::of(&headers).unwrap().state, None);
        headers.append(TRACEPARENT, GOOD.parse().unwrap());
        assert_eq!(Parent::of(&headers), None);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _ = Context::parse(&text);
        }
    }
}
