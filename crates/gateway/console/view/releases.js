// What is served, what is tried beside it, and taking that back.

import { lines } from "../chart/lines.js";
import { get, post } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { digest, ms, percent, short, when, whole } from "../lib/format.js";
import { col, confirm, empty, facts, head, num, panel, quiet, state, table, tag } from "../lib/part.js";

export const title = "Releases";

/** Most releases listed. */
const SHOWN = 100;

export function mount(main, { trouble }) {
  const box = { canaries: el("div", { class: "span stack" }), current: el("div"), loss: el("div"), history: el("div") };
  let losses = null;
  main.append(head("Releases"), el("div", { class: "grid" }, box.canaries, panel("Served now", box.current), panel("Training loss", box.loss),
    el("div", { class: "span" }, panel("History", box.history))));

  async function refresh(signal) {
    const [data, tried] = await Promise.all([get("/ashlar/releases", {}, signal), get("/ashlar/canaries", { days: 30 }, signal)]);
    put(box.canaries, ...canaries(tried, takeBack));
    put(box.current, ...current(data));
    put(box.history, ...history(data));
    showLoss(data.current?.losses);
  }

  function showLoss(values) {
    const known = (values ?? []).filter(Number.isFinite);
    if (JSON.stringify(known) === losses) return;
    losses = JSON.stringify(known);
    if (known.length < 2) return put(box.loss, empty("No training run stands behind this.", "A release made by ashlar up or ashlar train brings its loss curve along."));
    put(box.loss, lossChart(known), quiet(`${known[0].toFixed(3)} at the start, ${known.at(-1).toFixed(3)} after ${whole(known.length)} steps.`));
  }

  async function takeBack(canary) {
    const text = `No further request for ${canary.model} will be drawn for ${canary.backend}. Requests under way go on. It stays taken back until its settings change.`;
    if (!(await confirm(`Take back ${canary.backend}?`, text, "Take it back"))) return;
    try {
      await post(`/ashlar/canaries/${encodeURIComponent(canary.model)}/take-back`, { backend: canary.backend });
      await refresh();
    } catch (error) {
      trouble(error);
    }
  }
  return { refresh, every: 15000 };
}

function lossChart(values) {
  // Steps stand where times are elsewhere.
  const { node, update } = lines({ label: "Training loss by step", format: (v) => (v === null || v === undefined ? "–" : v.toFixed(3)), axis: (v) => short(v), series: [{ name: "loss", cls: "s1" }], by: "step" });
  update({ at: values.map((_, i) => i + 1), step: 1, columns: [values] });
  return node;
}

function current({ current, models }) {
  if (!current) {
    return [el("p", { class: "name" }, models[0]?.id ?? "No model"), quiet("Served without a release: answers are recorded, but no documents stand behind them.")];
  }
  return [
    el("p", { class: "name" }, current.channel, " ", current.revoked && tag("revoked: exposed to a document taken down", "bad")),
    facts([["Release", current.id, true], ["Served as", current.serving], ["Model", digest(current.model), true], ["Adapter", current.adapter && digest(current.adapter), true],
      ["Snapshot", current.snapshot && digest(current.snapshot), true], ["Promoted", when(current.created_ms)]]),
    current.checks?.length ? el("ul", { class: "checks" }, ...current.checks.map((c) => el("li", {}, state(c.passed, String(c.name ?? "")),
      el("span", { class: "why" }, c.detail ? String(c.detail) : c.passed ? "passed" : "failed")))) : null,
    el("p", {}, el("a", { href: "#/lineage/" + encodeURIComponent(current.id) }, "What it was made from")),
  ].filter(Boolean);
}

/** A card for each canary: evidence beside the incumbent's. */
function canaries({ canaries, sums }, takeBack) {
  if (!canaries.length) return [panel("Canary", empty("No canary.", "Give a model of the configuration file a [models.NAME.canary] with a backend and a share of requests."))];
  return canaries.map((c) => {
    const of = (is) => sums.filter((s) => s.model === c.model && (s.backend === c.backend) === is);
    const [mine, others] = [of(true), of(false)];
    const requests = (list) => list.reduce((n, s) => n + s.requests, 0);
    const mean = (list, f, count) => {
      const n = list.reduce((n, s) => n + s[count], 0);
      return n ? list.reduce((all, s) => all + (s[f] ?? 0) * s[count], 0) / n : null;
    };
    const rate = (a, b) => (b ? `${whole(a)} (${percent(a / b)})` : whole(a));
    const evidence = (e) => (e.canary + e.others ? `${short(e.e_value)} of ${short(3 / c.alpha)}` : "–");
    const row = (name, e) => [name, rate(e.canary, c.drawn.canary), rate(e.others, c.drawn.others), evidence(e)];
    return panel(`Canary of ${c.model}`,
      el("div", { class: "row apart" }, el("p", { class: "name" }, c.backend, " ", c.rolled_back ? tag("taken back", "bad") : tag(`${percent(c.share)} of requests`, "good")),
        c.rolled_back ? null : el("button", { type: "button", class: "danger", "data-key": "back-" + c.model, onclick: () => takeBack(c) }, "Take it back")),
      c.rolled_back ? el("p", { class: "notice bad" }, c.rolled_back) : quiet("It is taken back by itself once the evidence against it reaches its limit."),
      table("Canary against incumbent", [col("Since the start"), num("Canary"), num("Incumbent"), num("Evidence against it")], [
        ["Requests drawn", whole(c.drawn.canary), whole(c.drawn.others), "–"], row("Failures", c.failures), row("Slow first tokens", c.slow_first_tokens), row("Refusals", c.refusals)]),
      requests(mine) + requests(others) > 0 && table("The last 30 days", [col("Last 30 days"), num("Canary"), num("Incumbent")], [
        ["Requests", whole(requests(mine)), whole(requests(others))], ["First token, mean", ms(mean(mine, "ttft_ms", "first_tokens")), ms(mean(others, "ttft_ms", "first_tokens"))], ["In all, mean", ms(mean(mine, "total_ms", "requests")), ms(mean(others, "total_ms", "requests"))]]));
  });
}

function history({ releases, current }) {
  if (!releases.length) return [empty("No release yet.", "ashlar promote makes one once its gates hold.")];
  return [table("History", [col("Time"), col("Channel"), col("Release"), col("Model"), col("State")], releases.slice(0, SHOWN).map((r) => [when(r.created_ms), r.channel,
    el("a", { class: "id", href: "#/lineage/" + encodeURIComponent(r.id) }, r.id), el("code", {}, digest(r.model)),
    r.revoked ? tag("revoked", "bad") : r.id === current?.id ? tag("serving", "good") : "–"])),
  releases.length > SHOWN && quiet(`${whole(releases.length - SHOWN)} older ones are not listed.`),
  releases.length > 1 && quiet("To serve an earlier one again: ", el("code", {}, `ashlar rollback ${current?.channel ?? "CHANNEL"}`), ", then restart the server.")].filter(Boolean);
}
