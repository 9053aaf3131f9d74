//! The lineage of an answer as a layered SVG, drawn on the server.
//!
//! The ledger's edges run with the data; the picture runs from the answer back
//! to the documents. Layers follow the longest path, documents come last in
//! one list of at most twelve. Two layouts of the same layers: left to
//! right, and top to bottom for narrow screens. Text is escaped here and
//! nowhere else; no script, link or outside reference is ever written.
//!
//! Rejected: Graphviz (a program that may be absent), and force layouts, which
//! put the same graph elsewhere each time.

use ashlar_store::{Node, Trace};
use serde_json::Value;
use std::{collections::BTreeMap, fmt::Write as _};

/// Documents listed by title; the rest are counted.
const LISTED: usize = 12;
/// Nodes drawn in one layer; the rest are counted.
const IN_LAYER: usize = 8;

const BOX: (f64, f64) = (164.0, 64.0);
const HEAD: f64 = 46.0;
const LIST_WIDTH: f64 = 250.0;
const LINE: f64 = 22.0;
const PAD: f64 = 16.0;

/// Which way lineage runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Response left, documents right.
    Wide,
    /// Response on top, documents at the bottom.
    Tall,
}

/// A rectangle that is drawn: one node, or the list of documents.
struct Card {
    layer: usize,
    title: String,
    lines: Vec<(String, bool)>,
    class: String,
    hover: String,
    x: f64,
    y: f64,
    w: f64,
    h: f64,
}

/// Draws `trace`; documents that share text with the answer are marked.
pub(crate) fn svg(trace: &Trace, layout: Layout) -> String {
    let (mut cards, edges) = cards(trace);
    let (width, height) = place(&mut cards, &edges, layout);
    let mut out = String::with_capacity(4096);
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"lineage\" role=\"img\" \
         viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <title>Lineage of {}: what it was exposed to</title>\n<style>{STYLE}</style>\n",
        escape(&trace.root)
    );
    for (from, to, role) in &edges {
        let path = curve(&cards[*from], &cards[*to], layout);
        let _ = writeln!(
            out,
            "<path class=\"edge\" fill=\"none\" d=\"{path}\"><title>{}</title></path>",
            escape(role)
        );
    }
    for card in &cards {
        draw(&mut out, card);
    }
    out.push_str("</svg>\n");
    out
}

const STYLE: &str = ".lineage{--bg:#fff;--ink:#1d2433;--soft:#667085;--line:#c5ccd8;--mark:#b4530a}\
@media(prefers-color-scheme:dark){.lineage{--bg:#171c26;--ink:#e6e9ef;--soft:#98a2b3;--line:#3b4456;--mark:#f0a35e}}\
.card rect{fill:var(--bg);stroke:var(--line)}.card text{fill:var(--ink)}.card .kind{fill:var(--soft)}\
.card .shared{fill:var(--mark)}.edge{stroke:var(--line);stroke-width:1.4}.root rect{stroke:var(--mark)}";

fn draw(out: &mut String, c: &Card) {
    let _ = write!(
        out,
        "<g class=\"card {}\"><title>{}</title><rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" \
         height=\"{:.1}\" rx=\"8\"/><text class=\"kind\" font-size=\"10.5\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
        escape(&c.class),
        escape(&c.hover),
        c.x,
        c.y,
        c.w,
        c.h,
        c.x + 12.0,
        c.y + 18.0,
        escape(&c.title)
    );
    let room = ((c.w - 24.0) / 6.6) as usize;
    for (i, (line, shared)) in c.lines.iter().enumerate() {
        let list = c.class.starts_with("documents");
        let y = c.y + 36.0 + if list { LINE } else { 16.0 } * i as f64;
        let (mark, class) = match (shared, list || i == 0) {
            (true, _) => ("● ", "shared"),
            (false, true) => ("", "label"),
            (false, false) => ("", "kind"),
        };
        let _ = write!(
            out,
            "<text class=\"{class}\" x=\"{:.1}\" y=\"{y:.1}\">{mark}{}</text>",
            c.x + 12.0,
            escape(&cut(line, room - mark.len().min(2)))
        );
    }
    out.push_str("</g>\n");
}

/// At most `room` characters.
fn cut(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    let head: String = text.chars().take(room.saturating_sub(1)).collect();
    format!("{}…", head.trim_end())
}

/// Cards and the edges between them, each edge once.
fn cards(trace: &Trace) -> (Vec<Card>, Vec<(usize, usize, String)>) {
    let index: BTreeMap<&str, usize> = trace
        .nodes
        .iter()
        .enumerate()
        .map(|(i, n)| (n.id.as_str(), i))
        .collect();
    let edges: Vec<(usize, usize, &str)> = trace
        .edges
        .iter()
        .filter_map(|e| Some((*index.get(&*e.to)?, *index.get(&*e.from)?, e.role.as_str())))
        .filter(|(from, to, _)| from != to)
        .collect();
    let layers = layers(trace.nodes.len(), &edges);
    let is_document = |i: usize| trace.nodes[i].kind == "document";
    let last = (0..trace.nodes.len())
        .filter(|i| !is_document(*i))
        .map(|i| layers[i] + 1)
        .max()
        .unwrap_or(0);

    let mut cards = Vec::new();
    let mut card_of: Vec<Option<usize>> = vec![None; trace.nodes.len()];
    let mut in_layer: BTreeMap<usize, usize> = BTreeMap::new();
    let mut spill: BTreeMap<usize, usize> = BTreeMap::new();
    for (i, node) in trace.nodes.iter().enumerate().filter(|(i, _)| !is_document(*i)) {
        let count = in_layer.entry(layers[i]).or_default();
        *count += 1;
        let root = node.id == trace.root;
        if *count > IN_LAYER && !root {
            // One more card stands for all that do not fit.
            let slot = *spill.entry(layers[i]).or_insert(cards.len());
            card_of[i] = Some(slot);
            if slot == cards.len() {
                cards.push(Card::new(layers[i], "and", vec![], "more", ""));
            }
            let more = *count - IN_LAYER;
            cards[slot].lines = vec![(format!("{more} more"), false)];
            continue;
        }
        card_of[i] = Some(cards.len());
        let class = if root {
            format!("{} root", node.kind)
        } else {
            node.kind.clone()
        };
        let lines = captions(node).map(|line| (line, false)).into();
        let hover = format!("{}: {}", node.kind, node.label);
        cards.push(Card::new(layers[i], &node.kind, lines, &class, &hover));
    }
    let documents: Vec<usize> = (0..trace.nodes.len()).filter(|i| is_document(*i)).collect();
    if !documents.is_empty() {
        let mut lines: Vec<(String, bool)> = documents
            .iter()
            .take(LISTED)
            .map(|i| {
                let node = &trace.nodes[*i];
                let [title, _] = captions(node);
                (title, node.detail.get("span").is_some())
            })
            .collect();
        if documents.len() > LISTED {
            lines.push((format!("{} more", documents.len() - LISTED), false));
        }
        let title = match documents.len() {
            1 => "exposed to 1 document".to_owned(),
            n => format!("exposed to {n} documents"),
        };
        for i in &documents {
            card_of[*i] = Some(cards.len());
        }
        let root = documents.iter().any(|i| trace.nodes[*i].id == trace.root);
        let class = if root { "documents root" } else { "documents" };
        cards.push(Card::new(last, &title, lines, class, &title));
    }
    let mut joined: Vec<(usize, usize, String)> = Vec::new();
    for (from, to, role) in edges {
        let (Some(from), Some(to)) = (card_of[from], card_of[to]) else {
            continue;
        };
        let (from, to) = if cards[from].layer <= cards[to].layer {
            (from, to)
        } else {
            (to, from)
        };
        if from != to && !joined.iter().any(|(f, t, _)| (*f, *t) == (from, to)) {
            joined.push((from, to, role.to_owned()));
        }
    }
    (cards, joined)
}

/// A name and what else matters at a glance; the full label is the tooltip.
fn captions(node: &Node) -> [String; 2] {
    let text = |key: &str| node.detail.get(key).and_then(Value::as_str).map(str::to_owned);
    let number = |key: &str| node.detail.get(key).and_then(Value::as_f64);
    let hex = node.id.strip_prefix("sha256:").unwrap_or(&node.id);
    let short: String = hex.chars().take(12).collect();
    match &*node.kind {
        "response" => {
            let settlement = node.detail.get("settlement");
            let tokens = settlement.and_then(|s| s.get("completion_tokens")?.as_u64());
            let finish = settlement.and_then(|s| s.get("finish")?.as_str());
            let end = finish.unwrap_or("running");
            [node.id.clone(), format!("{end} · {} tokens", tokens.unwrap_or(0))]
        }
        "release" => [text("channel").unwrap_or_default(), node.id.clone()],
        "run" => {
            let seconds = number("seconds").map(|s| format!("{s:.1} s"));
            [text("name").unwrap_or(short), seconds.unwrap_or_default()]
        }
        "document" => {
            let name = text("title").filter(|t| !t.is_empty()).or_else(|| text("id"));
            [name.unwrap_or(short), String::new()]
        }
        _ => [text("name").unwrap_or_else(|| node.label.clone()), short],
    }
}

impl Card {
    fn new(layer: usize, title: &str, lines: Vec<(String, bool)>, class: &str, hover: &str) -> Self {
        Self {
            layer,
            title: title.to_owned(),
            lines,
            class: class.to_owned(),
            hover: hover.to_owned(),
            x: 0.0,
            y: 0.0,
            w: 0.0,
            h: 0.0,
        }
    }
}

/// Longest path from a node without incoming edge; a cycle, which lineage
/// never has, stops growing after as many rounds as there are nodes.
fn layers(nodes: usize, edges: &[(usize, usize, &str)]) -> Vec<usize> {
    let mut layer = vec![0; nodes];
    for _ in 0..nodes {
        let mut changed = false;
        for (from, to, _) in edges {
            if layer[*to] < layer[*from] + 1 && layer[*from] + 1 < nodes {
                layer[*to] = layer[*from] + 1;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    layer
}

/// Sets positions; the picture's width and height.
fn place(cards: &mut [Card], edges: &[(usize, usize, String)], layout: Layout) -> (f64, f64) {
    let mut rows: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (i, card) in cards.iter_mut().enumerate() {
        let list = card.class.starts_with("documents");
        card.w = if list { LIST_WIDTH } else { BOX.0 };
        card.h = BOX.1.max(HEAD + LINE * (card.lines.len().max(1) - 1) as f64);
        rows.entry(card.layer).or_default().push(i);
    }
    let mut rows: Vec<Vec<usize>> = rows.into_values().collect();
    // One sweep: each node near the mean place of what leads to it.
    let mut order = vec![0.0; cards.len()];
    for row in &mut rows {
        let mean = |i: &usize| {
            let above: Vec<f64> = edges
                .iter()
                .filter(|(_, to, _)| to == i)
                .map(|(from, _, _)| order[*from])
                .collect();
            if above.is_empty() {
                0.5
            } else {
                above.iter().sum::<f64>() / above.len() as f64
            }
        };
        row.sort_by(|a, b| mean(a).total_cmp(&mean(b)));
        for (k, i) in row.iter().enumerate() {
            order[*i] = (k as f64 + 0.5) / row.len() as f64;
        }
    }
    if layout == Layout::Tall {
        // Two cards fit side by side on a narrow screen.
        rows = rows
            .into_iter()
            .flat_map(|r| r.chunks(2).map(<[usize]>::to_vec).collect::<Vec<_>>())
            .collect();
    }
    let (gap_along, gap_across) = match layout {
        Layout::Wide => (44.0, 14.0),
        Layout::Tall => (34.0, 12.0),
    };
    let size = |c: &Card| match layout {
        Layout::Wide => (c.w, c.h),
        Layout::Tall => (c.h, c.w),
    };
    let across = |cards: &[Card], row: &[usize]| {
        row.iter().map(|i| size(&cards[*i]).1).sum::<f64>()
            + gap_across * (row.len().max(1) - 1) as f64
    };
    let breadth = rows.iter().map(|r| across(cards, r)).fold(BOX.1, f64::max);
    let mut along = PAD;
    for row in &rows {
        let mut at = PAD + (breadth - across(cards, row)) / 2.0;
        let mut deepest: f64 = 0.0;
        for i in row {
            let (depth, width) = size(&cards[*i]);
            let card = &mut cards[*i];
            (card.x, card.y) = match layout {
                Layout::Wide => (along, at),
                Layout::Tall => (at, along),
            };
            at += width + gap_across;
            deepest = deepest.max(depth);
        }
        along += deepest + gap_along;
    }
    let length = (along - gap_along + PAD).max(2.0 * PAD);
    match layout {
        Layout::Wide => (length, breadth + 2.0 * PAD),
        Layout::Tall => (breadth + 2.0 * PAD, length),
    }
}

fn curve(from: &Card, to: &Card, layout: Layout) -> String {
    match layout {
        Layout::Wide => {
            let (x1, y1) = (from.x + from.w, from.y + from.h / 2.0);
            let (x2, y2) = (to.x, to.y + to.h / 2.0);
            let mid = (x2 - x1).abs() / 2.0;
            format!(
                "M{x1:.1},{y1:.1} C{:.1},{y1:.1} {:.1},{y2:.1} {x2:.1},{y2:.1}",
                x1 + mid,
                x2 - mid
            )
        }
        Layout::Tall => {
            let (x1, y1) = (from.x + from.w / 2.0, from.y + from.h);
            let (x2, y2) = (to.x + to.w / 2.0, to.y);
            let mid = (y2 - y1).abs() / 2.0;
            format!(
                "M{x1:.1},{y1:.1} C{x1:.1},{:.1} {x2:.1},{:.1} {x2:.1},{y2:.1}",
                y1 + mid,
                y2 - mid
            )
        }
    }
}

/// `text` for XML content and attributes; what XML cannot hold becomes U+FFFD.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\t' | '\n' | '\r' => out.push(' '),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
