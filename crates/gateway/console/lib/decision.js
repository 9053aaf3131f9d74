// Why a request went where it went, and when each attempt was.

import { el, shape } from "./dom.js";
import { ms, short } from "./format.js";
import { col, num, quiet, table, tag, wide } from "./part.js";

/** The candidates of each stage with their scores, then the attempts. */
export function decision(route) {
  if (!route) return [quiet("The decision is no longer remembered.")];
  const answered = route.attempts?.find((a) => a.outcome === "answered");
  return [
    ...route.stages.map((s, i) => stage(s, i, route, answered)),
    route.attempts?.length ? el("div", {}, el("h3", {}, "Attempts"), attempts(route.attempts)) : quiet("Nothing was sent."),
  ];
}

function stage(s, i, route, answered) {
  const rows = s.candidates.map((c) => {
    const chosen = answered && answered.backend === c.backend && answered.model === c.model;
    return [el("span", {}, c.backend, " ", chosen && tag("answered", "good")), c.model, c.score === null ? "–" : short(c.score), c.excluded ? el("span", { class: "quiet" }, "left out: " + c.excluded) : c.detail || "–"];
  });
  return el("div", {}, el("h3", {}, i ? `Fallback to ${s.model}` : route.asked === s.model ? s.model : `${route.asked} → ${s.model}`),
    el("p", {}, tag(s.policy), s.rule && tag("rule " + s.rule), " ", s.reason),
    table("Candidates", [col("Backend"), col("Model there"), num("Score, lower is better"), wide("Why")], rows));
}

function attempts(list) {
  const end = Math.max(...list.map((a) => a.at_ms + a.took_ms), 0.001);
  return table("Attempts", [col("Backend"), col("Outcome"), num("Sent at"), num("Took"), wide("")], list.map((a) => {
    const svg = shape("svg", { class: "gantt", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
      shape("rect", { class: "part " + (a.outcome === "answered" ? "s1" : "s2"), x: (a.at_ms / end) * 100, y: 0, width: Math.max(0.6, (a.took_ms / end) * 100), height: 8 }));
    return [el("span", {}, a.backend, " ", a.hedge && tag("hedge")), a.outcome, ms(a.at_ms), ms(a.took_ms), svg];
  }));
}
