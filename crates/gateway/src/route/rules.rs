//! Rules on the request itself: how it was asked, what it holds.

use crate::{ask::Ask, config::RuleSettings};
use regex::Regex;

/// A rule ready to be used.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) settings: RuleSettings,
    regex: Option<Regex>,
}

impl Rule {
    pub(crate) fn new(settings: &RuleSettings) -> Result<Self, regex::Error> {
        let regex = settings.regex.as_deref().map(Regex::new).transpose()?;
        Ok(Self { settings: settings.clone(), regex })
    }

    /// Its name, or what stands for it.
    pub(crate) fn name(&self, index: usize) -> String {
        if self.settings.name.is_empty() { format!("rules[{index}]") } else { self.settings.name.clone() }
    }

    /// Whether every condition holds.
    pub(crate) fn fits(&self, ask: &Ask) -> bool {
        let s = &self.settings;
        let header = |(name, wanted): (&String, &String)| {
            let sent = ask.headers.get(name).and_then(|v| v.to_str().ok());
            sent.is_some_and(|v| wanted == "*" || v == wanted)
        };
        let bytes = ask.prompt().len();
        (s.asked_as.is_empty() || s.asked_as.contains(&ask.model))
            && s.headers.iter().all(header)
            && s.fields.iter().all(|f| ask.raw(f).is_some())
            && s.min_bytes.is_none_or(|n| bytes >= n)
            && s.max_bytes.is_none_or(|n| bytes <= n)
            && self.regex.as_ref().is_none_or(|r| r.is_match(ask.prompt()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ask::Endpoint;
    use axum::http::{HeaderMap, HeaderName};

    #[test]
    fn every_condition_counts() {
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static("x-tier"), "gold".parse().unwrap());
        let body = br#"{"model":"m","messages":[{"role":"user","content":"SELECT 1"}],"tools":[1]}"#;
        let ask = Ask::read(Endpoint::Chat, headers, body.as_slice().into(), std::time::Instant::now()).unwrap();
        let fits = |toml: &str| Rule::new(&toml::from_str(toml).unwrap()).unwrap().fits(&ask);
        for yes in [
            "", "asked_as = ['m']", "headers = { X-Tier = 'gold' }", "headers = { x-tier = '*' }", "fields = ['tools']",
            "min_bytes = 10", "max_bytes = 100", "regex = '(?i)select'", "regex = 'SELECT'\nfields = ['tools']",
        ] {
            assert!(fits(yes), "{yes}");
        }
        for no in [
            "asked_as = ['n']", "headers = { x-tier = 'tin' }", "headers = { other = '*' }", "fields = ['seed']",
            "min_bytes = 100", "max_bytes = 10", "regex = 'select'", "regex = 'SELECT'\nfields = ['seed']",
        ] {
            assert!(!fits(no), "{no}");
        }
    }
}
