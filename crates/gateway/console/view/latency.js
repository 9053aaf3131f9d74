// Where the time goes.

import { histogram, parts } from "../chart/bars.js";
import { lines } from "../chart/lines.js";
import { get } from "../lib/api.js";
import { el, put } from "../lib/dom.js";
import { seconds, short } from "../lib/format.js";
import { empty, figures, head, minutes, panel } from "../lib/part.js";

export const title = "Latency";

export const PHASES = [
  { key: "gateway", name: "gateway queue", cls: "s4" },
  { key: "guard", name: "guard", cls: "s5" },
  { key: "upstream_queue", name: "upstream queue", cls: "s2" },
  { key: "prefill", name: "prefill", cls: "s1" },
  { key: "decode", name: "decode", cls: "s3" },
];

/** Bounds between two whole numbers hold the lower one. */
const tokens = (v) => short(Math.floor(v + 1e-9));

export function mount(main, { again }) {
  let period = 15;
  const pick = (m) => { period = m; again(); };
  const box = { figures: el("div"), split: el("div") };
  const none = "No answer in this time.";
  const split = lines({ label: "Mean time of an answer by phase", format: seconds, stacked: true, series: PHASES, height: 220, empty: none });
  const ttft = lines({ label: "Time to first token", format: seconds, series: [{ name: "p50", cls: "s1" }, { name: "p95", cls: "s2" }, { name: "p99", cls: "s4" }], empty: none });
  const gap = lines({ label: "Time between tokens", format: seconds, series: [{ name: "p50", cls: "s1" }, { name: "p95", cls: "s2" }, { name: "p99", cls: "s4" }], empty: none });
  const bars = (label, noun, format) => histogram({ label, noun, format, empty: none });
  const h = {
    ttft: bars("Time to first token", "answer", seconds), gap: bars("Time between tokens", "gap", seconds), total: bars("Time in all", "answer", seconds),
    prompt: bars("Tokens of prompts", "prompt", tokens), output: bars("Tokens of answers", "answer", tokens),
  };
  main.append(head("Latency", null, minutes(period, pick)), box.figures, el("div", { class: "grid" },
    el("div", { class: "span" }, panel("Split of an answer's time", box.split, split.node)),
    panel("Time to first token", ttft.node), panel("Time between tokens", gap.node),
    panel("First tokens", h.ttft.node), panel("Gaps between tokens", h.gap.node),
    panel("Whole answers", h.total.node), panel("Prompt lengths, tokens", h.prompt.node), panel("Answer lengths, tokens", h.output.node)));

  async function refresh(signal) {
    const s = await get("/ashlar/series", { minutes: period }, signal);
    const t = s.total;
    put(box.figures, figures([
      { name: "First token, p50", value: seconds(t.ttft_s[0]), note: `p95 ${seconds(t.ttft_s[1])}, p99 ${seconds(t.ttft_s[2])}` },
      { name: "Between tokens, p50", value: seconds(t.gap_s[0]), note: `p95 ${seconds(t.gap_s[1])}, p99 ${seconds(t.gap_s[2])}` },
      { name: "In all, p50", value: seconds(t.total_s[0]), note: `p95 ${seconds(t.total_s[1])}, p99 ${seconds(t.total_s[2])}` },
    ]));
    const measured = PHASES.some((p) => t.phases_s[p.key] !== null);
    put(box.split, measured
      ? parts("Mean time by phase", PHASES.map((p) => ({ name: p.name, cls: p.cls, value: t.phases_s[p.key], text: seconds(t.phases_s[p.key]) })))
      : empty("No answer in this time.", "Choose a longer period, or ask something."));
    const at = { at: s.at_ms, step: s.step_ms };
    split.update({ ...at, columns: PHASES.map((p) => s.phases_s[p.key]) });
    ttft.update({ ...at, columns: [s.ttft_s.p50, s.ttft_s.p95, s.ttft_s.p99] });
    gap.update({ ...at, columns: [s.gap_s.p50, s.gap_s.p95, s.gap_s.p99] });
    for (const name of Object.keys(h)) h[name].update(t[name]);
  }
  return { refresh, every: 3000 };
}
