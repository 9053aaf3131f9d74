// What goes on now.

import { lines } from "../chart/lines.js";
import { spark } from "../chart/spark.js";
import { get } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { clip, ms, percent, perSecond, plural, seconds, short, whole } from "../lib/format.js";
import { col, empty, figures, head, minutes, num, panel, quiet, share, state, table } from "../lib/part.js";

export const title = "Overview";

export function mount(main, { again }) {
  let period = 5;
  const pick = (m) => { period = m; again(); };
  const box = { figures: el("div", { class: "span" }), backends: el("div"), running: el("div") };
  const load = lines({ label: "Requests a second", format: perSecond, axis: short,
    series: [{ name: "arrived", cls: "s1", area: true }, { name: "failed", cls: "s2" }, { name: "turned away", cls: "s4" }],
    empty: "No request in this time. Ask something under “Ask”, or send one to /v1/chat/completions." });
  const first = lines({ label: "Time to first token", format: seconds, series: [{ name: "p50", cls: "s1" }, { name: "p95", cls: "s2" }] });
  const tokens = lines({ label: "Tokens a second", format: perSecond, axis: short, stacked: true,
    series: [{ name: "prompts", cls: "s1" }, { name: "cached", cls: "s3" }, { name: "answers", cls: "s2" }] });
  main.append(head("Overview", null, minutes(period, pick)), box.figures, el("div", { class: "grid" },
    el("div", { class: "span" }, panel("Requests", load.node)), panel("Time to first token", first.node), panel("Tokens", tokens.node),
    el("div", { class: "span" }, panel("Backends", box.backends)), el("div", { class: "span" }, panel("Running now", box.running))));

  async function refresh(signal) {
    const [series, live, backends] = await Promise.all([
      get("/ashlar/series", { minutes: period }, signal), get("/ashlar/live", {}, signal), get("/ashlar/backends", {}, signal)]);
    put(box.figures, figures(numbers(series, live, backends)));
    load.update({ at: series.at_ms, step: series.step_ms, columns: [series.requests_per_s, series.errors_per_s, series.turned_away_per_s] });
    first.update({ at: series.at_ms, step: series.step_ms, columns: [series.ttft_s.p50, series.ttft_s.p95] });
    const computed = series.prompt_tokens_per_s.map((v, i) => (v === null ? null : v - series.cached_tokens_per_s[i]));
    tokens.update({ at: series.at_ms, step: series.step_ms, columns: [computed, series.cached_tokens_per_s, series.output_tokens_per_s] });
    put(box.backends, health(backends));
    put(box.running, ...[running(live.requests)].flat());
  }
  return { refresh, every: 2000 };
}

function numbers(series, live, { backends }) {
  const b = series.budget;
  const well = backends.filter((x) => x.available).length;
  const [ttft, gap] = [series.total.ttft_s, series.total.gap_s];
  const burn = b.burn_last_hour === null ? "" : `, ${short(b.burn_last_hour)}× in the last hour`;
  return [
    { name: "Requests", value: perSecond(series.rate_now), note: `${short(series.total.requests)} in this time`, extra: spark(series.requests_per_s) },
    { name: "In flight", value: whole(live.requests.length), note: `${live.waiting ? live.waiting + " waiting, " : ""}limit ${whole(live.limit)}`, extra: spark(series.in_flight, "s3") },
    { name: "First token, p50", value: seconds(ttft[0]), note: `p95 ${seconds(ttft[1])}` },
    { name: "Between tokens, p50", value: seconds(gap[0]), note: `p95 ${seconds(gap[1])}` },
    { name: "Error budget left", value: b.left === null ? "–" : percent(Math.max(0, b.left)),
      note: b.left === null ? `objective ${percent(b.objective)}` : `${whole(b.failed)} of ${short(b.requests)} failed${burn}`,
      extra: b.left === null ? null : el("div", { class: b.left > 0 ? "budget" : "budget spent" }, share(Math.max(0, b.left)).firstChild) },
    { name: "Backends", value: `${well} of ${backends.length}`, note: well === backends.length ? "all can be asked" : "some are left out",
      extra: state(well === backends.length, well === backends.length ? "healthy" : "degraded") },
  ];
}

function health({ backends, targets }) {
  if (!backends.length) return empty("No backend.", "Serve a model with ashlar serve, or name servers in the configuration file.");
  return table("Backends", [col("Backend"), col("State"), num("In flight"), num("Requests"), num("Failed"), num("First token"), num("Between tokens")],
    backends.map((b) => {
      const own = targets.filter((t) => t.backend === b.name);
      const best = (name) => own.map((t) => t[name]).filter((v) => v !== null).sort((x, y) => x - y)[0];
      return [el("span", {}, b.name, " ", el("span", { class: "quiet" }, b.kind)), el("span", {}, state(b.available, b.available ? "healthy" : "left out"),
        b.why && el("span", { class: "why" }, b.why)), whole(own.reduce((n, t) => n + t.in_flight, 0)), whole(b.requests), whole(b.errors), ms(best("ttft_ms")), ms(best("itl_ms"))];
    }));
}

function running(requests) {
  if (!requests.length) return quiet("Nothing is running.");
  const rows = requests.slice(0, 50).map((r) => [el("a", { href: "#/request/" + encodeURIComponent(r.id), class: "id", title: r.id }, clip(r.id)), r.model,
    whole(r.prompt_tokens), whole(r.tokens), ms(r.ttft_ms), ms(r.elapsed_ms)]);
  return [table("Running now", [col("Request"), col("Model"), num("Prompt"), num("Tokens"), num("First token"), num("Elapsed")], rows),
    requests.length > 50 && quiet(`${plural(requests.length - 50, "other")} not listed.`)].filter(Boolean);
}
