// The console's only script. Data from the server is set as text, never as
// markup; the one picture it takes in is parsed as XML and stripped of styles.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** An element with text, class and attributes; children are nodes or text. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

function shape(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const ms = (v) => (v === null || v === undefined ? "–" : v < 1 ? v.toFixed(2) + " ms" : v < 1000 ? Math.round(v) + " ms" : (v / 1000).toFixed(v < 10000 ? 2 : 1) + " s");
const short = (digest) => String(digest ?? "").replace(/^sha256:/, "").slice(0, 12);
function when(at) {
  const date = new Date(at);
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return date.toDateString() === new Date().toDateString() ? time : date.toLocaleDateString() + " " + time;
}

async function json(path) {
  const reply = await fetch(path, { headers: { accept: "application/json" } });
  const body = await reply.json();
  if (!reply.ok) throw new Error(body?.error?.message ?? "status " + reply.status);
  return body;
}

function trouble(error) {
  $("trouble").textContent = error ? String(error.message ?? error) : "";
  $("trouble").hidden = !error;
}

/* Release */

function facts(pairs) {
  const list = el("dl", { class: "facts" });
  for (const [name, value, code] of pairs) {
    if (value === null || value === undefined || value === "") continue;
    list.append(el("dt", {}, name), el("dd", {}, code ? el("code", {}, value) : value));
  }
  return list;
}

async function showRelease() {
  const { current, models, releases } = await json("/ashlar/releases");
  const body = $("release-body");
  if (current) {
    const state = current.revoked ? el("span", { class: "tag bad" }, "revoked: exposed to a document taken down") : null;
    body.replaceChildren(
      el("p", { class: "name" }, current.channel, state && " ", state),
      facts([
        ["Release", current.id, true],
        ["Served as", current.serving],
        ["Model", short(current.model), true],
        ["Adapter", current.adapter && short(current.adapter), true],
        ["Snapshot", current.snapshot && short(current.snapshot), true],
        ["Promoted", when(current.created_ms)],
      ]),
    );
    if (current.checks?.length) {
      body.append(el("ul", { class: "checks", id: "checks" }, ...current.checks.map((c) => el("li", {},
        el("span", { class: c.passed ? "good" : "bad", "aria-label": c.passed ? "passed" : "failed" }, c.passed ? "✓" : "✗"),
        el("span", {}, String(c.name ?? ""), c.detail ? el("span", { class: "why" }, String(c.detail)) : null)))));
    }
  } else {
    body.replaceChildren(
      el("p", { class: "name" }, models[0]?.id ?? "No model"),
      el("p", { class: "quiet" }, "Served without a release: answers are recorded, but no documents stand behind them."),
    );
  }
  const select = $("model");
  const chosen = select.value || current?.serving;
  select.replaceChildren(...models.map((m) => el("option", { value: m.id }, m.id)));
  if (models.some((m) => m.id === chosen)) select.value = chosen;
  $("history").hidden = releases.length < 2;
  $("releases-table").tBodies[0].replaceChildren(...releases.slice(0, 50).map((r) => el("tr", {},
    el("td", {}, when(r.created_ms)), el("td", {}, r.channel), el("td", { class: "id" }, r.id),
    el("td", { class: "id" }, short(r.model)),
    el("td", {}, r.revoked ? el("span", { class: "tag bad" }, "revoked") : r.id === current?.id ? el("span", { class: "tag mark" }, "serving") : "–"))));
  drawLoss(current?.losses);
}

/* Figures, live requests, histograms */

async function showLive() {
  const live = await json("/ashlar/live");
  const count = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)));
  $("figures").replaceChildren(
    count("running", live.running), count("waiting", live.waiting),
    count("KV blocks", live.blocks_total ? live.blocks_used + " of " + live.blocks_total : "–"));
  $("live-table").tBodies[0].replaceChildren(...live.requests.map((r) => el("tr", {},
    el("td", { class: "id" }, r.id), el("td", {}, r.model),
    el("td", { class: "n", "data-unit": "prompt tokens" }, String(r.prompt_tokens)),
    el("td", { class: "n", "data-unit": "tokens" }, String(r.tokens)),
    el("td", { class: "n", "data-unit": "to first" }, ms(r.ttft_ms)), el("td", { class: "n" }, ms(r.elapsed_ms)))));
  $("live-table").hidden = live.requests.length === 0;
  $("live-none").hidden = live.requests.length > 0;
  drawHistogram($("ttft"), live.ttft, "answers");
  drawHistogram($("itl"), live.itl, "gaps between tokens");
  return live.requests.length > 0;
}

function seconds(s) {
  return s < 1 ? +(s * 1000).toPrecision(3) + " ms" : +s.toPrecision(3) + " s";
}

function drawHistogram(box, h, what) {
  const total = h.counts.reduce((a, b) => a + b, 0);
  if (!total) {
    box.replaceChildren(el("p", { class: "quiet" }, "Nothing measured since the start."));
    return;
  }
  let first = h.counts.findIndex((c) => c > 0);
  let last = h.counts.findLastIndex((c) => c > 0);
  first = Math.max(0, Math.min(first, last - 5));
  last = Math.min(h.counts.length - 1, Math.max(last, first + 5));
  const counts = h.counts.slice(first, last + 1);
  const most = Math.max(...counts);
  const [w, height, top, foot] = [360, 150, 18, 24];
  const step = w / counts.length;
  const svg = shape("svg", { viewBox: `0 0 ${w} ${height}`, role: "img" });
  svg.append(shape("title", {}, total + " " + what + ", mean " + seconds(h.sum / total)));
  counts.forEach((count, i) => {
    const tall = count ? Math.max(2, (count / most) * (height - top - foot)) : 0;
    const bar = shape("rect", { class: "bar", x: i * step + 2, y: height - foot - tall, width: Math.max(2, step - 4), height: tall, rx: 2 });
    const bound = h.bounds[first + i];
    bar.append(shape("title", {}, count + (bound === undefined ? " above " + seconds(h.bounds.at(-1)) : " up to " + seconds(bound))));
    svg.append(bar);
    if (count && count === most) svg.append(shape("text", { x: i * step + step / 2, y: height - foot - tall - 5, "text-anchor": "middle" }, String(count)));
  });
  svg.append(shape("line", { class: "axis", x1: 0, x2: w, y1: height - foot, y2: height - foot }));
  const every = Math.ceil(counts.length / 6);
  counts.forEach((_, i) => {
    const bound = h.bounds[first + i];
    if (i % every === 0 && bound !== undefined) svg.append(shape("text", { x: i * step + step / 2, y: height - 8, "text-anchor": "middle" }, "≤" + seconds(bound)));
  });
  box.replaceChildren(svg, el("p", { class: "quiet" }, `${total} ${what}, mean ${seconds(h.sum / total)}`));
}

function drawLoss(losses) {
  const values = (losses ?? []).filter((v) => Number.isFinite(v));
  $("loss-section").hidden = values.length < 2;
  if (values.length < 2) return;
  const [w, height, left, foot, top] = [360, 150, 34, 24, 10];
  const [low, high] = [Math.min(0, ...values), Math.max(...values)];
  const x = (i) => left + (i / (values.length - 1)) * (w - left - 4);
  const y = (v) => top + (1 - (v - low) / (high - low || 1)) * (height - top - foot);
  const svg = shape("svg", { viewBox: `0 0 ${w} ${height}`, role: "img" });
  svg.append(shape("title", {}, `Loss over ${values.length} steps, from ${values[0].toFixed(3)} to ${values.at(-1).toFixed(3)}`),
    shape("line", { class: "axis", x1: left, x2: w, y1: y(low), y2: y(low) }),
    shape("text", { x: left - 6, y: y(high) + 4, "text-anchor": "end" }, high.toFixed(1)),
    shape("text", { x: left - 6, y: y(low) + 4, "text-anchor": "end" }, low.toFixed(1)),
    shape("text", { x: left, y: height - 8 }, "step 1"),
    shape("text", { x: w - 4, y: height - 8, "text-anchor": "end" }, String(values.length)),
    shape("path", { class: "curve", d: values.map((v, i) => (i ? "L" : "M") + x(i).toFixed(1) + "," + y(v).toFixed(1)).join("") }));
  $("loss").replaceChildren(svg, el("p", { class: "quiet" }, `${values[0].toFixed(3)} at the start, ${values.at(-1).toFixed(3)} at the end`));
}

/* Responses */

let chosen = null;

function speed(s) {
  const decode = s.total_ms - s.ttft_ms;
  return s.completion_tokens > 1 && s.ttft_ms > 0 && decode > 0 ? (((s.completion_tokens - 1) / decode) * 1000).toFixed(1) : "–";
}

async function showRecent() {
  const { responses } = await json("/ashlar/responses?limit=50");
  $("recent-table").tBodies[0].replaceChildren(...responses.map((r) => {
    const s = r.settlement;
    const end = el("td", {}, el("span", { class: "tag" + (s && !["stop", "length"].includes(s.finish) ? " bad" : "") }, s ? s.finish : "running"));
    if (s?.refusal) end.append(el("span", { class: "tag mark" }, "refusal"));
    const text = s?.answer ?? s?.error ?? "(no text)";
    return el("tr", { "data-id": r.id, class: r.id === chosen ? "chosen" : null },
      el("td", {}, when(r.at_ms)),
      el("td", { class: "text" }, el("button", { class: "link", type: "button", title: r.id, onclick: () => showLineage(r.id) }, text.slice(0, 300))),
      el("td", {}, r.model),
      el("td", { class: "n", "data-unit": "tokens", title: s ? `${s.prompt_tokens} in the prompt, ${s.cached_tokens} of them cached; ${s.completion_tokens} generated` : null }, s ? `${s.prompt_tokens} + ${s.completion_tokens}` : "–"),
      el("td", { class: "n", "data-unit": "to first" }, s && s.ttft_ms > 0 ? ms(s.ttft_ms) : "–"),
      el("td", { class: "n", "data-unit": "tokens/s" }, s ? speed(s) : "–"),
      end);
  }));
  $("recent-table").hidden = responses.length === 0;
  $("recent-none").hidden = responses.length > 0;
}

/* Lineage */

async function showLineage(id, push = true) {
  chosen = id;
  if (push) history.pushState({ id }, "", id ? "/?response=" + encodeURIComponent(id) : "/");
  for (const row of document.querySelectorAll("tr[data-id]")) row.classList.toggle("chosen", row.dataset.id === id);
  $("lineage").hidden = !id;
  if (!id) return;
  $("lineage-of").textContent = id;
  try {
    // Nine layers side by side fit no screen legibly; on top of each other they do.
    const [{ trace, response }, picture] = await Promise.all([
      json("/ashlar/trace/" + encodeURIComponent(id)),
      fetch("/ashlar/graph/" + encodeURIComponent(id) + ".svg?layout=tall").then((r) => r.ok ? r.text() : Promise.reject(new Error("no picture: status " + r.status))),
    ]);
    if (chosen !== id) return;
    const svg = new DOMParser().parseFromString(picture, "image/svg+xml").documentElement;
    // The page's own styles apply; its policy would refuse these.
    svg.querySelectorAll("style").forEach((s) => s.remove());
    $("graph").replaceChildren(document.importNode(svg, true));
    const answer = response?.settlement?.answer;
    $("lineage-answer").textContent = answer ?? "";
    $("lineage-answer").hidden = !answer;
    const documents = trace.nodes.filter((n) => n.kind === "document");
    const sharing = documents.filter((n) => n.detail?.span).length;
    $("documents-h").textContent = documents.length
      ? `Exposed to ${documents.length} document${documents.length > 1 ? "s" : ""}` + (sharing ? `, ${sharing} shar${sharing > 1 ? "e" : "es"} text with the answer` : "")
      : "No documents stand behind this";
    $("documents-note").hidden = documents.length === 0;
    const list = documents.slice(0, 40).map((n) => el("li", {}, n.label, n.detail?.span ? el("span", { class: "span" }, "shares “" + n.detail.span + "”") : null));
    if (documents.length > 40) list.push(el("li", { class: "quiet" }, `${documents.length - 40} more: see /ashlar/trace/${id}`));
    $("documents").replaceChildren(...list);
    if (push) $("lineage").scrollIntoView({ behavior: "smooth", block: "start" });
  } catch (error) {
    $("graph").replaceChildren(el("p", { class: "bad" }, String(error.message ?? error)));
    $("documents-h").textContent = "";
    $("documents-note").hidden = true;
    $("documents").replaceChildren();
  }
}

/* Ask */

let asking = null;

async function ask(event) {
  event.preventDefault();
  if (asking) return;
  asking = new AbortController();
  const answer = $("answer"), note = $("answer-note");
  answer.textContent = "";
  answer.hidden = false;
  note.hidden = true;
  $("send").disabled = true;
  $("stop").hidden = false;
  let id = null, usage = null;
  const began = performance.now();
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST", signal: asking.signal, headers: { "content-type": "application/json" },
      body: JSON.stringify({
        model: $("model").value, stream: true, stream_options: { include_usage: true }, temperature: 0, max_tokens: 256,
        messages: [{ role: "user", content: $("question").value }],
      }),
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    id = reply.headers.get("x-ashlar-response-id");
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        answer.append(chunk.choices?.[0]?.delta?.content ?? "");
      }
    }
    note.replaceChildren(`${usage?.completion_tokens ?? "?"} tokens in ${ms(performance.now() - began)}. `,
      el("button", { class: "link", type: "button", onclick: () => showLineage(id) }, "Where does it come from?"));
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "Stopped." : String(error.message ?? error);
  }
  note.hidden = false;
  asking = null;
  $("send").disabled = false;
  $("stop").hidden = true;
  refresh();
}

/* Life */

let timer = 0;

async function refresh() {
  clearTimeout(timer);
  let busy = false;
  try {
    [busy] = await Promise.all([showLive(), showRecent()]);
    trouble(null);
  } catch (error) {
    trouble(error instanceof TypeError ? "The server does not answer." : error);
  }
  timer = setTimeout(document.hidden ? idle : refresh, busy ? 1000 : 4000);
}

function idle() {
  document.addEventListener("visibilitychange", refresh, { once: true });
}

$("ask-form").addEventListener("submit", ask);
$("stop").addEventListener("click", () => asking?.abort());
$("close").addEventListener("click", () => showLineage(null));
$("question").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) ask(e);
});
const linked = () => new URLSearchParams(location.search).get("response");
window.addEventListener("popstate", () => showLineage(linked(), false));
showRelease().catch(trouble);
setInterval(() => { if (!document.hidden) showRelease().catch(trouble); }, 30000);
refresh();
if (linked()) showLineage(linked(), false);
