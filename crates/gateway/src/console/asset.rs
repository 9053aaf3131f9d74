//! The page's files, compiled in: nothing of it is read from a disk or another
//! server at run time.

use axum::{
    extract::Path,
    http::header,
    response::{IntoResponse as _, Response},
};
use crate::error::{Failure, refuse};

/// Each file's name and text.
macro_rules! files {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../../console/", $name)))),*] };
}

/// What `/console/NAME` may be.
const FILES: &[(&str, &str)] = files![
    "style/base.css",
    "style/layout.css",
    "style/part.css",
    "style/chart.css",
    "style/view.css",
    "main.js",
    "lib/api.js",
    "lib/decision.js",
    "lib/dom.js",
    "lib/format.js",
    "lib/live.js",
    "lib/part.js",
    "lib/session.js",
    "chart/bars.js",
    "chart/frame.js",
    "chart/lines.js",
    "chart/scale.js",
    "chart/spark.js",
    "view/abuse.js",
    "view/ask.js",
    "view/cache.js",
    "view/cost.js",
    "view/latency.js",
    "view/lineage.js",
    "view/overview.js",
    "view/releases.js",
    "view/request.js",
    "view/requests.js",
    "view/routing.js",
    "view/safety.js",
];
const PAGE: &str = include_str!("../../console/index.html");
const ICON: &str = include_str!("../../console/icon.svg");

fn sent(kind: &'static str, text: &'static str) -> Response {
    // Asked for anew each time: a page and a server of two versions would not
    // understand each other.
    ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], text).into_response()
}

pub(super) async fn page() -> Response {
    sent("text/html; charset=utf-8", PAGE)
}

pub(super) async fn icon() -> Response {
    sent("image/svg+xml", ICON)
}

pub(super) async fn file(Path(name): Path<String>) -> Result<Response, Failure> {
    let found = FILES.iter().find(|(known, _)| *known == name);
    let Some((name, text)) = found else {
        let shown: String = name.chars().take(80).collect();
        return Err(refuse(404, "not_found", format!("the console has no file {shown:?}")).into());
    };
    let kind = if name.ends_with(".css") { "text/css; charset=utf-8" } else { "text/javascript; charset=utf-8" };
    Ok(sent(kind, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_import_and_link_leads_to_a_file() {
        let known = |name: &str| FILES.iter().any(|(n, _)| *n == name);
        for (name, text) in FILES.iter().filter(|(n, _)| n.ends_with(".js")) {
            let folder = name.rsplit_once('/').map_or("", |(f, _)| f);
            for import in text.lines().filter(|l| l.starts_with("import ")) {
                let from = import.split('"').nth(1).expect("import … from \"…\"");
                let path = match (from.strip_prefix("./"), from.strip_prefix("../")) {
                    (Some(rest), _) if folder.is_empty() => rest.to_owned(),
                    (Some(rest), _) => format!("{folder}/{rest}"),
                    (_, Some(rest)) => rest.to_owned(),
                    _ => panic!("{name} imports {from}"),
                };
                assert!(known(&path), "{name} imports {path}");
            }
        }
        for link in PAGE.split('"').filter(|l| l.starts_with("/console/")) {
            assert!(known(&link["/console/".len()..]), "{link}");
        }
    }

    #[test]
    fn nothing_is_inline_and_no_text_becomes_markup() {
        assert!(!PAGE.contains("style=") && !PAGE.contains("<style") && !PAGE.contains("onclick"));
        assert_eq!(PAGE.matches("<script").count(), 1);
        for (name, text) in FILES {
            for bad in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "http://", "https://"] {
                let bad_here = text.replace("http://www.w3.org/2000/svg", "").contains(bad);
                assert!(!bad_here, "{name} has {bad}");
            }
        }
    }
}
