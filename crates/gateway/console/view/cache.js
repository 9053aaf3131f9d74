// What the prefix cache spared.

import { lines } from "../chart/lines.js";
import { get } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { clip, money, percent, perSecond, places, roughly, short, whole } from "../lib/format.js";
import { col, days, empty, figures, head, num, panel, share, table } from "../lib/part.js";

export const title = "Cache";

export function mount(main, { again }) {
  let period = 7;
  const pick = (d) => { period = d; again(); };
  const box = { figures: el("div"), rows: el("div") };
  const flow = lines({ label: "Prompt tokens a second", format: perSecond, axis: short, stacked: true,
    series: [{ name: "computed", cls: "s1" }, { name: "from cache", cls: "s3" }], empty: "No prompt in the last hour." });
  main.append(head("Cache", "Prompt tokens that a backend found in its prefix cache.", days(period, pick)), box.figures, el("div", { class: "grid" },
    el("div", { class: "span" }, panel("The last hour", flow.node)), el("div", { class: "span" }, panel("By model and backend", box.rows))));

  async function refresh(signal) {
    const [data, series, live] = await Promise.all([
      get("/ashlar/cache", { days: period }, signal), get("/ashlar/series", { minutes: 60 }, signal), get("/ashlar/live", {}, signal)]);
    const sum = (name) => data.rows.reduce((n, r) => n + r[name], 0);
    const [prompt, hits] = [sum("prompt"), sum("cache_read")];
    put(box.figures, figures([
      { name: "Hit rate", value: prompt ? percent(hits / prompt) : "–", note: "of prompt tokens" },
      { name: "Tokens from cache", value: short(hits), note: `of ${short(prompt)} in prompts` },
      { name: "Money saved" + (data.currency ? ", " + data.currency : ""), value: roughly(data.saved), note: data.saved === null ? "there is no price list" : data.unpriced_tokens ? `${short(data.unpriced_tokens)} tokens have no price for this` : "at today's prices" },
      { name: "KV blocks in use", value: live.blocks_total ? percent(live.blocks_used / live.blocks_total) : "–", note: live.blocks_total ? `${whole(live.blocks_used)} of ${whole(live.blocks_total)}` : "no engine in this process" },
    ]));
    const computed = series.prompt_tokens_per_s.map((v, i) => (v === null ? null : v - series.cached_tokens_per_s[i]));
    flow.update({ at: series.at_ms, step: series.step_ms, columns: [computed, series.cached_tokens_per_s] });
    const n = places(data.rows.map((r) => r.saved));
    put(box.rows, data.rows.length
      ? table("Cache by model and backend", [col("Model"), col("Backend"), num("Requests"), num("Prompt tokens"), num("From cache"), num("Written"), col("Hit rate"), num("Saved")],
        data.rows.map((r) => [clip(r.model, 40), r.backend, whole(r.requests), whole(r.prompt), whole(r.cache_read), whole(r.cache_write), share(r.prompt ? r.cache_read / r.prompt : 0), money(r.saved, r.saved === null ? "" : data.currency, n)]))
      : empty("No settled request in this time.", "Choose a longer period."));
  }
  return { refresh, every: 10000 };
}
